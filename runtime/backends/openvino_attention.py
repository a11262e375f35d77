"""Attention of many keys by our own kernels, where a graph of OpenVINO's rounds queries and keys to int8."""
from typing import Any, NamedTuple

import openvino

from ..kernels import attention, attention_kernels, widest_head
from .openvino_graph import (
    ALONE,
    Node,
    OwnNode,
    Value,
    int8_steps,
    number_of,
    only_reader,
    order_of,
    producer,
    take_the_place,
)

HEADS_FIRST, KEYS_LAST = [0, 2, 1, 3], [0, 2, 3, 1]
FEWEST_KEYS = 512  # below, OpenVINO's own is as fast


class Kernel(NamedTuple):
    """Which of our kernels, and on how many threads."""

    name: str
    threads: int


class Attention(OwnNode):
    """softmax(q k' scale) v of each head, of float rows that hold their heads one after the other."""

    class_type_info = openvino.DiscreteTypeInfo("Attention", "caphuman")

    def __init__(self, inputs: Any = None, heads: int = 1, scale: float = 1.0, kernel: str = "",
                 threads: int = 1) -> None:
        super().__init__(inputs, {"heads": heads, "scale": scale, "kernel": kernel, "threads": threads})

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        q, k, v = (tensor.data for tensor in inputs)
        attention(q, k, v, outputs[0].data, **self._settings)
        return True


def kernel_here(threads: int) -> Kernel | None:
    """The fastest that this machine has, if any."""
    names = attention_kernels()
    return Kernel(names[0], threads) if names else None


def use_attention(model: openvino.Model, kernel: Kernel) -> None:
    """Replace each attention that rounds queries and keys and has many keys, where shapes are definite."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Softmax":
            _replace(node, kernel)
    model.validate_nodes_and_infer_types()


def _replace(softmax: Node, kernel: Kernel) -> None:
    """If a softmax is that of such an attention, from rows of heads to rows of heads."""
    scores, sums = producer(softmax), only_reader(softmax)
    turned = sums and only_reader(sums)
    rows = turned and only_reader(turned)
    if not (sums and rows and rows.get_type_name() == "Reshape" and order_of(turned) == HEADS_FIRST
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
    take_the_place(rows, found)


class _Unrounded(NamedTuple):
    source: Node
    scale: float  # what the source is multiplied by on its way


def _unrounded(node: Node) -> _Unrounded | None:
    """Where a product's side comes from, before it was scaled and rounded to int8; None if it was not."""
    scale, rounded = 1.0, False
    while (kind := node.get_type_name()) in ("FakeQuantize", *ALONE):
        if kind == "FakeQuantize":
            factor, rounded = int8_steps(node), True
        elif kind == "Convert":
            factor = 1.0
        else:
            number = number_of(node.input_value(1))
            factor = number if kind == "Multiply" else 1.0 if number == 0 else None
        if factor is None:
            return None
        scale, node = scale * factor, producer(node)
    return _Unrounded(node, scale) if rounded else None


def _rows(node: Node, order: list[int]) -> Value | None:
    """The rows whose heads were brought to the front, (batch, tokens, heads * width)."""
    view = producer(node) if order_of(node) == order else None
    if view is None or view.get_type_name() != "Reshape":
        return None
    rows, shape = view.input_value(0), list(view.get_output_shape(0))
    return rows if len(shape) == 4 and list(rows.get_shape()) == [*shape[:2], shape[2] * shape[3]] else None


def _is_plain_product(node: Node) -> bool:
    """Whether it is a product that exchanges no axes of what it reads."""
    if node.get_type_name() != "MatMul":
        return False
    attributes = node.get_attributes()
    return not (attributes["transpose_a"] or attributes["transpose_b"])
