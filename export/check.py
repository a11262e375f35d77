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

FLOORS_DB = {"f32": 60.0, "f16": 35.0}  # least PSNR of any output, by precision of the arithmetic


def reference_outputs(module: nn.Module, spec: GraphSpec, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What the reference gives for a graph's inputs, by output name."""
    with torch.no_grad():
        outputs = module.eval()(*(inputs[tensor.name] for tensor in spec.inputs))
    listed = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: output.numpy() for tensor, output in zip(spec.outputs, listed, strict=True)}


def check_graph(path: Path, spec: GraphSpec, module: nn.Module, backend: Backend, precision: str = "f32",
                seeds: tuple[int, ...] = (11, 12)) -> dict[str, float]:
    """PSNR in dB of every output, the worst over the seeds; with text batches of one and of two.

    Raises BundleError naming the graph and output that fall below the floor of `precision`.
    """
    graph = backend.load(path)
    worst: dict[str, float] = {}
    for batch, seed in enumerate(seeds, start=1):
        inputs = example_inputs(spec.inputs, seed, batch=min(batch, 2))
        wanted = reference_outputs(module, spec, inputs)
        got = graph({name: tensor.numpy() for name, tensor in inputs.items()})
        worst = {name: round(min(worst.get(name, math.inf), psnr_db(got[name], wanted[name])), 2) for name in wanted}
    for name, decibels in worst.items():
        if decibels < FLOORS_DB[precision]:
            raise BundleError(f"{path}: {name} differs from the reference, PSNR {decibels:.1f} dB, expected at least "
                              f"{FLOORS_DB[precision]:.0f} dB; report the checkpoint and the backend's version")
    return worst
