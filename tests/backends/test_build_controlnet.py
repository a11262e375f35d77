"""A build with a second ControlNet: its flag, its graphs, its space on disk, and what the bundle says of it."""
import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from caphuman_edge.export import build_inputs, build_run, stages
from caphuman_edge.export.builder import Options
from caphuman_edge.export.full import sources_of
from caphuman_edge.export.graphs import has_control
from caphuman_edge.export.weights import Origin, WeightFiles
from caphuman_edge.runtime.cli import main
from caphuman_edge.runtime.head.storage import OPEN_HEAD
from caphuman_edge.runtime.schedule import Schedule

CONTROLNET = 0.361  # billion numbers of a full-size one
DENOISER = 1.221  # of UNet and CapFace


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def refusal(capfd, monkeypatch, tmp_path):
    """Runs a build that must be refused before anything is read; gives the line."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        assert main(["build", "--out", "b", *flags]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("caphuman: ") and err.count("\n") == 1
        assert not list(tmp_path.iterdir())
        return err
    return run


@pytest.fixture
def needed(refusal, monkeypatch):
    """How much space, in GB, a build of random full-size weights asks for."""
    monkeypatch.setattr(build_run.shutil, "disk_usage", lambda _: build_run.shutil._ntuple_diskusage(9, 8, 1))
    return lambda *flags: float(re.search(r"takes about ([\d.]+) GB", refusal("--random-weights", "full", *flags))[1])


@pytest.mark.parametrize(("flags", "said"), [
    (("--controlnet", "random"), "--controlnet is random, expected random with --random-weights and a file or"),
    (("--random-weights", "nano", "--controlnet", "pose.pth"), r"--controlnet is pose\.pth, expected random with"),
    (("--caphuman", "c.ckpt", "--controlnet", "pose.pth"), r"pose\.pth does not exist, expected a ControlNet"),
    (("--caphuman", "c.ckpt", "--controlnet", ""), "--facenet is missing"),  # the folder that we are in
])
def test_what_is_wrong_with_the_flag_is_told_in_one_line_at_once(refusal, flags, said):
    assert re.search(said, refusal(*flags))


def test_it_brings_its_graphs_and_the_form_that_can_take_its_residuals():
    for kind in ("onnx", "openvino", "coreml", "ort"):
        without = Options((kind,), split=False)
        with_one = dataclasses.replace(without, control=True)
        added = {*with_one.graphs_in(kind)} - {*without.graphs_in(kind)}
        assert added == {"control_encoder", "controlnet", *(() if kind == "coreml" else ("capface", "unet"))}
        assert {name for _, name in stages.jobs(with_one)} >= added
        assert "vae_encoder" in without.graphs_in(kind)


def test_it_counts_for_the_space_on_disk(needed):
    """At 2 bytes a number in ONNX, and 8 of random weights."""
    assert needed("--controlnet", "random") - needed() == pytest.approx(10 * CONTROLNET, abs=0.11)


def test_forms_of_the_denoiser_share_their_weights_in_onnx_alone(needed):
    form = "--denoiser", "both"
    assert needed("--format", "onnx", *form) == needed("--format", "onnx")
    difference = needed("--format", "openvino", *form) - needed("--format", "openvino")
    assert difference == pytest.approx(2 * DENOISER, abs=0.11)


def test_provenance_and_licences_tell_of_it():
    origin = Origin("controlnet", "pose.pth", "ab" * 32, 723, 340, ("float16",))
    files = WeightFiles(Path("caphuman.ckpt"), controlnet=Path("pose.pth"))
    told = sources_of(files, [origin], [], "mine", Schedule(), OPEN_HEAD)
    assert told.provenance["weights"] == [origin.to_json()]
    assert "that of its author" in told.licences["controlnet"] and "\ncontrolnet: that of its" in told.licence_text
    without = sources_of(WeightFiles(Path("caphuman.ckpt")), [], [], "mine", Schedule(), OPEN_HEAD)
    assert "controlnet" not in without.licences


def test_a_random_one_is_written_and_read_back_as_a_user_s_would_be(micro, tmp_path):
    """In a folder of its own, so that what a stopped build left is not taken for this one's."""
    lines = []
    asked = {"random_weights": "nano", "seed": 1, "out": tmp_path / "b", "head": "open", "name": None}
    model, _, sources = build_inputs.gather(argparse.Namespace(controlnet="random", **asked), micro.config, Schedule(),
                                            lines.append)
    assert has_control(model) and (tmp_path / ".b.random/nano-1-controlnet/controlnet.safetensors").is_file()
    assert any(line.startswith("controlnet: ") and "from controlnet.safetensors" in line for line in lines)
    assert sources.licences["weights"] == "none: random weights"
    asked["controlnet"] = None
    plain, *_ = build_inputs.gather(argparse.Namespace(**asked), micro.config, Schedule(), lines.append)
    assert not has_control(plain)
