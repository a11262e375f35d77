"""Building a bundle: what is checked first, what a stop leaves, what a wrong graph does."""
import copy
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from caphuman_edge.export import build_run, stages
from caphuman_edge.export.assemble import perception_in
from caphuman_edge.export.builder import Options, Sources, build
from caphuman_edge.runtime import Pipeline
from caphuman_edge.runtime.bundle import EMBEDDED, Bundle
from caphuman_edge.runtime.cli import main
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.machine import Machine
from caphuman_edge.runtime.schedule import Schedule
from caphuman_edge.runtime.selftest import psnr_db, self_test

FEW = ("text_encoder", "vae_decoder", "preview_decoder")  # graphs that are quick to trace


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def few(monkeypatch):
    """Builds make a few graphs only."""
    monkeypatch.setattr(Options, "graphs_in", lambda *_: FEW)


@pytest.fixture
def sources():
    return Sources(perception_in(EMBEDDED), "micro", Schedule(steps=2), {"weights": "random"}, {}, "tests only")


@pytest.fixture
def refusal(capfd):
    """Runs a build that must be refused before anything is read; gives the line."""
    def run(*flags):
        assert main(["build", *map(str, flags)]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("caphuman: ") and err.count("\n") == 1
        return err
    return run


def test_a_stopped_build_goes_on_where_it_was(micro, sources, few, tmp_path):
    out, lines = tmp_path / "micro", []

    def stop_at_the_decoder(line):
        if "onnx/vae_decoder ..." in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(micro.model, micro.preview, sources, out, report=stop_at_the_decoder)
    assert not out.exists() and (tmp_path / ".micro.parts/onnx/text_encoder/model.onnx").is_file()
    build(micro.model, micro.preview, sources, out, report=lines.append)
    assert "[4/9] onnx/text_encoder: kept" in lines and "[5/9] onnx/vae_decoder ..." in lines
    assert [path.name for path in tmp_path.iterdir()] == ["micro"]
    assert all(verdict.passed for verdict in self_test(Bundle.open(out)))


def test_other_weights_use_no_part_of_the_former(micro, sources, few, tmp_path):
    def stop_at_the_check(line):
        if "check" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(micro.model, micro.preview, sources, tmp_path / "micro", report=stop_at_the_check)
    lines, other = [], copy.deepcopy(micro.model)
    for tensor in (*other.text_encoder.parameters(), *other.first_stage_model.parameters()):
        tensor.mul_(1.1)
    build(other, micro.preview, sources, tmp_path / "micro", report=lines.append)
    assert not any("kept" in line for line in lines)


@pytest.mark.parametrize("kind", ["onnx", "openvino", "ort"])
def test_a_wrong_graph_fails_the_build_and_names_itself(micro, sources, few, tmp_path, monkeypatch, kind):
    """The former bundle stays as it was."""
    out = tmp_path / "micro"
    out.mkdir()
    (out / "bundle.json").write_text("former")
    monkeypatch.setattr(stages, "reference_cases", lambda module, spec: [
        stages.Case(case.inputs, {name: value + 0.02 * np.abs(value).max() for name, value in case.outputs.items()})
        if spec.name == "vae_decoder" else case for case in [*REFERENCE(module, spec)]])
    with pytest.raises(BundleError, match=r"vae_decoder.*sample differs from the reference, PSNR 3\d\.\d dB"):
        build(micro.model, micro.preview, sources, out, Options((kind,)))
    assert [path.name for path in out.iterdir()] == ["bundle.json"]


REFERENCE = stages.reference_cases


def test_weights_rounded_to_halves_are_measured_as_such(micro, sources, few, tmp_path):
    """35 dB is the floor there; and what rounding costs is in bundle.json."""
    for storage, stored in (("f16", "f16"), ("f32", "f32")):
        build(micro.model, micro.preview, sources, tmp_path / storage, Options(storage=storage))
        form = Bundle.open(tmp_path / storage).component("vae_decoder").forms["onnx"]
        assert form.precision == stored and form.parity["sample"] == form.parity["psnr_db"] > 60


def test_formats_share_their_selftest_and_are_all_in_the_manifest(micro, sources, few, tmp_path):
    build(micro.model, micro.preview, sources, tmp_path / "micro", Options(("openvino", "ort")))
    bundle = Bundle.open(tmp_path / "micro")
    for name in FEW:
        assert bundle.component(name).forms.keys() == {"openvino", "ort"}
    for backend in ("ort", "openvino"):
        assert {verdict.graph for verdict in self_test(bundle, Machine(backend))} >= set(FEW)


@pytest.mark.parametrize(("flags", "said"), [
    ([], "the following arguments are required: --out"),
    (["--out", "b"], r"--caphuman is missing: name caphuman\.ckpt, or add --fetch"),
    (["--out", "b", "--format", "tflite"], "tflite is no format, expected some of onnx, openvino, coreml, ort"),
    (["--out", "b", "--size", "500x512"], r"'500x512' is no size, expected such as 512x768"),
    (["--out", "b", "--phone"], r"--phone is about Core ML, but --format is onnx; add coreml"),
    (["--out", "b", "--format", "onnx,ort"], r"format ort takes graphs of less than 2\.1 GB, .* would have 4\.9 GB"),
    (["--out", "b", "--steps", "27"], "27 steps cannot be laid out"),
    (["--out", "b", "--head", "nobody"], 'head "nobody" is not known'),
    (["--out", "b", "--caphuman", "c.ckpt", "--facenet", "f.pt"], r"f\.pt does not exist, expected a checkpoint"),
    (["--out", "b", "--caphuman", "c.ckpt"], r"--facenet is missing: name FaceNet's file"),
])
def test_what_is_wrong_is_told_in_one_line_at_once(refusal, monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    assert re.search(said, refusal(*flags))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_not_overwritten(refusal, tmp_path):
    (tmp_path / "photos").mkdir()
    assert "exists and is no bundle" in refusal("--out", tmp_path / "photos", "--overwrite", "--random-weights", "nano")


def test_a_bundle_is_overwritten_only_where_that_is_asked_for(refusal, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/bundle.json").write_text("{}")
    assert "exists" in refusal("--out", tmp_path / "mine", "--random-weights", "nano")


def test_a_full_disk_is_told_before_anything_is_read(refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(build_run.shutil, "disk_usage", lambda _: build_run.shutil._ntuple_diskusage(9, 8, 1))
    said = refusal("--out", tmp_path / "full", "--random-weights", "full", "--format", "onnx,openvino")
    assert "has 0.0 GB free, a build of onnx, openvino takes about" in said


def start(*flags):
    """`caphuman build` in a process of its own; its stderr is read line by line."""
    script = "import sys; from caphuman_edge.runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "build", *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def survivor(tmp_path_factory):
    """A bundle from official-layout files of random weights whose build was stopped, then killed; and the last log."""
    folder = tmp_path_factory.mktemp("survivor")
    flags = ("--random-weights", "nano", "--out", folder / "nano", "--format", "onnx,openvino")
    stops = ((signal.SIGTERM, 130, "onnx/text_encoder: "), (signal.SIGKILL, -9, "onnx/image_encoder: "))
    for how, code, moment in stops:
        process = start(*flags)
        for line in process.stderr:
            if moment in line:
                process.send_signal(how)
        assert process.wait(60) == code and not (folder / "nano").exists()
    last = start(*flags)
    lines = last.stderr.readlines()
    assert last.wait(60) == 0
    return folder / "nano", lines


@pytest.mark.slow
def test_a_killed_build_goes_on_and_leaves_nothing_but_the_bundle(survivor):
    out, lines = survivor
    assert any("onnx/text_encoder: kept" in line for line in lines)
    assert any("onnx/image_encoder: kept" in line for line in lines)
    assert not any("writing" in line for line in lines)  # the random checkpoints were kept, too
    assert [path.name for path in out.parent.iterdir()] == ["nano"]


@pytest.mark.slow
def test_one_seed_is_one_portrait_from_either_format(survivor, stranger):
    """By ONNX Runtime and by OpenVINO, each from its own form, in float32."""
    portraits = []
    for backend in ("ort", "openvino"):
        pipe = Pipeline(Bundle.open(survivor[0]), backend, renderer="numpy")
        *_, last = pipe.generate(stranger(pipe), steps=4, prompt="smiling", seed=1)
        portraits.append(last.image.pixels.astype(np.float32))
    assert portraits[0].std() > 5 and psnr_db(portraits[1], portraits[0]) >= 40
