"""The conversion check: a written graph must compute what the reference computes.

The reference's answers are computed once (`reference_cases`) and serve every format, and the bundle's self-test.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from caphuman_edge.export.graphs import example_inputs
from caphuman_edge.runtime.backends import Backend
from caphuman_edge.runtime.contract import GATE, GraphSpec
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.selftest import FLOOR_GATES, psnr_db, told_apart

FLOOR_DB = 60.0  # least PSNR of any output in float32 arithmetic on the reference's own weights
FLOOR_HALF_DB = 35.0  # where weights were rounded to 16 bits, or arithmetic is in 16 bits
SEEDS = (11, 12)  # of the case with a text batch of one, and of that with two
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A graph's inputs of realistic range, and what the reference makes of them."""

    inputs: Arrays
    outputs: Arrays


def reference_cases(module: nn.Module, spec: GraphSpec, batches: Sequence[int] = (1, 2)) -> list[Case]:
    """A case a text batch size."""
    return [_case(module, spec, SEEDS[batch - 1], batch) for batch in batches]


def check_graph(path: Path, spec: GraphSpec, module: nn.Module, backend: Backend) -> dict[str, float]:
    """PSNR in dB of every output, the worst over text batches of one and of two; errors as `check_cases`."""
    return check_cases(str(path), backend.load(path), reference_cases(module, spec))


def check_cases(label: str, graph: Callable[[Arrays], Mapping[str, np.ndarray]], cases: Sequence[Case],
                floor: float = FLOOR_DB) -> dict[str, float]:
    """PSNR in dB of every output (of `told_apart`), the worst over the cases.

    Raises BundleError naming the graph (`label`) and the output that fall below their floor.
    """
    worst: dict[str, float] = {}
    for case in cases:
        found = told_apart(graph(case.inputs))
        worst = {name: round(min(worst.get(name, math.inf), psnr_db(found[name], wanted)), 2)
                 for name, wanted in told_apart(case.outputs).items()}
    for name, decibels in worst.items():
        least = FLOOR_GATES if name.startswith(GATE) else floor
        if decibels < least:
            raise BundleError(f"{label}: {name} differs from the reference, PSNR {decibels:.1f} dB, expected at least "
                              f"{least:.0f} dB; report the checkpoint and the backend's version")
    return worst


def save_cases(cases: Sequence[Case], path: Path) -> None:
    """Write cases to an .npz."""
    np.savez(path, **{f"{number}/{side}/{name}": array for number, case in enumerate(cases)  # type: ignore[arg-type]
                      for side, arrays in (("in", case.inputs), ("out", case.outputs))
                      for name, array in arrays.items()})


def load_cases(path: Path) -> list[Case]:
    """The cases that `save_cases` wrote."""
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    numbers = sorted({int(key.split("/")[0]) for key in arrays})
    return [Case(*({key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
                   for prefix in (f"{number}/in/", f"{number}/out/"))) for number in numbers]


def coarse_inputs(spec: GraphSpec, seed: int, batch: int = 2) -> Arrays:
    """Seeded inputs of realistic range. Floats come in steps of 1/8: halves hold them exactly."""
    return {name: ((value * 8).round() / 8 if value.is_floating_point() else value).numpy()
            for name, value in example_inputs(spec.inputs, seed, batch).items()}


def _case(module: nn.Module, spec: GraphSpec, seed: int, batch: int) -> Case:
    inputs = coarse_inputs(spec, seed, batch)
    with torch.no_grad():
        outputs = module.eval()(*(torch.from_numpy(inputs[tensor.name]) for tensor in spec.inputs))
    listed = outputs if isinstance(outputs, tuple) else (outputs,)
    return Case(inputs, {tensor.name: output.numpy() for tensor, output in zip(spec.outputs, listed, strict=True)})
