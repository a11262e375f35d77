"""FaceNet's weights out of facenet_512.tflite: int8 with a scale, multiplied out, in the official architecture.

The file holds the network with its batch norms folded into the convolutions and its blocks' scales folded into their
last ones; here each batch norm becomes the identity plus the folded bias. The .tflite is read as what it is, a
FlatBuffer, so that TensorFlow is not needed. Source: tensorflow/lite/schema/schema.fbs.
"""
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.identity import NORM_EPS, FaceNet, Residual
from caphuman_edge.runtime.errors import CheckpointError

CONVOLUTION, DENSE = 3, 9  # operator codes
TYPES = {0: "<f4", 9: "<i1"}  # tensor types

Layer = tuple[Float32[np.ndarray, "out ..."], Float32[np.ndarray, "out"]]


def read_facenet(path: Path) -> FaceNet:
    """The network of facenet_512.tflite, ready to infer. Raises CheckpointError for a file of another form."""
    network = FaceNet()
    try:
        layers = list(read_layers(path.read_bytes()))
    except (OSError, struct.error, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read as a .tflite ({error}), expected facenet_512.tflite; "
                              "add --fetch to get it") from error
    load_strictly(network, _named(network, layers, path), path.name)
    return network.eval().requires_grad_(False)


def read_layers(content: bytes) -> Iterator[Layer]:
    """Weights (out, in, rows, columns) or (out, in), and biases, of every convolution and dense layer as they run."""
    model = _Table.root(content)
    codes = [code.number(3, "<i") for code in model.tables(1)]
    graph, buffers = model.tables(2)[0], model.tables(4)
    tensors = graph.tables(0)
    for operator in graph.tables(3):
        if codes[operator.number(0, "<I")] in (CONVOLUTION, DENSE):
            _, weight, bias = (tensors[k] for k in operator.vector(1, "<i4"))
            values, added = _values(weight, buffers), _values(bias, buffers)
            if values.ndim not in (2, 4) or added.shape != values.shape[:1]:
                raise ValueError(f"weights of shape {values.shape} with a bias of shape {added.shape}")
            yield values.transpose(0, 3, 1, 2) if values.ndim == 4 else values, added


def _named(network: FaceNet, layers: list[Layer], path: Path) -> dict[str, Tensor]:
    """The layers under the network's names, in the order in which both run."""
    targets = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if len(layers) != len(targets):
        raise CheckpointError(f"{path} has {len(layers)} layers with weights, expected {len(targets)}; "
                              "pass facenet_512.tflite")
    blocks = [(name, module) for name, module in network.named_modules() if isinstance(module, Residual)]
    scales = {f"{name}.conv2d": block.scale for name, block in blocks}
    weights = dict(network.state_dict())  # batch norms are made with mean 0 and variance 1
    for (name, module), (weight, bias) in zip(targets, layers, strict=True):
        scale = scales.get(name, 1.0)
        weights[f"{name}.weight"] = torch.from_numpy(weight / np.float32(scale))
        if module.bias is not None:
            weights[f"{name}.bias"] = torch.from_numpy(bias / np.float32(scale))
        else:
            norm = "last_bn" if name == "last_linear" else f"{name.removesuffix('.conv')}.bn"
            weights[f"{norm}.weight"] = torch.full((len(bias),), (1 + NORM_EPS) ** 0.5)
            weights[f"{norm}.bias"] = torch.from_numpy(bias)
    return weights


def _values(tensor: "_Table", buffers: "list[_Table]") -> np.ndarray:
    """A constant as float32; an int8 one times its scale, which is one for all or one for each output."""
    stored = buffers[tensor.number(2, "<I")].vector(0, "u1").view(TYPES[tensor.number(1, "<b")])
    values = stored.reshape(tensor.vector(0, "<i4")).astype(np.float32)
    quantisation = tensor.table(4)
    scale = quantisation.vector(2, "<f4") if quantisation else np.zeros(0)
    if len(scale) > 1 and scale.shape != values.shape[:1]:
        raise ValueError(f"{len(scale)} scales for weights of shape {values.shape}")
    return values * scale.reshape(-1, *[1] * (values.ndim - 1)) if len(scale) else values


class _Table:
    """One FlatBuffer table: fields by their number in the schema, absent ones zero or empty."""

    def __init__(self, content: bytes, position: int):
        self.content, self.position = content, position
        self.fields = position - self._read("<i", position)  # where the table of offsets lies

    @classmethod
    def root(cls, content: bytes) -> "_Table":
        return cls(content, struct.unpack_from("<I", content, 0)[0])

    def number(self, field: int, form: str) -> int:
        place = self._place(field)
        return self._read(form, place) if place else 0

    def vector(self, field: int, dtype: str) -> np.ndarray:
        place = self._place(field)
        if not place:
            return np.zeros(0, dtype)
        start = place + self._read("<I", place)
        return np.frombuffer(self.content, dtype, self._read("<I", start), start + 4)

    def table(self, field: int) -> "_Table | None":
        place = self._place(field)
        return _Table(self.content, place + self._read("<I", place)) if place else None

    def tables(self, field: int) -> "list[_Table]":
        place = self._place(field)
        if not place:
            return []
        start = place + self._read("<I", place)
        places = range(start + 4, start + 4 + 4 * self._read("<I", start), 4)
        return [_Table(self.content, at + self._read("<I", at)) for at in places]

    def _place(self, field: int) -> int:
        slot = 4 + 2 * field
        if slot >= self._read("<H", self.fields):
            return 0
        offset = self._read("<H", self.fields + slot)
        return self.position + offset if offset else 0

    def _read(self, form: str, at: int) -> int:
        return int(struct.unpack_from(form, self.content, at)[0])
