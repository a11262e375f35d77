"""ONNX Runtime on the CPU: the backend of the base installation."""
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from ..contract import GraphSpec, TensorSpec
from ..errors import BundleError
from . import Arrays, Graph, check_choice, check_threads, chosen_device

NAME = "ort"
FORMATS = ("onnx", "ort")
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64",
          "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(uint8)": "uint8", "tensor(int8)": "int8",
          "tensor(bool)": "bool"}
WARNINGS_OFF = 3  # onnxruntime's log level: errors only
# ONNX Runtime's exceptions have no base class of their own.
ORT_ERRORS = tuple(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception))


def devices() -> tuple[str, ...]:
    """The CPU."""
    return ("cpu",)


def load(
    path: Path, *, device: str | None = None, threads: int | None = None, cache_dir: Path | None = None,
    precision: str | None = None, by_shape: GraphSpec | None = None, in_halves: bool = False,
) -> Graph:
    """Load an .onnx file and what it keeps in external data files beside it, or an .ort file.

    `cache_dir` is not used: ONNX Runtime compiles in memory. It computes in the precision that the graph is stored in,
    so `precision` may be None or f32. Raises BundleError for a file that it cannot load, BadInput for other settings.
    """
    chosen_device(NAME, device, devices())
    check_choice(NAME, "precision", precision, ("f32",))
    check_threads(threads)
    try:
        session = onnxruntime.InferenceSession(str(path), _options(threads), providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise BundleError(f"{path} cannot be loaded ({_line(error)}); rebuild the bundle") from error
    return Graph(str(path), _specs(session.get_inputs()), _specs(session.get_outputs()), _runner(path, session))


def _options(threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = WARNINGS_OFF
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # between calls numpy and GL need the cores on which workers would wait for work
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
        # Who limits threads shares the machine: waiting threads sleep instead of burning their core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _runner(path: Path, session: onnxruntime.InferenceSession) -> Callable[[Arrays], Arrays]:
    names = [output.name for output in session.get_outputs()]

    def run(arrays: Arrays) -> Arrays:
        try:
            return dict(zip(names, session.run(names, arrays), strict=True))
        except ORT_ERRORS as error:
            raise BundleError(f"{path} failed to run ({_line(error)}); free memory, or rebuild the bundle") from error

    return run


def _specs(arguments: Sequence[onnxruntime.NodeArg]) -> tuple[TensorSpec, ...]:
    """Names, shapes and dtypes as the file declares them; a nameless unknown length gets a name of its own."""
    return tuple(TensorSpec(
        argument.name,
        tuple(f"{argument.name}.{axis}" if n is None else n for axis, n in enumerate(argument.shape)),
        DTYPES.get(argument.type, argument.type),
    ) for argument in arguments)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
