"""One side of `benchmarks.portrait` in a process of its own: prints a line of JSON for each line that it is sent.

The orchestrator has several of these wait while one works, so that all of them meet the same hours of a shared machine.
"""
import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.endurance import memory
from caphuman_edge.runtime import Bundle, Person, Pipeline, Settings
from caphuman_edge.runtime.backends import Arrays, Graph
from caphuman_edge.runtime.contract import FULL, RESIDUALS, Config, graphs
from caphuman_edge.runtime.image import load_photo

Row = dict[str, Any]
PROMPT, NEGATIVE = "a portrait, smiling, blue background", "blurry"
EACH_STEP = ("denoiser", "capface", "unet")


def main() -> None:
    """Command line: what to be, then its options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("ours", "reference", "diffusers", "graph"))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--photo", type=Path)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision")
    parser.add_argument("--memory", default="keep")
    parser.add_argument("--decoder", default="kl")
    parser.add_argument("--texts", type=int, default=1, help="1, or 2 with guidance")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--stop-after", type=int, help="steps to measure of those")
    parser.add_argument("--people", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    sides: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
        "ours": ours, "reference": reference, "diffusers": diffusers_step, "graph": graph_step}
    started = time.perf_counter()
    rows = sides[options.side](options)
    for _ in sys.stdin:
        print(json.dumps({**next(rows), "since_start_s": time.perf_counter() - started, **memory()}), flush=True)


def ours(options: argparse.Namespace) -> Iterator[Row]:
    """A portrait each time, of another photo, head and prompt, so that nothing is remembered; the first also loads."""
    clock, photo, opened = Clock(), load_photo(options.photo), time.perf_counter()
    with clock("open"):
        pipe = _Timed(Bundle.open(options.bundle), options, clock)
    for number in count():
        settings = pipe.settings(Settings(f"{PROMPT}, {number}", f"{NEGATIVE}, {number}", number, options.steps,
                                          7.0 ** (options.texts - 1), 1.0, decoder=options.decoder))
        pipe.prepare(settings, options.people)
        with clock("perceive"):
            subject = pipe.perceive(np.roll(photo, number % 16, axis=1))
        people = [Person(subject, subject.head.posed(yaw=float(number + k))) for k in range(options.people)]
        begun = time.perf_counter()
        done = [(time.perf_counter(), step) for step in islice(pipe.generate(people, settings=settings),
                                                               options.stop_after)]
        with clock("decode"):
            done[-1][1].image  # noqa: B018  # decodes
        yield {"portrait_s": time.perf_counter() - begun, "first_step_s": done[0][0] - opened, **clock.taken(),
               "step": clock.last_each(EACH_STEP)}


def reference(options: argparse.Namespace) -> Iterator[Row]:
    """The torch reference's parts in float32, of random weights: a pass is CapFace and UNet of one text."""
    import torch

    from caphuman_edge.export.graphs import example_inputs, modules
    from caphuman_edge.export.preview import fit_preview
    from caphuman_edge.ref.caphuman import CapHuman

    if options.threads:
        torch.set_num_threads(options.threads)
    model = CapHuman(FULL).eval()
    preview = fit_preview(torch.randn(4, 4, 8, 8), torch.randn(4, 3, 8, 8))
    parts, specs = modules(model, preview), graphs(FULL)
    inputs = {name: tuple(example_inputs(specs[name].inputs, seed=0, batch=1).values())
              for name in ("text_encoder", "image_encoder", "hint_encoder", "denoiser", "vae_decoder")}
    once: Row = {}
    with torch.inference_mode():
        while True:
            names = ["denoiser"] if once else list(inputs)
            for name in names:
                if name == "denoiser" and not once:
                    parts[name](*inputs[name])  # the first pass allocates
                begun = time.perf_counter()
                parts[name](*inputs[name])
                once[name] = time.perf_counter() - begun
            yield {"graphs": dict(once)}


def diffusers_step(options: argparse.Namespace) -> Iterator[Row]:
    """A peer: diffusers' UNet and ControlNet of the same sizes, one text, as its ControlNet pipeline calls them."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).to(dtype).eval()
    control = ControlNetModel(cross_attention_dim=768, attention_head_dim=8).to(dtype).eval()
    latent, text = torch.randn(1, 4, 64, 64, dtype=dtype), torch.randn(1, 77, 768, dtype=dtype)
    face, image = torch.randn(1, 258, 768, dtype=dtype), torch.rand(1, 3, 512, 512, dtype=dtype)

    def step() -> None:
        down, mid = control(latent, 501, face, image, return_dict=False)
        unet(latent, 501, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)

    with torch.inference_mode():
        step()
        while True:
            begun = time.perf_counter()
            step()
            yield {"step": [time.perf_counter() - begun]}


def graph_step(options: argparse.Namespace) -> Iterator[Row]:
    """One step of a bundle's fused denoiser on a backend."""
    bundle = Bundle.open(options.bundle)
    graph = bundle.graph("denoiser", options.backend, precision=options.precision, threads=options.threads,
                         by_shape=True)
    arrays = step_inputs(bundle.config, options.texts)
    begun = time.perf_counter()
    graph(arrays)
    first = time.perf_counter() - begun
    while True:
        begun = time.perf_counter()
        graph(arrays)
        yield {"step": [time.perf_counter() - begun], "first_s": first}


def step_inputs(config: Config, texts: int) -> Arrays:
    """Random inputs of a fused step."""
    rng, lengths = np.random.default_rng(0), {"batch": texts, "tokens": 77}
    arrays = {spec.name: rng.standard_normal([lengths.get(str(n), n) for n in spec.shape]).astype(np.float32)
              for spec in graphs(config)["denoiser"].inputs}
    arrays |= {name: np.ones_like(array) for name, array in arrays.items() if name.startswith("gate_")}
    return {**arrays, "timestep": np.array([501], np.float32), "scales": np.ones(RESIDUALS, np.float32)}


class Clock:
    """Seconds by label since they were last taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, label: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds.setdefault(label, []).append(time.perf_counter() - begun)

    def last_each(self, labels: tuple[str, ...]) -> list[float]:
        """Of each step, the sum over the calls of these graphs."""
        calls = [self.steps[label] for label in labels if label in self.steps]
        count = min(map(len, calls))  # CapFace runs once a person in each step
        return [sum(sum(each[k * (len(each) // count):(k + 1) * (len(each) // count)]) for each in calls)
                for k in range(count)]

    def taken(self) -> Row:
        """Sums by label, which start anew; single calls of each step's graphs stay for `last_each`."""
        self.steps = {label: times for label, times in self.seconds.items() if label in EACH_STEP}
        row: Row = {label: sum(times) for label, times in self.seconds.items()}
        self.seconds = {}
        return row


class _Timed(Pipeline):
    """A pipeline that times loading and calling of every graph, and the drawing of maps."""

    def __init__(self, bundle: Bundle, options: argparse.Namespace, clock: Clock):
        super().__init__(bundle, options.backend, options.threads, precision=options.precision, memory=options.memory)
        self.clock = clock

    def graph(self, name: str) -> Graph:
        loaded = name in self._graphs
        with self.clock("load" if not loaded else "held"):
            graph = super().graph(name)

        def run(arrays: Arrays) -> Arrays:
            with self.clock(name):
                return graph.run(arrays)
        return Graph(graph.name, graph.inputs, graph.outputs, run)

    def maps(self, head):  # type: ignore[no-untyped-def]
        with self.clock("maps"):
            return super().maps(head)


if __name__ == "__main__":
    main()
