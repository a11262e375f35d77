"""How fast a posed head becomes its condition maps: the GL and numpy renderers beside the torch reference.

    python -m benchmarks.maps [--size 512] [--runs 15] [--scale 1.0] [--json]

The open head turns from frame to frame as under a slider. All paths draw the same frames in turns, so that they meet
the same machine; every figure is the median over the runs. Needs the gl and export extras.
"""
import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from caphuman_edge.ref import rasterizer
from caphuman_edge.ref.flame import FLAME
from caphuman_edge.runtime.condition import condition_maps
from caphuman_edge.runtime.head import HeadCode, HeadModel, load_head, project
from caphuman_edge.runtime.render import GlRenderer, Mesh, NumpyRenderer
from caphuman_edge.runtime.render.gl import MapPass, covered_box, open_pass, pack_corners

YAWS = np.linspace(-60, 60, 13)  # degrees
WARM_UP = 2
Maps = np.ndarray  # (9, size, size)
Times = dict[str, float]  # milliseconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="frame height and width, px")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--scale", type=float, default=1.0, help="of the head; at 1 it fills two thirds of the frame")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measure(options.size, options.runs, options.scale)
    print(json.dumps(report, indent=1) if options.json else as_text(report))


def measure(size: int, runs: int, scale: float) -> dict:
    """Stage times of the GL path, times of whole frames by path, and how far apart the paths' maps are."""
    model = load_head()
    neutral = HeadCode.neutral(model.layout).moved(scale=scale)
    codes = [neutral.posed(yaw=float(yaw)) for yaw in YAWS]
    renderer, surface = GlRenderer(), open_pass()
    paths = {"GL": lambda code: condition_maps(renderer, model, code, size, size),
             "numpy": lambda code: condition_maps(NumpyRenderer(), model, code, size, size),
             "torch reference": torch_path(model, size)}
    frames = interleaved(paths, codes, runs)
    stages = [stage_times(surface, model, codes[run % len(codes)], size) for run in range(WARM_UP + runs)][WARM_UP:]
    report = {"size": size, "runs": runs, "device": renderer.device, "cpu": platform.processor() or platform.machine(),
              "torch_threads": torch.get_num_threads(), "vertices": len(model.template), "faces": len(model.faces),
              "stages_ms": {name: statistics.median(stage[name] for stage in stages) for name in stages[0]},
              "frames_ms": {name: statistics.median(times) for name, times in frames.items()},
              "apart": differences({name: draw(codes[3]) for name, draw in paths.items()})}
    renderer.close()
    return report


def interleaved(paths: dict[str, Callable[[HeadCode], Maps]], codes: list[HeadCode], runs: int) -> dict[str, list]:
    """Milliseconds of whole frames by path; in each run every path draws the same head."""
    times: dict[str, list] = defaultdict(list)
    for run in range(WARM_UP + runs):
        for name, draw in paths.items():
            took: Times = {}
            with stopwatch(took, name):
                draw(codes[run % len(codes)])
            times[name].append(took[name])
    return {name: values[WARM_UP:] for name, values in times.items()}


def stage_times(surface: MapPass, model: HeadModel, code: HeadCode, size: int) -> Times:
    """Milliseconds of each stage of one GL frame, each finished before the next begins."""
    times: Times = {}
    with stopwatch(times, "shape + LBS"):
        vertices = model.vertices(code)
    with stopwatch(times, "normals"):
        normals = model.normals(vertices)
    with stopwatch(times, "texture (kept from the frame before)"):
        texture = model.texture(code)
    with stopwatch(times, "project + pack"):
        mesh = Mesh(project(vertices, code), normals, model.faces, model.face_uv, texture, code.light)
        corners = pack_corners(mesh)
        box = covered_box(corners, size, size)
    with stopwatch(times, "upload + draw"):
        surface.upload(mesh, corners)
        surface.paint(len(corners), box, (size, size))
        surface.context.finish()
    with stopwatch(times, "read-back"):
        maps = np.zeros((9, size, size), np.float32)
        surface.read(box, maps)
    return times


def torch_path(model: HeadModel, size: int) -> Callable[[HeadCode], Maps]:
    """The reference on the same head, from a code to the maps."""
    flame, faces, face_uv = reference_head(model), torch.tensor(model.faces).long(), torch.tensor(model.face_uv)
    mean, basis = torch.tensor(model.texture_mean), torch.tensor(model.texture_basis)

    @torch.inference_mode()
    def draw(code: HeadCode) -> Maps:
        identity, expression, pose, camera, light = map(batch_of_one, (code.identity, code.expression, code.pose,
                                                                       code.camera, code.light))
        vertices = flame.vertices(identity, expression, flame.rotations(pose))
        albedo = mean + torch.tensordot(torch.tensor(code.texture), basis, dims=1)
        maps = rasterizer.render(vertices, rasterizer.project(vertices, camera), faces, face_uv,
                                 albedo.permute(2, 0, 1)[None], light, (size, size))
        return maps.hint[0].numpy()

    return draw


def reference_head(model: HeadModel) -> FLAME:
    """The runtime's head as the reference's module; its landmarks are not asked for, so they are one corner."""
    first = {f"{kind}_lmk_{part}": np.zeros(shape + (3,) * (part == "bary_coords"), dtype)
             for kind, shape in (("static", (51,)), ("dynamic", (79, 17)), ("full", (1, 68)))
             for part, dtype in (("faces_idx", np.int64), ("bary_coords", np.float32))}
    split, end = model.identity_basis.shape[2], model.identity_basis.shape[2] + model.expression_basis.shape[2]
    return FLAME({"v_template": model.template, "f": model.faces, "J_regressor": model.joint_regressor,
                  "shapedirs": np.concatenate([model.identity_basis, model.expression_basis], axis=2),
                  "posedirs": np.zeros((*model.template.shape, 36), np.float32), "weights": model.weights,
                  "kintree_table": model.parents[None], **first}, (slice(split), slice(split, end)))


def batch_of_one(array: np.ndarray) -> Tensor:
    return torch.tensor(array)[None]


def differences(maps: dict[str, Maps]) -> dict[str, dict[str, float]]:
    """Coverage (% of the frame) and decibels inside both outlines, of each path against the torch reference."""
    expected = maps.pop("torch reference")
    covered = {name: drawn.any(axis=0) for name, drawn in maps.items()}
    both = {name: seen & expected.any(axis=0) for name, seen in covered.items()}
    return {name: {"coverage_percent": float((covered[name] != expected.any(axis=0)).mean() * 100),
                   "psnr_db": float(-10 * np.log10(((drawn - expected)[:, both[name]] ** 2).mean()))}
            for name, drawn in maps.items()}


def as_text(report: dict) -> str:
    """What was measured on, and two Markdown tables."""
    stages, frames = report["stages_ms"], report["frames_ms"]
    head = (f"{report['device']}; {report['cpu']}, torch on {report['torch_threads']} threads; the open head "
            f"({report['vertices']:,} vertices, {report['faces']:,} faces), {report['size']} px, "
            f"median of {report['runs']} frames.")
    rows = [f"| {name} | {1000 / time_:.1f} | {time_:.1f} | {frames['torch reference'] / time_:.1f} x | "
            + " | ".join(f"{value:.4g}" for value in report["apart"].get(name, {}).values() or (0, float("inf"))) + " |"
            for name, time_ in frames.items()]
    return "\n".join([head, "", "| stage of a GL frame | ms |", "|---|---|",
                      *(f"| {name} | {value:.2f} |" for name, value in stages.items()),
                      f"| sum | {sum(stages.values()):.2f} |", "",
                      "| head code to maps | maps a second | ms | of the reference's speed | coverage apart, % | dB |",
                      "|---|---|---|---|---|---|", *rows])


@contextmanager
def stopwatch(times: Times, name: str) -> Iterator[None]:
    """Note how many milliseconds the block takes."""
    start = time.perf_counter()
    yield
    times[name] = (time.perf_counter() - start) * 1000


if __name__ == "__main__":
    main()
