"""Write reference modules as ONNX graphs with the contract's names; weights in half precision where that is exact.

Graphs saved together share one external-data file: equal tensors are stored once.
"""
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from caphuman_edge.export.graphs import example_inputs
from caphuman_edge.runtime.contract import GraphSpec

OPSET = 18
EXTERNAL_BYTES = 1024  # smaller tensors stay inside the graph
ALIGNMENT = 64  # bytes
WEIGHTS = "weights.bin"


def trace(module: nn.Module, spec: GraphSpec) -> ModelProto:
    """The module as an ONNX model whose inputs and outputs are the contract's."""
    inputs = example_inputs(spec.inputs, seed=0)
    program = torch.onnx.export(
        module.eval(), tuple(inputs.values()), dynamo=True, opset_version=OPSET, verbose=False, optimize=True,
        input_names=[tensor.name for tensor in spec.inputs], output_names=[tensor.name for tensor in spec.outputs],
        dynamic_shapes=_dynamic_shapes(module, spec))
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:  # where in the source a node came from: bulk that nobody reads in a bundle
        node.doc_string = ""
        del node.metadata_props[:]
    return model


def save(models: Mapping[str, ModelProto], folder: Path) -> str:
    """Write `models` (by file name) to a folder with one shared weights file.

    Returns the precision that the large tensors are stored in: "f16", "f32", or "mixed".
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / WEIGHTS, "wb") as weights:
        pool = WeightPool(weights, WEIGHTS)
        for name, model in models.items():
            _compact_embeddings(model.graph)
            _halve_weights(model.graph)
            pool.move_weights(model.graph)
            onnx.save(model, folder / name)
    if not pool.places:
        (folder / WEIGHTS).unlink()
    return _precision(models)


class WeightPool:
    """One external-data file; a tensor that is already in it is not written again."""

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name
        self.places: dict[bytes, int] = {}  # digest: offset

    def move_weights(self, graph: GraphProto) -> None:
        """Replace a graph's large tensors by references into the file."""
        for tensor in graph.initializer:
            data = numpy_helper.to_array(tensor).tobytes()
            if len(data) >= EXTERNAL_BYTES:
                tensor.raw_data = data
                onnx.external_data_helper.set_external_data(tensor, self.name, self._place(data), len(data))
                tensor.ClearField("raw_data")

    def _place(self, data: bytes) -> int:
        digest = hashlib.sha256(data).digest()
        if digest not in self.places:
            self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
            self.places[digest] = self.file.tell()
            self.file.write(data)
        return self.places[digest]


def _dynamic_shapes(module: nn.Module, spec: GraphSpec) -> tuple[object, ...]:
    """The symbolic axes of every input; a module's variadic inputs are one tuple, as torch.export wants it."""
    # Least sizes are what tracing needs: an ONNX graph keeps none of them.
    ranges = {"batch": (1, 64), "tokens": (1, 4096), "height": (33, 4096), "width": (33, 4096)}
    symbols = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in ranges.items()}
    shapes = [{axis: symbols[n] for axis, n in enumerate(tensor.shape) if isinstance(n, str)}
              for tensor in spec.inputs]
    named = module.forward.__code__.co_argcount - 1
    rest = tuple(shapes[named:])
    return (*shapes[:named], rest) if rest else tuple(shapes)


def _precision(models: Mapping[str, ModelProto]) -> str:
    """Of the tensors that were moved out of the graphs; small ones do not count."""
    types = {tensor.data_type for model in models.values() for tensor in model.graph.initializer
             if tensor.data_location == TensorProto.EXTERNAL}
    names = {frozenset({TensorProto.FLOAT16}): "f16", frozenset({TensorProto.FLOAT}): "f32", frozenset(): "f32"}
    return names.get(frozenset(types - {TensorProto.UINT16}), "mixed")


def _compact_embeddings(graph: GraphProto) -> None:
    """Store only the non-zero rows of embedding tables that are mostly zero: the words a small model never met.

    ids -> index of the stored row (row 0 is zeros) -> row. Exact.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    tables = [position for position, node in enumerate(graph.node)
              if node.op_type == "Gather" and node.input[0] in tensors and uses[node.input[0]] == 1
              and all(attribute.name != "axis" or attribute.i == 0 for attribute in node.attribute)]
    for position in reversed(tables):  # from the end: a replacement inserts nodes before its own
        tensor = tensors[graph.node[position].input[0]]
        table = numpy_helper.to_array(tensor)
        used = np.flatnonzero(table.any(axis=-1)) if table.ndim == 2 else np.arange(len(table))
        if 2 * len(used) < len(table) and len(used) < np.iinfo(np.uint16).max:
            _replace_table(graph, position, tensor, table, used)


def _replace_table(graph: GraphProto, position: int, tensor: TensorProto, table: np.ndarray, used: np.ndarray) -> None:
    name, gather = tensor.name, graph.node[position]
    rows = np.zeros(len(table), np.uint16)
    rows[used] = 1 + np.arange(len(used))
    stored = np.concatenate([np.zeros_like(table[:1]), table[used]])
    tensor.CopyFrom(numpy_helper.from_array(stored, name))
    graph.initializer.append(numpy_helper.from_array(rows, f"{name}.row_of_token"))
    lookup = helper.make_node("Gather", [f"{name}.row_of_token", gather.input[1]], [f"{name}.row"])
    cast = helper.make_node("Cast", [f"{name}.row"], [f"{name}.index"], to=TensorProto.INT64)
    gather.input[1] = f"{name}.index"
    graph.node.insert(position, lookup)
    graph.node.insert(position + 1, cast)


def _halve_weights(graph: GraphProto) -> None:
    """Store float32 tensors as float16 plus a cast, where that loses nothing; runtimes fold the cast when loading."""
    casts = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.nbytes < EXTERNAL_BYTES:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    for cast in reversed(casts):
        graph.node.insert(0, cast)
