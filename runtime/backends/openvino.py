"""OpenVINO: Intel's CPUs, GPUs and NPUs, and other CPUs. Reads its own format and ONNX."""
import functools
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from ..compiled import compiled_entry
from ..contract import GraphSpec, TensorSpec
from ..errors import BundleError
from ..kernels import AMX, ISA_LIMIT
from ..manifest import check_graph
from ..pages import Range, dropping_pages, give_back, mapped_under
from . import ANY_DEVICE, FAST, Arrays, Graph, Shapes, check_choice, check_threads, chosen_device
from .openvino_attention import Attention, Kernel, kernel_here, use_attention
from .openvino_attention_block import AttentionBlock, attention_block_of
from .openvino_blocks import use_blocks
from .openvino_feed_forward import FeedForward, feed_forward_of
from .openvino_halves import halves
from .openvino_norm import GroupNorm, use_group_norm

NAME = "openvino"
FORMATS = ("openvino", "onnx")
DTYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "i64": "int64", "i32": "int32", "u8": "uint8",
          "i8": "int8", "boolean": "bool"}
PRECISIONS = {"FP32": "f32", "BF16": "bf16", "FP16": "f16"}  # as OpenVINO's devices name what they compute in
FASTEST = ("bf16", "f16", "f32")  # of what a device has units for
WITHOUT_HALVES = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")  # of ISA_LIMIT: no bfloat16
FIXED_LENGTHS = ("NPU",)  # devices that compile for definite lengths alone
REWRITTEN = 4  # another number where what is done to graphs for our kernels is another
ROUNDING = (FAST, "bf16")  # precisions that let our own kernels round, too
CPU = "CPU"
AUTO = "AUTO"  # OpenVINO's own choice among the devices
NOISE = ("Exception from ", "Check '")  # how lines of its messages begin that tell a user nothing


def devices() -> tuple[str, ...]:
    """The devices of this machine, such as "cpu", "gpu", "gpu.1", "npu", the CPU first; and "auto", "all"."""
    found = sorted(name.lower() for name in _core().available_devices)
    names = [name for full in found for name in (full.removesuffix(".0"), full)]  # of several GPUs, GPU is GPU.0
    return (*dict.fromkeys(names), *ANY_DEVICE)


def load(
    path: Path, *, device: str | None = None, threads: int | None = None, cache_dir: Path | None = None,
    precision: str | None = None, by_shape: GraphSpec | None = None, in_halves: bool = False,
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
    kernel = kernel_here(threads or _cores()) if place == CPU and precision in ROUNDING else None
    file = _File(path, place, config, cache_dir, kernel)
    try:
        spec = by_shape or (file.open_lengths() if place.startswith(FIXED_LENGTHS) else None)
        if spec:
            return _for_each_shape(file, spec, in_halves and place == CPU)
        loaded = file.compiled()
        inputs, outputs = _both_specs(loaded.model)
        return Graph(str(path), inputs, outputs, functools.partial(_called, file, loaded, outputs))
    except RuntimeError as error:
        raise BundleError(f"{path} cannot be loaded for {place} ({_line(error)}); rebuild the bundle, "
                          "or choose another device") from error


@functools.cache
def _core() -> openvino.Core:
    core = openvino.Core()
    for node in (Attention, AttentionBlock, FeedForward, GroupNorm):
        core.add_extension(node)
    return core


@functools.cache
def _cores() -> int:
    """How many OpenVINO computes on, left alone."""
    nothing = openvino.op.Parameter(openvino.Type.f32, openvino.Shape([1]))
    model = openvino.Model([openvino.opset13.result(nothing)], [nothing])
    return int(_core().compile_model(model, CPU, {"PERFORMANCE_HINT": "LATENCY"}).get_property("INFERENCE_NUM_THREADS"))


def _config(place: str, precision: str | None, threads: int | None) -> dict[str, Any]:
    """OpenVINO's properties for a device."""
    able = [PRECISIONS[name] for name in _core().get_property(place, "OPTIMIZATION_CAPABILITIES") if name in PRECISIONS]
    if place == CPU and os.environ.get(ISA_LIMIT, "").upper() in WITHOUT_HALVES:
        able = ["f32"]
    check_choice(NAME, "precision", precision, (*able, FAST))
    if precision == FAST:
        precision = next((name for name in FASTEST if name in able), None)
    check_threads(threads)
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision or "f32" in able:
        config["INFERENCE_PRECISION_HINT"] = precision or "f32"
    if config.get("INFERENCE_PRECISION_HINT") == "f32":
        config["EXECUTION_MODE_HINT"] = "ACCURACY"  # or activations are rounded where weights have 8 bits
    if threads is not None and place in (CPU, AUTO):  # the others keep no core busy
        config["INFERENCE_NUM_THREADS"] = threads
    return config


@dataclass(frozen=True)
class _Loaded:
    """A compiled model, and what its weights lie in, to be kept as long as it."""

    model: openvino.CompiledModel
    weights: object = None

    def __call__(self, known: Arrays) -> Arrays:
        """Every output by each of its names; of what is known it takes what it needs."""
        taken = [next(name for name in port.get_names() if name in known) for port in self.model.inputs]
        found = self.model({name: known[name] for name in taken})
        return {name: found[port] for port in self.model.outputs for name in port.get_names()}


@dataclass(frozen=True)
class _File:
    """A graph's file and how it is compiled.

    What was compiled is kept in a file that OpenVINO writes, under a name of its own in our folder. On a CPU it is read
    by us: then neither the graph nor its weights need be looked at, and the pages of what is rearranged can be dropped.
    """

    path: Path
    place: str
    config: dict[str, Any]
    cache_dir: Path | None
    kernel: Kernel | None  # ours, for attention; None: no kernel of ours at all

    def open_lengths(self) -> GraphSpec | None:
        """What the graph takes and gives, if some lengths in it are left open."""
        model = _core().read_model(self.path)
        return GraphSpec(self.path.name, *_both_specs(model)) if model.is_dynamic() else None

    def compiled(self, shapes: Shapes | None = None, spec: GraphSpec | None = None) -> _Loaded:
        """For these shapes, or any."""
        with self._entry(shapes) as folder:
            for kept in self._kept(folder, "*.blob"):
                with suppress(RuntimeError):  # compiled anew instead
                    return self._imported(kept)
            model, mapped = self._read(shapes, spec)
            return self._made(model, mapped, folder)

    def run_in_halves(self, arrays: Arrays, spec: GraphSpec) -> Arrays:
        """Compile for these arrays and run, half of the graph after the other: nothing stays loaded."""
        shapes = _shapes(arrays)
        with self._entry(shapes, "halves") as folder:
            if kept := self._kept(folder, "?/*.blob"):
                with suppress(RuntimeError):
                    return _in_turn([functools.partial(self._imported, blob) for blob in kept], arrays)
            model, mapped = self._read(shapes, spec)
            return _in_turn([functools.partial(self._made, half, mapped, folder and folder / str(k))
                             for k, half in enumerate(halves(model))], arrays)

    def _entry(self, shapes: Shapes | None, *more: str) -> AbstractContextManager[Path | None]:
        label = f"openvino-{openvino.get_version().split('-')[0]}-{self.place}"
        hardware = _core().get_property(self.place, "FULL_DEVICE_NAME")
        lengths = sorted((shapes or {}).items())
        decides = [hardware, os.environ.get(ISA_LIMIT), openvino.get_version(), self.config, lengths, *more]
        if self.kernel:
            decides.append([REWRITTEN, self.kernel])
        return compiled_entry(label, self.path, decides, self.cache_dir)

    def _kept(self, folder: Path | None, pattern: str) -> list[Path]:
        return sorted(folder.glob(pattern)) if folder and self.place == CPU else []

    def _read(self, shapes: Shapes | None, spec: GraphSpec | None) -> tuple[openvino.Model, set[Range]]:
        """The graph, as it should be, and where its weights are mapped, as long as it is kept."""
        before = mapped_under(self.path.parent)
        model = _core().read_model(self.path)
        if spec:
            check_graph(str(self.path), *_both_specs(model), spec)
        model.reshape(shapes or {})
        if self.kernel:
            if self.kernel.name == AMX:
                use_blocks(model, (feed_forward_of, attention_block_of), self.kernel.threads)
            use_attention(model, self.kernel)
            use_group_norm(model, self.config["INFERENCE_PRECISION_HINT"] == "bf16", self.kernel.threads)
        return model, mapped_under(self.path.parent) - before

    def _made(self, model: openvino.Model, mapped: set[Range], folder: Path | None) -> _Loaded:
        if folder:
            folder.mkdir(exist_ok=True)
        caching = {"CACHE_DIR": str(folder)} if folder else {}
        with dropping_pages(mapped):
            return _Loaded(_core().compile_model(model, self.place, {**self.config, **caching}))

    def _imported(self, kept: Path) -> _Loaded:
        """What OpenVINO's cache holds behind a header, a line of XML."""
        with kept.open("rb") as file:
            header = len(file.readline())
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)  # nobody writes to it
        with dropping_pages([(data.ctypes.data, len(data))]):
            blob = openvino.Tensor(data[header:], shared_memory=True)
            return _Loaded(_core().import_model(blob, self.place, self.config), data)


def _for_each_shape(file: _File, spec: GraphSpec, in_halves: bool) -> Graph:
    """Compiles when first called with some shapes, or told of them, for these."""
    whole: dict[tuple[object, ...], _Loaded] = {}

    def load_whole(shapes: Shapes) -> _Loaded:
        key = tuple(sorted(shapes.items()))
        if key not in whole:
            whole[key] = _compiled_for(file, shapes, spec)
        return whole[key]

    def prepare(shapes: Shapes) -> None:
        if not in_halves:
            load_whole(shapes)

    def run(arrays: Arrays) -> Arrays:
        if in_halves and not whole:
            with suppress(RuntimeError):  # held whole from now on
                return _only(spec.outputs, file.run_in_halves(arrays, spec))
        return _called(file, load_whole(_shapes(arrays)), spec.outputs, arrays)

    return Graph(str(file.path), spec.inputs, spec.outputs, run, prepare)


def _compiled_for(file: _File, shapes: Shapes, spec: GraphSpec) -> _Loaded:
    """Compile for these shapes; where OpenVINO cannot, such as int8 feature maps of one cell, for any."""
    try:
        try:
            return file.compiled(shapes, spec)
        except RuntimeError as error:
            if file.place.startswith(FIXED_LENGTHS):
                raise
            warnings.warn(f"{file.path} cannot be compiled for the shapes of this call ({_line(error)}), so it is "
                          "compiled for any, which is slower", stacklevel=2)
            return file.compiled(spec=spec)
    except RuntimeError as error:
        raise BundleError(f"{file.path} cannot be compiled for {file.place} ({_line(error)}); try another --precision, "
                          "such as f32, or another device") from error


def _called(file: _File, loaded: _Loaded, outputs: Iterable[TensorSpec], arrays: Arrays) -> Arrays:
    try:
        return _only(outputs, loaded(arrays))
    except RuntimeError as error:
        raise BundleError(f"{file.path} failed to run ({_line(error)}); free memory, or rebuild the bundle") from error


def _in_turn(parts: Iterable[Callable[[], _Loaded]], arrays: Arrays) -> Arrays:
    """All that is known when each part was loaded, called and dropped."""
    known = dict(arrays)
    for load_part in parts:
        known |= load_part()(known)
        give_back()
    return known


def _only(specs: Iterable[TensorSpec], arrays: Arrays) -> Arrays:
    return {spec.name: arrays[spec.name] for spec in specs}


def _shapes(arrays: Arrays) -> Shapes:
    return {name: array.shape for name, array in arrays.items()}


def _both_specs(
    model: openvino.Model | openvino.CompiledModel,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Of inputs and of outputs."""
    return tuple(_specs(model.inputs)), tuple(_specs(model.outputs))


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
