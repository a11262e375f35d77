"""Read a bundle's ONNX graph with its weights memory-mapped."""
from pathlib import Path

import numpy as np
import onnx_ir as ir

from caphuman_edge.runtime.errors import BundleError


def read_graph(path: Path) -> ir.Model:
    """The graph; large weights stay in their file until they are used.

    onnx_ir alone would refuse files with several hard links, which bundles that share parts (`build --like`) have.
    Raises BundleError where weights lie in another folder.
    """
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(_mapped(value.const_value, path), name=value.name)
    return model


def _mapped(tensor: ir.ExternalTensor, path: Path) -> np.ndarray:
    location = str(tensor.location)
    if Path(location).name != location:
        raise BundleError(f"{path} keeps weights in {location!r:.80}, expected a file beside it; build it again")
    return np.memmap(path.parent / location, tensor.dtype.numpy(), "r", tensor.offset or 0, tensor.shape.numpy())
