"""Reading a saved .mlpackage: its manifest, its specification, its main function as a list of checked steps.

A package is a folder: Manifest.json names items by an identifier, their paths are below Data/, and the root item is
the specification (model.mlmodel, a protobuf); weights lie beside it. Nothing of it is trusted: sizes are bounded,
paths may not leave the package, every name must have been defined, every constant must fit its type.
"""
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from caphuman_edge.export.coreml_writer import coremltools
from caphuman_edge.export.mil_weights import STRING, Constant, TensorType, WeightFiles, constant, tensor_type
from caphuman_edge.runtime.errors import BundleError

MANIFEST_BYTES = 1 << 20  # more is no manifest
SPECIFICATION_BYTES = 1 << 30  # weights lie in blob files; a program is some megabytes
AGAIN = "export the model again"
Argument = str | Constant | list["str | Constant"]  # a string names an earlier value


@dataclass(frozen=True)
class Step:
    """One operation: its type, its arguments by parameter name, its outputs."""

    op: str
    arguments: dict[str, Argument]
    outputs: dict[str, TensorType]

    def names(self) -> Iterator[str]:
        """The values that it reads."""
        for argument in self.arguments.values():
            yield from (part for part in (argument if isinstance(argument, list) else [argument])
                        if isinstance(part, str))


@dataclass(frozen=True)
class Function:
    """The main function of a program: inputs and outputs in the order of the model's description."""

    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]
    steps: list[Step]
    constants: dict[str, Constant]
    files: WeightFiles = field(repr=False)  # keeps the maps open that constants lie in


def read_function(package: Path) -> Function:
    """The main function of a saved .mlpackage. Raises BundleError for what is damaged, foreign or no program.

    The protobuf messages are coremltools', which must be installed: MissingExtra.
    """
    path = specification_path(package)
    model = _specification(path)
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise BundleError(f"{path} holds a {kind or 'model without type'}, expected an mlProgram; convert with "
                          f"convert_to=\"mlprogram\"")
    name = model.description.defaultFunctionName or "main"
    functions = model.mlProgram.functions
    if name not in functions:
        raise BundleError(f"{path} has functions {sorted(functions)}, expected {name!r}; {AGAIN}")
    function = functions[name]
    if function.opset not in function.block_specializations:
        raise BundleError(f"{path}: function {name!r} has no block for its opset {function.opset!r}; {AGAIN}")
    described = next((part for part in model.description.functions if part.name == name), model.description)
    return _Reader(path).function(function, described)


def specification_path(package: Path) -> Path:
    """Where a package's specification lies, from its manifest. Raises BundleError."""
    manifest = package / "Manifest.json"
    if not manifest.is_file() or manifest.stat().st_size > MANIFEST_BYTES:
        raise BundleError(f"{package} is no .mlpackage: expected a folder with a Manifest.json; {AGAIN}")
    try:
        content = json.loads(manifest.read_bytes())
        inside = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{manifest} names no model ({type(error).__name__}: {error}); {AGAIN}") from error
    data = (package / "Data").resolve()
    path = (data / str(inside)).resolve()
    if not path.is_relative_to(data) or not path.is_file():
        raise BundleError(f"{manifest} names {inside!r}, which is no file in the package's Data folder; {AGAIN}")
    return path


def _specification(path: Path) -> Any:
    size = path.stat().st_size
    if size > SPECIFICATION_BYTES:
        raise BundleError(f"{path} has {size} bytes, expected at most {SPECIFICATION_BYTES}; keep weights in blob "
                          f"files")
    model = coremltools().proto.Model_pb2.Model()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise BundleError(f"{path} is no Core ML specification ({error}); {AGAIN}") from error
    return model


class _Reader:
    """Turns protobuf operations into steps; knows which names have been defined so far."""

    def __init__(self, path: Path):
        self.path, self.files = path, WeightFiles(path.parent)
        self.types: dict[str, TensorType] = {}
        self.constants: dict[str, Constant] = {}

    def function(self, function: Any, description: Any) -> Function:
        for value in function.inputs:
            self._define(value.name, tensor_type(value.type, f"{self.path}: input {value.name}"))
        block = function.block_specializations[function.opset]
        steps = [step for operation in block.operations if (step := self._step(operation))]
        inputs = self._described("inputs", description.input, [value.name for value in function.inputs])
        outputs = self._described("outputs", description.output, list(block.outputs))
        return Function(inputs, outputs, steps, self.constants, self.files)

    def _step(self, operation: Any) -> Step | None:
        """The operation as a step; None for a constant, which is kept by its name."""
        outputs = {value.name: tensor_type(value.type, f"{self.path}: output {value.name} of {operation.type}")
                   for value in operation.outputs}
        where = f"{operation.type} {next(iter(outputs), 'without output')}"
        if operation.blocks:
            raise BundleError(f"{self.path}: {where} has blocks of its own; control flow cannot be evaluated here")
        # Up to iOS 17, a compressed constant's parameters are attributes.
        attributes = {name: constant(value, self.files, f"{self.path}: {name} of {where}")
                      for name, value in operation.attributes.items() if name != "name"}
        arguments = {name: self._argument(argument, f"{name} of {where}")
                     for name, argument in operation.inputs.items()}
        for name, tensor in outputs.items():
            self._define(name, tensor)
        if operation.type != "const":
            return Step(operation.type, {**attributes, **arguments}, outputs)
        if set(attributes) != {"val"} or list(outputs.values()) != [attributes["val"].type]:
            raise BundleError(f"{self.path}: {where} has outputs {sorted(outputs)} and values {sorted(attributes)}, "
                              f"expected one output and a val of its type; {AGAIN}")
        self.constants[next(iter(outputs))] = attributes["val"]
        return None

    def _argument(self, argument: Any, where: str) -> Argument:
        bound: list[str | Constant] = []
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                bound.append(constant(binding.value, self.files, f"{self.path}: {where}"))
            elif binding.name in self.types:
                bound.append(binding.name)
            else:
                raise BundleError(f"{self.path}: {where} is {binding.name!r}, which nothing before has defined; "
                                  f"{AGAIN}")
        if not bound:
            raise BundleError(f"{self.path}: {where} is bound to nothing; {AGAIN}")
        return bound[0] if len(bound) == 1 else bound

    def _define(self, name: str, tensor: TensorType) -> None:
        if name in self.types:
            raise BundleError(f"{self.path} defines {name!r} twice; {AGAIN}")
        self.types[name] = tensor

    def _described(self, what: str, described: Any, names: list[str]) -> dict[str, TensorType]:
        """The function's values in the description's order, which must name the same."""
        ordered = [feature.name for feature in described]
        if sorted(ordered) != sorted(names) or any(name not in self.types for name in names):
            raise BundleError(f"{self.path} describes {what} {ordered}, its program has {names}; {AGAIN}")
        tensors = {name: self.types[name] for name in ordered}
        if any(tensor.element is STRING for tensor in tensors.values()):
            raise BundleError(f"{self.path} has {what} of strings; only tensors of numbers can be evaluated")
        return tensors
