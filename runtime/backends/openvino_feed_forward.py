"""A transformer's feed-forward blocks by our own kernel, where a graph of OpenVINO's computes them in int8."""
import math
from typing import Any, NamedTuple

import numpy as np
import openvino
from openvino import opset13 as op

from ..kernels import DEPTH, feed_forward, gated_panels, panels
from .openvino_graph import (
    Node,
    OwnNode,
    Rounded,
    Value,
    array_of,
    number_of,
    rounded,
    same,
    sides,
    take_the_place,
)


class FeedForward(OwnNode):
    """x + second(v gelu(g)), where v, g = first(layer norm of x), of rows of bfloat16."""

    class_type_info = openvino.DiscreteTypeInfo("FeedForward", "caphuman")

    def __init__(self, inputs: Any = None, epsilon: float = 0.0, threads: int = 1) -> None:
        super().__init__(inputs, {"epsilon": epsilon, "threads": threads})

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, openvino.Type.bf16, self.get_input_partial_shape(0))

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        feed_forward(*(tensor.data for tensor in inputs), outputs[0].data, **self._settings)
        return True


def use_feed_forward(model: openvino.Model, threads: int) -> None:
    """Replace each feed-forward block that is computed in int8, where shapes are definite and fit the matrix unit."""
    for node in model.get_ordered_ops():
        for x, branch in sides(node, "Add"):
            block = _block(x, branch)
            if block:
                _replace(node, x, block, threads)
                break
    model.validate_nodes_and_infer_types()


class _Linear(NamedTuple):
    rows: Rounded
    weights: np.ndarray  # int8, inputs x outputs
    scale: np.ndarray  # of each output, float32
    shift: np.ndarray


class _Block(NamedTuple):
    gamma: np.ndarray
    beta: np.ndarray
    epsilon: float
    values: _Linear
    gates: _Linear
    second: _Linear


def _replace(last: Node, x: Value, block: _Block, threads: int) -> None:
    """A block, by what it reads and its last sum."""
    gamma, beta, epsilon, values, gates, second = block
    steps, hidden_steps = values.rows.steps, second.rows.steps
    arrays = [np.stack([gamma, beta]) * steps,
              gated_panels(values.weights, gates.weights),
              np.stack([values.scale * hidden_steps, values.shift * hidden_steps, gates.scale, gates.shift]),
              panels(second.weights),
              np.stack([second.scale, second.shift])]
    constants = [op.constant(np.ascontiguousarray(array)).output(0) for array in arrays]
    found = FeedForward([op.convert(x, "bf16").output(0), *constants], epsilon, threads)
    found.set_friendly_name(last.get_friendly_name())
    take_the_place(last, op.convert(found, "f32"))


def _block(x: Value, branch: Value) -> _Block | None:
    """What is added to x, if it is such a block of x."""
    second = _linear(branch)
    if second is None or not x.get_partial_shape().is_static:
        return None
    for one, other in sides(second.rows.source.get_node(), "Multiply"):
        inner = _gelu(other)
        values, gates = _linear(one), inner and _linear(inner)
        if values and gates and values.weights.shape == gates.weights.shape and same(
                values.rows.source, gates.rows.source):
            return _normed(x, values, gates, second)
    return None


def _normed(x: Value, values: _Linear, gates: _Linear, second: _Linear) -> _Block | None:
    """The same, if what it multiplies is a layer norm of x."""
    fits = all(length % DEPTH == 0 for length in values.weights.shape) and second.weights.shape == values.weights.shape[::-1]
    for scaled, shift in sides(values.rows.source.get_node(), "Add"):
        for normal, factor in sides(scaled.get_node(), "Multiply"):
            beta, gamma, mvn = array_of(shift), array_of(factor), normal.get_node()
            if fits and beta is not None and gamma is not None and _is_of_rows(mvn, x):
                each = (_of_each(numbers, x.get_shape()[-1]) for numbers in (gamma, beta))
                return _Block(*each, mvn.get_attributes()["eps"], values, gates, second)
    return None


def _is_of_rows(mvn: Node, x: Value) -> bool:
    """Whether a node normalises the rows of x."""
    if mvn.get_type_name() != "MVN" or not same(mvn.input_value(0), x):
        return False
    attributes, axes = mvn.get_attributes(), mvn.input_value(1).get_node()
    if axes.get_type_name() == "Range":
        last = [number_of(value) for value in axes.input_values()] == [-1, 0, 1]
    else:
        last = array_of(mvn.input_value(1)) in ([-1], [len(x.get_shape()) - 1])
    return bool(last and attributes["normalize_variance"] and attributes["eps_mode"] == "INSIDE_SQRT")


def _gelu(value: Value) -> Value | None:
    """Of what a value is gelu: x / 2 (1 + erf(x / sqrt 2))."""
    for x, half in sides(value.get_node(), "Multiply"):
        for number, more in sides(half.get_node(), "Multiply"):
            for one, erf in sides(more.get_node(), "Add"):
                scaled = erf.get_node().input_value(0).get_node() if erf.get_node().get_type_name() == "Erf" else None
                if scaled and scaled.get_type_name() == "Divide" and same(scaled.input_value(0), x) and (
                        number_of(number), number_of(one)) == (0.5, 1) and math.isclose(
                        number_of(scaled.input_value(1)) or 0, math.sqrt(2), rel_tol=1e-3):
                    return x
    return None


def _linear(value: Value) -> _Linear | None:
    """The product of int8 rows and weights that a value is, with what is added."""
    for product, shift in sides(value.get_node(), "Add"):
        node, added = product.get_node(), array_of(shift)
        if added is None or node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
            continue
        rows, weights = rounded(node.input_value(0)), _int8_weights(node)
        if rows and weights:
            numbers, outputs = weights[0], weights[0].shape[1]
            scale = _of_each(weights[1], outputs) * np.float32(rows.scale)
            return _Linear(rows, numbers, scale, _of_each(added, outputs))
    return None


def _of_each(numbers: np.ndarray, count: int) -> np.ndarray:
    """One number of each channel, float32."""
    return np.broadcast_to(numbers.astype(np.float32).reshape(-1), (count,))


def _int8_weights(product: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a matrix product, inputs x outputs, and what they are multiplied by."""
    for ints, factors in sides(product.input_value(1).get_node(), "Multiply"):
        numbers, scale = array_of(ints), array_of(factors)
        if numbers is not None and scale is not None and numbers.dtype == np.int8 and numbers.ndim == 2:
            turned = product.get_attributes()["transpose_b"]
            return (numbers.T if turned else numbers), scale
    return None
