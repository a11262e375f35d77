"""Write ONNX Runtime Mobile's form of a graph: one optimised .ort file that minimal builds of the runtime load."""
from pathlib import Path

import onnxruntime

from caphuman_edge.runtime.backends.ort import ORT_ERRORS
from caphuman_edge.runtime.errors import BundleError

LARGEST = 2 << 30  # bytes; the format is a flatbuffer


def write_mobile(onnx: Path, target: Path) -> None:
    """Convert a written ONNX graph. Casts of halves are folded, so weights take four bytes each.

    Optimised as far as every processor can run it: what ONNX Runtime fuses, not how it lays blocks out on this one.
    Raises BundleError where the graph is larger than the format allows.
    """
    stored = sum(file.stat().st_size for file in onnx.parent.iterdir())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise BundleError(f"{onnx} cannot be written as .ort ({reason}); the format takes less than "
                          f"{LARGEST >> 30} GiB a graph in 32 bits, this folder holds {stored / 1e9:.1f} GB: "
                          "leave format ort out") from error
