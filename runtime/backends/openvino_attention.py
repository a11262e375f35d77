"""Attention of many keys by our own kernels, where a graph of OpenVINO's rounds queries and keys to int8."""
from typing import Any, NamedTuple

import openvino

from ..kernels import attention, attention_kernels, takes_heads
from .openvino_graph import (
    ALONE,
    Node,
    OwnNode,
    Value,
    factor_of,
    int8_steps,
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
        found = heads_of(node)
        if found and found.rounded and found.k.get_shape()[1] >= FEWEST_KEYS and takes_heads(kernel.name, found.width):
            own = Attention([found.q, found.k, found.v], found.heads, found.scale, *kernel)
            own.set_friendly_name(node.get_friendly_name())
            take_the_place(node, own)
    model.validate_nodes_and_infer_types()


class Heads(NamedTuple):
    """softmax(q k' scale) v of heads, of rows that hold them one after the other, (batch, tokens, heads * width)."""

    q: Value
    k: Value
    v: Value
    heads: int
    width: int
    scale: float
    rounded: bool  # whether queries and keys are, to int8


def heads_of(rows: Node) -> Heads | None:
    """The attention that a node gives the rows of, if it does."""
    sums = _before_transpose(rows, HEADS_FIRST)
    if sums is None or not _is_plain_product(sums) or not sums.get_output_partial_shape(0).is_static:
        return None
    softmax, values = (value.get_node() for value in sums.input_values())
    scores = producer(softmax) if softmax.get_type_name() == "Softmax" else None
    if scores is None or not _is_plain_product(scores):
        return None
    queries, keys = (_unrounded(value.get_node()) for value in scores.input_values())
    if queries is None or keys is None or queries.rounded != keys.rounded:
        return None
    q, k, v = _rows(queries.source, HEADS_FIRST), _rows(keys.source, KEYS_LAST), _rows(values, HEADS_FIRST)
    batch, heads, tokens, width = sums.get_output_shape(0)
    if q is None or k is None or v is None or list(rows.get_output_shape(0)) != [batch, tokens, heads * width]:
        return None
    return Heads(q, k, v, heads, width, queries.scale * keys.scale, queries.rounded)


class _Unrounded(NamedTuple):
    source: Node
    scale: float  # what the source is multiplied by on its way
    rounded: bool


def _unrounded(node: Node) -> _Unrounded | None:
    """Where a product's side comes from, before it was scaled and, perhaps, rounded to int8."""
    scale, rounded = 1.0, False
    while (kind := node.get_type_name()) in ("FakeQuantize", *ALONE):
        rounded = rounded or kind == "FakeQuantize"
        factor = int8_steps(node) if kind == "FakeQuantize" else factor_of(node)
        if factor is None:
            return None
        scale, node = scale * factor, producer(node)
    return _Unrounded(node, scale, rounded)


def _before_transpose(node: Node, order: list[int]) -> Node | None:
    """What was given this order of axes and reshaped to become a node's output."""
    turned = producer(node) if node.get_type_name() == "Reshape" else None
    return producer(turned) if order_of(turned) == order else None


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
