"""Arrange OpenVINO's form of a transformer block so that fewer tensors are copied.

The tracer writes what PyTorch does, whose views and chunks cost nothing there. OpenVINO copies: keys are transposed
twice; a gated layer's two halves are taken apart; and around blocks, where feature maps become rows of tokens, 1x1
convolutions ask for channels last, norms for channels first. Keys are transposed once here, gated layers become two
products, and those convolutions become products of rows. Each number is computed as before.
"""
from collections.abc import Callable
from functools import partial

import numpy as np
import openvino
from openvino import opset13 as op

from caphuman_edge.runtime.backends.openvino_graph import Node, Value, order_of, producer, take_the_place

ROUNDING = ("FakeQuantize", "Convert", "Multiply", "Subtract")  # between a tensor and who reads it in 8 bits
ROWS, HEADS, KEYS = [0, 2, 1], [0, 2, 1, 3], [0, 2, 3, 1]  # orders of transposes


def arrange(model: openvino.Model) -> None:
    """Rearrange all that is found of these three; what looks otherwise stays as it is."""
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Transpose":
            _keys_at_once(node)
            _rows_before(node)
        elif kind == "Split":
            _two_products(node)
        elif kind == "Convolution":
            _rows_after(node)
    model.validate_nodes_and_infer_types()


def _keys_at_once(node: Node) -> None:
    """Heads to the front, then, in three axes, the last two exchanged, back to four: one transpose."""
    three, after = producer(node), _only_reader(node)
    heads = three and producer(three)
    if not (order_of(node) == ROWS and three and three.get_type_name() == "Reshape" and heads and after
            and order_of(heads) == HEADS and after.get_type_name() == "Reshape" and _rank(after.output(0)) == 4):
        return
    keys = op.transpose(heads.input_value(0), op.constant(np.array(KEYS)))
    if keys.get_output_partial_shape(0).compatible(after.get_output_partial_shape(0)):
        take_the_place(after, keys)


def _two_products(node: Node) -> None:
    """The halves of a product's last axis: each a product of its own."""
    added, axis = (value.get_node() for value in node.input_values())
    product = added.input_value(0).get_node() if added.get_type_name() == "Add" else added
    if not (node.get_attributes()["num_splits"] == 2 and product.get_type_name() == "MatMul"
            and axis.get_type_name() == "Constant" and int(axis.data) in (-1, _rank(node.output(0)) - 1)):
        return
    if not all(_is_constant(each.input_value(1)) for each in (product, added)):
        return
    flags = product.get_attributes()
    for half in range(2):
        weight = _changed(product.input_value(1), partial(_half, half=half, axis=0 if flags["transpose_b"] else 1))
        found = op.matmul(product.input_value(0), weight, flags["transpose_a"], flags["transpose_b"])
        found.set_friendly_name(f"{product.get_friendly_name()}/{half}")
        if added is not product:
            bias = added.input_value(1)
            found = op.add(found, _changed(bias, partial(_half, half=half, axis=_rank(bias) - 1)))
        take_the_place(node, found, half)


def _rows_before(node: Node) -> None:
    """A 1x1 convolution whose cells become rows: rows first, then a product."""
    view = producer(node)
    if not (order_of(node) == ROWS and view and view.get_type_name() == "Reshape" and _rank(view.input_value(0)) == 4):
        return
    convolution, bias = _with_bias(view.input_value(0))
    if convolution is None or not _is_pointwise(convolution):
        return
    image = convolution.input_value(0)
    channels = image.get_partial_shape()[1].get_length()
    rows = op.transpose(op.reshape(image, op.constant(np.array([0, channels, -1])), True), op.constant(np.array(ROWS)))
    take_the_place(node, _product(rows.output(0), convolution, bias))


def _rows_after(node: Node) -> None:
    """A 1x1 convolution of what just were rows: a product first, then cells."""
    if not _is_pointwise(node):
        return
    image = producer(node)
    rounding = []
    while image and image.get_type_name() in ROUNDING and _only_reader(image) and _of_one_number(image):
        rounding.append(image)
        image = producer(image)
    turned = image and producer(image)
    if not (image and image.get_type_name() == "Reshape" and turned and order_of(turned) == ROWS
            and _rank(image.output(0)) == 4 and _only_reader(image)):
        return
    last, bias = _reader_with_bias(node)
    rows = turned.input_value(0)
    if rounding:
        rounding[-1].input(0).replace_source_output(rows)
        rows = node.input_value(0)
        for each in reversed(rounding):
            each.validate_and_infer_types()
    found = op.transpose(_product(rows, node, bias), op.constant(np.array(ROWS)))
    take_the_place(last, op.reshape(found, image.input_value(1), image.get_attributes()["special_zero"]))


def _product(rows: Value, convolution: Node, bias: Value | None) -> Node:
    """What a 1x1 convolution computes, of rows of channels."""
    found = op.matmul(rows, _changed(convolution.input_value(1), _matrix), False, True)
    found.set_friendly_name(convolution.get_friendly_name())
    return found if bias is None else op.add(found, bias)


def _matrix(array: np.ndarray) -> np.ndarray:
    """1x1 kernels without the kernels' axes."""
    return array.reshape(array.shape[:2]) if array.ndim == 4 else array


def _half(array: np.ndarray, half: int, axis: int) -> np.ndarray:
    """One half along an axis; of what has one number there, all of it."""
    whole = array.ndim <= axis or array.shape[axis] == 1
    return array if whole else np.ascontiguousarray(np.split(array, 2, axis)[half])


def _changed(value: Value, change: Callable[[np.ndarray], np.ndarray]) -> Value:
    """A constant, or what 8 bits of one stand for, of changed arrays."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return op.constant(change(node.data)).output(0)
    if kind == "Reshape":  # scales, one an output
        return op.constant(change(node.input_value(0).get_node().data.reshape(value.get_shape()))).output(0)
    if kind == "Convert":
        return op.convert(_changed(node.input_value(0), change), node.get_element_type()).output(0)
    make = {"Multiply": op.multiply, "Subtract": op.subtract}[kind]
    return make(*(_changed(each, change) for each in node.input_values())).output(0)


def _with_bias(value: Value) -> tuple[Node | None, Value | None]:
    """The convolution that a value comes from, and its bias, one number a channel."""
    node = value.get_node()
    if node.get_type_name() == "Convolution":
        return node, None
    if node.get_type_name() != "Add" or node.input_value(0).get_node().get_type_name() != "Convolution":
        return None, None
    bias = node.input_value(1).get_node()
    if bias.get_type_name() != "Reshape" or _rank(bias.input_value(0)) != 1:
        return None, None
    return node.input_value(0).get_node(), bias.input_value(0)


def _reader_with_bias(convolution: Node) -> tuple[Node, Value | None]:
    """The node whose output is the convolution's with its bias, and that bias, if it has one."""
    reader = _only_reader(convolution)
    found, bias = _with_bias(reader.output(0)) if reader else (None, None)
    return (reader, bias) if found is not None and bias is not None else (convolution, None)


def _is_pointwise(node: Node) -> bool:
    attributes, kernel = node.get_attributes(), node.input_value(1).get_partial_shape()
    return (kernel.is_static and list(kernel.to_shape())[2:] == [1, 1] and list(attributes["strides"]) == [1, 1]
            and not any([*attributes["pads_begin"], *attributes["pads_end"]]) and _is_constant(node.input_value(1)))


def _is_constant(value: Value) -> bool:
    """A constant, or what 8 bits of one stand for."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Convert":
        return _is_constant(node.input_value(0))
    if kind == "Reshape":
        return bool(node.input_value(0).get_node().get_type_name() == "Constant")
    return kind == "Constant" or (kind in ("Multiply", "Subtract") and all(map(_is_constant, node.input_values())))


def _of_one_number(node: Node) -> bool:
    """Whether all that it reads besides a tensor is single numbers, so that the tensor's axes do not matter."""
    return all(value.get_partial_shape().is_static and int(np.prod(value.get_shape())) == 1
               for value in node.input_values()[1:])


def _rank(value: Value) -> int:
    shape = value.get_partial_shape()
    return len(shape) if shape.rank.is_static else 0


def _only_reader(node: Node) -> Node | None:
    ports = list(node.output(0).get_target_inputs())
    return ports[0].get_node() if len(ports) == 1 else None
