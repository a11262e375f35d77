"""The miniature's training runs, saves, resumes and is read back; on a label folder made of noise."""
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from caphuman_edge.ref.training import nano
from caphuman_edge.ref.training.labels import Labels, batches_ahead
from caphuman_edge.ref.training.muon import Muon, optimizers, orthogonal
from caphuman_edge.ref.training.run import Plan, Run, warmup
from caphuman_edge.ref.training.vae import read_pictures
from caphuman_edge.ref.training.weights import load_vae, read_metadata, read_weights, weight_files, write_weights
from caphuman_edge.runtime.contract import NANO
from caphuman_edge.runtime.errors import CheckpointError

NAMES = np.array(["00300", "00300_a", "00300_b", "00301"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A label folder of four pictures: three of one identity, one of another."""
    path, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    count, edge = len(NAMES), NANO.vision.image_size
    jpegs = [_jpeg(rng.integers(256, size=(edge, edge, 3), dtype=np.uint8)) for _ in range(count)]
    np.savez(path / "labels.npz", names=NAMES, identities=rng.normal(size=(count, 128)).astype(np.float16),
             masks=np.packbits(rng.random((count, *NANO.latent_shape[1:])) > 0.5, axis=-1),
             empty_caption=np.full(77, 49407, np.uint16),
             crops=np.frombuffer(b"".join(jpegs), np.uint8), crop_ends=np.cumsum([len(jpeg) for jpeg in jpegs]))
    vae = dataclasses.replace(NANO.vae, latent_scale=0.25)
    for edge, cells in ((256, 32), (128, 16)):
        np.savez(path / f"latents-{edge}.npz", names=NAMES, step=np.float32(0.05),
                 config=json.dumps(dataclasses.asdict(vae)), mirrored=np.tile([False, True], (count, 1)),
                 captions=rng.integers(1000, size=(count, 2, 3, 77)).astype(np.uint16),
                 latents=rng.integers(-60, 60, size=(count, 2, 4, cells, cells), dtype=np.int8))
    np.save(path / "maps.npy", rng.normal(size=(count, 9, NANO.height, NANO.width)).astype(np.float16))
    return path


@pytest.fixture
def labels(folder):
    return Labels(folder, 256)


def test_references_are_other_pictures_of_the_same_identity(labels):
    assert [others.tolist() for others in labels.others] == [[1, 2], [0, 2], [0, 1], []]


def test_a_batch_pairs_targets_with_references(labels):
    batch = labels.batch(8, np.random.default_rng(1), text_dropout=0.0)
    apart = (labels.latents * labels.step - batch.latents[0]).abs().sum(dim=(2, 3, 4))
    target, variant = np.unravel_index(int(apart.argmin()), apart.shape)
    maps, _ = labels._head(torch.tensor([target]), labels.mirrored[[target], [variant]])
    assert torch.allclose(batch.maps[0], maps[0], atol=1e-3)
    assert any(torch.equal(batch.captions[0], told) for told in labels.captions[target, variant])
    reference = int((labels.identities - batch.identities[0]).abs().sum(dim=1).argmin())
    assert reference in labels.others[target] or (reference == target and not len(labels.others[target]))


def test_a_mirrored_target_comes_with_the_mirrored_head(labels):
    (maps, flipped), (masks, flipped_masks) = (
        torch.cat(tensors) for tensors in zip(
            *(labels._head(torch.tensor([2]), np.array([turned])) for turned in (False, True)), strict=True))
    normals_x = torch.tensor([-1.0] + 8 * [1.0])[:, None, None]
    assert torch.equal(flipped, maps.flip(2) * normals_x) and not torch.equal(flipped, maps)
    assert torch.equal(flipped_masks, masks.flip(2))


def test_batches_are_made_ahead_in_order():
    made = []
    batches = batches_ahead(lambda: made.append(len(made)) or len(made))
    assert [next(batches) for _ in range(3)] == [1, 2, 3]
    batches.close()
    assert made == [0, 1, 2, 3]  # one was ready and is dropped


def test_the_average_of_a_short_run_has_forgotten_its_start(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1000.0)
    run = Run(tmp_path, model, Plan(minutes=1), {})
    torch.nn.init.zeros_(model.weight)
    for _ in range(200):
        run.average.update_parameters(model)
        run.step += 1
    assert abs(float(run.average.module.weight)) < 1e-3


def test_small_pictures_come_with_maps_and_masks_of_their_size(folder):
    batch = Labels(folder, 128).batch(3, np.random.default_rng(1), text_dropout=0.0)
    assert (batch.latents.shape, batch.maps.shape, batch.masks.shape) == ((3, 4, 16, 16), (3, 9, 128, 128),
                                                                           (3, 1, 16, 16))
    assert set(batch.masks.unique().tolist()) == {0, 1}


def test_text_dropout_one_leaves_only_empty_captions(labels):
    batch = labels.batch(4, np.random.default_rng(1), text_dropout=1.0)
    assert (batch.captions == 49407).all()


def test_labels_of_another_autoencoder_are_refused(folder, tmp_path):
    for name in ("labels.npz", "maps.npy"):
        (tmp_path / name).symlink_to(folder / name)
    np.savez(tmp_path / "latents-256.npz", names=NAMES[:2], step=1.0, config="{}", latents=np.zeros(2))
    with pytest.raises(CheckpointError, match="run `export.labels encode` again"):
        Labels(tmp_path, 256)


def test_labels_of_held_out_people_are_refused(folder, tmp_path):
    for name in ("labels.npz", "latents-256.npz"):
        arrays = dict(np.load(folder / name))
        np.savez(tmp_path / name, **{**arrays, "names": np.array(["00299", "00300_a", "00300_b", "00301"])})
    with pytest.raises(CheckpointError, match="seeds below 300, which are never trained on"):
        Labels(tmp_path, 256)


def test_the_autoencoder_never_sees_held_out_people(tmp_path):
    for name, grey in (("00299", 10), ("00299_a", 20), ("00300", 200), ("00300_b", 210)):
        Image.new("RGB", (16, 16), (grey,) * 3).save(tmp_path / f"{name}.jpg")
    assert [int(picture.mean()) for picture in read_pictures(tmp_path)] == [200, 210]


def test_training_saves_and_goes_on_where_it_stopped(labels, tmp_path):
    first = _run(labels, tmp_path, steps=2)
    again = _run(labels, tmp_path, steps=1)
    assert (first.step, again.step, again.samples) == (2, 3, 3 * again.plan.batch)
    assert read_metadata(tmp_path)["samples"] == again.samples
    assert not all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_words_of_no_caption_keep_zero_embeddings(labels, tmp_path):
    table = _run(labels, tmp_path, steps=3).model.text_encoder.text_model.embeddings.token_embedding.weight
    assert table[2000:49000].abs().max() == 0
    assert torch.equal(table.abs().sum(dim=1).nonzero().ravel(), labels.words)


def test_a_fresh_text_encoder_tells_prompts_apart(labels):
    encoder = nano.Trainer(NANO, labels.words, torch.device("cpu"), compiled=False).model.text_encoder
    first, second = encoder(labels.captions[0, 0, :2])
    assert (first - second).std() > 0.5 * first.std()


def test_an_autoencoder_run_is_read_back_in_half_precision(tmp_path):
    from caphuman_edge.ref.autoencoder import Autoencoder

    model = Autoencoder(NANO.vae)
    run = Run(tmp_path, model, Plan(minutes=1), {"vae": dataclasses.asdict(NANO.vae)})
    run.save()
    for name, value in load_vae(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name].half().float())


def test_weights_come_back_from_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("caphuman_edge.ref.training.weights.SHARD_BYTES", 100)
    weights = {name: torch.randn(30).half() for name in "abc"}
    write_weights(tmp_path, weights, {"step": 3})
    assert len(weight_files(tmp_path)) == 3
    assert all(torch.equal(read_weights(tmp_path)[name], weights[name].float()) for name in weights)


def test_a_missing_shard_and_mixed_steps_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("caphuman_edge.ref.training.weights.SHARD_BYTES", 100)
    weights = {name: torch.randn(30) for name in "ab"}
    write_weights(tmp_path, weights, {"step": 3})
    first, second = weight_files(tmp_path)
    kept = first.read_bytes()
    write_weights(tmp_path, weights, {"step": 4})
    first.write_bytes(kept)
    with pytest.raises(CheckpointError, match="different training steps"):
        read_weights(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match="holds 1 weight shards"):
        read_weights(tmp_path)


def test_a_run_can_start_from_another_runs_weights(labels, tmp_path):
    _run(labels, tmp_path / "first", steps=1)
    trainer = nano.Trainer(NANO, labels.words, torch.device("cpu"), compiled=False)
    run = Run(tmp_path / "second", trainer.model, Plan(minutes=1), {})
    run.start_from(tmp_path / "first")
    assert run.samples == read_metadata(tmp_path / "first")["samples"]
    assert all(torch.equal(trainer.model.state_dict()[name], value)
               for name, value in read_weights(tmp_path / "first").items())


def test_orthogonal_keeps_singular_vectors_and_levels_singular_values():
    left, values, right = torch.linalg.svd(torch.randn(2, 12, 30), full_matrices=False)
    for matrices in (left * values[:, None] @ right, (left * values[:, None] @ right).mT):
        made = orthogonal(matrices)
        assert made.shape == matrices.shape
        singular = torch.linalg.svdvals(made)
        assert singular.min() > 0.5 and singular.max() < 1.3
        assert torch.linalg.matrix_norm(made @ matrices.mT - matrices @ made.mT).max() < 1e-3  # symmetric: same vectors


def test_hidden_matrices_go_to_muon_and_all_parameters_to_one_optimiser(labels):
    model = nano.Trainer(NANO, labels.words, torch.device("cpu"), compiled=False).model
    muon, adam = optimizers(model, 1e-3, 0.01)
    counts = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in (muon, adam)]
    assert isinstance(muon, Muon) and sum(counts) == len(list(model.parameters()))
    assert all(weight.ndim > 1 for group in muon.param_groups for weight in group["params"])
    table = model.text_encoder.text_model.embeddings.token_embedding.weight
    assert any(weight is table for group in adam.param_groups for weight in group["params"])


def test_a_mistake_about_the_picture_costs_the_same_at_every_timestep(labels):
    """The loss is v's: with eps off by sqrt(alpha_bar) everywhere it is 1."""
    trainer = nano.Trainer(NANO, labels.words, torch.device("cpu"), compiled=False)
    batch = labels.batch(4, np.random.default_rng(0), 0.0)

    def off_by_one_v(noisy, timestep, batch):
        alpha_bar = trainer.alphas_cumprod[timestep][:, None, None, None]
        noise = (noisy - alpha_bar.sqrt() * batch.latents) / (1 - alpha_bar).sqrt()
        return noise + alpha_bar.sqrt(), torch.zeros(4, 1, 32, 32)

    trainer.predict = off_by_one_v
    assert float(trainer.losses(batch)["v"]) == pytest.approx(1, abs=1e-3)


def test_references_are_learnt_from_a_little_beside_themselves():
    torch.manual_seed(0)
    identities = torch.nn.functional.normalize(torch.randn(64, 128), dim=1)
    near = nano.blurred(identities)
    cosines = (near * identities).sum(dim=1)
    assert torch.allclose(near.norm(dim=1), torch.ones(64)) and cosines.min() > 0.93 and cosines.max() < 0.995
    crops = torch.zeros(64, 3, 56, 56)
    crops[:, :, 26:30, 26:30] = 1
    moved = nano.shaken(crops)
    middles = (moved.sum(dim=(1, 3)) @ torch.arange(56.0)) / moved.sum(dim=(1, 2, 3))
    assert 1 < middles.std() < 2 and abs(middles.mean() - 27.5) < 0.5  # 0.08 of half 56 either way, evenly
    assert torch.allclose(nano.shaken(torch.ones(2, 3, 56, 56)), torch.ones(2, 3, 56, 56))  # the white goes on


def test_rates_fall_by_steps_or_by_the_clock():
    by_steps, by_clock = Plan(minutes=10.0, warmup=1, decay_steps=100), Plan(minutes=10.0, warmup=1, decay_steps=0)
    assert [by_steps.factor(step, 0.0) for step in (0, 50, 100, 200)] == pytest.approx([1, 0.525, 0.05, 0.05])
    assert [by_clock.factor(0, minutes) for minutes in (0.0, 5.0, 10.0, 20.0)] == pytest.approx([1, 0.525, 0.05, 0.05])
    assert (warmup(1000, 100), warmup(10, 100), warmup(0, 100)) == (50, 1, 100)


def _run(labels, folder, steps):
    torch.manual_seed(0)
    trainer = nano.Trainer(NANO, labels.words, torch.device("cpu"), compiled=False)
    run = Run(folder, trainer.model, Plan(minutes=10, batch=2), {"config": NANO.to_json()},
              optimizers(trainer.model, 1e-3, 0.01))
    rng = np.random.default_rng(run.step)
    for _ in range(steps):
        run.update(trainer.losses(labels.batch(2, rng, nano.TEXT_DROPOUT))["loss"])
    run.save()
    return run


def _jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()
