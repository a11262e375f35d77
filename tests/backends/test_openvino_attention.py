"""Attention by our own kernels in OpenVINO's graphs: where queries and keys are rounded, and nowhere else."""
import numpy as np
import pytest

from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.contract import GraphSpec, TensorSpec
from caphuman_edge.runtime.kernels import ISA_LIMIT, attention_kernels
from caphuman_edge.runtime.selftest import psnr_db

openvino = pytest.importorskip("openvino")
op = pytest.importorskip("openvino.opset13")
ours = pytest.importorskip("caphuman_edge.runtime.backends.openvino_attention")
pytestmark = pytest.mark.skipif(not attention_kernels(), reason="no kernel was compiled for this machine")

HEADS, WIDTH, TOKENS = 2, 16, 576
ROWS = HEADS * WIDTH
SPEC = GraphSpec("attention", (TensorSpec("x", ("batch", TOKENS, ROWS)),), (TensorSpec("y", ("batch", TOKENS, ROWS)),))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))


def heads_of(rows, order, tokens=TOKENS):
    return op.transpose(op.reshape(rows, op.constant(np.array([-1, tokens, HEADS, WIDTH])), False),
                        op.constant(np.array(order)))


def rounded(value, largest=4.0):
    """To int8 about 0, to whole numbers and back: what OpenVINO makes of QuantizeLinear and DequantizeLinear."""
    step = largest / 128
    ends = (np.float32(v) for v in (-largest, largest - step, -128, 127))
    whole = op.convert(op.convert(op.fake_quantize(value, *map(op.constant, ends), 256), "i8"), "f32")
    zero = op.convert(op.constant(np.int8(0)), "f32")
    return op.multiply(op.subtract(whole, zero), op.constant(np.float32(step)))


def network(rounds=rounded, tokens=TOKENS):
    """Self-attention between linear layers, scaled by the root of what scores are on either side."""
    rng = np.random.default_rng(0)
    x = op.parameter([-1, tokens, ROWS], np.float32, name="x")
    x.output(0).get_tensor().set_names({"x"})
    q, k, v, last = (op.constant(weights.astype(np.float32) * np.float32(ROWS ** -0.5))
                     for weights in rng.standard_normal((4, ROWS, ROWS)))
    root = op.constant(np.float32(WIDTH ** -0.25))
    queries = rounds(op.multiply(heads_of(op.matmul(x, q, False, False), [0, 2, 1, 3], tokens), root))
    keys = rounds(op.multiply(heads_of(op.matmul(x, k, False, False), [0, 2, 3, 1], tokens), root))
    values = heads_of(op.matmul(x, v, False, False), [0, 2, 1, 3], tokens)
    sums = op.matmul(op.softmax(op.matmul(queries, keys, False, False), -1), values, False, False)
    rows = op.reshape(op.transpose(sums, op.constant(np.array([0, 2, 1, 3]))),
                      op.constant(np.array([-1, tokens, ROWS])), False)
    y = op.matmul(rows, last, False, False)
    y.output(0).get_tensor().set_names({"y"})
    return openvino.Model([op.result(y)], [x], "attention")


def attentions(model):
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "Attention"]


def rewritten(model, batch=2):
    model.reshape([batch, *model.input().get_partial_shape()[1:]])
    ours.use_attention(model, ours.kernel_here(2))
    return model


@pytest.fixture
def file(tmp_path):
    (tmp_path / "graph").mkdir()
    openvino.save_model(network(), tmp_path / "graph" / "attention.xml", compress_to_fp16=False)
    return tmp_path / "graph" / "attention.xml"


@pytest.fixture
def rows():
    return {"x": np.random.default_rng(1).standard_normal((2, TOKENS, ROWS)).astype(np.float32)}


def test_attention_of_rounded_queries_and_keys_becomes_one_node():
    model = rewritten(network())
    assert len(attentions(model)) == 1
    assert not {"Softmax", "FakeQuantize", "Transpose"} & {node.get_type_name() for node in model.get_ops()}
    assert model.output().get_shape() == [2, TOKENS, ROWS]


def each_head_otherwise(value):
    return op.multiply(rounded(value), op.constant(np.array([1, 2], np.float32).reshape(HEADS, 1, 1)))


def shifted(value):
    return op.add(rounded(value), op.constant(np.float32(1)))


def on_a_grid_that_moves_zero(value):
    return op.fake_quantize(value, *(op.constant(np.float32(end)) for end in (-1, 3, -128, 127)), 256)


def in_float(value):
    return value


@pytest.mark.parametrize("rounds", [in_float, each_head_otherwise, shifted, on_a_grid_that_moves_zero])
def test_what_is_not_rounded_or_not_by_one_number_stays(rounds):
    assert not attentions(rewritten(network(rounds)))


def test_few_keys_stay():
    assert not attentions(rewritten(network(tokens=64)))


@pytest.mark.parametrize("limit", ["AVX512_CORE_AMX", "AVX512_CORE_VNNI", "AVX2_VNNI", "AVX2"])
def test_the_graph_computes_the_same(file, rows, monkeypatch, limit):
    """As exact as OpenVINO's own, which rounds alike; held against the graph in float."""
    monkeypatch.setenv(ISA_LIMIT, limit)  # OpenVINO read it long ago, our kernels ask each time
    if not attention_kernels():
        pytest.skip("this CPU has no such instructions")
    found = open_backend("openvino").load(file, by_shape=SPEC, precision="fast", threads=2)(rows)["y"]
    core = openvino.Core()
    exact, theirs = (core.compile_model(network(rounds), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(rows)[0]
                     for rounds in (in_float, rounded))
    assert psnr_db(found, exact) > psnr_db(theirs, exact) - 1


def test_from_the_cache_it_is_the_same_to_the_bit(file, rows):
    one, other = (open_backend("openvino").load(file, by_shape=SPEC, precision="fast")(rows)["y"] for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_another_kernel_is_another_entry_of_the_cache(file, rows, monkeypatch, tmp_path):
    backend = open_backend("openvino")
    backend.load(file, by_shape=SPEC, precision="fast")(rows)
    before = set((tmp_path / "cache").rglob("*.blob"))
    monkeypatch.setattr(backend, "kernel_here", lambda threads: None)
    backend.load(file, by_shape=SPEC, precision="fast")(rows)
    assert len(set((tmp_path / "cache").rglob("*.blob")) - before) == 1


@pytest.mark.parametrize("precision", [None, "f32"])
def test_who_asks_for_float_gets_openvinos_own(file, rows, precision, monkeypatch):
    monkeypatch.setattr(ours.Attention, "evaluate", lambda *_: pytest.fail("our kernel ran"))
    open_backend("openvino").load(file, by_shape=SPEC, precision=precision)(rows)


def test_in_halves_it_computes_the_same(file, rows):
    backend = open_backend("openvino")
    whole, held = (backend.load(file, by_shape=SPEC, precision="fast", in_halves=halves)(rows)["y"]
                   for halves in (False, True))
    np.testing.assert_array_equal(held, whole)


def test_memory_that_runs_out_is_told(file, rows, monkeypatch):
    def full(*_, **__):
        raise MemoryError("attention of 576 keys needs more memory than there is; close other programs")

    graph = open_backend("openvino").load(file, by_shape=SPEC, precision="fast")
    graph(rows)
    monkeypatch.setattr(ours, "attention", full)
    with pytest.raises(Exception, match="needs more memory than there is") as caught:
        graph(rows)
    assert type(caught.value).__name__ in ("BundleError", "MemoryError")
