"""Blocks of transformers, x + layers(layer norm of x), as nodes of our own in OpenVINO's graphs."""
from collections.abc import Callable, Iterable
from typing import TypeAlias

import openvino
from openvino import opset13 as op

from .openvino_graph import OwnNode, Value, sides, take_the_place


class Block(OwnNode):
    """A node that reads rows of bfloat16 and gives as many."""

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, openvino.Type.bf16, self.get_input_partial_shape(0))


Find: TypeAlias = Callable[[Value, Value, int], Block | None]  # of x, what is added to it, and threads


def use_blocks(model: openvino.Model, finders: Iterable[Find], threads: int) -> None:
    """Replace each sum that is one of the blocks that are looked for."""
    for node in model.get_ordered_ops():
        found = [block for x, branch in sides(node, "Add") for find in finders if (block := find(x, branch, threads))]
        if found:
            found[0].set_friendly_name(node.get_friendly_name())
            take_the_place(node, op.convert(found[0], "f32"))
    model.validate_nodes_and_infer_types()


def halves_of(x: Value) -> Value:
    """x in bfloat16."""
    return op.convert(x, "bf16").output(0)
