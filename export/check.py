"""The conversion check: a written graph must compute what the reference computes."""
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from caphuman_edge.export.graphs import example_inputs
from caphuman_edge.runtime.backends import Backend
from caphuman_edge.runtime.contract import GraphSpec
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.selftest import psnr_db

FLOOR_DB = 60.0  # least PSNR of any output in float32 arithmetic
FLOOR_GATES_DB = 30.0  # gates are thresholds: one cell in a thousand may fall on the other side
SEEDS = (11, 12)


def reference_outputs(module: nn.Module, spec: GraphSpec, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What the reference gives for a graph's inputs, by output name."""
    with torch.no_grad():
        outputs = module.eval()(*(inputs[tensor.name] for tensor in spec.inputs))
    listed = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: output.numpy() for tensor, output in zip(spec.outputs, listed, strict=True)}


def check_graph(path: Path, spec: GraphSpec, module: nn.Module, backend: Backend) -> dict[str, float]:
    """PSNR in dB of every output, the worst over two seeds; with text batches of one and of two.

    Raises BundleError naming the graph and the output that fall below their floor.
    """
    graph = backend.load(path)
    worst: dict[str, float] = {}
    for batch, seed in enumerate(SEEDS, start=1):
        inputs = example_inputs(spec.inputs, seed, batch)
        wanted = reference_outputs(module, spec, inputs)
        got = graph({name: tensor.numpy() for name, tensor in inputs.items()})
        worst = {name: round(min(worst.get(name, math.inf), psnr_db(got[name], wanted[name])), 2) for name in wanted}
    for name, decibels in worst.items():
        floor = FLOOR_GATES_DB if name.startswith("gate_") else FLOOR_DB
        if decibels < floor:
            raise BundleError(f"{path}: {name} differs from the reference, PSNR {decibels:.1f} dB, expected at least "
                              f"{floor:.0f} dB; report the checkpoint and the backend's version")
    return worst
