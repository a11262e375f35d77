"""ONNX Runtime as a backend: arrays in, arrays out, and one line for whatever does not fit."""
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.bundle import Bundle, new_bundle, record_files, write_manifest
from caphuman_edge.runtime.contract import NANO, TensorSpec, graphs
from caphuman_edge.runtime.errors import BadInput, BundleError, CapHumanError, ShapeMismatch
from caphuman_edge.runtime.manifest import Component, Form, Manifest
from caphuman_edge.runtime.schedule import Schedule

WEIGHTS = np.arange(6, dtype=np.float32).reshape(2, 3)


def write_product(path: Path, external: bool = False) -> None:
    """scores = rows @ WEIGHTS for any number of rows, and total = scores * scale."""
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 2])
    scale = helper.make_tensor_value_info("scale", TensorProto.FLOAT, ["batch", 1])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("scores", "total")]
    nodes = [helper.make_node("MatMul", ["rows", "weights"], ["scores"]),
             helper.make_node("Mul", ["scores", "scale"], ["total"])]
    weights = numpy_helper.from_array(WEIGHTS, "weights")
    graph = helper.make_graph(nodes, "product", [rows, scale], outputs, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)


@pytest.fixture
def product(tmp_path):
    write_product(tmp_path / "product.onnx")
    return open_backend("ort").load(tmp_path / "product.onnx")


def arrays(rows: int = 4) -> dict[str, np.ndarray]:
    return {"rows": np.ones((rows, 2), np.float32), "scale": np.full((rows, 1), 2, np.float32)}


def test_a_graph_computes_and_names_its_outputs(product):
    outputs = product(arrays())
    assert list(outputs) == ["scores", "total"]
    np.testing.assert_array_equal(outputs["scores"], np.ones((4, 2)) @ WEIGHTS)
    np.testing.assert_array_equal(outputs["total"], 2 * outputs["scores"])


def test_a_graph_knows_what_it_takes_and_gives(product):
    assert product.inputs == (TensorSpec("rows", ("batch", 2)), TensorSpec("scale", ("batch", 1)))
    assert product.outputs == (TensorSpec("scores", ("batch", 3)), TensorSpec("total", ("batch", 3)))


def test_a_symbolic_length_is_free_between_calls_and_one_number_within(product):
    for rows in (1, 5):
        assert product(arrays(rows))["scores"].shape == (rows, 3)
    with pytest.raises(ShapeMismatch, match=r"scale has shape \(5, 1\), expected \(4, 1\)"):
        product({"rows": arrays(4)["rows"], "scale": arrays(5)["scale"]})


def test_strided_arrays_are_taken(product):
    rows = np.arange(16, dtype=np.float32).reshape(4, 4)[:, ::2]
    np.testing.assert_array_equal(product({**arrays(), "rows": rows})["scores"], rows @ WEIGHTS)


def test_nan_passes_through(product):
    assert np.isnan(product({**arrays(1), "rows": np.full((1, 2), np.nan, np.float32)})["scores"]).all()


@pytest.mark.parametrize(("change", "match"), [
    ({"rows": np.ones((4, 3), np.float32)}, r"rows has shape \(4, 3\), expected \(4, 2\)"),
    ({"rows": np.ones(4, np.float32)}, r"rows has shape \(4,?\), expected"),
    ({"rows": np.ones((4, 2))}, "rows is float64, expected float32"),
    ({"columns": np.ones(1)}, "has no input columns, it takes rows, scale"),
])
def test_wrong_arrays_are_refused_with_both_sides(product, change, match):
    with pytest.raises(ShapeMismatch, match=match):
        product({**arrays(), **change})


def test_a_missing_array_is_named(product):
    with pytest.raises(ShapeMismatch, match="needs scale, got rows"):
        product({"rows": arrays()["rows"]})


def test_weights_may_lie_in_a_file_beside_the_graph(tmp_path):
    write_product(tmp_path / "product.onnx", external=True)
    assert (tmp_path / "weights.bin").stat().st_size == WEIGHTS.nbytes
    graph = open_backend("ort").load(tmp_path / "product.onnx")
    np.testing.assert_array_equal(graph(arrays())["scores"], np.ones((4, 2)) @ WEIGHTS)


def one_line(error: CapHumanError, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"not a graph"),
    lambda path: path.write_bytes(path.read_bytes()[:60]),
    lambda path: (path.parent / "weights.bin").unlink(),
    lambda path: os.truncate(path.parent / "weights.bin", 3),
])
def test_a_damaged_graph_is_refused_in_one_line_that_names_it(tmp_path, damage):
    write_product(tmp_path / "product.onnx", external=True)
    damage(tmp_path / "product.onnx")
    with pytest.raises(BundleError) as caught:
        open_backend("ort").load(tmp_path / "product.onnx")
    one_line(caught.value, str(tmp_path / "product.onnx"), "rebuild")


@pytest.mark.parametrize("settings", [{"device": "gpu"}, {"precision": "bf16"}, {"threads": 0}])
def test_settings_that_it_does_not_have_are_refused(tmp_path, settings):
    write_product(tmp_path / "product.onnx")
    with pytest.raises(BadInput) as caught:
        open_backend("ort").load(tmp_path / "product.onnx", **settings)
    one_line(caught.value, str(next(iter(settings.values()))))


def test_limited_threads_give_the_same_result(tmp_path, product):
    limited = open_backend("ort").load(tmp_path / "product.onnx", threads=1, precision="f32")
    np.testing.assert_array_equal(limited(arrays())["total"], product(arrays())["total"])


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(BadInput, match="backend 'tpu' is unknown; choose one of .*ort"):
        open_backend("tpu")


def test_a_runtime_that_cannot_be_imported_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "caphuman_edge.runtime.backends.ort", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # makes the import fail
    with pytest.raises(BadInput) as caught:
        open_backend("ort")
    one_line(caught.value, "backend ort cannot be loaded", "onnxruntime", "caphuman doctor")


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle of one graph: a preview decoder that repeats the latent's first channel."""
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))
    spec = graphs(NANO)["preview_decoder"]
    with new_bundle(tmp_path / "bundle") as scratch:
        write_preview(scratch / "preview.onnx", spec.inputs[0].shape)
        files = record_files(scratch, [scratch / "preview.onnx"])
        component = Component({"onnx": Form("preview.onnx", files)}, spec.inputs, spec.outputs)
        write_manifest(scratch, Manifest("test", NANO, Schedule(), {"preview_decoder": component}))
    return Bundle.open(tmp_path / "bundle")


def write_preview(path: Path, shape: tuple[int, ...]) -> None:
    latent = helper.make_tensor_value_info("latent_sample", TensorProto.FLOAT, shape)
    sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, ("n", 3, "h", "w"))
    first = numpy_helper.from_array(np.zeros(3, np.int64), "first")
    graph = helper.make_graph([helper.make_node("Gather", ["latent_sample", "first"], ["sample"], axis=1)], "preview",
                              [latent], [sample], [first])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_a_bundle_loads_its_graph_with_the_contract_s_shapes(bundle):
    graph = bundle.graph("preview_decoder", threads=1)
    assert graph.outputs == graphs(NANO)["preview_decoder"].outputs
    latent = np.random.default_rng(0).standard_normal((1, 4, 32, 32), dtype=np.float32)
    np.testing.assert_array_equal(graph({"latent_sample": latent})["sample"][0, 2], latent[0, 0])


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(bundle):
    write_preview(bundle.file("preview_decoder", "onnx"), (1, 4, 64, 64))
    with pytest.raises(ShapeMismatch, match=r"preview.onnx inputs: latent_sample is .*\[1, 4, 64, 64\], expected"):
        bundle.graph("preview_decoder")


def test_a_graph_for_another_backend_is_refused(bundle):
    component = bundle.component("preview_decoder")
    other = dataclasses.replace(component, forms={"coreml": component.forms["onnx"]})
    manifest = dataclasses.replace(bundle.manifest, components={"preview_decoder": other})
    with pytest.raises(BundleError, match="preview_decoder of .* is stored as coreml, expected onnx or ort; choose"):
        dataclasses.replace(bundle, manifest=manifest).graph("preview_decoder")


def test_a_graph_of_onnx_runtime_mobile_computes_the_same(tmp_path, product):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "product.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(tmp_path / "product.onnx", options, providers=["CPUExecutionProvider"])
    mobile = open_backend("ort").load(tmp_path / "product.ort")
    np.testing.assert_array_equal(mobile(arrays())["total"], product(arrays())["total"])


@pytest.mark.parametrize("device", ["cpu", "auto", "all"])
def test_the_cpu_is_its_only_device_and_so_the_best(tmp_path, device):
    write_product(tmp_path / "product.onnx")
    assert open_backend("ort").devices() == ("cpu",)
    open_backend("ort").load(tmp_path / "product.onnx", device=device)
