"""A transformer's attention blocks by our own kernel, where a graph of OpenVINO's computes their layers in int8."""
from typing import Any, NamedTuple

import numpy as np
import openvino
from openvino import opset13 as op

from ..kernels import AMX, takes_heads
from ..kernels.blocks import attention_block, panels
from .openvino_attention import Heads, heads_of
from .openvino_graph import Node, OwnNode, Value, constants, same, sides, take_the_place
from .openvino_linear import LayerNorm, Linear, layer_norm, linear


class AttentionBlock(OwnNode):
    """x + last(attention), of the layer norm of x to itself, or to keys and values that are read, too.

    Rows of x are bfloat16, keys and values float32.
    """

    class_type_info = openvino.DiscreteTypeInfo("AttentionBlock", "caphuman")

    def __init__(self, inputs: Any = None, heads: int = 1, scale: float = 1.0, rounded: bool = False,
                 steps: float = 1.0, epsilon: float = 0.0, threads: int = 1) -> None:
        super().__init__(inputs, {"heads": heads, "scale": scale, "rounded": rounded, "steps": steps,
                                  "epsilon": epsilon, "threads": threads})

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, openvino.Type.bf16, self.get_input_partial_shape(0))

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        x, norm, first, inner, last, outer, *others = (tensor.data for tensor in inputs)
        known = (others[0], others[1]) if others else None
        attention_block(x, norm, first, inner, last, outer, known, outputs[0].data, **self._settings)
        return True


def use_attention_block(model: openvino.Model, threads: int) -> None:
    """Replace each attention block whose layers are computed in int8, where shapes are definite and fit the unit."""
    for node in model.get_ordered_ops():
        for x, branch in sides(node, "Add"):
            if block := _block(x, branch):
                _replace(node, x, block, threads)
                break
    model.validate_nodes_and_infer_types()


class _Block(NamedTuple):
    norm: LayerNorm
    first: list[Linear]  # of queries, or of queries, keys and values
    heads: Heads
    last: Linear


def _replace(sum_: Node, x: Value, block: _Block, threads: int) -> None:
    """A block, by what it reads and its last sum."""
    norm, first, heads, last = block
    arrays = constants(
        np.stack([norm.gamma, norm.beta]) * first[0].rows.steps,
        np.concatenate([panels(layer.weights) for layer in first]),
        np.concatenate([[layer.scale, layer.shift] for layer in first], axis=1),
        panels(last.weights), np.stack([last.scale, last.shift]))
    known = [] if len(first) == 3 else [heads.k, heads.v]
    found = AttentionBlock([op.convert(x, "bf16").output(0), *arrays, *known], heads.heads, heads.scale, heads.rounded,
                           last.rows.steps, norm.epsilon, threads)
    found.set_friendly_name(sum_.get_friendly_name())
    take_the_place(sum_, op.convert(found, "f32"))


def _block(x: Value, branch: Value) -> _Block | None:
    """What is added to x, if it is such a block of x."""
    last = linear(branch)
    heads = heads_of(last.rows.source.get_node()) if last and x.get_partial_shape().is_static else None
    queries = linear(heads.q) if heads and takes_heads(AMX, heads.width) else None
    norm = layer_norm(queries.rows.source, x) if queries else None
    if last is None or heads is None or queries is None or norm is None:
        return None
    others = map(linear, (heads.k, heads.v))
    of_x = [layer for layer in others if layer and same(layer.rows.source, queries.rows.source)]
    first = [queries, *of_x] if len(of_x) == 2 else [queries]
    fits = all(layer.fits() and layer.weights.shape == last.weights.shape for layer in (*first, last))
    return _Block(norm, first, heads, last) if fits else None
