"""Train the fast decoder: it learns from an autoencoder's own decoder what latents look like.

    python -m caphuman_edge.ref.training.tiny --labels DIR --vae RUN --out DIR --minutes 20

No photo is needed: the decoder's picture of a latent is what is to be drawn. That decoder sees whole latents, and each
of its pictures serves several steps, since decoding costs as much as a step; what is learnt from are mostly crops.
"""
import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.tiny_decoder import TinyDecoder
from caphuman_edge.ref.training.muon import optimizers
from caphuman_edge.ref.training.run import Plan, Run, fastest_device, guarded, mixed_precision, warmup
from caphuman_edge.ref.training.vae import gradient_distance
from caphuman_edge.ref.training.weights import load_vae
from caphuman_edge.runtime.contract import HELD_OUT_SEEDS, NANO, VaeConfig
from caphuman_edge.runtime.errors import CheckpointError

SHARPNESS_WEIGHT = 1.0
CROP = 16  # cells; a batch's crops together have as many cells as whole latents where those are drawn instead
WHOLE_EVERY = 4  # steps: whole latents, in which no cell is near an edge that is not the picture's
OUTER = ("1.weight", "19.weight")  # first and last layer, AdamW's


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, required=True, help="folder with latents-256.npz of `export.labels`")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the training.vae run that encoded them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="another run's weights, for a fresh start")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--batch", type=int, default=8, help="crops of 128 px a step")
    parser.add_argument("--pool", type=int, default=256, help="decoded pictures that are at hand")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--muon-rate", type=float, default=0.01)
    parser.add_argument("--decay-steps", type=int, default=0, help="over which the rates fall; 0: over the minutes")
    options = parser.parse_args()
    device = fastest_device()
    plan = Plan(minutes=options.minutes, batch=options.batch, learning_rate=options.learning_rate,
                decay_steps=options.decay_steps, warmup=warmup(options.decay_steps, 50), ema=0.99)
    torch.manual_seed(plan.seed)
    latents = Latents(options.labels, NANO.height)
    config = dataclasses.replace(NANO, vae=latents.vae)
    model = TinyDecoder(config).to(device, memory_format=torch.channels_last)
    run = Run(options.out, model, plan, {"config": config.to_json()},
              optimizers(model, plan.learning_rate, options.muon_rate, OUTER))
    if options.start_from:
        run.start_from(options.start_from)
    teacher = load_vae(options.vae, latents.vae).to(device, memory_format=torch.channels_last)
    pool = Pool(teacher, latents, options.pool, np.random.default_rng(plan.seed + run.step))
    run.train(lambda step: losses(model, *pool.batch(plan.batch, whole=step % WHOLE_EVERY == 0)))


class Latents:
    """The scaled latents of a label folder, all variants of all pictures."""

    def __init__(self, folder: Path, edge: int):
        """Raises CheckpointError for a folder without them, or with pictures that are not to be trained on."""
        path = folder / f"latents-{edge}.npz"
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist, expected latents; run `export.labels encode` first")
        with np.load(path) as stored:
            if min(int(name[:5]) for name in stored["names"]) < HELD_OUT_SEEDS:
                raise CheckpointError(f"{path} holds seeds below {HELD_OUT_SEEDS}, which are never trained on; "
                                      "run `export.labels measure` again")
            self.vae = VaeConfig.from_json(json.loads(str(stored["config"])))
            self.codes = stored["latents"].reshape(-1, *stored["latents"].shape[2:])  # (n, 4, h, w) int8
            self.step = float(stored["step"])

    def draw(self, count: int, rng: np.random.Generator) -> Tensor:
        """(count, 4, h, w) random ones."""
        return torch.from_numpy(self.codes[rng.integers(len(self.codes), size=count)].astype(np.float32) * self.step)


class Pool:
    """Latents with what the teacher makes of them; the oldest is replaced at each batch."""

    def __init__(self, teacher: Autoencoder, latents: Latents, size: int, rng: np.random.Generator):
        self.teacher, self.source, self.rng, self.oldest = teacher, latents, rng, 0
        self.device = next(teacher.parameters()).device
        pairs = [self._decoded() for _ in range(size)]
        self.latents, self.pictures = (torch.cat(side) for side in zip(*pairs, strict=True))

    def batch(self, count: int, whole: bool) -> tuple[Tensor, Tensor]:
        """Latents and pictures: `count` random crops, or as many whole ones as have their size together."""
        fresh = self._decoded()
        self.latents[self.oldest], self.pictures[self.oldest] = (side[0] for side in fresh)
        self.oldest = (self.oldest + 1) % len(self.latents)
        cells = self.latents.shape[-1]
        edge = cells if whole else min(CROP, cells)
        count = max(1, count * CROP**2 // edge**2)
        crops = [self._crop(edge) for _ in range(count)]
        latents, pictures = (torch.stack(side).to(memory_format=torch.channels_last)
                             for side in zip(*crops, strict=True))
        return latents, pictures.float()

    def _crop(self, edge: int) -> tuple[Tensor, Tensor]:
        index = self.rng.integers(len(self.latents))
        top, left = self.rng.integers(self.latents.shape[-1] - edge + 1, size=2)
        scale = self.pictures.shape[-1] // self.latents.shape[-1]
        rows, columns = (slice(start * scale, (start + edge) * scale) for start in (top, left))
        return (self.latents[index, :, top:top + edge, left:left + edge], self.pictures[index, :, rows, columns])

    @torch.no_grad()
    def _decoded(self) -> tuple[Tensor, Tensor]:
        """One more pair; colours end where a screen's do, and are kept in halves."""
        latent = self.source.draw(1, self.rng).to(self.device)
        with mixed_precision(self.device):
            picture = self.teacher.decode(latent)
        return latent, picture.clamp(-1, 1).half()


def losses(model: TinyDecoder, latents: Tensor, pictures: Tensor) -> dict[str, Tensor]:
    """L1 on pixels and on image gradients at three scales, as of the autoencoder itself."""
    with mixed_precision(latents.device):
        drawn = model(latents)
    drawn = drawn.float()
    pixel, sharpness = F.l1_loss(drawn, pictures), gradient_distance(drawn, pictures)
    psnr = -10 * torch.log10(F.mse_loss(drawn.detach().clamp(-1, 1), pictures) / 4)
    return {"loss": pixel + SHARPNESS_WEIGHT * sharpness, "pixel": pixel, "sharpness": sharpness, "psnr": psnr}


if __name__ == "__main__":
    guarded(main)
