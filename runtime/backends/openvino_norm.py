"""Group norms of large maps by our own kernel, where a graph of OpenVINO's rounds their results to int8."""
from typing import Any, NamedTuple

import numpy as np
import openvino
from openvino import opset13 as op

from ..kernels import group_norm
from .openvino_graph import (
    ALONE,
    Node,
    OwnNode,
    array_of,
    constants,
    factor_of,
    int8_steps,
    is_norm,
    only_reader,
    order_of,
    producer,
    readers,
    take_the_place,
)

CHANNELS_LAST, CHANNELS_FIRST, ROWS = [0, 2, 3, 1], [0, 3, 1, 2], [0, 2, 1]
FEWEST_NUMBERS = 1 << 19  # of a map; below, OpenVINO's copies are as fast as a call of ours


class GroupNorm(OwnNode):
    """Group norm, then SiLU or not, as int8 of which `steps` are 1, of maps whose channels are last."""

    class_type_info = openvino.DiscreteTypeInfo("GroupNorm", "caphuman")

    def __init__(self, inputs: Any = None, groups: int = 1, epsilon: float = 0.0, silu: bool = False,
                 steps: float = 1.0, threads: int = 1) -> None:
        super().__init__(inputs, {"groups": groups, "epsilon": epsilon, "silu": silu, "steps": steps,
                                  "threads": threads})

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, openvino.Type.i8, self.get_input_partial_shape(0))

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        maps, gamma, beta = (tensor.data for tensor in inputs)
        for one, out in zip(maps, outputs[0].data, strict=True):
            group_norm(one, gamma, beta, out, **self._settings)
        return True


def use_group_norm(model: openvino.Model, halves: bool, threads: int) -> None:
    """Replace each group norm of a large map that is rounded to int8. `halves`: maps are computed in bfloat16."""
    for node in model.get_ordered_ops():
        if is_norm(node):
            _replace(node, halves, threads)
    model.validate_nodes_and_infer_types()


def _replace(mvn: Node, halves: bool, threads: int) -> None:
    """If it normalises groups of a map, and what follows leads to int8."""
    view = producer(mvn)
    if view.get_type_name() != "Reshape" or not view.get_output_partial_shape(0).is_static:
        return
    image, grouped = view.input_value(0), view.get_output_shape(0)
    if not (len(image.get_shape()) == 4 and len(grouped) == 3 and array_of(mvn.input_value(1)) == [2]):
        return
    batch, channels, height, width = image.get_shape()
    affine = _affine(mvn, grouped[1], channels)
    if affine is None or channels * height * width < FEWEST_NUMBERS or list(grouped)[:2] != [batch, grouped[1]]:
        return
    last, silu = _after_silu(affine.last)
    rounding = only_reader(last)
    whole = rounding and rounding.get_type_name() == "FakeQuantize" and only_reader(rounding)
    steps = int8_steps(rounding) if whole else None
    floats = _floats(whole) if whole and whole.get_output_element_type(0) == openvino.Type.i8 else None
    if steps is None or floats is None:
        return
    maps = op.transpose(image, op.constant(np.array(CHANNELS_LAST)))
    if halves:
        maps = op.convert(maps, "bf16")
    found = GroupNorm([maps.output(0), *constants(affine.gamma, affine.beta)], grouped[1],
                      mvn.get_attributes()["eps"], silu, steps, threads)
    found.set_friendly_name(mvn.get_friendly_name())
    _go_on(floats, found, [batch, height * width, channels])


def _go_on(floats: "_Floats", maps: Node, rows: list[int]) -> None:
    """Maps of floats again, channels first, or rows of tokens, where those are made of them.

    Numbers are made floats before axes are exchanged: otherwise OpenVINO no longer sees that they were int8.
    """
    view = only_reader(floats.last)
    turned = view and view.get_type_name() == "Reshape" and only_reader(view)
    if turned and order_of(turned) == ROWS and list(turned.get_output_shape(0)) == rows:
        maps = op.reshape(maps, op.constant(np.array(rows)), False)
    found = op.multiply(op.convert(maps, "f32"), op.constant(np.float32(floats.scale)))
    if turned and len(maps.get_output_shape(0)) == 3:
        take_the_place(turned, found)
    else:
        take_the_place(floats.last, op.transpose(found, op.constant(np.array(CHANNELS_FIRST))))


class _Affine(NamedTuple):
    last: Node
    gamma: np.ndarray  # of each channel
    beta: np.ndarray


def _affine(mvn: Node, groups: int, channels: int) -> _Affine | None:
    """Factors and summands of groups, then of channels, that follow a norm; None if anything else does first."""
    gamma, beta = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    node, of_channels = mvn, False
    while (reader := only_reader(node)) is not None:
        kind = reader.get_type_name()
        if kind == "Reshape" and not of_channels and reader.get_output_shape(0)[1] == channels:
            of_channels = True
        elif kind in ("Multiply", "Add"):
            numbers = array_of(reader.input_value(1))
            if numbers is None or numbers.size != (channels if of_channels else groups):
                break
            each = numbers.astype(np.float32).reshape(-1).repeat(1 if of_channels else channels // groups)
            gamma, beta = (gamma * each, beta * each) if kind == "Multiply" else (gamma, beta + each)
        else:
            break
        node = reader
    return _Affine(node, gamma, beta) if of_channels else None


def _after_silu(node: Node) -> tuple[Node, bool]:
    """The node itself, or x sigmoid(x) of it, and whether it is that."""
    found = {reader.get_type_name(): reader for reader in readers(node)}
    if set(found) != {"Multiply", "Sigmoid"} or len(readers(node)) != 2:
        return node, False
    product = only_reader(found["Sigmoid"])
    same = product is not None and product.get_name() == found["Multiply"].get_name()
    return (product, True) if same else (node, False)


class _Floats(NamedTuple):
    last: Node
    scale: float


def _floats(whole: Node) -> _Floats | None:
    """Where int8 numbers have become floats again, and what 1 of them is then."""
    node, scale = whole, 1.0
    while (reader := only_reader(node)) is not None and reader.get_type_name() in ALONE:
        if (factor := factor_of(reader)) is None:
            return None
        scale, node = scale * factor, reader
    return None if node is whole else _Floats(node, scale)
