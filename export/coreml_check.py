"""The conversion check of Core ML packages: by the MIL evaluator anywhere, on a Mac also by Core ML itself."""
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from caphuman_edge.export.check import Case, check_cases, reference_cases
from caphuman_edge.export.coreml_graphs import fixed
from caphuman_edge.export.coreml_writer import chunk_paths, coremltools, packages
from caphuman_edge.export.mil import load_program
from caphuman_edge.runtime.backends import Arrays, Graph
from caphuman_edge.runtime.contract import GraphSpec, TensorSpec
from caphuman_edge.runtime.errors import BundleError, ShapeMismatch

# Least PSNR by what `write_coreml` returned. Palettised weights carry noise of their own, 44, 32 and 20 dB below
# themselves at 8, 6 and 4 bits. What that does to outputs was measured: the worst of any graph's, over the trained
# miniature and random networks of full depth, were 40.8, 32.1 and 18.8 dB, six to seven above these floors.
FLOORS_DB = {"f32": 60.0, "f16": 35.0, "palettised-8": 35.0, "palettised-6": 25.0, "palettised-4": 12.0}
DTYPES = {65568: "float32", 131104: "int32"}  # Core ML's ArrayFeatureType.ArrayDataType

Load = Callable[[Path], Graph]


def check_coreml(path: Path, spec: GraphSpec, module: nn.Module, floor: float) -> dict[str, float]:
    """PSNR in dB of every output against the reference, at batch 1; errors as `check_packages`."""
    return check_packages(path, spec, reference_cases(module, spec, batches=(1,)), floor)


def check_packages(path: Path, spec: GraphSpec, cases: Sequence[Case], floor: float) -> dict[str, float]:
    """PSNR in dB of every output, the worst over the cases, which are of batch 1.

    On a Mac Core ML runs the graph, too, on units of its own choice, and the worse figure counts. `floor` is that of
    FLOORS_DB for what `write_coreml` returned; gates have a floor of their own, as in every check.
    Raises BundleError naming the package and the output that fall below, ShapeMismatch where names, shapes or dtypes
    are not the contract's.
    """
    runs: list[Load] = [evaluated, *([_native] if sys.platform == "darwin" else [])]
    figures = [check_cases(str(path), run_chain(path, spec, load), cases, floor) for load in runs]
    return {name: min(figure[name] for figure in figures) for name in figures[0]}


def run_chain(path: Path, spec: GraphSpec, load: Load) -> Callable[[Mapping[str, np.ndarray]], Arrays]:
    """The graph at `path` as one callable, in one package or in chunks that run as a host runs them.

    Each package takes its inputs from all that is known so far, and adds its outputs. It is loaded when its turn comes
    and then dropped: the halves of a large network need not fit into memory together.
    """
    spec, found = fixed(spec), packages(path)
    if found not in ([path], chunk_paths(path)):
        raise BundleError(f"{path} is missing or lacks a chunk, found {[one.name for one in found]}; write it again")

    def run(arrays: Mapping[str, np.ndarray]) -> Arrays:
        known = {tensor.name: _for_coreml(arrays[tensor.name]) for tensor in spec.inputs}
        for package in found:
            graph = load(package)
            _check_known(package, graph.inputs, known)
            known |= graph({tensor.name: known[tensor.name] for tensor in graph.inputs})
        return {tensor.name: _checked(path, tensor, known) for tensor in spec.outputs}

    return run


def evaluated(package: Path) -> Graph:
    """One package as the MIL evaluator runs it."""
    program = load_program(package)
    return Graph(str(package), program.inputs, program.outputs, program)


def _native(package: Path) -> Graph:
    ct = coremltools()
    model = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit.ALL)
    description = model.get_spec().description
    return Graph(str(package), _tensors(description.input), _tensors(description.output), model.predict)


def _tensors(features: Iterable[Any]) -> tuple[TensorSpec, ...]:
    arrays = [(feature.name, feature.type.multiArrayType) for feature in features]
    return tuple(TensorSpec(name, tuple(array.shape), DTYPES[array.dataType]) for name, array in arrays)


def _check_known(package: Path, inputs: tuple[TensorSpec, ...], known: Arrays) -> None:
    missing = sorted({tensor.name for tensor in inputs} - known.keys())
    if missing:
        raise ShapeMismatch(f"{package} takes {', '.join(missing)}, which nothing gives; write it again")


def _checked(path: Path, tensor: TensorSpec, known: Arrays) -> np.ndarray:
    shape = known[tensor.name].shape if tensor.name in known else "absent"
    if shape != tensor.shape:
        raise ShapeMismatch(f"{path}: {tensor.name} is {shape}, expected {tensor.shape}; write it again")
    return known[tensor.name]


def _for_coreml(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32) if array.dtype == np.int64 else array
