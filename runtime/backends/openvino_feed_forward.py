"""A transformer's feed-forward blocks by our own kernel, where a graph of OpenVINO's computes them in int8."""
import math
from typing import Any

import numpy as np
import openvino

from ..kernels.blocks import feed_forward, gated_panels, panels
from .openvino_blocks import Block, halves_of
from .openvino_graph import Value, constants, number_of, same, sides
from .openvino_linear import layer_norm, linear


class FeedForward(Block):
    """x + second(v gelu(g)), where v, g = first(layer norm of x), of rows of bfloat16."""

    class_type_info = openvino.DiscreteTypeInfo("FeedForward", "caphuman")

    def __init__(self, inputs: Any = None, epsilon: float = 0.0, threads: int = 1) -> None:
        super().__init__(inputs, {"epsilon": epsilon, "threads": threads})

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        x, norm, first, inner, second, outer = (tensor.data for tensor in inputs)
        feed_forward(x, norm, first, inner, second, outer, outputs[0].data, **self._settings)
        return True


def feed_forward_of(x: Value, branch: Value, threads: int) -> FeedForward | None:
    """The block that adds a branch to x, if it is one in int8, of definite shape, that fits the matrix unit."""
    second = linear(branch)
    if second is None or not second.fits() or not x.get_partial_shape().is_static:
        return None
    for one, other in sides(second.rows.source.get_node(), "Multiply"):
        inner = _gelu(other)
        values, gates = linear(one), inner and linear(inner)
        norm = layer_norm(values.rows.source, x) if values else None
        if values and gates and norm and same(values.rows.source, gates.rows.source) and (
                values.weights.shape == gates.weights.shape == second.weights.shape[::-1]):
            return FeedForward([halves_of(x), *constants(
                norm.affine * values.rows.steps, gated_panels(values.weights, gates.weights),
                np.concatenate([values.affine * second.rows.steps, gates.affine]), panels(second.weights),
                second.affine)], norm.epsilon, threads)
    return None


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
