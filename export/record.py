"""Record what the reference computes on a CUDA machine, for the tests to compare with everywhere.

    python -m caphuman_edge.export.record --out tests/golden/cuda.npz

Every graph of a tiny model whose weights follow from their names, twice: in float32, and with TF32, which PyTorch
leaves on for convolutions and which the official tool therefore computes with. Beside them stands the noise that the
device's own generator draws for two seeds, which `runtime.noise` makes in numpy.
"""
import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from caphuman_edge.export.graphs import PreviewDecoder, example_inputs, modules
from caphuman_edge.export.random_weights import random_weight
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.runtime.cli import guarded
from caphuman_edge.runtime.contract import TINY, VisionConfig, graphs
from caphuman_edge.runtime.errors import BadInput

CONFIG = replace(TINY, vision=VisionConfig(width=64, layers=2, heads=4, image_size=56, patch_size=14))
WEIGHTS_SEED, INPUTS_SEED = 3, 4
NOISE_SEEDS, NOISE_SHAPE = (1, 12345), (1, 4, 64, 64)
PRECISIONS = {"f32": False, "tf32": True}  # by name: whether TF32 is allowed


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="an .npz")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("no CUDA device is here; run this where torch sees one, or try it with --device cpu")
    np.savez_compressed(options.out, **record(torch.device(options.device)))
    return 0


def record(device: torch.device) -> dict[str, Any]:
    """Arrays by `PRECISION/graph/output` and `noise/SEED`, and as `about` what they were made with, in JSON."""
    arrays: dict[str, Any] = {}
    for precision, allowed in PRECISIONS.items():
        with tf32(allowed):
            arrays |= {f"{precision}/{name}": values for name, values in answers(device).items()}
    for seed in NOISE_SEEDS:
        generator = torch.Generator(device).manual_seed(seed)
        arrays[f"noise/{seed}"] = torch.randn(NOISE_SHAPE, generator=generator, device=device).cpu().numpy()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return arrays | {"about": json.dumps({"device": name, "torch": torch.__version__, "cuda": torch.version.cuda})}


@torch.no_grad()
def answers(device: torch.device) -> dict[str, np.ndarray]:
    """`graph/output` of every graph of the contract, on inputs that follow from a seed."""
    specs = graphs(CONFIG)
    found: dict[str, np.ndarray] = {}
    for name, module in parts().items():
        inputs = example_inputs(specs[name].inputs, INPUTS_SEED)
        outputs = module.to(device)(*(tensor.to(device) for tensor in inputs.values()))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found |= {f"{name}/{spec.name}": output.cpu().numpy()
                  for spec, output in zip(specs[name].outputs, outputs, strict=True)}
    return found


def parts() -> dict[str, nn.Module]:
    """The tiny model's graphs."""
    model = CapHuman(CONFIG)
    model.load_state_dict({name: torch.from_numpy(random_weight(name, tensor.shape, WEIGHTS_SEED))
                           if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()})
    return modules(model.eval(), PreviewDecoder(torch.ones(3, 4, 1, 1), torch.zeros(3)))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 in convolutions and matrix products, or in neither; afterwards as it was."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


if __name__ == "__main__":
    sys.exit(guarded(main))
