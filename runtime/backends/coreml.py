"""Core ML on a Mac: its CPU, GPU and Neural Engine. Reads .mlpackage folders, or a folder of a graph's chunks.

Not run where it was written, which was no Mac: there, only loading a package's description and the plumbing of arrays
were tried.
"""
import logging
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..compiled import compiled_entry
from ..contract import GraphSpec, TensorSpec
from ..errors import BadInput, BundleError, MissingExtra
from . import Arrays, Graph, check_choice, check_threads, chosen_device

NAME = "coreml"
FORMATS = ("coreml",)
UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "npu": "CPU_AND_NE"}
# What Core ML calls a number: what it takes, and what the contract has in its place.
NUMBERS = {"FLOAT32": ("float32", "float32"), "FLOAT16": ("float16", "float32"), "INT32": ("int32", "int64")}
HALF = 10  # a tensor of halves, in Core ML's MIL.proto
STORED = ("const", "constexpr_")  # operations that only hold weights
COMPILED = "graph.mlmodelc"
CHUNKS = "*_chunk*.mlpackage"  # of one graph, in the order of their names


def devices() -> tuple[str, ...]:
    """The compute units that a graph may use; "npu" is the Neural Engine, beside which the CPU does what that cannot.

    Raises BadInput anywhere but on a Mac, MissingExtra without coremltools.
    """
    if sys.platform != "darwin":
        raise BadInput(f"backend coreml runs on macOS alone, this is {platform.system()}; choose ort or openvino")
    _tools()
    return ("all", "cpu", "gpu", "npu") if platform.machine() == "arm64" else ("all", "cpu", "gpu")


def load(
    path: Path, *, device: str | None = None, threads: int | None = None, cache_dir: Path | None = None,
    precision: str | None = None, by_shape: GraphSpec | None = None, in_halves: bool = False,
) -> Graph:
    """Load an .mlpackage folder, or a folder of CHUNKS that run in turn; compiled models are kept on disk.

    Core ML has no limit on threads, and computes in the precision that a package was built for: another `precision`
    than that is refused. The Neural Engine knows float16 alone, so what is built for f32 runs on CPU and GPU. Integers
    are 64 bits for the caller and 32 for Core ML. Raises BundleError for a folder that it cannot load, BadInput for
    settings that it does not have.
    """
    units = UNITS[chosen_device(NAME, device, devices())]
    check_choice(NAME, "precision", precision, ("f32", "f16"))
    check_threads(threads)
    packages = [path] if path.suffix == ".mlpackage" else sorted(path.glob(CHUNKS))
    if not packages:
        raise BundleError(f"{path} is no .mlpackage and holds no {CHUNKS}; rebuild the bundle")
    return chained(path, [_load_package(package, units, precision, cache_dir) for package in packages])


def chained(path: Path, chunks: Sequence[Graph]) -> Graph:
    """One graph of several that run in turn: each takes its inputs from all that is known so far.

    What no other chunk gives are the inputs, what no other takes the outputs. One chunk is the graph itself.
    """
    if len(chunks) == 1:
        return chunks[0]
    given = {spec.name for chunk in chunks for spec in chunk.outputs}
    taken = {spec.name: spec for chunk in chunks for spec in chunk.inputs}
    outputs = tuple(spec for chunk in chunks for spec in chunk.outputs if spec.name not in taken)

    def run(arrays: Arrays) -> Arrays:
        known = dict(arrays)
        for chunk in chunks:
            known |= chunk({spec.name: known[spec.name] for spec in chunk.inputs})
        return {spec.name: known[spec.name] for spec in outputs}

    return Graph(str(path), tuple(spec for spec in taken.values() if spec.name not in given), outputs, run)


def graph_of(path: Path, spec: Any, model: Any) -> Graph:
    """A graph from a package's description, a Model protobuf, and what predicts: a dict of arrays from a dict."""
    description = spec.description
    return Graph(str(path), tuple(_specs(description.input)), tuple(_specs(description.output)),
                 _runner(path, model, description))


def arithmetic(spec: Any) -> str:
    """f16 or f32: what the operations of a package give, however its weights are stored."""
    if spec.WhichOneof("Type") == "pipeline":  # of chunks
        return "f16" if any(arithmetic(model) == "f16" for model in spec.pipeline.models) else "f32"
    blocks = [block for function in spec.mlProgram.functions.values()
              for block in function.block_specializations.values()]
    kinds = {output.type.tensorType.dataType for block in blocks for operation in block.operations
             if not operation.type.startswith(STORED) for output in operation.outputs}
    return "f16" if HALF in kinds else "f32"


def _tools() -> ModuleType:
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of torch, which loading does not need
    try:
        import coremltools
    except ModuleNotFoundError as error:
        raise MissingExtra("coremltools", NAME, f"backend {NAME}") from error
    return coremltools


def _load_package(path: Path, units: str, precision: str | None, cache_dir: Path | None) -> Graph:
    try:
        (description,) = path.glob("Data/*/*.mlmodel")  # of a package coremltools would write its Manifest.json anew
        spec = _tools().utils.load_spec(str(description))
        model = _model(path, units, cache_dir)
    except Exception as error:  # coremltools has no errors of its own and raises the base class
        raise BundleError(f"{path} cannot be loaded ({_line(error)}); rebuild the bundle") from error
    if precision not in (None, arithmetic(spec)):
        raise BadInput(f"{path} computes in {arithmetic(spec)}, not in {precision}; leave precision out, "
                       "or build a bundle for it")
    return graph_of(path, spec, model)


def _model(path: Path, units: str, cache_dir: Path | None) -> Any:
    """The compiled package, compiled once; loaded from where it stays, as macOS keeps more about it by its place."""
    tools = _tools()
    label, unit = f"coreml-{tools.__version__}-macos-{platform.mac_ver()[0]}", tools.ComputeUnit[units]
    with compiled_entry(label, path, None, cache_dir) as folder:
        if folder is None:
            return tools.models.CompiledMLModel(tools.models.utils.compile_model(str(path)), unit)
        if not (folder / COMPILED).exists():
            tools.models.utils.compile_model(str(path), str(folder / COMPILED))
    with compiled_entry(label, path, None, cache_dir) as folder:
        return tools.models.CompiledMLModel(str((folder or path) / COMPILED), unit)


def _runner(path: Path, model: Any, description: Any) -> Callable[[Arrays], Arrays]:
    taken = {feature.name: _numbers(feature)[0] for feature in description.input}
    given = {spec.name: spec for spec in _specs(description.output)}

    def run(arrays: Arrays) -> Arrays:
        fed = {name: _cast(f"{path}: {name}", array, taken[name]) for name, array in arrays.items()}
        try:
            outputs = model.predict(fed)
            return {name: _restored(outputs[name], spec) for name, spec in given.items()}
        except (RuntimeError, KeyError) as error:
            raise BundleError(f"{path} failed to run ({_line(error)}); free memory, or rebuild the bundle") from error

    return run


def _cast(label: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """The array as Core ML takes it. Raises BadInput for an integer that does not fit."""
    cast = np.ascontiguousarray(array, dtype=dtype)
    if dtype == "int32" and not np.array_equal(cast, array):
        raise BadInput(f"{label} holds {np.abs(array).max()}, expected integers of 32 bits; mend the input")
    return cast


def _restored(value: Any, spec: TensorSpec) -> np.ndarray:
    """An output as the contract has it; Core ML gives a single number as no array at all."""
    array = np.asarray(value, dtype=spec.dtype)
    return array.reshape([int(n) for n in spec.shape]) if array.ndim == 0 else array


def _specs(features: Iterable[Any]) -> Iterator[TensorSpec]:
    """Names, shapes and dtypes, the latter as the contract has them; a flexible length gets a name of its own."""
    for feature in features:
        array = feature.type.multiArrayType
        ranges = array.shapeRange.sizeRanges or [None] * len(array.shape)
        lengths = tuple(f"{feature.name}.{axis}" if limits and limits.lowerBound != limits.upperBound else int(length)
                        for axis, (length, limits) in enumerate(zip(array.shape, ranges, strict=True)))
        yield TensorSpec(feature.name, lengths, _numbers(feature)[1])


def _numbers(feature: Any) -> tuple[str, str]:
    """What Core ML takes or gives, and the contract's dtype. Raises BundleError for numbers that no graph has."""
    array = feature.type.multiArrayType
    name = array.ArrayDataType.Name(array.dataType)
    if name not in NUMBERS:
        raise BundleError(f"{feature.name} is an array of {name}, expected {', '.join(NUMBERS)}; rebuild the bundle")
    return NUMBERS[name]


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
