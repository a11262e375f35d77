"""OpenVINO: Intel's CPUs, GPUs and NPUs, and other CPUs. Reads its own format and ONNX."""
import functools
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from ..compiled import compiled_entry
from ..contract import TensorSpec
from ..errors import BundleError
from ..pages import dropping_pages, mapped_under
from . import ANY_DEVICE, FAST, Arrays, Graph, check_choice, check_threads, chosen_device

NAME = "openvino"
FORMATS = ("openvino", "onnx")
DTYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "i64": "int64", "i32": "int32", "u8": "uint8",
          "i8": "int8", "boolean": "bool"}
PRECISIONS = {"FP32": "f32", "BF16": "bf16", "FP16": "f16"}  # as OpenVINO's devices name what they compute in
FASTEST = ("bf16", "f16", "f32")  # of what a device has units for
ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"  # variable by which users hold back the CPU's newest instructions
FIXED_LENGTHS = ("NPU",)  # devices that compile for definite lengths alone
AUTO = "AUTO"  # OpenVINO's own choice among the devices
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of a call's arrays, by name
NOISE = ("Exception from ", "Check '")  # how lines of its messages begin that tell a user nothing


def devices() -> tuple[str, ...]:
    """The devices of this machine, such as "cpu", "gpu", "gpu.1", "npu", the CPU first; and "auto", "all"."""
    found = sorted(name.lower() for name in _core().available_devices)
    names = [name for full in found for name in (full.removesuffix(".0"), full)]  # of several GPUs, GPU is GPU.0
    return (*dict.fromkeys(names), *ANY_DEVICE)


def load(
    path: Path, *, device: str | None = None, threads: int | None = None, cache_dir: Path | None = None,
    precision: str | None = None, by_shape: bool = False,
) -> Graph:
    """Load an .xml file with its .bin, or an .onnx file with its external data; compiled models are kept on disk.

    `precision` None is f32, as ONNX Runtime computes, where the device can: left alone, OpenVINO takes bfloat16 on
    processors with AMX, float16 on GPUs, and rounds activations to 8 bits where weights have 8. An NPU knows float16
    alone. "fast" is the first of FASTEST that the device has. Raises BundleError for a file that it cannot load,
    BadInput for settings that this machine does not have.
    """
    if not path.is_file():
        raise BundleError(f"{path} is missing; rebuild the bundle")
    chosen = chosen_device(NAME, device, devices())
    place = AUTO if chosen in ANY_DEVICE else chosen.upper()
    config = _config(place, precision, threads)
    try:
        model = _core().read_model(path) if by_shape or place.startswith(FIXED_LENGTHS) else None
        if model and model.is_dynamic():
            return _graph(path, model, _for_each_shape(path, place, config, cache_dir))
        compiled, weights = _compiled(path, place, config, cache_dir)
        return _graph(path, compiled, _runner(path, compiled, weights))
    except RuntimeError as error:
        raise BundleError(f"{path} cannot be loaded for {place} ({_line(error)}); rebuild the bundle, "
                          "or choose another device") from error


@functools.cache
def _core() -> openvino.Core:
    return openvino.Core()


def _config(place: str, precision: str | None, threads: int | None) -> dict[str, Any]:
    """OpenVINO's properties for a device."""
    able = [PRECISIONS[name] for name in _core().get_property(place, "OPTIMIZATION_CAPABILITIES") if name in PRECISIONS]
    check_choice(NAME, "precision", precision, (*able, FAST))
    if precision == FAST:
        precision = next((name for name in FASTEST if name in able), None)
    check_threads(threads)
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision or "f32" in able:
        config["INFERENCE_PRECISION_HINT"] = precision or "f32"
    if config.get("INFERENCE_PRECISION_HINT") == "f32":
        config["EXECUTION_MODE_HINT"] = "ACCURACY"  # or activations are rounded where weights have 8 bits
    if threads is not None and place in ("CPU", AUTO):  # the others keep no core busy
        config["INFERENCE_NUM_THREADS"] = threads
    return config


def _compiled(path: Path, place: str, config: dict[str, Any], cache_dir: Path | None,
              shapes: Shapes = ()) -> tuple[openvino.CompiledModel, object]:
    """Compile a graph, for these shapes if any, or take it from the cache; also what its weights lie in, to be kept.

    OpenVINO writes the cache's file, under a name of its own in our folder. On a CPU it is read by us: then neither the
    graph nor its weights need be looked at, and the pages of what is rearranged can be dropped.
    """
    label = f"openvino-{openvino.get_version().split('-')[0]}-{place}"
    hardware = _core().get_property(place, "FULL_DEVICE_NAME")
    decides = [hardware, os.environ.get(ISA_LIMIT), openvino.get_version(), config, shapes]
    with compiled_entry(label, path, decides, cache_dir) as folder:
        for kept in folder.glob("*.blob") if folder and place == "CPU" else ():
            with suppress(RuntimeError):  # compiled anew instead
                return _imported(kept, place, config)
        before = mapped_under(path.parent)
        model = _core().read_model(path)
        model.reshape(dict(shapes))
        caching = {} if folder is None else {"CACHE_DIR": str(folder)}
        with dropping_pages(mapped_under(path.parent) - before):  # which `model` keeps mapped
            return _core().compile_model(model, place, {**config, **caching}), None


def _imported(kept: Path, place: str, config: dict[str, Any]) -> tuple[openvino.CompiledModel, object]:
    """What OpenVINO's cache holds behind a header, a line of XML, and the mapping that it reads from."""
    with kept.open("rb") as file:
        header = len(file.readline())
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)  # nobody writes to it
    with dropping_pages([(data.ctypes.data, len(data))]):
        return _core().import_model(openvino.Tensor(data[header:], shared_memory=True), place, config), data


def _graph(path: Path, model: openvino.Model | openvino.CompiledModel, run: Callable[[Arrays], Arrays]) -> Graph:
    return Graph(str(path), tuple(_specs(model.inputs)), tuple(_specs(model.outputs)), run)


def _runner(path: Path, compiled: openvino.CompiledModel, weights: object) -> Callable[[Arrays], Arrays]:
    """Calls the model; `weights` are kept as long as it."""
    names = [_name(port) for port in compiled.outputs]

    def run(arrays: Arrays, _: object = weights) -> Arrays:
        try:
            return dict(zip(names, compiled(arrays).values(), strict=True))
        except RuntimeError as error:
            raise BundleError(f"{path} failed to run ({_line(error)}); free memory, or rebuild the bundle") from error

    return run


def _for_each_shape(path: Path, place: str, config: dict[str, Any],
                    cache_dir: Path | None) -> Callable[[Arrays], Arrays]:
    """Compiles when first called with some shapes, for these."""
    runners: dict[Shapes, Callable[[Arrays], Arrays]] = {}

    def run(arrays: Arrays) -> Arrays:
        shapes = tuple(sorted((name, array.shape) for name, array in arrays.items()))
        if shapes not in runners:
            runners[shapes] = _runner(path, *_compiled_for(shapes, path, place, config, cache_dir))
        return runners[shapes](arrays)

    return run


def _compiled_for(shapes: Shapes, path: Path, place: str, config: dict[str, Any],
                  cache_dir: Path | None) -> tuple[openvino.CompiledModel, object]:
    """Compile for these shapes; where OpenVINO cannot, such as int8 feature maps of one cell, for any."""
    try:
        try:
            return _compiled(path, place, config, cache_dir, shapes)
        except RuntimeError as error:
            if place.startswith(FIXED_LENGTHS):
                raise
            warnings.warn(f"{path} cannot be compiled for the shapes of this call ({_line(error)}), so it is compiled "
                          "for any, which is slower", stacklevel=2)
            return _compiled(path, place, config, cache_dir)
    except RuntimeError as error:
        raise BundleError(f"{path} cannot be compiled for {place} ({_line(error)}); try another --precision, such as "
                          "f32, or another device") from error


def _specs(ports: Iterable[Any]) -> Iterator[TensorSpec]:
    """Names, shapes and dtypes; an unknown length, which has no name here, gets one of its own."""
    for port in ports:
        name, kind = _name(port), port.get_element_type().get_type_name()
        lengths = tuple(f"{name}.{axis}" if n.is_dynamic else n.get_length() for axis, n in
                        enumerate(port.get_partial_shape()))
        yield TensorSpec(name, lengths, DTYPES.get(kind, kind))


def _name(port: Any) -> str:
    """The tensor's name in the file: where OpenVINO merged several tensors, that of the node, not of what it eats."""
    node = port.get_node().get_friendly_name().split("/sink_port_")[0]
    return node if node in port.get_names() else port.get_any_name()


def _line(error: Exception) -> str:
    """What OpenVINO says, without where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(NOISE)]
    return (" ".join(lines) or type(error).__name__)[:300]
