"""Attention of many keys by our own kernels, where a graph of OpenVINO's rounds queries and keys to int8."""
from typing import Any, NamedTuple, TypeAlias

import openvino

from ..kernels import attention, attention_kernels, widest_head

Node: TypeAlias = Any  # OpenVINO's, which Python sees as a new object each time
ROUNDED, ALONE = "FakeQuantize", ("Multiply", "Subtract", "Convert")  # what changes each number alone
HEADS_FIRST, KEYS_LAST = [0, 2, 1, 3], [0, 2, 3, 1]
FEWEST_KEYS = 512  # below, OpenVINO's own is as fast


class Kernel(NamedTuple):
    """Which of our kernels, and on how many threads."""

    name: str
    threads: int


class Attention(openvino.Op):  # type: ignore[misc]  # of a package without types
    """softmax(q k' scale) v of each head, of float rows that hold their heads one after the other."""

    class_type_info = openvino.DiscreteTypeInfo("Attention", "caphuman")

    def __init__(self, inputs: Any = None, heads: int = 1, scale: float = 1.0, kernel: str = "",
                 threads: int = 1) -> None:
        super().__init__(self)
        self._attributes: dict[str, Any] = {"heads": heads, "scale": scale, "kernel": kernel, "threads": threads}
        if inputs is not None:
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def clone_with_new_inputs(self, new_inputs: Any) -> "Attention":
        return Attention(new_inputs, **self._attributes)

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes(self._attributes)
        return True

    @staticmethod
    def get_type_info() -> openvino.DiscreteTypeInfo:
        return Attention.class_type_info

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        q, k, v = (tensor.data for tensor in inputs)
        attention(q, k, v, outputs[0].data, **self._attributes)
        return True


def kernel_here(threads: int) -> Kernel | None:
    """The fastest that this machine has, if any."""
    names = attention_kernels()
    return Kernel(names[0], threads) if names else None


def use_kernel(model: openvino.Model, kernel: Kernel) -> None:
    """Replace each attention that rounds queries and keys and has many keys; shapes must be definite."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Softmax":
            _replace(node, kernel)
    model.validate_nodes_and_infer_types()


def _replace(softmax: Node, kernel: Kernel) -> None:
    """If a softmax is that of such an attention, from rows of heads to rows of heads."""
    scores, sums = _producer(softmax), _only_reader(softmax)
    turned = sums and _only_reader(sums)
    rows = turned and _only_reader(turned)
    if not (sums and rows and rows.get_type_name() == "Reshape" and _order(turned) == HEADS_FIRST
            and all(map(_is_plain_product, (scores, sums))) and softmax.get_output_partial_shape(0).is_static):
        return
    queries, keys = (_unrounded(scores.input_value(side).get_node()) for side in (0, 1))
    if queries is None or keys is None:
        return
    inputs = [_rows(queries.source, HEADS_FIRST), _rows(keys.source, KEYS_LAST),
              _rows(sums.input_value(1).get_node(), HEADS_FIRST)]
    batch, heads, tokens, width = sums.get_output_shape(0)
    if (None in inputs or list(rows.get_output_shape(0)) != [batch, tokens, heads * width]
            or width > widest_head(kernel.name) or softmax.get_output_shape(0)[-1] < FEWEST_KEYS):
        return
    found = Attention(inputs, heads, queries.scale * keys.scale, *kernel)
    found.set_friendly_name(softmax.get_friendly_name())
    for port in rows.output(0).get_target_inputs():
        port.replace_source_output(found.output(0))


class _Unrounded(NamedTuple):
    source: Node
    scale: float  # what the source is multiplied by on its way


def _unrounded(node: Node) -> _Unrounded | None:
    """Where a product's side comes from, before it was scaled and rounded to int8 about 0; None if it was not."""
    scale, rounded = 1.0, False
    while node.get_type_name() in (ROUNDED, *ALONE):
        kind, others = node.get_type_name(), node.input_values()[1:]
        numbers = [number for number in (_number(value.get_node()) for value in others) if number is not None]
        if len(numbers) < len(others) or (kind == "Subtract" and numbers != [0]):
            return None
        if kind == ROUNDED:
            low, high, least, most = numbers
            scale *= (most - least) / (high - low)
            rounded = abs(least - low * (most - least) / (high - low)) < 1e-3  # so that 0 stays 0
        elif kind == "Multiply":
            scale *= numbers[0]
        node = _producer(node)
    return _Unrounded(node, scale) if rounded else None


def _number(node: Node) -> float | None:
    """What a constant of one number holds, converted or not."""
    if node.get_type_name() == "Convert":
        node = _producer(node)
    return float(node.data.item()) if node.get_type_name() == "Constant" and node.data.size == 1 else None


def _rows(node: Node, order: list[int]) -> Any | None:
    """The rows whose heads were brought to the front, as a value (batch, tokens, heads * width)."""
    view = _producer(node) if _order(node) == order else None
    if view is None or view.get_type_name() != "Reshape":
        return None
    rows, shape = view.input_value(0), view.get_output_shape(0)
    fits = len(rows.get_shape()) == 3 and list(rows.get_shape()) == [*shape[:2], shape[2] * shape[3]]
    return rows if fits and len(shape) == 4 else None


def _order(node: Node) -> list[int] | None:
    """Of a transpose."""
    if node.get_type_name() != "Transpose":
        return None
    order = node.input_value(1).get_node()
    return [int(axis) for axis in order.data] if order.get_type_name() == "Constant" else None


def _is_plain_product(node: Node) -> bool:
    """Whether it is a product that exchanges no axes of what it reads."""
    if node.get_type_name() != "MatMul":
        return False
    attributes = node.get_attributes()
    return not (attributes["transpose_a"] or attributes["transpose_b"])


def _producer(node: Node) -> Node:
    return node.input_value(0).get_node()


def _only_reader(node: Node) -> Node | None:
    ports = list(node.output(0).get_target_inputs())
    return ports[0].get_node() if len(ports) == 1 else None
