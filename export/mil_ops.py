"""What an op of the MIL evaluator is: a function of torch tensors whose parameters bear MIL's names.

Semantics are those of coremltools' op documentation (converters/mil/mil/ops/defs, opsets iOS15 to iOS18).
Parameters declared as int, float, bool, str or list[int] are given as such, tensors as tensors. float16 tensors arrive
as float32, and the evaluator rounds what an op returns to the type that the program declares, once.
"""
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Value = Tensor | str | list[Tensor | str]
Result = Tensor | tuple[Tensor, ...]
Function = TypeVar("Function", bound=Callable[..., Result])


def _integers(value: Any) -> list[int]:
    """A list from a vector, or from a tuple of scalars."""
    return [int(n) for n in value] if isinstance(value, list) else [int(n) for n in value.reshape(-1).tolist()]


CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    Tensor: lambda value: value, list[Tensor]: lambda value: value if isinstance(value, list) else [value],
    int: int, float: float, bool: bool, str: str, list[int]: _integers, list[bool]: lambda v: [bool(n) for n in v],
}


@dataclass(frozen=True)
class Op:
    """An op: its function, how each of its parameters is converted, and which it needs."""

    function: Callable[..., Result]
    converters: Mapping[str, Callable[[Any], Any]]
    required: frozenset[str]
    moves_data: bool  # only moves elements, whatever their type: float16 is not widened for it

    def __call__(self, arguments: Mapping[str, Value]) -> Result:
        """Run the op; `arguments` are by MIL's parameter names."""
        converted = {name: self.converters[name](value) for name, value in arguments.items()}
        return self.function(**converted)


class OpTable(dict[str, Op]):
    """Ops by name."""

    def add(self, name: str, function: Callable[..., Result], moves_data: bool = False) -> None:
        """Register a function whose annotations are all among `CONVERTERS`, or those or None."""
        parameters = inspect.signature(function).parameters
        converters = {key: CONVERTERS[_plain(parameter.annotation)] for key, parameter in parameters.items()}
        required = frozenset(k for k, parameter in parameters.items() if parameter.default is inspect.Parameter.empty)
        self[name] = Op(function, converters, required, moves_data)

    def op(self, function: Function) -> Function:
        """Decorator: register under the function's name, less a trailing underscore."""
        self.add(function.__name__.rstrip("_"), function)
        return function

    def mover(self, function: Function) -> Function:
        """Decorator: the same for an op that only moves elements."""
        self.add(function.__name__.rstrip("_"), function, moves_data=True)
        return function


def _plain(annotation: Any) -> Any:
    """`X` of `X | None`."""
    options = [option for option in getattr(annotation, "__args__", ()) if option is not type(None)]
    return options[0] if type(None) in getattr(annotation, "__args__", ()) else annotation
