"""Train the critic: a small network that reads the face-recognition vector of a picture out of its latent.

    python -m caphuman_edge.ref.training.critic --labels DIR --edge 128 --out DIR --minutes 8

The error of v hardly rewards likeness: few numbers of a latent tell one person from another. With a critic the
miniature's training (`training.nano --critic DIR`) is told, too, how surely its picture is the reference's person.
Every twelfth person is kept from the critic; how well it knows those stands in `knowledge.json` in the end.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.training.labels import Labels
from caphuman_edge.ref.training.muon import optimizers
from caphuman_edge.ref.training.run import Plan, Run, guarded, warmup
from caphuman_edge.ref.training.weights import read_metadata, read_weights
from caphuman_edge.runtime.contract import NANO
from caphuman_edge.runtime.errors import CheckpointError

WIDTH = 48  # channels of the first stage; each of the two halvings after it doubles them
STAGE_CELLS = 16  # edge of the first stage, whatever the latent's
DROPOUT = 0.3
TEMPERATURE = 0.1  # of the softmax over people; cosines of two people spread by about this much
KEPT_OUT = 12  # every twelfth person
SHIFT = 1  # cells, at STAGE_CELLS
LEAST_CONTRAST = 0.6  # of a softened latent, about the mean of all
MOST_NOISE = 0.3
LINE_UP = 32  # among how many people a picture has to be told


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, required=True, help="folder written by `export.labels`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--edge", type=int, choices=(128, 256), default=256, help="size of the pictures, px")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--decay-steps", type=int, default=2_000,
                        help="over which the rates fall to a twentieth; 0: over the minutes")
    options = parser.parse_args()
    plan = Plan(minutes=options.minutes, batch=options.batch, learning_rate=options.learning_rate,
                decay_steps=options.decay_steps, warmup=warmup(options.decay_steps, 100))
    people = People(Labels(options.labels, options.edge))
    torch.manual_seed(plan.seed)
    critic = Critic(people.latents.shape[-1])
    run = Run(options.out, critic, plan, {"cells": critic.cells},
              optimizers(critic, plan.learning_rate, options.muon_rate))
    rng = np.random.default_rng(plan.seed + run.step)
    run.train(lambda step: losses(critic, *people.batch(plan.batch, rng), people.vectors))
    (options.out / "knowledge.json").write_text(json.dumps(knowledge(run.average.module, people)) + "\n")


class Critic(nn.Module):
    """(b, 4, cells, cells) scaled latents to (b, 128) unit vectors of face recognition."""

    def __init__(self, cells: int):
        super().__init__()
        self.cells, stride = cells, cells // STAGE_CELLS
        widths = (WIDTH, 2 * WIDTH, 4 * WIDTH)
        self.stem = nn.Conv2d(NANO.vae.latent_channels, WIDTH, 2 * stride + 1, stride, padding=stride)
        self.stages = nn.Sequential(
            Block(widths[0]), nn.Conv2d(widths[0], widths[1], 2, 2), Block(widths[1]), Block(widths[1]),
            nn.Conv2d(widths[1], widths[2], 2, 2), Block(widths[2]), nn.GroupNorm(8, widths[2]), nn.SiLU())
        # faces stand at about the same place in every picture: the last layer may look at each place apart
        self.out = nn.Sequential(nn.Flatten(), nn.Dropout(DROPOUT),
                                 nn.Linear(widths[2] * (STAGE_CELLS // 4) ** 2, NANO.identity_width))

    def forward(self, latents: Tensor) -> Tensor:
        """What the class says."""
        return F.normalize(self.out(self.stages(self.stem(latents))), dim=1)


class Block(nn.Module):
    """Two convolutions added to their input."""

    def __init__(self, width: int):
        super().__init__()
        self.change = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                    nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


class People:
    """Latents by person, and each person's vector: the mean of its pictures', at unit length."""

    def __init__(self, labels: Labels):
        seeds, self.person = np.unique([int(name[:5]) for name in labels.names], return_inverse=True)
        self.latents, self.step = labels.latents, labels.step
        self.identities, self.others = labels.identities, labels.others
        sums = torch.zeros(len(seeds), self.identities.shape[1])
        self.vectors = F.normalize(sums.index_add(0, torch.from_numpy(self.person), self.identities), dim=1)
        self.kept_out = seeds[self.person] % KEPT_OUT == 0  # (n,) per picture
        self.mean = self.read(np.arange(len(labels)), np.zeros(len(labels), int)).mean(dim=0)

    def read(self, pictures: np.ndarray, variants: np.ndarray) -> Tensor:
        """(b, 4, h, w) scaled latents."""
        return self.latents[torch.from_numpy(pictures), torch.from_numpy(variants)] * self.step

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Softened latents of random pictures, and whose they are (an index into `vectors`)."""
        pictures = rng.choice(np.flatnonzero(~self.kept_out), size)
        latents = self.read(pictures, rng.integers(self.latents.shape[1], size=size))
        return softened(latents, self.mean), torch.from_numpy(self.person[pictures])


def softened(latents: Tensor, mean: Tensor) -> Tensor:
    """The latents mirrored, shifted, blurred, paled and noisy at random, as a denoiser's guesses at them are."""
    def chance() -> Tensor:
        return torch.rand(len(latents), 1, 1, 1)

    latents = torch.where(chance() < 0.5, latents.flip(3), latents)
    reach = SHIFT * latents.shape[-1] // STAGE_CELLS
    padded = F.pad(latents, 4 * [reach], mode="replicate")
    top, left = torch.randint(2 * reach + 1, (2,)).tolist()
    latents = padded[:, :, top:top + latents.shape[2], left:left + latents.shape[3]]
    blurred = F.avg_pool2d(F.pad(latents, 4 * [1], mode="replicate"), 3, 1)
    latents = torch.lerp(latents, blurred, chance().square())
    latents = torch.lerp(mean, latents, 1 - (1 - LEAST_CONTRAST) * chance())
    return latents + MOST_NOISE * chance().square() * torch.randn_like(latents)


def losses(critic: Critic, latents: Tensor, person: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """Named loss terms: the person has to be found among all people, and its vector met."""
    read = critic(latents)
    found = F.cross_entropy(read @ vectors.T / TEMPERATURE, person)
    apart = 1 - (read * vectors[person]).sum(dim=1).mean()
    return {"loss": found + apart, "found": found, "apart": apart}


def unlikeness(critic: Critic, latents: Tensor, identities: Tensor) -> Tensor:
    """() how hard it is to tell which of its line-up's identities each latent shows: mean cross-entropy, in nats.

    A line-up is every k-th of the batch, at most `LINE_UP`: pictures of one person, neighbours in a batch, stand apart,
    and the loss means the same whatever the batch's size.
    """
    read, groups = critic(latents), -(-len(latents) // LINE_UP)
    return torch.cat([F.cross_entropy(read[i::groups] @ identities[i::groups].T / TEMPERATURE,
                                      torch.arange(len(read[i::groups]), device=read.device), reduction="none")
                      for i in range(groups)]).mean()


def load_critic(folder: Path, cells: int) -> Critic:
    """A run's critic, frozen. Raises CheckpointError where it reads latents of another size than `cells`."""
    critic = Critic(read_metadata(folder)["cells"])
    if critic.cells != cells:
        raise CheckpointError(f"{folder} holds a critic of latents of {critic.cells} cells, expected {cells}: "
                              "train one with the same --edge")
    load_strictly(critic, read_weights(folder), str(folder))
    return critic.eval().requires_grad_(False)


@torch.no_grad()
def knowledge(critic: Critic, people: People) -> dict[str, float]:
    """On people kept out: cosine to the own vector of another picture, and how often a random other's is farther."""
    critic.eval()
    pictures = np.array([i for i in np.flatnonzero(people.kept_out) if len(people.others[i])])
    read = critic(people.read(pictures, np.zeros_like(pictures)))
    cosines = read @ people.identities[pictures].T
    own = (read * people.identities[[people.others[i][0] for i in pictures]]).sum(dim=1)
    strangers = torch.from_numpy(people.person[pictures][:, None] != people.person[pictures])
    nearer = (own[:, None] > cosines)[strangers].float().mean()
    return {"pictures": len(pictures), "cosine": round(float(own.mean()), 3),
            "cosine_to_others": round(float(cosines[strangers].mean()), 3), "nearer_own": round(float(nearer), 3)}


if __name__ == "__main__":
    guarded(main)
