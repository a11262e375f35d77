"""The MIL evaluator: executes the program of a saved .mlpackage with torch, on any machine.

Core ML runs on Apple's systems only. What a package computes is checked here from what lies on disk: the protobuf
program and the weight files, compressed weights included. Every value is rounded to the type that the program declares
for it; ops compute float16 in float32, as the Neural Engine accumulates wider than it stores. Of control flow, states,
recurrent and random ops it knows nothing: they are errors.
"""
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from caphuman_edge.export import (
    mil_ops_constexpr,
    mil_ops_elementwise,
    mil_ops_image,
    mil_ops_linear,
    mil_ops_reduction,
    mil_ops_shape,
    mil_ops_tensor,
)
from caphuman_edge.export.mil_ops import Op, Value
from caphuman_edge.export.mil_program import Argument, Function, Step, read_function
from caphuman_edge.export.mil_weights import Constant, TensorType
from caphuman_edge.runtime.contract import TensorSpec
from caphuman_edge.runtime.errors import BundleError, ShapeMismatch

OPS: dict[str, Op] = {
    **mil_ops_constexpr.OPS, **mil_ops_elementwise.OPS, **mil_ops_image.OPS, **mil_ops_linear.OPS,
    **mil_ops_reduction.OPS, **mil_ops_shape.OPS, **mil_ops_tensor.OPS,
}


def load_program(path: Path) -> "MilProgram":
    """Read and check a saved .mlpackage; nothing is executed and no weight is read yet.

    Raises BundleError for a package that is damaged, truncated, foreign, or uses an op that is not known here.
    """
    return MilProgram(path, read_function(path))


class MilProgram:
    """A package's main function: call it with arrays by input name, it gives arrays by output name."""

    def __init__(self, path: Path, function: Function):
        self.path, self.function = path, function
        self.inputs = _specs(function.inputs)
        self.outputs = _specs(function.outputs)
        for step in function.steps:
            _check_step(path, step)
        # Compressed constants are expanded where they are used, and not kept.
        self.lazy = {name: step for step in function.steps if step.op.startswith("constexpr_") for name in step.outputs}
        self.steps = [step for step in function.steps if not step.op.startswith("constexpr_")]
        last_use = {name: k for k, step in enumerate(self.steps) for name in (*step.names(), *step.outputs)}
        self.unused_after: list[list[str]] = [[] for _ in self.steps]
        for name, k in last_use.items():
            if name not in function.outputs:
                self.unused_after[k].append(name)

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Execute the program op by op. Raises ShapeMismatch for other inputs than `inputs`."""
        if arrays.keys() != self.function.inputs.keys():
            raise ShapeMismatch(f"{self.path} takes {list(self.function.inputs)}, got {list(arrays)}; pass every input")
        values = {name: _input(self.path, name, array, self.function.inputs[name]) for name, array in arrays.items()}
        with torch.no_grad():
            for step, unused in zip(self.steps, self.unused_after, strict=True):
                values.update(self._run(step, values))
                for name in unused:
                    values.pop(name, None)
            outputs = {name: self._value(name, values) for name in self.function.outputs}
        return {name: _output(outputs[name], tensor) for name, tensor in self.function.outputs.items()}

    def _run(self, step: Step, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One op's outputs, rounded to their declared types."""
        op, first = OPS[step.op], next(iter(step.outputs))
        arguments = {name: self._argument(argument, values, not op.moves_data)
                     for name, argument in step.arguments.items()}
        try:
            result = op(arguments)
        except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            reason = str(error).partition("\n")[0]
            raise BundleError(f"{self.path}: {step.op} {first!r} cannot be evaluated ({reason}); export the model "
                              f"again, or report the package") from error
        parts = result if isinstance(result, tuple) else (result,)
        if len(parts) != len(step.outputs):
            raise BundleError(f"{self.path}: {step.op} {first!r} gives {len(parts)} values, the program declares "
                              f"{len(step.outputs)}; export the model again")
        return {name: self._rounded(part, tensor, step, name)
                for part, (name, tensor) in zip(parts, step.outputs.items(), strict=True)}

    def _rounded(self, value: Tensor, tensor: TensorType, step: Step, name: str) -> Tensor:
        if not _fits(tuple(value.shape), tensor.shape):
            raise BundleError(f"{self.path}: {step.op} {name!r} has shape {list(value.shape)}, the program declares "
                              f"{list(tensor.shape)}; export the model again, or report the package")
        return value.to(tensor.element.held)

    def _argument(self, argument: Argument, values: Mapping[str, Tensor], widen: bool) -> Value:
        if isinstance(argument, list):
            return [self._tensor(part, values, widen) for part in argument]
        return self._tensor(argument, values, widen)

    def _tensor(self, argument: str | Constant, values: Mapping[str, Tensor], widen: bool) -> Tensor | str:
        value = argument.read() if isinstance(argument, Constant) else self._value(argument, values)
        return value.float() if widen and isinstance(value, Tensor) and value.dtype is torch.float16 else value

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A computed value, a constant, or a compressed constant."""
        if name in values:
            return values[name]
        if name in self.lazy:
            return self._run(self.lazy[name], values)[name]
        return self.function.constants[name].read()  # type: ignore[return-value]


def _check_step(path: Path, step: Step) -> None:
    """The op is known, and takes these parameters."""
    first = next(iter(step.outputs), None)
    if step.op not in OPS or first is None:
        raise BundleError(f"{path}: op {step.op!r} ({first}) is not known to the evaluator; leave it out of the model, "
                          f"or report the coremltools version")
    op, given = OPS[step.op], step.arguments.keys()
    if not op.required <= given or not given <= op.converters.keys():
        raise BundleError(f"{path}: {step.op} {first!r} has parameters {sorted(given)}, expected {sorted(op.required)} "
                          f"and any of {sorted(op.converters.keys() - op.required)}; report the coremltools version")


def _specs(tensors: Mapping[str, TensorType]) -> tuple[TensorSpec, ...]:
    """A length that the package leaves open is named after its tensor and axis."""
    return tuple(TensorSpec(name, tuple(f"{name}_{axis}" if n is None else n for axis, n in enumerate(tensor.shape)),
                            tensor.element.name) for name, tensor in tensors.items())


def _fits(shape: tuple[int, ...], declared: tuple[int | None, ...]) -> bool:
    return len(shape) == len(declared) and all(m is None or n == m for n, m in zip(shape, declared, strict=True))


def _input(path: Path, name: str, array: np.ndarray, tensor: TensorType) -> Tensor:
    """An input in its declared type: any float for floats, integers that fit for integers."""
    wanted = np.dtype(tensor.element.stored)
    if not _fits(array.shape, tensor.shape) or not np.can_cast(array.dtype, wanted, "same_kind"):
        raise ShapeMismatch(f"{path}: {name} is {array.dtype} {list(array.shape)}, expected {tensor.element.name} "
                            f"{list(tensor.shape)}; pass the model's own inputs")
    converted = array.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(converted, array):
        raise ShapeMismatch(f"{path}: {name} has values that {tensor.element.name} does not hold; pass smaller ones")
    held = converted if wanted.kind != "u" or wanted.itemsize == 1 else converted.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(held)).to(tensor.element.held)


def _output(value: Tensor, tensor: TensorType) -> np.ndarray:
    return value.contiguous().numpy().astype(tensor.element.stored)
