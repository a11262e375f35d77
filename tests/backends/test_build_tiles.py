"""A build whose autoencoder decodes in tiles: its flag, its graph, the portraits that it makes."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from caphuman_edge.export import build_inputs
from caphuman_edge.export.assemble import perception_in
from caphuman_edge.export.builder import Options, Sources, build
from caphuman_edge.export.graphs import modules
from caphuman_edge.export.part_keys import part_keys
from caphuman_edge.runtime.bundle import EMBEDDED, Bundle
from caphuman_edge.runtime.cli import main
from caphuman_edge.runtime.cli.inspect import facts, text
from caphuman_edge.runtime.contract import FULL, graphs
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.schedule import Schedule
from caphuman_edge.runtime.selftest import self_test

TILE = 48  # px, of 64


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("edge", ["0", "64", "100", "-320", "3e2", "320px"])
def test_an_edge_that_is_none_is_refused(capfd, edge):
    assert main(["build", "--random-weights", "nano", "--out", "b", f"--decode-tiles={edge}"]) == 2
    assert f"{edge!r} is no edge of tiles, expected such as 320" in capfd.readouterr().err


def test_tiles_as_large_as_the_portrait_are_refused(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["build", "--random-weights", "nano", "--out", "b", "--decode-tiles", "256"]) == 2
    said = capfd.readouterr().err
    assert "--decode-tiles is 256, but portraits have 256x256 px, which one tile holds" in said
    assert not list(tmp_path.iterdir())


def test_the_flag_decides_the_decoder_s_shapes():
    asked = SimpleNamespace(random_weights=None, size=(512, 768), pool_keys=1, decode_tiles=576)
    spec = graphs(build_inputs.config_of(asked))["vae_decoder"]
    assert (spec.inputs[0].shape, spec.outputs[0].shape) == ((1, 4, 72, 64), (1, 3, 576, 512))


def test_a_bundle_of_tiles_draws_nearly_the_portrait_of_one_without(micro, monkeypatch, tmp_path):
    """Proved graph by graph as any other; of its decoder alone, since other graphs are tested elsewhere."""
    monkeypatch.setattr(Options, "graphs_in", lambda *_: ("vae_decoder", "tiny_decoder", "preview_decoder"))
    monkeypatch.setattr(micro.model, "config", dataclasses.replace(micro.config, decoder_tile=TILE))
    sources = Sources(perception_in(EMBEDDED), "micro", Schedule(), {}, {}, "")
    build(micro.model, micro.preview, sources, tmp_path / "b", Options(("onnx", "openvino"), "f16", tiny=True),
          tiny=micro.tiny)
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.component("vae_decoder").inputs[0].shape == (1, 4, 6, 6)
    assert "vae_decoder" in {verdict.graph for verdict in self_test(bundle) if verdict.passed}
    assert "approximation: vae_decoder makes tiles of 48 px, which overlap" in text(facts(bundle))
    latent = np.random.default_rng(0).normal(size=(1, *micro.config.latent_shape)).astype(np.float32)
    latent = latent.repeat(4, axis=2).repeat(4, axis=3)[..., :8, :8]  # as smooth as pictures are
    whole = micro.model.first_stage_model.decode(torch.from_numpy(latent)).numpy()[0]
    wanted = np.clip(whole * 127.5 + 127.5, 0, 255).transpose(1, 2, 0)
    drawn = {kind: Pipeline(bundle, kind).decode(latent, "vae_decoder") for kind in ("ort", "openvino")}
    for pixels in drawn.values():
        assert pixels.shape == (64, 64, 3)
        assert np.abs(pixels - wanted).mean() < 0.1 * np.abs(wanted - wanted.mean()).mean()
    assert np.abs(drawn["ort"].astype(int) - drawn["openvino"]).max() <= 1
    assert Pipeline(bundle).decode(latent, "tiny_decoder").shape == (64, 64, 3)  # at once


def test_tiles_change_no_other_graph_s_key(micro):
    tiled = dataclasses.replace(micro.config, decoder_tile=TILE)
    keys, others = (part_keys(modules(micro.model, micro.preview, micro.tiny), graphs(config), config,
                              Options(tiny=True, control=True)) for config in (micro.config, tiled))
    changed = {job[1] for job in keys if keys[job] != others[job]}
    assert changed == {"vae_decoder"}


def test_a_bundle_of_before_there_were_tiles_decodes_at_once():
    assert Bundle.open().config.decoder_tile == 0 and FULL.tile_shape == (64, 64)
