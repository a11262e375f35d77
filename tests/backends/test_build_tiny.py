"""A build with a fast decoder: its flag, whose file it takes, and what the bundle says of it."""
import argparse
import re

import pytest
import torch

from caphuman_edge.export import build_inputs
from caphuman_edge.export.assemble import perception_in
from caphuman_edge.export.builder import Options, Sources, build
from caphuman_edge.export.full import sources_of
from caphuman_edge.export.graphs import FastDecoder
from caphuman_edge.export.weights import Origin, WeightFiles
from caphuman_edge.runtime.bundle import EMBEDDED, Bundle
from caphuman_edge.runtime.cli import main
from caphuman_edge.runtime.head.storage import OPEN_HEAD
from caphuman_edge.runtime.schedule import Schedule
from caphuman_edge.runtime.selftest import self_test


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def refusal(capfd, monkeypatch, tmp_path):
    """Runs a build that must be refused before anything large is read; gives the line."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        assert main(["build", "--out", "b", *flags]) == 2
        out, err = capfd.readouterr()
        assert out == "" and (lines := err.splitlines())[-1].startswith("caphuman: ")
        assert all(line.startswith("reading ") for line in lines[:-1])
        return lines[-1]
    return run


def test_with_random_weights_it_is_drawn_and_not_named(refusal, tmp_path):
    said = refusal("--random-weights", "nano", "--tiny-decoder", "t.pth")
    assert "--tiny-decoder is t.pth, but --random-weights draws the tiny decoder's, too" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "said"), [
    (None, r"taesd_decoder\.pth does not exist"),
    ({"0.weight": torch.ones(64, 3, 3, 3)}, "seems to be the encoder of a tiny autoencoder .* as the tiny decoder"),
    ({"1.weight": torch.ones(64, 16, 3, 3)}, r"does not fit TinyDecoder: 66 missing .* 1 mis-shaped"),
    ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "seems to be a Stable Diffusion checkpoint")])
def test_a_wrong_file_is_told_before_the_large_ones_are_read(micro, tmp_path, content, said):
    path, lines = tmp_path / "taesd_decoder.pth", []
    if content:
        torch.save(content, path)
    with pytest.raises(build_inputs.CheckpointError, match=said) as caught:
        build_inputs.load(WeightFiles(tmp_path / "absent.ckpt", tiny_decoder=path), micro.config, lines.append)
    assert "\n" not in str(caught.value) and lines == [f"reading {path} (tiny decoder)"]


def test_a_random_one_is_written_and_read_back_as_a_user_s_would_be(micro, tmp_path):
    asked = {"random_weights": "nano", "seed": 1, "out": tmp_path / "b", "head": "open", "name": None}
    lines = []
    _, tiny, sources = build_inputs.gather(argparse.Namespace(controlnet=None, **asked), micro.config, Schedule(),
                                           lines.append)
    assert tiny[1].weight.shape == (8, 4, 3, 3) and sources.licences["weights"] == "none: random weights"
    assert any(re.match(r"tiny_decoder: 67 tensors from tiny_decoder\.safetensors \(float32", line) for line in lines)


def test_provenance_and_licences_tell_of_it(tmp_path):
    origin = Origin("tiny_decoder", "taesd_decoder.pth", "ab" * 32, 4915, 67, ("float32",))
    files = WeightFiles(tmp_path / "caphuman.ckpt", tiny_decoder=tmp_path / "taesd_decoder.pth")
    told = sources_of(files, [origin], [], "mine", Schedule(), OPEN_HEAD)
    assert told.provenance["weights"] == [origin.to_json()]
    assert told.licences["tiny_decoder"] == "that of its author; MIT, if it is TAESD"


def test_a_bundle_has_it_in_every_format_and_proves_it(micro, monkeypatch, tmp_path):
    """Stored in halves, for Core ML run by the evaluator; other graphs take minutes and are tested elsewhere."""
    monkeypatch.setattr(Options, "graphs_in", lambda *_: ("tiny_decoder", "preview_decoder"))
    sources, kinds = Sources(perception_in(EMBEDDED), "micro", Schedule(), {}, {}, ""), ("onnx", "openvino", "coreml",
                                                                                         "ort")
    build(micro.model, micro.preview, sources, tmp_path / "b", Options(kinds, "f16", tiny=True), tiny=micro.tiny)
    bundle = Bundle.open(tmp_path / "b")
    forms = bundle.component("tiny_decoder").forms
    assert forms.keys() == {*kinds} and forms["onnx"].precision == "f16"
    assert all(form.parity["sample"] > (60 if kind != "coreml" else 40) for kind, form in forms.items())
    assert "tiny_decoder" in {verdict.graph for verdict in self_test(bundle) if verdict.passed}
    assert bundle.config.tiny_channels == 8 and isinstance(micro.modules["tiny_decoder"], FastDecoder)
