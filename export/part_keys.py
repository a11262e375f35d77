"""The key of each part of a build: a hash of all that decides what that part holds, and of nothing else.

Weights count by their numbers, in float32: it does not matter which files they were read from, at which precision those
held them, or whether a LoRA was fused into them. Two builds that would make equal parts so give them equal keys.
"""
import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caphuman_edge import export, ref
from caphuman_edge.export.stages import ALWAYS_EXACT, CONVERTED, TRACED, Job, Options, jobs
from caphuman_edge.runtime import backends, contract
from caphuman_edge.runtime.contract import Config, GraphSpec

SELFTEST = "selftest"  # as a stage: a graph's rows of selftest.npz
CHECK = " check"  # how the stages of checks end
LIBRARIES = {  # by stage: what it computes with; of checks by format
    "reference": ("torch",), "onnx": ("torch", "onnx", "onnx-ir", "onnxscript"), "coreml": ("torch", "coremltools"),
    "openvino": ("openvino",), "ort": ("onnxruntime",), "onnx check": ("onnxruntime",),
    "ort check": ("onnxruntime",), "openvino check": ("openvino",), "coreml check": ("torch", "coremltools")}
SELECTING = ("formats", "fused", "split", "control", "tiny")  # options that say which parts there are
CONFIG_OF = {  # graphs that a part of the config decides alone, together with their weights and shapes
    "text_encoder": ("text",), "image_encoder": ("vision",), "vae_encoder": ("vae",), "vae_decoder": ("vae",),
    "tiny_decoder": (), "preview_decoder": ()}
DECODING = ("tiny_channels", "decoder_tile")  # parts of the config that decide none of the others
PREVIEW_STEP = 1 / 512  # the preview decoder is fitted anew for each build: its last bits differ, and nobody sees them


def part_keys(modules: Mapping[str, nn.Module], specs: Mapping[str, GraphSpec], config: Config,
              options: Options) -> dict[Job, str]:
    """The key, hex, of every job of `jobs(options)` and of (SELFTEST, graph) for each graph whose answers are among
    them. Reads all weights once: 5 s at full size."""
    facts, code = _GraphFacts(modules, specs, config), _code()
    keys: dict[Job, str] = {}
    for job in jobs(options):  # each comes after those that it is made from
        stage, name = job
        made_from = [keys[other] for other in made_of(job, options)]
        keys[job] = _hash(code, stage, _libraries(stage), made_from, _own(job, facts, options))
        if stage == "reference":
            keys[SELFTEST, name] = _hash(keys[job], _cases(options))
    return keys


def made_of(job: Job, options: Options) -> tuple[Job, ...]:
    """The parts that a part is made from, or that it proves; none for what is made from the reference itself."""
    stage, name = job
    if stage in TRACED:
        return ()
    if stage in CONVERTED:
        return (("onnx", options.folder_of("onnx", name)),)
    kind = stage.removesuffix(CHECK)
    return (kind, options.folder_of(kind, name)), ("reference", name)


def _own(job: Job, facts: "_GraphFacts", options: Options) -> Any:
    """What decides a part besides code, libraries and the parts that it is made from."""
    stage, name = job
    other = {field: value for field, value in dataclasses.asdict(options).items()
             if field not in (*SELECTING, "storage", "coreml")}
    if stage == "reference":
        return facts.of(name), other
    if stage == "onnx":
        graphs = {options.onnx_file(graph): facts.of(graph) for graph in options.graphs_in("onnx")
                  if options.folder_of("onnx", graph) == name}
        return graphs, "exact" if name in ALWAYS_EXACT else options.storage, other
    if stage == "coreml":
        return facts.of(name), dataclasses.asdict(options.coreml), other
    if stage in CONVERTED:
        return options.onnx_file(name)
    return name, _cases(options), platform.system(), platform.machine()  # a check is about the machine that it ran on


def _cases(options: Options) -> str:
    """Which of the reference's answers count: bundles with Core ML are tested with a text batch of one alone."""
    return "one text" if "coreml" in options.formats else "one text and two"


class _GraphFacts:
    """What decides a graph: its weights, its tensors, its sizes. Each tensor is hashed once, whoever holds it."""

    def __init__(self, modules: Mapping[str, nn.Module], specs: Mapping[str, GraphSpec], config: Config):
        self.modules, self.specs, self.config = modules, specs, config.to_json()
        self.digests: dict[Any, str] = {}

    def of(self, graph: str) -> dict[str, Any]:
        """As JSON holds it."""
        sizes = CONFIG_OF.get(graph, [name for name in self.config if name not in DECODING])
        return {"weights": self._weights(graph), "tensors": dataclasses.asdict(self.specs[graph]),
                "module": type(self.modules[graph]).__qualname__, "config": {name: self.config[name] for name in sizes}}

    def _weights(self, graph: str) -> Any:
        module = self.modules[graph]
        if graph == "preview_decoder":  # rounded, and by what it is fitted to
            return [[round(value / PREVIEW_STEP) for value in tensor.flatten().tolist()]
                    for _, tensor in _tensors(module)], self._weights("vae_decoder")
        return _hash({name: self._digest(tensor) for name, tensor in _tensors(module)})

    def _digest(self, tensor: Tensor) -> str:
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if place not in self.digests:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            content = hashlib.sha256(data.data).hexdigest()
            self.digests[place] = f"{tensor.dtype} {list(tensor.shape)} {content}"
        return self.digests[place]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that no checkpoint holds included."""
    yield from ((name, tensor.detach()) for name, tensor in module.named_parameters(remove_duplicate=False))
    yield from module.named_buffers(remove_duplicate=False)


def _hash(*decisive: Any) -> str:
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """sha256 of the sources that make, define and run graphs; taken once, since a process does not reload them."""
    digest = hashlib.sha256()
    files = [sorted(file for folder in package.__path__ for file in Path(folder).rglob("*.py"))
             for package in (export, ref, backends)]
    for path in (*(file for package in files for file in package), Path(contract.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _libraries(stage: str) -> dict[str, str | None]:
    return {name: _version(name) for name in LIBRARIES[stage]}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
