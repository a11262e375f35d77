"""Rewrite an ONNX graph so that its layers read weights, and where asked activations, of 8 bits.

The form is QuantizeLinear and DequantizeLinear around layers that stay Conv, Gemm and MatMul. ONNX Runtime on the CPU
computes Conv as QLinearConv, for which its output must be rounded, too, and MatMul as MatMulIntegerToFloat, which gives
floats. OpenVINO reads pairs as FakeQuantize and runs oneDNN's int8 kernels, whose outputs may be floats. NNCF would
make the same operations, for OpenVINO alone and by ranges of its own: so it is not needed.

A layer is known by the name of its parameter in the reference, so fused and split graphs and models of any size are
treated alike. Weights are int8, symmetric, one scale an output channel. Activations have one scale and zero point; they
are stored as uint8, 128 above, since of int8 pairs ONNX Runtime on x86 converts only those that a single layer reads;
for OpenVINO they are stored as int8.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import onnx_ir as ir
from jaxtyping import Float32, Int8
from onnx_ir.passes.common import RemoveUnusedNodesPass

from caphuman_edge.export.palette import palettise
from caphuman_edge.quant.recipe import Treatment, palette_bits

LEVELS = 127  # of the weights to each side of zero
SMALLEST = 1e-20  # that a channel's largest weight counts as
LARGEST_BIAS = 0.9 * 2**31
SCORES = "/scores"  # behind a layer's name: its output where queries meet keys
ARRANGING = ("Mul", "Transpose", "Reshape")


@dataclass(frozen=True)
class Grid:
    """The 256 numbers of an activation, -128..127: value = scale * (number - zero)."""

    scale: float
    zero: int


@dataclass(frozen=True)
class LayerGrids:
    """Of what a layer reads and, where it is a convolution, gives."""

    input: Grid
    output: Grid | None = None


@dataclass(frozen=True)
class Layer:
    """A node with a constant weight of two or more axes."""

    name: str  # of the weight, as the reference has it
    node: ir.Node
    axis: int  # of the weight: output channels

    @property
    def input(self) -> ir.Value:
        """What it reads."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def is_convolution(self) -> bool:
        return self.node.op_type == "Conv"

    def weight(self) -> Float32[np.ndarray, "..."]:
        """A copy of the weight, read from the file."""
        return _constant(self.node.inputs[1])


@dataclass(frozen=True)
class Scores:
    """The product of an attention's queries and keys, by the layers that these come from."""

    queries: str
    keys: str
    node: ir.Node

    def sides(self) -> list[tuple[int, str, ir.Value]]:
        """Of each input: its place, under what name its numbers are known, and itself."""
        return [(place, f"{layer}{SCORES}", value) for place, layer, value in
                zip((0, 1), (self.queries, self.keys), self.node.inputs, strict=True) if value is not None]


def scores_of(graph: ir.Graph) -> list[Scores]:
    """Of all attentions whose queries and keys are made by layers, in the order of the graph."""
    names = {layer.node.outputs[0]: layer.name for layer in layers_of(graph)}
    found = []
    for node in graph:
        readers = [reader.op_type for reader, _ in node.outputs[0].uses()]
        if node.op_type == "MatMul" and readers == ["Softmax"]:
            queries, keys = (_origin(value, names) for value in node.inputs)
            if queries and keys:
                found.append(Scores(queries, keys, node))
    return found


def _origin(value: ir.Value | None, names: Mapping[ir.Value, str]) -> str | None:
    """The layer that made what a value is another arrangement, or a multiple, of."""
    while value is not None and value not in names:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in ARRANGING else None
    return None if value is None else names[value]


def layers_of(graph: ir.Graph) -> list[Layer]:
    """All layers, in the order of the graph."""
    found = []
    for node in graph:
        if node.op_type in ("Conv", "Gemm", "MatMul") and _is_constant(node.inputs[1]):
            transposed = node.op_type == "MatMul" or not node.attributes.get_int("transB", 0)
            axis = 1 if node.op_type != "Conv" and transposed else 0
            found.append(Layer(str(node.inputs[1].name), node, axis))  # type: ignore[union-attr]
    return found


def quantize_model(model: ir.Model, treatment_of: Callable[[str], Treatment], grids: Mapping[str, LayerGrids],
                   round_outputs: bool, signed: bool = False, round_scores: Callable[[str], bool] = lambda name: False,
                   ) -> dict[Treatment, int]:
    """Rewrite the model in place; returns how many layers were treated how. `grids`: of those treated as "int8".

    `signed`: activations are stored as int8, which OpenVINO needs to see that a grid has no zero point.
    A palette's values are stored as floats: that measures what they lose, and saves nothing but in Core ML.
    `round_outputs`: of convolutions, without which ONNX Runtime computes them in float. `round_scores`: whether queries
    that a layer makes, and the keys that they meet, are rounded for their product: OpenVINO multiplies those in int8.
    """
    pairs = _Pairs(model.graph, signed)
    attentions = [scores for scores in scores_of(model.graph) if round_scores(scores.queries)]
    counts = dict.fromkeys(get_args(Treatment), 0)
    for layer in layers_of(model.graph):
        treatment = treatment_of(layer.name)
        counts[treatment] += 1
        if bits := palette_bits(treatment):
            layer.node.replace_input_with(1, pairs.palette(layer, bits))
        elif treatment != "float":
            _quantize(layer, pairs, grids[layer.name] if treatment == "int8" else None, round_outputs)
    for scores in attentions:
        for place, name, value in scores.sides():
            scores.node.replace_input_with(place, pairs.activation(value, grids[name].input))
    RemoveUnusedNodesPass()(model)  # weights in float, and casts to it
    return {treatment: count for treatment, count in counts.items() if count}


def weight_scales(weight: Float32[np.ndarray, "..."], axis: int) -> Float32[np.ndarray, "n"]:
    """A scale an output channel, such that the largest weight is the largest number."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    return np.maximum(np.abs(weight).max(axis=others), np.float32(SMALLEST)) / np.float32(LEVELS)


def quantize_weight(weight: Float32[np.ndarray, "..."], scales: Float32[np.ndarray, "n"], axis: int,
                    ) -> Int8[np.ndarray, "..."]:
    """Weights in numbers of their scale."""
    along = scales.reshape([-1 if other == axis else 1 for other in range(weight.ndim)])
    return np.clip(np.rint(weight / along), -LEVELS, LEVELS).astype(np.int8)


def _quantize(layer: Layer, pairs: "_Pairs", grids: LayerGrids | None, round_outputs: bool) -> None:
    """Without grids the weight alone."""
    node, weight = layer.node, layer.weight()
    scales = weight_scales(weight, layer.axis)
    bias = _constant(node.inputs[2]) if grids and len(node.inputs) > 2 and node.inputs[2] is not None else None
    if grids and bias is not None:  # the bias is in numbers of 32 bits: channels of next to no weights get coarser ones
        scales = np.maximum(scales, np.abs(bias) / np.float32(grids.input.scale * LARGEST_BIAS))
    node.replace_input_with(1, pairs.weight(layer, scales))
    if not grids:
        return
    node.replace_input_with(0, pairs.activation(layer.input, grids.input))
    if bias is not None:
        node.replace_input_with(2, pairs.bias(layer, bias, scales * np.float32(grids.input.scale)))
    if node.op_type == "MatMul":
        pairs.keep_apart(node)
    if layer.is_convolution and round_outputs:
        assert grids.output is not None
        pairs.output(node.outputs[0], grids.output)


class _Pairs:
    """Puts Q and DQ nodes into a graph; layers that read the same value on the same grid share a pair."""

    def __init__(self, graph: ir.Graph, signed: bool):
        self.graph, self.signed = graph, signed
        self.made: dict[tuple[ir.Value, Grid], ir.Value] = {}

    def weight(self, layer: Layer, scales: Float32[np.ndarray, "n"]) -> ir.Value:
        """A layer's weight as stored: computed when the file is written, one weight at a time."""
        def numbers() -> ir.TensorProtocol:
            return ir.tensor(quantize_weight(source(), scales, layer.axis), name=name)

        value, name = layer.node.inputs[1], f"{layer.name}.int8"
        assert value is not None
        source = _reader(value)
        stored = ir.LazyTensor(numbers, dtype=ir.DataType.INT8, shape=ir.Shape(_shape(value)), name=name)
        return self._dequantized(self._constant(name, stored), scales, layer.node, layer.axis)

    def palette(self, layer: Layer, bits: int) -> ir.Value:
        """A layer's weight of values of a palette alone."""
        weight = layer.weight()
        values, places = palettise(weight, bits)
        return self._constant(f"{layer.name}.palette", ir.tensor(values[places].reshape(weight.shape)))

    def bias(self, layer: Layer, bias: Float32[np.ndarray, "n"], scales: Float32[np.ndarray, "n"]) -> ir.Value:
        """A layer's bias in the numbers that its sums are in."""
        name = f"{layer.name.removesuffix('weight')}bias.int32"
        numbers = np.rint(bias.astype(np.float64) / scales).astype(np.int32)
        return self._dequantized(self._constant(name, ir.tensor(numbers)), scales, layer.node, 0)

    def keep_apart(self, product: ir.Node) -> None:
        """Give the bias behind a product three axes: of one, ONNX Runtime makes a Gemm of both, which stays float."""
        shape = product.outputs[0].shape
        for add, index in product.outputs[0].uses() if shape is None or len(shape) > 2 else ():
            bias = add.inputs[1 - index] if add.op_type == "Add" else None
            if _is_constant(bias) and len(_shape(bias)) == 1:  # type: ignore[arg-type]
                rows = _constant(bias)[None, None]
                add.replace_input_with(1 - index, self._constant(f"{bias.name}.rows", ir.tensor(rows)))  # type: ignore

    def activation(self, value: ir.Value, grid: Grid) -> ir.Value:
        """The value rounded to the grid, for one layer of those that read it."""
        if (value, grid) not in self.made:
            nodes = self._pair(value, grid)
            producer = value.producer()
            if producer is None:  # an input of the graph
                self.graph.insert_before(self.graph[0], nodes)
            else:
                self.graph.insert_after(producer, nodes)
            self.made[value, grid] = nodes[1].outputs[0]
        return self.made[value, grid]

    def output(self, value: ir.Value, grid: Grid) -> None:
        """Whoever reads the value, and the graph's caller, gets it rounded."""
        readers = list(value.uses())
        rounded = self.activation(value, grid)
        self.made[rounded, grid] = rounded  # a layer that reads it needs no other pair
        for node, index in readers:
            node.replace_input_with(index, rounded)
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                rounded.name, value.name, self.graph.outputs[index] = value.name, f"{value.name}.exact", rounded

    def _pair(self, value: ir.Value, grid: Grid) -> list[ir.Node]:
        scale = self._constant(f"{value.name}.scale", ir.tensor(np.float32(grid.scale)))
        number = np.int8(grid.zero) if self.signed else np.uint8(grid.zero + 128)
        zero = self._constant(f"{value.name}.zero", ir.tensor(number))
        quantize = ir.node("QuantizeLinear", [value, scale, zero])
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
        for node in (quantize, dequantize):
            node.outputs[0].shape = value.shape
        quantize.outputs[0].dtype = ir.DataType.INT8 if self.signed else ir.DataType.UINT8
        dequantize.outputs[0].dtype = ir.DataType.FLOAT
        return [quantize, dequantize]

    def _dequantized(self, stored: ir.Value, scales: np.ndarray, reader: ir.Node, axis: int) -> ir.Value:
        name = f"{stored.name}.scales"
        node = ir.node("DequantizeLinear", [stored, self._constant(name, ir.tensor(scales, name=name))],
                       attributes={"axis": axis})
        node.outputs[0].name, node.outputs[0].shape = f"{stored.name}.float", stored.shape
        node.outputs[0].dtype = ir.DataType.FLOAT
        self.graph.insert_before(reader, node)
        return node.outputs[0]

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        tensor.name = name
        value = ir.val(name, tensor.dtype, ir.Shape(_numbers(tensor)), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and _stored(value) is not None


def _stored(value: ir.Value) -> ir.Value | None:
    """The initializer behind a value: itself, or halves that a cast widens."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        return _stored(producer.inputs[0])  # type: ignore[arg-type]
    return value if producer is None and value.const_value is not None else None


def _reader(value: ir.Value) -> Callable[[], np.ndarray]:
    """Reads a constant in float32, now or later."""
    stored = _stored(value)
    assert stored is not None and stored.const_value is not None
    tensor = stored.const_value
    return lambda: tensor.numpy().astype(np.float32)


def _constant(value: ir.Value | None) -> Float32[np.ndarray, "..."]:
    assert value is not None
    return _reader(value)()


def _shape(value: ir.Value) -> tuple[int, ...]:
    stored = _stored(value)
    assert stored is not None and stored.const_value is not None
    return _numbers(stored.const_value)


def _numbers(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of what is stored, which has no symbols."""
    return tuple(n for n in tensor.shape if isinstance(n, int))
