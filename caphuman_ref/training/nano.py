"""Train the miniature: UNet, CapFace, mask head, text and patch encoders together, from scratch.

    python -m caphuman_edge.ref.training.nano --labels DIR --out SMALL --edge 128 --minutes 45
    python -m caphuman_edge.ref.training.nano --labels DIR --out DIR --start-from SMALL --minutes 60

Reference and target are different pictures of one identity, so that identity and pose are learnt apart. Who is shown
and what the prompt says is learnt four times as fast on small pictures, and kept.
The loss is the error of v (Salimans and Ho 2022) plus the mask's. In terms of eps it weighs noisy timesteps up to 200
times more than the usual loss does: there only the conditions can tell what to draw. With `--critic DIR` (a run of
`training.critic` on pictures of the same size) the face that eps implies has to be the reference's person's, too.
"""
import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caphuman_edge.ref.caphuman import CapHuman, FaceCondition, face_gates
from caphuman_edge.ref.sampler import alphas_cumprod
from caphuman_edge.ref.training.critic import Critic, load_critic, unlikeness
from caphuman_edge.ref.training.labels import Batch, Labels, batches_ahead
from caphuman_edge.ref.training.muon import optimizers
from caphuman_edge.ref.training.run import Plan, Run, fastest_device, guarded, mixed_precision, warmup
from caphuman_edge.runtime.contract import NANO, Config

MASK_WEIGHT = 0.1
FACE_WEIGHT = 2.0  # how much more an error in the face costs than one elsewhere
TEXT_DROPOUT = 0.1  # for classifier-free guidance
IDENTITY_WEIGHT = 0.2  # of the critic's loss, in nats
IDENTITY_DROPOUT = 0.1  # as tau drops it in early steps
IMAGE_DROPOUT = 0.25  # more often only the image tokens are dropped, so that the identity vector has to be heard
IDENTITY_LOUDNESS = 4.0  # how much larger the identity token starts than an image token: it is one among dozens
MASK_BIAS = 2.0  # the gate begins open
IDENTITY_NOISE = 0.25  # length, beside a unit vector; two photos of one person differ by three times as much
CROP_TURN, CROP_SHIFT = 0.1, 0.08  # at most: radians; shares of half the crop's edge


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, required=True, help="folder written by `export.labels`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, metavar="DIR",
                        help="weights to begin with, such as caphuman_ref/training/milestone/model")
    parser.add_argument("--critic", type=Path, metavar="DIR", help="run of `training.critic` with the same --edge")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--edge", type=int, choices=(128, 256), default=256, help="size of the pictures, px")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--muon-rate", type=float, default=0.01)
    parser.add_argument("--decay-steps", type=int, default=20_000,
                        help="over which the rates fall to a twentieth; 0: over the minutes")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser")
    options = parser.parse_args()
    device = fastest_device()
    labels = Labels(options.labels, options.edge, device)
    config = dataclasses.replace(NANO, vae=labels.vae)
    plan = Plan(minutes=options.minutes, batch=options.batch, learning_rate=options.learning_rate,
                decay_steps=options.decay_steps, warmup=warmup(options.decay_steps, 200))
    torch.manual_seed(plan.seed)
    critic = load_critic(options.critic, labels.latents.shape[-1]) if options.critic else None
    trainer = Trainer(config, labels.words, device, options.compile, critic)
    run = Run(options.out, trainer.model, plan, {"config": config.to_json()},
              optimizers(trainer.model, plan.learning_rate, options.muon_rate))
    if options.start_from:
        run.start_from(options.start_from)
    rng = np.random.default_rng(plan.seed + run.step)
    torch.manual_seed(plan.seed + run.step)
    batches = batches_ahead(lambda: labels.batch(plan.batch, rng, TEXT_DROPOUT))
    run.train(lambda step: trainer.losses(next(batches)))


class Trainer:
    """The trainable model and its loss on one batch."""

    def __init__(self, config: Config, words: Tensor, device: torch.device, compiled: bool,
                 critic: Critic | None = None):
        """`words`: the token ids that captions use; `critic`: frozen, rewards likeness."""
        self.model = CapHuman(config, autoencoder=False, mask_bias=MASK_BIAS)
        _start_vocabulary(self.model.text_encoder.text_model.embeddings.token_embedding.weight.data, words)
        self.model.id_linear.weight.data *= IDENTITY_LOUDNESS * config.identity_width**0.5  # its input has unit length
        self.model.to(device, memory_format=torch.channels_last)
        self.critic = critic.to(device) if critic else None
        self.alphas_cumprod = alphas_cumprod().to(device)
        self.predict = torch.compile(self._predict) if compiled else self._predict

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Named loss terms of one batch; `loss` is the sum to minimise, `v` and `eps` plain errors.

        `identity`, with a critic only: how hard it is to tell whose picture eps implies.
        """
        timestep = torch.randint(0, 1000, (len(batch.latents),), device=batch.latents.device)
        alpha_bar = self.alphas_cumprod[timestep][:, None, None, None]
        noise = torch.randn_like(batch.latents)
        noisy = alpha_bar.sqrt() * batch.latents + (1 - alpha_bar).sqrt() * noise
        with mixed_precision(noisy.device):
            eps, mask_logit = self.predict(noisy, timestep, batch)
        error = (eps.float() - noise).square()
        v = error / alpha_bar
        weighted = v * (1 + FACE_WEIGHT * batch.masks)
        mask = F.binary_cross_entropy_with_logits(mask_logit.float(), batch.masks)
        terms = {"loss": weighted.mean() + MASK_WEIGHT * mask, "v": v.mean(), "eps": error.mean(), "mask": mask}
        if self.critic:
            clean = (noisy - (1 - alpha_bar).sqrt() * eps.float()) / alpha_bar.sqrt()
            shown = torch.lerp(batch.latents, clean, batch.masks)  # hair and surroundings are the prompt's to say
            terms["identity"] = unlikeness(self.critic, shown, batch.identities)
            terms["loss"] = terms["loss"] + IDENTITY_WEIGHT * terms["identity"]
        return terms

    def _predict(self, noisy: Tensor, timestep: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        model, control = self.model, self.model.control_model
        hint = control.encode_hint(batch.maps)
        logit = control.mask_predict[0](hint)
        tokens = model.face_tokens(model.image_encoder(shaken(batch.crops)), blurred(batch.identities))
        chance = torch.rand(len(tokens), 1, 1, device=tokens.device)
        kept = (chance >= IDENTITY_DROPOUT + IMAGE_DROPOUT).repeat(1, tokens.shape[1], 1)
        kept[:, -1:] = chance >= IDENTITY_DROPOUT  # the last token is the identity vector's
        gates = face_gates(logit.detach().float().sigmoid(), len(model.config.unet.channel_mult))
        face = FaceCondition(tokens * kept, hint, gates)
        text = model.text_encoder(batch.captions)
        return model(noisy, timestep, text, [face]), logit


def blurred(identities: Tensor) -> Tensor:
    """(b, d) unit vectors a little beside the given ones, so that a picture cannot be learnt by heart from them."""
    noise = torch.randn_like(identities) * IDENTITY_NOISE / identities.shape[1]**0.5
    return F.normalize(identities + noise, dim=1)


def shaken(crops: Tensor) -> Tensor:
    """(b, 3, s, s) crops each turned, scaled and shifted a little at random; the edge goes on outside."""
    turn, grow, right, down = (2 * torch.rand(4, len(crops), device=crops.device) - 1) * torch.tensor(
        [[CROP_TURN], [CROP_SHIFT], [CROP_SHIFT], [CROP_SHIFT]], device=crops.device)
    cosine, sine = turn.cos() / (1 + grow), turn.sin() / (1 + grow)
    places = torch.stack([torch.stack([cosine, -sine, right], dim=1), torch.stack([sine, cosine, down], dim=1)], dim=1)
    grid = F.affine_grid(places, list(crops.shape), align_corners=False)
    return F.grid_sample(crops, grid, padding_mode="border", align_corners=False)


def _start_vocabulary(table: Tensor, words: Tensor) -> None:
    """Words that no caption uses are zero for good: neutral to the model, and free to store.

    The others start at unit variance. CLIP's 0.02 drowns in what attention and feed-forward layers add at their own
    initial scale, and a model this small then takes very long to tell one prompt from another.
    """
    nn.init.zeros_(table)
    table[words] = torch.randn(len(words), table.shape[1])


if __name__ == "__main__":
    guarded(main)
