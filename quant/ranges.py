"""Which numbers a layer's activations are: histograms from runs of the float graph on recorded inputs."""
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from caphuman_edge.quant.histogram import Histogram
from caphuman_edge.quant.rewrite import LayerGrids, layers_of, scores_of
from caphuman_edge.runtime.backends import Arrays

CHUNK_BYTES = 1 << 30  # of activations kept at a time
TEXTS = 2  # the largest text batch
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
Histograms = dict[str, Histogram]


def observe(path: Path, inputs: Callable[[], Iterable[Arrays]], threads: int | None = None,
            report: Callable[[str], None] = lambda line: None) -> Histograms:
    """A histogram of every value that a layer reads, of what convolutions give, and of queries and keys as they meet.

    By `LAYER`, `LAYER/out` and `LAYER/scores`; layers that read the same value share its histogram. `inputs()` goes
    through the recorded inputs one at a time, once for each chunk of values whose arrays stay below CHUNK_BYTES.
    """
    graph = ir.load(path).graph
    names = {f"{layer.name}{end}": str(value.name) for layer in layers_of(graph)
             for end, value in (("", layer.input), *([("/out", layer.node.outputs[0])] * layer.is_convolution))}
    names |= {name: str(value.name) for scores in scores_of(graph) for _, name, value in scores.sides()}
    values = {str(value.name): value for value in _values(graph)}
    found: Histograms = {}
    for chunk in _chunks({name: _bytes(values[name]) for name in dict.fromkeys(names.values())}):
        _count(path, chunk, inputs(), found, threads)
        report(f"ranges of {len(found)} of {len(set(names.values()))} activations")
    return {key: found[name] for key, name in names.items()}


def grids(histograms: Mapping[str, Histogram], clip: float, affine: bool) -> dict[str, LayerGrids]:
    """The grids of all layers; of histograms that layers share one is made."""
    made = {id(histogram): histogram.grid(clip, affine) for histogram in histograms.values()}
    by_key = {key: made[id(histogram)] for key, histogram in histograms.items()}
    return {key: LayerGrids(grid, by_key.get(f"{key}/out")) for key, grid in by_key.items() if not key.endswith("/out")}


def save_histograms(histograms: Histograms, path: Path) -> None:
    """Write them to an .npz, shared ones once."""
    each = list({id(histogram): histogram for histogram in histograms.values()}.values())
    places = {id(histogram): place for place, histogram in enumerate(each)}
    np.savez_compressed(path, counts=np.array([one.counts for one in each]),
                        limits=np.array([(one.reach, one.low, one.high) for one in each]),
                        names=np.array(list(histograms)), places=[places[id(one)] for one in histograms.values()])


def load_histograms(path: Path) -> Histograms:
    """What `save_histograms` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        counts, limits, names, places = (stored[name] for name in ("counts", "limits", "names", "places"))
    each = [Histogram(row, *map(float, ends)) for row, ends in zip(counts, limits, strict=True)]
    return {str(name): each[place] for name, place in zip(names, places, strict=True)}


def open_session(model: ir.Model, folder: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A changed graph whose large weights still lie in its folder."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
    if threads:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options,
                                        providers=["CPUExecutionProvider"])


def _count(path: Path, chunk: Sequence[str], inputs: Iterable[Arrays], found: Histograms, threads: int | None) -> None:
    """Fill the histograms of these values."""
    model = ir.load(path)
    given = {str(value.name) for value in model.graph.inputs}
    values = {str(value.name): value for value in _values(model.graph)}
    inner = [name for name in chunk if name not in given]
    for name in inner:
        values[name].dtype = ir.DataType.FLOAT
    model.graph.outputs[:] = [values[name] for name in inner]
    session = open_session(model, path.parent, threads)
    wanted = {value.name for value in session.get_inputs()}
    found.update({name: Histogram() for name in chunk})
    for arrays in inputs:
        fed = {name: array for name, array in arrays.items() if name in wanted}
        for name, array in zip(inner, session.run(inner, fed), strict=True):
            found[name].add(array)
        for read in given & {*chunk}:
            found[read].add(arrays[read])


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from (value for node in graph for value in node.outputs)


def _chunks(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for name, size in sizes.items():
        if chunk and sum(sizes[other] for other in chunk) + size > CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(name)
    yield chunk


def _bytes(value: ir.Value) -> int:
    """Of the value's array; a symbolic length counts as that of the largest text batch."""
    return 4 * int(np.prod([n if isinstance(n, int) else TEXTS for n in value.shape or ()]))
