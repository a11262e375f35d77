"""A transformer's attention blocks by our own kernel, where a graph of OpenVINO's computes their layers in int8."""
from typing import Any

import numpy as np
import openvino

from ..kernels import AMX, takes_heads
from ..kernels.blocks import attention_block, panels
from .openvino_attention import heads_of
from .openvino_blocks import Block, halves_of
from .openvino_graph import Value, constants, same
from .openvino_linear import layer_norm, linear


class AttentionBlock(Block):
    """x + last(attention), of the layer norm of x to itself, or to keys and values that are read, too.

    Rows of x are bfloat16, keys and values float32.
    """

    class_type_info = openvino.DiscreteTypeInfo("AttentionBlock", "caphuman")

    def __init__(self, inputs: Any = None, heads: int = 1, scale: float = 1.0, rounded: bool = False,
                 steps: float = 1.0, epsilon: float = 0.0, threads: int = 1) -> None:
        super().__init__(inputs, {"heads": heads, "scale": scale, "rounded": rounded, "steps": steps,
                                  "epsilon": epsilon, "threads": threads})

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        x, norm, first, inner, last, outer, *others = (tensor.data for tensor in inputs)
        known = (others[0], others[1]) if others else None
        attention_block(x, norm, first, inner, last, outer, known, outputs[0].data, **self._settings)
        return True


def attention_block_of(x: Value, branch: Value, threads: int) -> AttentionBlock | None:
    """The block that adds a branch to x, if it is one in int8, of definite shape, that fits the matrix unit."""
    last = linear(branch)
    heads = heads_of(last.rows.source.get_node()) if last and x.get_partial_shape().is_static else None
    queries = linear(heads.q) if heads and takes_heads(AMX, heads.width) else None
    norm = layer_norm(queries.rows.source, x) if queries else None
    if last is None or heads is None or queries is None or norm is None:
        return None
    others = map(linear, (heads.k, heads.v))
    of_x = [layer for layer in others if layer and same(layer.rows.source, queries.rows.source)]
    first, known = ([queries, *of_x], []) if len(of_x) == 2 else ([queries], [heads.k, heads.v])
    if not all(layer.fits() and layer.weights.shape == last.weights.shape for layer in (*first, last)):
        return None
    arrays = constants(norm.affine * queries.rows.steps, np.concatenate([panels(layer.weights) for layer in first]),
                       np.concatenate([layer.affine for layer in first], axis=1), panels(last.weights), last.affine)
    return AttentionBlock([halves_of(x), *arrays, *known], heads.heads, heads.scale, heads.rounded, last.rows.steps,
                          norm.epsilon, threads)
