"""A transformer's feed-forward blocks by our own kernel, where a graph of OpenVINO's computes them in int8."""
import math
from typing import Any, NamedTuple

import numpy as np
import openvino
from openvino import opset13 as op

from ..kernels.blocks import feed_forward, gated_panels, panels
from .openvino_graph import Node, OwnNode, Value, constants, number_of, same, sides, take_the_place
from .openvino_linear import LayerNorm, Linear, layer_norm, linear


class FeedForward(OwnNode):
    """x + second(v gelu(g)), where v, g = first(layer norm of x), of rows of bfloat16."""

    class_type_info = openvino.DiscreteTypeInfo("FeedForward", "caphuman")

    def __init__(self, inputs: Any = None, epsilon: float = 0.0, threads: int = 1) -> None:
        super().__init__(inputs, {"epsilon": epsilon, "threads": threads})

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, openvino.Type.bf16, self.get_input_partial_shape(0))

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        x, norm, first, inner, second, outer = (tensor.data for tensor in inputs)
        feed_forward(x, norm, first, inner, second, outer, outputs[0].data, **self._settings)
        return True


def use_feed_forward(model: openvino.Model, threads: int) -> None:
    """Replace each feed-forward block that is computed in int8, where shapes are definite and fit the matrix unit."""
    for node in model.get_ordered_ops():
        for x, branch in sides(node, "Add"):
            if block := _block(x, branch):
                _replace(node, x, block, threads)
                break
    model.validate_nodes_and_infer_types()


class _Block(NamedTuple):
    norm: LayerNorm
    values: Linear
    gates: Linear
    second: Linear


def _replace(last: Node, x: Value, block: _Block, threads: int) -> None:
    """A block, by what it reads and its last sum."""
    norm, values, gates, second = block
    inner = np.stack([values.scale, values.shift]) * second.rows.steps
    found = FeedForward([op.convert(x, "bf16").output(0), *constants(
        np.stack([norm.gamma, norm.beta]) * values.rows.steps, gated_panels(values.weights, gates.weights),
        np.stack([*inner, gates.scale, gates.shift]), panels(second.weights),
        np.stack([second.scale, second.shift]))], norm.epsilon, threads)
    found.set_friendly_name(last.get_friendly_name())
    take_the_place(last, op.convert(found, "f32"))


def _block(x: Value, branch: Value) -> _Block | None:
    """What is added to x, if it is such a block of x."""
    second = linear(branch)
    if second is None or not second.fits() or not x.get_partial_shape().is_static:
        return None
    for one, other in sides(second.rows.source.get_node(), "Multiply"):
        inner = _gelu(other)
        values, gates = linear(one), inner and linear(inner)
        if values and gates and same(values.rows.source, gates.rows.source) and (
                values.weights.shape == gates.weights.shape == second.weights.shape[::-1]):
            norm = layer_norm(values.rows.source, x)
            return norm and _Block(norm, values, gates, second)
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
