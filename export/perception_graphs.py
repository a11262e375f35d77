"""Rewrite the perception networks: the contract's names and shapes, small weights, float32 arithmetic."""
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from jaxtyping import Float32
from onnx import TensorProto, helper, numpy_helper

from caphuman_edge.runtime.contract import GraphSpec, TensorSpec

OPSET = 17
IR_VERSION = 8
SMALLEST_STORED = 64  # elements; below it a Cast costs more than it saves, and epsilons would underflow
FIRST_INT8_CONVOLUTION = 10  # of SFace's fourteen


@dataclass(frozen=True)
class Ports:
    """A network's own tensor names, in the order of the contract's inputs and outputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    logits: tuple[str, ...] = ()  # outputs that the network leaves before the sigmoid


def to_contract(model: onnx.ModelProto, ports: Ports, spec: GraphSpec) -> onnx.ModelProto:
    """Cut the network to the wanted outputs, in the contract's names and shapes, logits turned to probabilities."""
    nodes, initializers = list(model.graph.node), list(model.graph.initializer)
    for own, tensor in zip(ports.outputs, spec.outputs, strict=True):
        nodes += _output_nodes(own, tensor, own in ports.logits)
        initializers.append(numpy_helper.from_array(np.array(tensor.shape, np.int64), f"{own}/shape"))
    names = dict(zip(ports.inputs, (tensor.name for tensor in spec.inputs), strict=True))
    names |= {f"contract/{tensor.name}": tensor.name for tensor in spec.outputs}
    return rebuild(nodes, initializers, spec, names)


def rebuild(nodes: Sequence[onnx.NodeProto], initializers: Sequence[TensorProto], spec: GraphSpec,
            names: dict[str, str]) -> onnx.ModelProto:
    """A checked model of the nodes that the contract's outputs need.

    `names` turns own names into the contract's; every other tensor gets a short one.
    """
    nodes = _live(nodes, names)
    stored = {tensor.name: tensor for tensor in initializers}
    used = dict.fromkeys(name for node in nodes for name in node.input)  # a set that keeps its order
    initializers = [stored[name] for name in used if name in stored]
    names = dict(names)
    for node in nodes:
        node.ClearField("name")
        _rename(node.input, names)
        _rename(node.output, names)
    for tensor in initializers:
        tensor.name = names[tensor.name]
    graph = helper.make_graph(nodes, spec.name, _values(spec.inputs), _values(spec.outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def sface_to_contract(model: onnx.ModelProto, ports: Ports, spec: GraphSpec) -> onnx.ModelProto:
    """The face recogniser, four times smaller.

    Its dense layer and last convolutions go to int8, per output channel. The first nine convolutions stay float16:
    they would save 0.8 MB more, but cause most of the error.
    """
    for node in model.graph.node:
        if node.op_type == "Dropout":  # nothing at inference, and older than the opset
            node.op_type = "Identity"
            node.ClearField("attribute")
    late = {f"conv_{i}_conv2d_weight" for i in range(FIRST_INT8_CONVOLUTION, 15)}
    return store_half(to_contract(_store_int8(model, late | {"pre_fc1_weight"}), ports, spec), rounding=True)


def store_half(model: onnx.ModelProto, rounding: bool = False) -> onnx.ModelProto:
    """Keep weights as float16, cast up where they are used.

    Those are the float32 weights that float16 holds exactly, and with `rounding` every convolution's kernel.
    """
    graph = model.graph
    for tensor in [tensor for tensor in graph.initializer if _fits_half(tensor, rounding)]:
        name, weight = tensor.name, numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float16), f"{name}h"))
        graph.node.insert(0, helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    return model


def read_canonical_face(metadata: bytes) -> Float32[np.ndarray, "468 4"]:
    """The canonical face of the landmark model: x, y, z in centimetres (right, up, to the viewer), Procrustes weight.

    The metadata is a protobuf: field 1 the mesh, whose field 3 lists floats x y z u v of each vertex;
    field 2, repeated, one weighted vertex (1 its index, 2 its weight). Vertices without an entry weigh nothing.
    """
    fields = list(_wire_fields(metadata))
    mesh = next(value for number, value in fields if number == 1)
    vertices = np.array([value for number, value in _wire_fields(mesh) if number == 3]).reshape(-1, 5)
    face = np.zeros((len(vertices), 4), np.float32)
    face[:, :3] = vertices[:, :3]
    for entry in (dict(_wire_fields(value)) for number, value in fields if number == 2):
        face[entry[1], 3] = entry[2]
    return face


def _output_nodes(own: str, tensor: TensorSpec, is_logit: bool) -> list[onnx.NodeProto]:
    output = f"contract/{tensor.name}"
    reshaped = f"{own}/reshaped" if is_logit else output
    nodes = [helper.make_node("Reshape", [own, f"{own}/shape"], [reshaped])]
    return [*nodes, helper.make_node("Sigmoid", [reshaped], [output])] if is_logit else nodes


def _live(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that the outputs need, depth first, because the converter orders them differently on every run.

    (It also folds the blendshape network's reshapes differently: that file's hash, unlike its answers, still varies.)
    """
    makers = {output: node for node in nodes for output in node.output}
    live: list[onnx.NodeProto] = []

    def visit(tensor: str) -> None:
        node = makers.pop(tensor, None)
        if node is not None:
            for name in node.input:
                visit(name)
            live.append(node)

    for output in outputs:
        visit(output)
    return live


def _rename(tensors: list[str], names: dict[str, str]) -> None:
    for i, name in enumerate(tensors):
        if name:  # an empty name is an optional input left out
            tensors[i] = names.setdefault(name, f"t{len(names)}")


def _values(tensors: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.shape) for tensor in tensors]


def _store_int8(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """Keep the named weights as int8 with one scale for each output channel (axis 0), symmetric about zero."""
    graph = model.graph
    for tensor in [tensor for tensor in graph.initializer if tensor.name in names]:
        name, weight = tensor.name, numpy_helper.to_array(tensor)
        scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim))) / 127
        steps = np.round(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
        tensor.CopyFrom(numpy_helper.from_array(steps, f"{name}/int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}/scale"))
        graph.node.insert(0, helper.make_node("DequantizeLinear", [tensor.name, f"{name}/scale"], [name], axis=0))
    return model


def _fits_half(tensor: TensorProto, rounding: bool) -> bool:
    weight = numpy_helper.to_array(tensor)
    if weight.dtype != np.float32 or weight.size < SMALLEST_STORED:
        return False
    return rounding and weight.ndim == 4 or bool(np.array_equal(weight.astype(np.float16), weight))


def _wire_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of every field in a protobuf message: varints, length-delimited bytes and floats."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
        elif key & 7 == 2:
            length, at = _varint(message, at)
            yield key >> 3, message[at:at + length]
            at += length
        else:
            yield key >> 3, struct.unpack_from("<f", message, at)[0]
            at += 4


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
