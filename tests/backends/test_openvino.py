"""OpenVINO as a backend: what ONNX Runtime computes, from a cache that cannot spoil it."""
import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from caphuman_edge.runtime import Bundle, Pipeline
from caphuman_edge.runtime.backends import Graph, open_backend
from caphuman_edge.runtime.contract import TensorSpec
from caphuman_edge.runtime.errors import BadInput, BundleError, ShapeMismatch
from caphuman_edge.runtime.machine import Machine
from caphuman_edge.runtime.selftest import psnr_db

openvino = pytest.importorskip("openvino")
GRAPHS = [name for name, part in Bundle.open().manifest.components.items() if part.inputs]
ROUNDED = [name for name in GRAPHS if Bundle.open().component(name).forms["onnx"].precision == "int8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def selftest():
    with np.load(Bundle.open().file("selftest")) as stored:
        return {key: stored[key] for key in stored.files}


@pytest.fixture
def chain(tmp_path) -> Path:
    """A graph whose outputs are one tensor's after another: a = relu(x), z = a, b = -a, for any number of rows."""
    rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xzab"]
    nodes = [helper.make_node("Relu", ["x"], ["inner"]), helper.make_node("Identity", ["inner"], ["a"]),
             helper.make_node("Identity", ["a"], ["z"]), helper.make_node("Neg", ["a"], ["b"])]
    graph = helper.make_graph(nodes, "chain", rows[:1], rows[1:])
    (tmp_path / "graph").mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
              tmp_path / "graph" / "chain.onnx")
    return tmp_path / "graph" / "chain.onnx"


@pytest.fixture
def compiled(monkeypatch) -> list[bool]:
    """For each model that is compiled from now on, whether it came out of the cache."""
    backend, taken = open_backend("openvino"), []

    def recording(name):
        original = getattr(backend._File, name)

        def record(*arguments):
            loaded = original(*arguments)
            taken.append(name == "_imported")
            return loaded

        monkeypatch.setattr(backend._File, name, record)

    recording("_imported")
    recording("_made")
    return taken


def inputs_of(graph: Graph, selftest: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {spec.name: selftest[f"{name}/in/{spec.name}"].astype(spec.dtype) for spec in graph.inputs}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_computes_what_onnx_runtime_computes(selftest, name):
    graph, other = (Machine(backend, threads=1).load(Bundle.open(), name) for backend in ("openvino", "ort"))
    inputs = inputs_of(other, selftest, name)
    found, expected = graph(inputs), other(inputs)
    assert {tensor: array.shape for tensor, array in found.items()} == {
        tensor: array.shape for tensor, array in expected.items()}
    for tensor in (tensor for tensor in expected if tensor.startswith("gate_")):
        assert (found[tensor] != expected[tensor]).mean() <= 0.001
    numbers = [tensor for tensor in expected if not tensor.startswith("gate_")]
    if name not in ROUNDED:
        assert min(psnr_db(found[tensor], expected[tensor]) for tensor in numbers) > 90
    for tensor in numbers if name in ROUNDED else ():  # the two round differently, each as well as the other
        ours, theirs = (psnr_db(arrays[tensor], selftest[f"{name}/out/{tensor}"]) for arrays in (found, expected))
        assert ours > theirs - 3, tensor


def test_one_seed_is_one_portrait_on_both_backends(stranger):
    portraits = []
    for backend in ("ort", "openvino"):
        with Pipeline(Bundle.open(), backend, renderer="numpy", precision="f32") as pipe:
            person = stranger(pipe)
            *_, last = pipe.generate(person, person.head.posed(yaw=20.0), steps=4, prompt="a smiling woman", seed=3)
            portraits.append(last.image)
    one, other = (portrait.pixels.astype(np.float64) for portrait in portraits)
    assert one.std() > 10  # a picture
    assert 10 * np.log10(255**2 / max(np.mean((one - other) ** 2), 1e-9)) >= 40
    assert [portrait.recipe["backend"] for portrait in portraits] == ["ort", "openvino"]


def test_its_own_format_is_preferred_and_computes_the_same(chain, tmp_path):
    openvino.save_model(openvino.Core().read_model(chain), tmp_path / "chain.xml", compress_to_fp16=False)
    backend = open_backend("openvino")
    assert backend.FORMATS[0] == "openvino"
    x = np.array([[1, -1], [2, 3]], np.float32)
    found, expected = (backend.load(path)({"x": x}) for path in (tmp_path / "chain.xml", chain))
    for name in "azb":
        np.testing.assert_array_equal(found[name], expected[name])


def test_tensors_keep_their_names_where_openvino_merges_them(chain):
    for _ in ("compiled", "from the cache"):
        graph = open_backend("openvino").load(chain)
        assert graph.inputs == (TensorSpec("x", ("x.0", 2)),)
        assert [spec.name for spec in graph.outputs] == ["z", "a", "b"]
        outputs = graph({"x": np.array([[1, -1]], np.float32)})
        np.testing.assert_array_equal(np.concatenate([outputs[name] for name in "zab"]), [[1, 0], [1, 0], [-1, 0]])


def test_outputs_stay_when_the_graph_is_called_again(chain):
    graph = open_backend("openvino").load(chain)
    first = graph({"x": np.ones((1, 2), np.float32)})["a"]
    graph({"x": np.zeros((1, 2), np.float32)})
    np.testing.assert_array_equal(first, [[1, 1]])


def test_strided_arrays_are_taken_and_wrong_ones_refused(chain):
    graph = open_backend("openvino").load(chain)
    rows = np.arange(16, dtype=np.float32).reshape(4, 4)[:, ::2]
    np.testing.assert_array_equal(graph({"x": rows})["a"], rows)
    with pytest.raises(ShapeMismatch, match="x has shape"):
        graph({"x": np.ones((4, 3), np.float32)})


def test_int8_weights_do_not_round_what_goes_through_them():
    """Left alone, OpenVINO's CPU quantises activations there; a user who asked for nothing gets ort's numbers."""
    config = open_backend("openvino")._config("CPU", None, None)
    core = openvino.Core()
    model = core.compile_model(Bundle.open().file("text_encoder", "onnx"), "CPU", config)
    assert model.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert model.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert core.compile_model(Bundle.open().file("text_encoder", "onnx"), "CPU", {}).get_property(
        "DYNAMIC_QUANTIZATION_GROUP_SIZE") != 0  # or this test and that setting have no purpose any more


def test_threads_are_limited():
    assert open_backend("openvino")._config("CPU", None, 1)["INFERENCE_NUM_THREADS"] == 1
    assert "INFERENCE_NUM_THREADS" not in open_backend("openvino")._config("CPU", None, None)


def test_a_device_without_float32_computes_in_what_it_has(monkeypatch):
    backend = open_backend("openvino")
    npu = dataclasses.make_dataclass("Npu", [])()
    npu.get_property = lambda place, name: ["FP16", "INT8"]
    monkeypatch.setattr(backend, "_core", lambda: npu)
    assert "INFERENCE_PRECISION_HINT" not in backend._config("NPU", None, 2)
    assert backend._config("NPU", "f16", None)["INFERENCE_PRECISION_HINT"] == "f16"
    with pytest.raises(BadInput, match="no precision f32 here; choose f16"):
        backend._config("NPU", "f32", None)


def test_devices_are_named_as_a_user_types_them(monkeypatch):
    backend = open_backend("openvino")
    machine = dataclasses.make_dataclass("Machine", [])()
    machine.available_devices = ["NPU", "GPU.1", "GPU.0", "CPU"]
    monkeypatch.setattr(backend, "_core", lambda: machine)
    assert backend.devices() == ("cpu", "gpu", "gpu.0", "gpu.1", "npu", "auto", "all")


@pytest.mark.parametrize("settings", [{"device": "tpu"}, {"device": "CPU"}, {"precision": "int8"}, {"threads": 0}])
def test_settings_that_it_does_not_have_are_refused(chain, settings):
    with pytest.raises(BadInput) as caught:
        open_backend("openvino").load(chain, **settings)
    assert str(next(iter(settings.values()))) in str(caught.value) and "\n" not in str(caught.value)


def test_a_device_that_may_be_any_of_this_machine_is_taken(chain):
    for device in ("cpu", "auto", "all"):
        graph = open_backend("openvino").load(chain, device=device, threads=1)
        np.testing.assert_array_equal(graph({"x": np.ones((1, 2), np.float32)})["b"], [[-1, -1]])


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"not a graph"),
    lambda path: path.write_bytes(path.read_bytes()[:60]),
])
def test_a_damaged_graph_is_refused_in_one_line_that_names_it(chain, damage):
    damage(chain)
    with pytest.raises(BundleError) as caught:
        open_backend("openvino").load(chain)
    message = str(caught.value)
    assert str(chain) in message and "rebuild" in message and "\n" not in message and "src/" not in message


def test_lengths_that_a_device_must_know_are_compiled_when_they_come(chain, compiled, monkeypatch):
    """As on an NPU, which has no free lengths."""
    monkeypatch.setattr(open_backend("openvino"), "FIXED_LENGTHS", ("CPU",))
    graph = open_backend("openvino").load(chain)
    assert graph.inputs == (TensorSpec("x", ("x.0", 2)),) and compiled == []
    for rows in (1, 3, 1):
        np.testing.assert_array_equal(graph({"x": np.ones((rows, 2), np.float32)})["b"], np.full((rows, 2), -1))
    assert compiled == [False, False]
    open_backend("openvino").load(chain)({"x": np.ones((3, 2), np.float32)})
    assert compiled == [False, False, True]


def test_a_graph_is_compiled_once_and_then_taken_from_the_cache(chain, compiled, tmp_path):
    for _ in range(2):
        open_backend("openvino").load(chain)
    assert compiled == [False, True]
    (entry,) = (tmp_path / "cache" / "compiled").iterdir()
    assert entry.name.startswith(f"openvino-{openvino.get_version().split('-')[0]}-CPU-")


def test_the_cache_may_lie_elsewhere(chain, compiled, tmp_path):
    for _ in range(2):
        open_backend("openvino").load(chain, cache_dir=tmp_path / "here")
    assert compiled == [False, True] and not (tmp_path / "cache" / "compiled").exists()


@pytest.mark.parametrize("damage", [
    lambda blob: blob.write_bytes(b"\0" * blob.stat().st_size),
    lambda blob: blob.write_bytes(blob.read_bytes()[:-64] + os.urandom(64)),
    lambda blob: os.truncate(blob, blob.stat().st_size // 2),
    lambda blob: blob.write_bytes(b""),
])
def test_a_damaged_entry_is_not_believed(tmp_path, compiled, selftest, damage):
    """Of a blob whose weights were overwritten, OpenVINO would make another network without a word."""
    path = Bundle.open().file("preview_decoder", "onnx")
    first = open_backend("openvino").load(path)
    (blob,) = (tmp_path / "cache" / "compiled").rglob("*.blob")
    damage(blob)
    again = open_backend("openvino").load(path)
    inputs = inputs_of(first, selftest, "preview_decoder")
    assert compiled == [False, False]
    np.testing.assert_array_equal(first(inputs)["sample"], again(inputs)["sample"])


def test_changed_weights_beside_the_graph_are_noticed(tmp_path, compiled):
    weights = onnx.numpy_helper.from_array(np.full((1, 2), 2, np.float32), "weights")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy")
    model = helper.make_model(helper.make_graph([helper.make_node("Mul", ["x", "weights"], ["y"])], "g", [x], [y],
                                                [weights]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "g.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    for factor in (2, 5):
        (tmp_path / "weights.bin").write_bytes(np.full((1, 2), factor, np.float32).tobytes())
        graph = open_backend("openvino").load(tmp_path / "g.onnx")
        np.testing.assert_array_equal(graph({"x": np.ones((1, 2), np.float32)})["y"], [[factor, factor]])
    assert compiled == [False, False]
