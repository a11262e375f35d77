"""OpenVINO's graphs cut in two: what the whole computes, with half of the weights in memory."""
import numpy as np
import pytest

from caphuman_edge.runtime import Bundle
from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.contract import GraphSpec, TensorSpec
from caphuman_edge.runtime.errors import ShapeMismatch
from caphuman_edge.runtime.machine import EACH_STEP, Machine
from caphuman_edge.runtime.selftest import psnr_db

openvino = pytest.importorskip("openvino")
op = pytest.importorskip("openvino.opset13")
halves = pytest.importorskip("caphuman_edge.runtime.backends.openvino_halves").halves
WIDTH, LAYERS = 8, 6
SPEC = GraphSpec("network", (TensorSpec("x", ("batch", WIDTH)),),
                 (TensorSpec("early", ("batch", WIDTH)), TensorSpec("late", ("batch", WIDTH))))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))


def network(rows: int = -1) -> openvino.Model:
    """Layers with weights of equal size, each added to what it reads; the first has an output of its own."""
    rng = np.random.default_rng(0)
    x = op.parameter([rows, WIDTH], np.float32, name="x")
    x.output(0).get_tensor().set_names({"x"})
    node, outputs = x, []
    for layer in range(LAYERS):
        weights = op.constant(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32))
        coarse = op.fake_quantize(node, *(op.constant(np.float32(v)) for v in (-4, 4, -4, 4)), 256)
        node = op.add(node, op.tanh(op.matmul(coarse, weights, False, False)))
        if layer in (0, LAYERS - 1):
            outputs.append(op.multiply(node, op.constant(np.float32(2))))
            outputs[-1].output(0).get_tensor().set_names({"late" if layer else "early"})
    return openvino.Model([op.result(each) for each in outputs], [x], "network")


@pytest.fixture
def file(tmp_path):
    (tmp_path / "graph").mkdir()
    openvino.save_model(network(), tmp_path / "graph" / "network.xml", compress_to_fp16=False)
    return tmp_path / "graph" / "network.xml"


@pytest.fixture
def rows():
    return np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)


def weights_of(model: openvino.Model) -> int:
    return sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")


def test_each_half_holds_about_half_of_the_weights_and_hands_over_sums_alone():
    whole = weights_of(network(3))
    first, second = halves(network(3))
    assert all(0.4 <= weights_of(half) / whole <= 0.6 for half in (first, second))
    handed_over = {name: port for port in first.outputs for name in port.get_names() if name.startswith("cut.")}
    assert {port.get_node().input_value(0).get_node().get_type_name() for port in handed_over.values()} == {"Add"}
    assert {port.get_any_name() for port in second.inputs} == handed_over.keys()


def test_a_graph_without_sums_stays_whole():
    x = op.parameter([1, WIDTH], np.float32, name="x")
    y = op.matmul(op.matmul(x, op.constant(np.eye(WIDTH, dtype=np.float32)), False, False),
                  op.constant(np.eye(WIDTH, dtype=np.float32)), False, False)
    model = openvino.Model([op.result(y)], [x], "plain")
    assert halves(model) == [model]


def test_halves_compute_what_the_whole_computes(file, rows):
    whole, cut = (open_backend("openvino").load(file, by_shape=SPEC, in_halves=choice) for choice in (False, True))
    for count in (3, 1, 3):
        expected, found = whole({"x": rows[:count]}), cut({"x": rows[:count]})
        assert found.keys() == {"early", "late"}
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_halves_are_kept_on_disk_and_made_anew_where_they_are_damaged(file, rows, tmp_path, monkeypatch):
    graph = open_backend("openvino").load(file, by_shape=SPEC, in_halves=True)
    expected = graph({"x": rows})["late"]
    blobs = sorted((tmp_path / "cache" / "compiled").rglob("*.blob"))
    assert [blob.parent.name for blob in blobs] == ["0", "1"]
    reads, file_class = [], open_backend("openvino")._File
    read = file_class._read
    monkeypatch.setattr(file_class, "_read", lambda *args: reads.append(1) or read(*args))
    np.testing.assert_array_equal(graph({"x": rows})["late"], expected)
    assert reads == []
    blobs[1].write_bytes(blobs[1].read_bytes()[:100])
    np.testing.assert_array_equal(graph({"x": rows})["late"], expected)
    assert reads == [1]


@pytest.mark.parametrize("name", EACH_STEP[:3])
def test_the_miniatures_graphs_are_cut_and_compute_the_same(name):
    bundle = Bundle.open()
    with np.load(bundle.file("selftest")) as stored:
        inputs, reference = ({key.rpartition("/")[2]: stored[key].astype(np.float32) for key in stored.files
                              if key.startswith(f"{name}/{side}/")} for side in ("in", "out"))
    path = bundle.root / bundle.form(name, ["onnx"]).path
    model = openvino.Core().read_model(path)
    model.reshape({port.get_any_name(): inputs[port.get_any_name()].shape for port in model.inputs})
    assert len(halves(model)) == 2
    found, expected = (Machine("openvino", precision="f32", memory=memory).load(bundle, name)(inputs)
                       for memory in ("stage", "keep"))
    assert found.keys() == expected.keys()
    for tensor, array in reference.items():  # the last bits of a float decide roundings to 8 bits, here or there
        assert psnr_db(found[tensor], array) > psnr_db(expected[tensor], array) - 1, tensor


def test_a_graph_that_is_prepared_does_not_compile_at_its_call(file, rows, monkeypatch):
    graph = open_backend("openvino").load(file, by_shape=SPEC)
    graph.prepare({"x": rows.shape})
    monkeypatch.setattr(open_backend("openvino"), "_compiled_for", None)
    assert graph({"x": rows})["late"].shape == rows.shape


def test_a_file_that_holds_another_graph_is_refused_when_it_is_read(file, rows):
    other = GraphSpec("network", (TensorSpec("y", ("batch", WIDTH)),), SPEC.outputs)
    for in_halves in (False, True):
        graph = open_backend("openvino").load(file, by_shape=other, in_halves=in_halves)
        with pytest.raises(ShapeMismatch, match=r"network\.xml"):
            graph({"y": rows})
