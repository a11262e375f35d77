"""Looking at OpenVINO's graphs, and nodes of our own in them."""
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import openvino

Node: TypeAlias = Any  # OpenVINO's, whose package has no types; Python sees a new object each time
Value: TypeAlias = Any  # a node's output
ALONE = ("Multiply", "Subtract", "Convert")  # what changes each number alone, by one number


class OwnNode(openvino.Op):  # type: ignore[misc]  # of a package without types
    """A node that Python computes; graphs, cached ones too, keep its settings in the types of their defaults."""

    class_type_info: openvino.DiscreteTypeInfo

    def __init__(self, inputs: Any, settings: dict[str, Any]) -> None:
        super().__init__(self)
        self._settings = settings
        if inputs is not None:
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

    def clone_with_new_inputs(self, new_inputs: Any) -> "OwnNode":
        return type(self)(new_inputs, **self._settings)

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes(self._settings)
        return True

    @classmethod
    def get_type_info(cls) -> openvino.DiscreteTypeInfo:
        return cls.class_type_info

    def has_evaluate(self) -> bool:
        return True


def producer(node: Node) -> Node:
    """Of the first of what a node reads; None if it reads nothing."""
    return node.input_value(0).get_node() if node.get_input_size() else None


def readers(node: Node) -> list[Node]:
    """Who reads a node's output, but for those that ask for its shape alone."""
    found = [port.get_node() for port in node.output(0).get_target_inputs()]
    return [reader for reader in found if reader.get_type_name() != "ShapeOf"]


def only_reader(node: Node) -> Node | None:
    """The one that reads a node's output, if it is one."""
    found = readers(node)
    return found[0] if len(found) == 1 else None


def order_of(node: Node | None) -> list[int] | None:
    """Of a transpose."""
    if node is None or node.get_type_name() != "Transpose":
        return None
    order = node.input_value(1).get_node()
    return [int(axis) for axis in order.data] if order.get_type_name() == "Constant" else None


def array_of(value: Value) -> np.ndarray | None:
    """The numbers of a constant, converted, reshaped and multiplied or not."""
    node = value.get_node()
    if node.get_type_name() in ("Convert", "Reshape"):
        found = array_of(node.input_value(0))
        return None if found is None else found.reshape(value.get_shape())
    if node.get_type_name() == "Multiply":
        if (one := array_of(node.input_value(0))) is None or (two := array_of(node.input_value(1))) is None:
            return None
        return one.astype(np.float32) * two
    return node.data if node.get_type_name() == "Constant" else None


def number_of(value: Value) -> float | None:
    """What a constant of one number holds."""
    found = array_of(value)
    return float(found.item()) if found is not None and found.size == 1 else None


def factor_of(node: Node) -> float | None:
    """By which number a node of `ALONE` multiplies all that it reads; None if it does something else."""
    if node.get_type_name() == "Convert":
        return 1.0
    number = number_of(node.input_value(1))
    return number if node.get_type_name() == "Multiply" else 1.0 if number == 0 else None


def is_norm(node: Node) -> bool:
    """Whether it divides by the root of variance and epsilon."""
    if node.get_type_name() != "MVN":
        return False
    attributes = node.get_attributes()
    return bool(attributes["normalize_variance"] and attributes["eps_mode"] == "INSIDE_SQRT")


def int8_steps(rounding: Node) -> float | None:
    """How many of a FakeQuantize's steps are 1, if it rounds to int8 and 0 stays 0; None if not."""
    numbers = [number for number in map(number_of, rounding.input_values()[1:]) if number is not None]
    if len(numbers) < 4:
        return None
    low, high, least, most = numbers
    steps = (most - least) / (high - low)
    return steps if abs(least - low * steps) < 1e-3 and (least, most) == (-128, 127) else None


class Rounded(NamedTuple):
    """Numbers that were rounded to int8 and are floats again."""

    source: Value  # what was rounded
    steps: float  # of int8 in 1
    scale: float  # what 1 of int8 has become


def rounded(value: Value) -> Rounded | None:
    """Where numbers come from, if they were rounded to int8 and multiplied by one number afterwards."""
    node, scale = value.get_node(), 1.0
    while (kind := node.get_type_name()) in ALONE:
        if (factor := factor_of(node)) is None:
            return None
        scale, node = scale * factor, producer(node)
    steps = int8_steps(node) if kind == "FakeQuantize" else None
    return None if steps is None else Rounded(node.input_value(0), steps, scale)


def constants(*arrays: np.ndarray) -> list[Value]:
    """Arrays, as a node of ours reads them."""
    return [openvino.opset13.constant(np.ascontiguousarray(array)).output(0) for array in arrays]


def same(one: Value, two: Value) -> bool:
    """Whether both are one output of one node."""
    return bool(one.get_node().get_name() == two.get_node().get_name() and one.get_index() == two.get_index())


def sides(node: Node, kind: str) -> list[tuple[Value, Value]]:
    """What a node of this kind reads, either way round; nothing if it is another kind."""
    if node.get_type_name() != kind:
        return []
    one, two = node.input_values()
    return [(one, two), (two, one)]


def take_the_place(old: Node, new: Node, output: int = 0) -> None:
    """Whoever read the old node's output reads the new node's."""
    for port in old.output(output).get_target_inputs():
        port.replace_source_output(new.output(0))
