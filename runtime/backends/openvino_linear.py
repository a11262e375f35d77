"""Linear layers of int8 and layer norms in OpenVINO's graphs, as our kernels want them."""
from typing import NamedTuple

import numpy as np

from ..kernels.blocks import DEPTH
from .openvino_graph import Node, Rounded, Value, array_of, is_norm, number_of, rounded, same, sides


class Linear(NamedTuple):
    """rows weights scale + shift, where rows are whole numbers of `rows.scale` each, which `scale` holds, too."""

    rows: Rounded
    weights: np.ndarray  # int8, inputs x outputs
    affine: np.ndarray  # scale and shift of each output, float32

    def fits(self) -> bool:
        """Whether the matrix unit takes it whole."""
        return all(length % DEPTH == 0 for length in self.weights.shape)


class LayerNorm(NamedTuple):
    affine: np.ndarray  # gamma and beta of each channel, float32
    epsilon: float


def linear(value: Value) -> Linear | None:
    """The product of int8 rows and weights that a value is, with what is added or not."""
    product, added = value, None
    for one, other in sides(value.get_node(), "Add"):
        if one.get_node().get_type_name() == "MatMul" and (added := array_of(other)) is not None:
            product = one
            break
    node = product.get_node()
    if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
        return None
    rows, weights = rounded(node.input_value(0)), _int8_weights(node)
    if rows is None or weights is None:
        return None
    numbers, factors = weights
    outputs = numbers.shape[1]
    shift = np.zeros(outputs, np.float32) if added is None else _of_each(added, outputs)
    return Linear(rows, numbers, np.stack([_of_each(factors, outputs) * np.float32(rows.scale), shift]))


def layer_norm(rows: Value, x: Value) -> LayerNorm | None:
    """What turned x into these rows, if that is a layer norm."""
    for scaled, shift in sides(rows.get_node(), "Add"):
        for normal, factor in sides(scaled.get_node(), "Multiply"):
            beta, gamma, mvn = array_of(shift), array_of(factor), normal.get_node()
            if beta is not None and gamma is not None and _is_of_rows(mvn, x):
                width = x.get_shape()[-1]
                return LayerNorm(np.stack([_of_each(gamma, width), _of_each(beta, width)]), mvn.get_attributes()["eps"])
    return None


def _is_of_rows(mvn: Node, x: Value) -> bool:
    """Whether a node normalises the rows of x."""
    if not is_norm(mvn) or not same(mvn.input_value(0), x):
        return False
    axes = mvn.input_value(1).get_node()
    if axes.get_type_name() == "Range":
        return [number_of(value) for value in axes.input_values()] == [-1, 0, 1]
    return array_of(mvn.input_value(1)) in ([-1], [len(x.get_shape()) - 1])


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
