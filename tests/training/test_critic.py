"""The critic learns who a latent shows, and makes the miniature's training draw nearer to that person."""
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from caphuman_edge.ref.training import critic as module
from caphuman_edge.ref.training import nano
from caphuman_edge.ref.training.critic import Critic, People, knowledge, load_critic, losses, softened, unlikeness
from caphuman_edge.ref.training.labels import Labels
from caphuman_edge.ref.training.muon import optimizers
from caphuman_edge.ref.training.run import Plan, Run
from caphuman_edge.runtime.contract import NANO
from caphuman_edge.runtime.errors import CheckpointError

PEOPLE = 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures of each person; latents show the vector: one coarse pattern for each of its four numbers."""
    path, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    names = np.array([f"{300 + i:05d}{pose}" for i in range(PEOPLE) for pose in ("", "_a")])
    codes = np.repeat(rng.normal(size=(PEOPLE, 4)), 2, axis=0)
    vectors = np.zeros((len(names), NANO.identity_width), np.float32)
    vectors[:, :4] = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    patterns = np.kron(rng.choice([-1, 1], size=(4, 4, 4, 4)), np.ones((4, 4)))
    latents = 20 * np.einsum("nk,kchw->nchw", vectors[:, :4], patterns) + rng.normal(size=(len(names), 4, 16, 16))
    edge, jpeg = NANO.vision.image_size, io.BytesIO()
    Image.new("RGB", (edge, edge)).save(jpeg, "JPEG")
    np.savez(path / "labels.npz", names=names, identities=vectors.astype(np.float16),
             masks=np.zeros((len(names), 32, 4), np.uint8), empty_caption=np.full(77, 49407, np.uint16),
             crops=np.frombuffer(jpeg.getvalue() * len(names), np.uint8),
             crop_ends=len(jpeg.getvalue()) * np.arange(1, len(names) + 1))
    np.savez(path / "latents-128.npz", names=names, step=np.float32(0.05), latents=latents[:, None].astype(np.int8),
             config=json.dumps(dataclasses.asdict(NANO.vae)), mirrored=np.zeros((len(names), 1), bool),
             captions=np.full((len(names), 1, 1, 77), 49407, np.uint16))
    np.save(path / "maps.npy", np.zeros((len(names), 9, NANO.height, NANO.width), np.float16))
    return path


@pytest.fixture(scope="module")
def labels(folder):
    return Labels(folder, 128)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run's folder, trained by the command."""
    out = tmp_path_factory.mktemp("critic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["critic", "--labels", str(folder), "--edge", "128", "--out", str(out),
                                   "--minutes", "0.08", "--batch", "16", "--decay-steps", "60"])
        patch.setattr(module, "WIDTH", 16)
        module.main()
    return out


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(module, "WIDTH", 16)


def test_the_critic_knows_people_that_it_never_saw(trained, labels, narrow):
    people = People(labels)
    assert json.loads((trained / "knowledge.json").read_text())["nearer_own"] > 0.9
    torch.manual_seed(0)
    assert knowledge(Critic(16), people)["nearer_own"] < 0.8


def test_kept_out_people_are_whole_and_never_in_a_batch(labels):
    people = People(labels)
    assert labels.names[people.kept_out].tolist() == ["00300", "00300_a", "00312", "00312_a"]
    drawn = np.concatenate([people.batch(32, np.random.default_rng(i))[1].numpy() for i in range(8)])
    assert set(drawn) == set(people.person) - set(people.person[people.kept_out])


def test_a_persons_vector_is_the_mean_of_its_pictures(labels):
    people = People(labels)
    assert torch.allclose(people.vectors[3], people.identities[6:8].mean(dim=0), atol=1e-3)


def test_softened_latents_differ_but_keep_what_they_show(labels):
    people = People(labels)
    latents = people.read(np.full(200, 5), np.zeros(200, int))
    torch.manual_seed(0)
    soft = softened(latents, people.mean)
    assert soft.shape == latents.shape
    assert (soft[1:] - soft[:-1]).square().mean(dim=(1, 2, 3)).gt(0).all()  # no two alike
    direct, mirrored = ((soft - shown).square().mean(dim=(1, 2, 3)) for shown in (latents, latents.flip(3)))
    assert torch.minimum(direct, mirrored).median() < 0.5 * latents.var()
    assert 0.3 < (direct < mirrored).float().mean() < 0.7


def test_a_trained_critic_tells_whose_latents_they_are(trained, labels, narrow):
    people, critic = People(labels), load_critic(trained, 16)
    pictures = np.arange(0, 40, 2)
    latents, identities = people.read(pictures, np.zeros_like(pictures)), people.identities[pictures]
    right, wrong = unlikeness(critic, latents, identities), unlikeness(critic, latents, identities.roll(1, 0))
    assert right < wrong - 1


def test_a_large_batch_is_several_line_ups(trained, labels, narrow, monkeypatch):
    """So that the loss means the same whatever the batch; pictures of one person, side by side, stand apart."""
    people, critic = People(labels), load_critic(trained, 16)
    pictures = np.arange(16)
    latents, identities = people.read(pictures, np.zeros_like(pictures)), people.identities[pictures]
    whole = unlikeness(critic, latents, identities)
    monkeypatch.setattr(module, "LINE_UP", 8)
    apart = [unlikeness(critic, latents[i::2], identities[i::2]) for i in range(2)]
    halved = unlikeness(critic, latents, identities)
    assert float(halved) == pytest.approx(float(sum(apart)) / 2) and halved < whole


def test_the_loss_falls_along_its_gradient(trained, labels, narrow):
    """Drawing the identity in lowers it: what the miniature's training does, on bare latents."""
    people, critic = People(labels), load_critic(trained, 16)
    pictures = np.arange(0, 32, 2)
    drawn = people.mean.repeat(16, 1, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([drawn], 0.05)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = unlikeness(critic, drawn, people.identities[pictures])
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.6 * values[0]


def test_a_critic_adds_its_term_and_no_critic_changes_nothing(trained, labels, narrow):
    batch = labels.batch(4, np.random.default_rng(0), 0.0)
    plain, judged = (_losses(labels, batch, critic) for critic in (None, load_critic(trained, 16)))
    assert "identity" not in plain
    added = float(judged["loss"] - plain["loss"])
    assert added == pytest.approx(nano.IDENTITY_WEIGHT * float(judged["identity"]), rel=1e-3)
    assert all(torch.equal(plain[name], judged[name]) for name in ("v", "eps", "mask"))


def test_the_term_reads_the_picture_that_eps_implies(trained, labels, narrow):
    """With a perfect eps it is the critic's judgement of the target itself, at every timestep."""
    critic = load_critic(trained, 16)
    trainer = nano.Trainer(NANO, labels.words, CPU, compiled=False, critic=critic)
    batch = labels.batch(4, np.random.default_rng(0), 0.0)
    batch = dataclasses.replace(batch, masks=torch.ones_like(batch.masks))

    def perfect(noisy, timestep, batch):
        alpha_bar = trainer.alphas_cumprod[timestep][:, None, None, None]
        return (noisy - alpha_bar.sqrt() * batch.latents) / (1 - alpha_bar).sqrt(), torch.zeros(4, 1, 16, 16)

    trainer.predict = perfect
    expected = unlikeness(critic, batch.latents, batch.identities)
    assert float(trainer.losses(batch)["identity"]) == pytest.approx(float(expected), rel=1e-2)


def test_the_term_judges_the_face_alone(trained, labels, narrow):
    """Hair and surroundings are the prompt's to say: what eps implies there changes nothing."""
    trainer = nano.Trainer(NANO, labels.words, CPU, compiled=False, critic=load_critic(trained, 16))
    batch = labels.batch(4, np.random.default_rng(0), 0.0)
    face = torch.zeros_like(batch.masks)
    face[..., 4:12, 4:12] = 1
    batch, terms = dataclasses.replace(batch, masks=face), []
    for change in (0.0, 1.0 - face, face):
        torch.manual_seed(0)
        trainer.predict = lambda noisy, timestep, batch, change=change: (noisy + change, torch.zeros(4, 1, 16, 16))
        terms.append(float(trainer.losses(batch)["identity"]))
    assert terms[1] == terms[0] != terms[2]


def test_training_leaves_the_critic_as_it_is(trained, labels, tmp_path, narrow):
    critic = load_critic(trained, 16)
    before = [value.clone() for value in critic.state_dict().values()]
    trainer = nano.Trainer(NANO, labels.words, CPU, compiled=False, critic=critic)
    run = Run(tmp_path, trainer.model, Plan(minutes=1), {}, optimizers(trainer.model, 1e-3, 0.01))
    loss = trainer.losses(labels.batch(2, np.random.default_rng(0), 0.0))["loss"]
    run.update(loss)
    assert all(torch.equal(a, b) for a, b in zip(before, critic.state_dict().values(), strict=True))
    assert not any(name.startswith("critic") for name in run.model.state_dict())


def test_a_critic_of_another_size_is_refused(trained, narrow):
    with pytest.raises(CheckpointError, match="critic of latents of 16 cells, expected 32"):
        load_critic(trained, 32)


def test_large_latents_reach_the_same_stages(narrow):
    assert Critic(32)(torch.randn(2, 4, 32, 32)).norm(dim=1).tolist() == pytest.approx([1, 1])


def test_a_stopped_critic_goes_on(labels, tmp_path, narrow):
    people = People(labels)
    for steps in (2, 3):
        critic = Critic(16)
        run = Run(tmp_path, critic, Plan(minutes=1, batch=4), {"cells": 16}, optimizers(critic, 1e-3, 0.02))
        run.update(losses(critic, *people.batch(4, np.random.default_rng(0)), people.vectors)["loss"])
        run.update(losses(critic, *people.batch(4, np.random.default_rng(0)), people.vectors)["loss"])
        assert run.step == (2 if steps == 2 else 4)
        run.save()


def _losses(labels, batch, critic):
    torch.manual_seed(0)
    trainer = nano.Trainer(NANO, labels.words, CPU, compiled=False, critic=critic)
    torch.manual_seed(1)
    return {name: value.detach() for name, value in trainer.losses(batch).items()}
