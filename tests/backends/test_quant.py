"""A whole bundle becomes int8 and runs so on both backends."""
import dataclasses
import json
import shutil

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from caphuman_edge.export.assemble import perception_in
from caphuman_edge.export.builder import Options, Sources, build
from caphuman_edge.export.coreml_writer import write_coreml
from caphuman_edge.export.graphs import SplitCapFace
from caphuman_edge.quant import fidelity_limits, int8_bundle, int8_command
from caphuman_edge.quant.int8_bundle import Calibration, default_recipes, quantize
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.runtime.bundle import EMBEDDED, Bundle, new_bundle, record_files, write_manifest
from caphuman_edge.runtime.cli import main
from caphuman_edge.runtime.contract import graphs
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.machine import Machine
from caphuman_edge.runtime.manifest import Form
from caphuman_edge.runtime.schedule import Schedule
from caphuman_edge.runtime.selftest import self_test

openvino = pytest.importorskip("openvino")
pytest.importorskip("coremltools")
POSE = "pose_"  # the second ControlNet's weights
DENOISER = ("denoiser", "capface", "unet")


@pytest.fixture(scope="module")
def source(micro, tmp_path_factory):
    """The micro model's float bundle, with two heads: of one, OpenVINO 2026.4 cannot compile int8 attention."""
    model = CapHuman(dataclasses.replace(micro.config, unet=dataclasses.replace(micro.config.unet, num_heads=2)))
    weights = micro.model.state_dict()
    model.load_state_dict({name: weights[name] for name in weights if not name.startswith(POSE)})
    home = tmp_path_factory.mktemp("float")
    sources = Sources(perception_in(EMBEDDED), "micro", Schedule(steps=4), {"weights": "random"}, {}, "tests only")
    build(model.requires_grad_(False), micro.preview, sources, home / "plain", Options(("onnx", "openvino")))
    return with_coreml(Bundle.open(home / "plain"), SplitCapFace(model), home / "micro")


def with_coreml(bundle, capface, target):
    """The bundle with a Core ML package of one graph, and its folder."""
    with new_bundle(target) as folder:
        shutil.copytree(bundle.root, folder, dirs_exist_ok=True)
        path, component = folder / "capface" / "model.mlpackage", bundle.component("capface")
        precision = write_coreml(capface, graphs(bundle.config)["capface"], path)
        form = Form(path.relative_to(folder).as_posix(), record_files(folder, [path]), precision)
        changed = dataclasses.replace(component, forms={**component.forms, "coreml": form})
        write_manifest(folder, dataclasses.replace(
            bundle.manifest, name="micro", components={**bundle.manifest.components, "capface": changed}))
    return target


def refuse(folder):
    """Turns down a finished bundle."""
    assert Bundle.open(folder).component("denoiser").forms["onnx"].precision == "int8"
    raise BundleError("not accepted")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """Its int8 bundle, made by a build that broke down once and was turned down once, and the second one's lines."""
    out, lines = tmp_path_factory.mktemp("int8") / "micro", []
    patch = pytest.MonkeyPatch()
    patch.setattr(int8_bundle, "check_cases", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(source, out, default_recipes(), Calibration(portraits=1), threads=1)
    patch.undo()
    with pytest.raises(BundleError, match="not accepted"):
        quantize(source, out, default_recipes(), Calibration(portraits=1), threads=1, report=lines.append,
                 accept=refuse)
    assert not out.exists()
    quantize(source, out, default_recipes(), Calibration(portraits=1), threads=1)
    assert [path.name for path in out.parent.iterdir()] == ["micro"]  # no parts are left
    return Bundle.open(out), lines


@pytest.mark.slow
def test_a_stopped_build_goes_on_where_it_was(made):
    kept = [line for line in made[1] if line.endswith(": kept")]
    assert any("samples" in line for line in kept) and any("onnx/denoiser" in line for line in kept)
    assert not any("check" in line for line in kept)


@pytest.mark.slow
def test_the_bundle_says_what_it_is_and_is_half_as_large(made, source):
    before, after = Bundle.open(source), made[0]
    for graph in DENOISER:
        for kind, form in after.component(graph).forms.items():
            assert form.precision == "int8" and form.parity["psnr_db"] > 25
            size = sum(record.size for path, record in form.files.items() if path.endswith(".bin"))
            was = sum(record.size for path, record in before.component(graph).forms[kind].files.items()
                      if path.endswith(".bin"))
            assert size < 0.75 * was
    assert after.component("hint_encoder") == before.component("hint_encoder")
    assert json.loads(after.manifest.to_text())["provenance"]["int8"]["from_bundle"] == before.digest


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_it_verifies_on_each_backend(made, backend, tmp_path):
    # a net this small has int8 feature maps of one cell, which OpenVINO 2026.4 compiles for any shape in f32 alone
    machine = Machine(backend, threads=1, cache_dir=tmp_path, precision="f32")
    verdicts = {verdict.graph: verdict for verdict in self_test(made[0], machine)}
    assert verdicts.keys() >= {*DENOISER}
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


@pytest.mark.slow
@pytest.mark.parametrize("graph", DENOISER)
def test_onnx_runtime_runs_every_layer_in_int8(made, graph, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(made[0].file(graph, "onnx")), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in ir.load(tmp_path / "optimised.onnx").graph]
    assert operators.count("QLinearConv") > 10
    assert operators.count("Conv") <= 3  # those that the recipe leaves in float
    assert operators.count("MatMulIntegerToFloat") > 5


@pytest.mark.slow
def test_openvino_runs_convolutions_in_int8(made):
    compiled = openvino.Core().compile_model(made[0].file("denoiser", "openvino"), "CPU",
                                             {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"})
    kinds = [(str(node.get_rt_info()["layerType"].astype(str)), str(node.get_rt_info()["primitiveType"].astype(str)))
             for node in compiled.get_runtime_model().get_ops()]
    convolutions = [primitive for kind, primitive in kinds if kind == "Convolution"]
    rounded = [primitive for primitive in convolutions if primitive.lower().endswith("i8")]
    assert rounded and len(rounded) >= len(convolutions) - 3  # those that the recipe leaves in float


@pytest.mark.slow
def test_openvinos_activations_have_no_zero_point(made):
    model = openvino.Core().read_model(made[0].file("denoiser", "openvino"))
    grids = [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
    assert len(grids) > 20
    assert {float(node.input_value(3).get_node().data.ravel()[0]) for node in grids} == {-128.0}


@pytest.mark.slow
def test_the_decoder_is_calibrated_on_ends_of_trajectories(made):
    with np.load(made[0].file("selftest")) as stored:
        latent = stored["vae_decoder/in/latent_sample"]
    assert abs(latent.std() - 1) > 0.02  # drawn, where the float bundle's is plain noise
    assert made[0].component("vae_decoder").forms["openvino"].precision == "int8"


@pytest.mark.slow
def test_what_is_int8_is_not_quantized_again(made, tmp_path, capsys):
    with pytest.raises(BundleError, match="is int8 already"):
        quantize(made[0].root, tmp_path / "again", default_recipes())
    assert main(["quantize", str(made[0].root), "--out", str(tmp_path / "again")]) == 2
    assert "is int8 already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_gate_refuses_what_surely_loses_too_much_and_lets_the_rest_pass(made, source, tmp_path, monkeypatch):
    monkeypatch.setattr(int8_command, "GATED", 2)
    lines = []
    int8_command._gate(source, tmp_path / "gate", lines.append, made[0].root)
    assert any(line.startswith("gate: SSIM at least: 0.") for line in lines)
    monkeypatch.setattr(fidelity_limits, "limits_of", lambda *_: {"ssim": 1.1})
    with pytest.raises(BundleError, match=r"fails its limits: SSIM at least is 0\.\d+ on 2 triples, the limit 1.1"):
        int8_command._gate(source, tmp_path / "gate", lines.append, made[0].root)


def test_flags_that_do_not_go_together_are_refused_before_anything_is_read(tmp_path, capsys):
    build_command = ["build", "--random-weights", "nano", "--out", str(tmp_path / "new")]
    assert main([*build_command, "--precision", "int8", "--format", "onnx,ort"]) == 2
    assert "--precision int8 is for onnx, openvino and coreml, but --format has ort" in capsys.readouterr().err
    assert main([*build_command, "--precision", "int8", "--format", "coreml", "--phone"]) == 2
    assert "choose one of the two" in capsys.readouterr().err
    assert main([*build_command, "--photos", "me.jpg"]) == 2
    assert "--photos is what int8 is calibrated with" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
