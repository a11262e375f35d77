"""Write reference modules as ONNX graphs with the contract's names, their large weights in one file beside them.

Graphs saved together share that file: equal tensors are stored once. One tensor is in memory at a time, so that a model
of any size can be written from weights that are memory-mapped.
"""
import ast
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import passes
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import (
    materialize_reshape_shape_rule,
    remove_optional_bias_from_conv_rule,
    squeeze_reshape_1d_rule,
    unsqueeze_unsqueeze_rule,
)
from torch import nn

from caphuman_edge.export.graphs import example_inputs
from caphuman_edge.runtime.contract import GraphSpec

OPSET = 18
EXTERNAL_BYTES = 1024  # smaller tensors stay inside the graph
ALIGNMENT = 64  # bytes
WEIGHTS = "weights.bin"
RULES = (materialize_reshape_shape_rule, remove_optional_bias_from_conv_rule, squeeze_reshape_1d_rule,
         unsqueeze_unsqueeze_rule)  # of onnxscript's, those that find something in our graphs
FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"  # where the exporter notes what it computed a weight from
Storage = Literal["exact", "f16", "f32"]  # halves where that loses nothing; wherever they do not overflow; never


def trace(module: nn.Module, spec: GraphSpec) -> ir.Model:
    """The module as an ONNX model whose inputs and outputs are the contract's; its weights are the module's own."""
    inputs = example_inputs(spec.inputs, seed=0)
    with _quiet():
        program = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, opset_version=OPSET, verbose=False, optimize=False,
            input_names=[tensor.name for tensor in spec.inputs], output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=_dynamic_shapes(module, spec))
    assert program is not None
    _simplify(program.model)
    _name_transposed(program.model.graph)
    for node in program.model.graph:  # where in the source a node came from: bulk that nobody reads in a bundle
        node.doc_string = None
        node.metadata_props.clear()
    return program.model


def save(models: Mapping[str, ir.Model], folder: Path, storage: Storage = "exact") -> str:
    """Write `models` (by file name) to a folder with one shared weights file.

    Halves are float16 plus a cast, which runtimes fold when they load. Returns the precision that the large tensors are
    stored in: "f16", "f32", or "mixed".
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / WEIGHTS, "wb") as file:
        pool = WeightPool(file)
        for name, model in models.items():
            _compact_embeddings(model.graph)
            _store_weights(model.graph, pool, storage)
            ir.save(model, folder / name)
    if not pool.places:
        (folder / WEIGHTS).unlink()
    return pool.precision


class WeightPool:
    """One external-data file; a tensor that is already in it is not written again."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.places: dict[bytes, int] = {}  # digest: offset
        self.kinds: set[str] = set()  # of the floats in it

    def put(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        """The array as a reference into the file."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data  # no copy
        digest = hashlib.sha256(data).digest()
        if digest not in self.places:
            self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
            self.places[digest] = self.file.tell()
            self.file.write(data)
        if array.dtype.kind == "f":
            self.kinds.add(f"f{8 * array.itemsize}")
        return ir.ExternalTensor(WEIGHTS, self.places[digest], data.nbytes, ir.DataType.from_numpy(array.dtype),
                                 shape=ir.Shape(array.shape), name=name, base_dir=Path(self.file.name).parent)

    @property
    def precision(self) -> str:
        """Of the tensors in the file; small ones, which stay in the graphs, do not count."""
        return self.kinds.copy().pop() if len(self.kinds) == 1 else "mixed" if self.kinds else "f32"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own deprecations, and packages that it would like to find, are no business of a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def _name_transposed(graph: ir.Graph) -> None:
    """Give weights that the exporter transposed their parameters' names again: `quant` knows layers by those."""
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer():
            origins = ast.literal_eval(weight.metadata_props.get(FOLDED_FROM, "[]"))
            if len(origins) == 1 and origins[0] not in graph.initializers:
                weight.name = origins[0]


def _simplify(model: ir.Model) -> None:
    """What torch's own `optimize` does but for one rule, slices to splits, which took half of a large graph's time."""
    for _ in range(2):  # what one pass rewrites, the next may fold
        fold_constants(model, onnx_shape_inference=True)
        rewrite(model, RULES)
    passes.Sequential(
        common.RemoveUnusedNodesPass(), common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(), common.CommonSubexpressionEliminationPass(), common.OutputFixPass(),
        common.NameFixPass())(model)


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


def _store_weights(graph: ir.Graph, pool: WeightPool, storage: Storage) -> None:
    """Move every large tensor to the pool, as halves where `storage` says so."""
    for value in list(graph.initializers.values()):
        assert value.const_value is not None and value.name is not None
        if value.const_value.nbytes < EXTERNAL_BYTES:
            if isinstance(value.const_value, ir.ExternalTensor):  # a half in the file that the graph was read from
                value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
            continue
        array = value.const_value.numpy()
        half = _half(array, storage)
        if half is None:
            value.const_value = pool.put(value.name, array)
        else:
            _insert_cast(graph, value, pool.put(f"{value.name}.half", half))


def _half(array: np.ndarray, storage: Storage) -> np.ndarray | None:
    """The float32 array as float16, or None where it has to stay as it is."""
    if array.dtype != np.float32 or storage == "f32":
        return None
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    good = np.isfinite(half).all() if storage == "f16" else np.array_equal(half.astype(np.float32), array)
    return half if good else None


def _insert_cast(graph: ir.Graph, value: ir.Value, stored: ir.ExternalTensor) -> None:
    """Let whoever reads the value read a cast of what is stored."""
    half = ir.val(stored.name, ir.DataType.FLOAT16, stored.shape, const_value=stored)
    graph.register_initializer(half)
    cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT})
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    del graph.initializers[str(value.name)]
    cast.outputs[0].name, cast.outputs[0].shape = value.name, value.shape
    cast.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(graph[0], cast)


def _compact_embeddings(graph: ir.Graph) -> None:
    """Store only the non-zero rows of embedding tables that are mostly zero: the words a small model never met.

    ids -> index of the stored row (row 0 is zeros) -> row. Exact.
    """
    for node in list(graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is not None and table.const_value is not None and table.name in graph.initializers \
                and len(table.uses()) == 1 and node.attributes.get_int("axis", 0) == 0:
            rows = table.const_value.numpy()
            used = np.flatnonzero(rows.any(axis=-1)) if rows.ndim == 2 else np.arange(len(rows))
            if 2 * len(used) < len(rows) and len(used) < np.iinfo(np.uint16).max:
                _replace_table(graph, node, table, rows, used)


def _replace_table(graph: ir.Graph, gather: ir.Node, table: ir.Value, rows: np.ndarray, used: np.ndarray) -> None:
    place = np.zeros(len(rows), np.uint16)
    place[used] = 1 + np.arange(len(used))
    stored = np.concatenate([np.zeros_like(rows[:1]), rows[used]])
    table.const_value, table.shape = ir.tensor(stored, name=table.name), ir.Shape(stored.shape)
    places = ir.val(f"{table.name}.row_of_token", const_value=ir.tensor(place, name=f"{table.name}.row_of_token"))
    graph.register_initializer(places)
    lookup = ir.node("Gather", [places, gather.inputs[1]])
    index = ir.node("Cast", lookup.outputs, attributes={"to": ir.DataType.INT64})
    gather.replace_input_with(1, index.outputs[0])
    graph.insert_before(gather, [lookup, index])
