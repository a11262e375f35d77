"""Write OpenVINO's form of a graph: an .xml and a .bin beside it, with the contract's names."""
from pathlib import Path

import openvino

from caphuman_edge.export.openvino_layout import arrange
from caphuman_edge.runtime.errors import BundleError


def write_openvino(onnx: Path, target: Path) -> None:
    """Convert a written ONNX graph, rearranged for OpenVINO; halves stay halves, and its weights are memory-mapped.

    Raises BundleError where OpenVINO does not understand the graph.
    """
    try:
        model = openvino.Core().read_model(onnx)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise BundleError(f"{onnx} cannot be converted to OpenVINO ({reason}); report OpenVINO's version") from error
    arrange(model)
    openvino.save_model(model, target, compress_to_fp16=False)  # the weights were rounded when ONNX was written, if so
