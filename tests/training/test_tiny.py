"""The fast decoder's training: it draws nearer to the autoencoder's decoder, stops, goes on, and is read back."""
import dataclasses
import json

import numpy as np
import pytest
import torch

from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.tiny_decoder import TinyDecoder
from caphuman_edge.ref.training import tiny as module
from caphuman_edge.ref.training.muon import optimizers
from caphuman_edge.ref.training.run import Plan, Run
from caphuman_edge.ref.training.tiny import Latents, Pool, losses
from caphuman_edge.ref.training.weights import load_tiny, read_metadata, write_weights
from caphuman_edge.runtime.contract import NANO, VaeConfig
from caphuman_edge.runtime.errors import CheckpointError

VAE = VaeConfig(channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4, latent_scale=0.5)
SMALL = dataclasses.replace(NANO, tiny_channels=8, vae=VAE)


def write_labels(folder, first_seed=300):
    """Smooth latents of six pictures, two variants each, of 20 cells: small ones, for the time they take."""
    rng = np.random.default_rng(0)
    codes = np.kron(rng.integers(-50, 50, size=(6, 2, 4, 5, 5)), np.ones((4, 4))).astype(np.int8)
    np.savez(folder / "latents-256.npz", names=np.array([f"{first_seed + i:05d}" for i in range(6)]), latents=codes,
             step=np.float32(1 / 24), config=json.dumps(dataclasses.asdict(VAE)))
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return write_labels(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A run's folder, whose latent scale is not the one that labels were measured to have."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    write_weights(folder, Autoencoder(VAE).state_dict(),
                  {"vae": dataclasses.asdict(dataclasses.replace(VAE, latent_scale=0.18215)), "step": 1, "samples": 1})
    return folder


@pytest.fixture
def train(labels, vae, monkeypatch):
    """`train(out, minutes)` runs the command at a small width."""
    monkeypatch.setattr(module, "NANO", SMALL)

    def run(out, minutes, *more):
        monkeypatch.setattr("sys.argv", ["tiny", "--labels", str(labels), "--vae", str(vae), "--out", str(out),
                                         "--minutes", str(minutes), "--batch", "4", "--pool", "4", *more])
        module.main()
    return run


@pytest.fixture
def pool(labels, vae):
    latents = Latents(labels, 256)
    return Pool(module.load_vae(vae, latents.vae), latents, 4, np.random.default_rng(0))


def test_the_decoder_draws_nearer_and_nearer_to_the_teacher(pool, tmp_path):
    torch.manual_seed(1)
    model = TinyDecoder(SMALL)
    run = Run(tmp_path, model, Plan(minutes=1, batch=2, warmup=5, decay_steps=100), {},
              optimizers(model, 1e-3, 0.02, module.OUTER))
    latents, pictures = pool.batch(4, whole=True)
    before = losses(model, latents, pictures)["psnr"]
    for _ in range(30):
        run.update(losses(model, *pool.batch(2, whole=False))["loss"])
    assert losses(model, latents, pictures)["psnr"] > before + 2


def test_a_stopped_training_goes_on_where_it_was(train, tmp_path):
    train(tmp_path / "run", 0.01)
    first = read_metadata(tmp_path / "run")
    train(tmp_path / "run", 0.01)
    then = read_metadata(tmp_path / "run")
    assert 0 < first["step"] < then["step"] and then["samples"] == 4 * then["step"]
    assert then["config"]["tiny_channels"] == 8 and then["config"]["vae"]["latent_scale"] == 0.5
    assert load_tiny(tmp_path / "run", SMALL)[1].weight.dtype == torch.float32


def test_another_run_begins_with_its_weights(train, tmp_path):
    train(tmp_path / "first", 0.01)
    train(tmp_path / "second", 0, "--start-from", str(tmp_path / "first"))
    assert read_metadata(tmp_path / "second") | {"step": 0} == read_metadata(tmp_path / "first") | {"step": 0}
    kept, made = (load_tiny(tmp_path / name, SMALL).state_dict() for name in ("first", "second"))
    assert all(torch.equal(kept[name], made[name]) for name in kept)


@pytest.mark.parametrize(("whole", "count", "cells"), [(False, 4, 16), (True, 2, 20)])
def test_crops_lie_where_their_pictures_do(pool, whole, count, cells):
    latents, pictures = pool.batch(4, whole)
    assert latents.shape == (count, 4, cells, cells) and pictures.shape == (count, 3, 8 * cells, 8 * cells)
    assert pictures.abs().max() <= 1
    for latent, picture in zip(latents, pictures, strict=True):
        places = [(k, y, x) for k in range(4) for y in range(21 - cells) for x in range(21 - cells)
                  if torch.equal(pool.latents[k, :, y:y + cells, x:x + cells], latent)]
        assert any(torch.equal(picture, pool.pictures[k, :, 8 * y:8 * (y + cells), 8 * x:8 * (x + cells)].float())
                   for k, y, x in places)


def test_the_teacher_sees_whole_latents_at_the_scale_of_the_labels(pool, vae):
    teacher = module.load_vae(vae, VAE)
    with torch.no_grad():
        wanted = teacher.decode(pool.latents[:1]).clamp(-1, 1)
    assert (pool.pictures[:1] - wanted).abs().mean() < 0.03 * wanted.std()  # bfloat16 where that is fast
    assert pool.teacher.config.latent_scale == 0.5


def test_each_batch_replaces_the_oldest_picture(pool):
    before = pool.latents.clone()
    pool.batch(1, whole=True)
    changed = (pool.latents != before).flatten(1).any(dim=1)
    assert not changed[1:].any()


def test_latents_that_are_absent_or_held_out_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"latents-256\.npz does not exist, expected latents; run"):
        Latents(tmp_path, 256)
    with pytest.raises(CheckpointError, match="holds seeds below 300, which are never trained on"):
        Latents(write_labels(tmp_path, first_seed=295), 256)


def test_weights_of_another_width_are_refused(train, tmp_path):
    train(tmp_path / "run", 0)
    with pytest.raises(CheckpointError, match="does not fit TinyDecoder: .* mis-shaped"):
        load_tiny(tmp_path / "run", NANO)
