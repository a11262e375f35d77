"""Distil the miniature's guided steps into a student that draws in 1, 2 or 4 steps and needs no guidance.

    python -m caphuman_edge.ref.training.distill --labels DIR --teacher DIR --out SMALL --edge 128 --skip 5 --minutes 60
    python -m caphuman_edge.ref.training.distill --labels DIR --teacher DIR --out DIR --start-from SMALL --minutes 60

Latent consistency distillation (Luo et al. 2023, "Latent Consistency Models", algorithm 1): what the student makes of
a noisy latent is to be what a target network, the moving average of the student, makes of the less noisy latent that
one DDIM step of the guided teacher leads to. Guidance is fixed: it is in the teacher's steps, one strength for the
whole run, and the student has no input for it. With `--kind tcd` both are compared at a random, less noisy timestep
instead of at the picture (Zheng et al. 2024, "Trajectory Consistency Distillation", section 4.1).

UNet and CapFace are trained, mask head and hint encoder excepted; these, face tokens and text encoder stay the
teacher's, bit by bit. The student is sampled by `--schedule lcm` or `tcd` with both guidances 1.
"""
import argparse
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from caphuman_edge.ref.caphuman import CapHuman, FaceCondition
from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.sampler import TRAIN_STEPS, alphas_cumprod
from caphuman_edge.ref.training.critic import Critic, load_critic, unlikeness
from caphuman_edge.ref.training.labels import Batch, Labels, batches_ahead
from caphuman_edge.ref.training.muon import optimizers
from caphuman_edge.ref.training.nano import FACE_WEIGHT, TEXT_DROPOUT
from caphuman_edge.ref.training.run import Plan, Run, fastest_device, guarded, mixed_precision, warmup
from caphuman_edge.ref.training.weights import read_metadata, read_weights
from caphuman_edge.runtime.contract import NANO, Config, VaeConfig
from caphuman_edge.runtime.errors import BadInput, CheckpointError

KINDS = ("lcm", "tcd")
SIGMA_DATA, TIMESTEP_SCALE = 0.5, 10.0  # of LCM's boundary condition, as its samplers have them
IDENTITY_WEIGHT = 0.02  # of the critic's loss, in nats; a tenth of nano's, as the loss of latents here is of v's
HUBER = 0.001  # the pseudo-Huber loss is quadratic below, linear above
Denoise = Callable[[Tensor, Tensor], Tensor]  # (latents, timesteps (b,)) -> eps


def main() -> None:
    """Command line."""
    options = _options()
    if not 0 <= options.target_decay < 1:
        raise BadInput(f"target-decay is {options.target_decay}, expected 0 to below 1; 0 takes the student itself")
    device = fastest_device()
    labels = Labels(options.labels, options.edge, device)
    plan = Plan(minutes=options.minutes, batch=options.batch, learning_rate=options.learning_rate,
                decay_steps=options.decay_steps, ema=options.target_decay,
                warmup=warmup(options.decay_steps, 100))
    lesson = Lesson(options.kind, options.guidance, options.identity_guidance, options.steps)
    critic = load_critic(options.critic, labels.latents.shape[-1]) if options.critic else None
    teacher = load_teacher(options.teacher, labels.vae).to(device, memory_format=torch.channels_last)
    metadata = {"config": teacher.config.to_json(), "distilled": facts_of(lesson, options.teacher)}
    check_same_run(options.out, metadata["distilled"])
    student = student_of(teacher)
    run = Run(options.out, student, plan, metadata, optimizers(student, plan.learning_rate, options.muon_rate))
    run.start_from(options.start_from or options.teacher)
    rng = np.random.default_rng(plan.seed + run.step)
    torch.manual_seed(plan.seed + run.step)
    distiller = Distiller(lesson, teacher, student, run.average.module, labels.empty_caption,
                          Consistency(options.kind, options.steps, options.skip, device), critic)
    # some captions are empty: a student has to draw without a prompt, too
    batches = batches_ahead(lambda: labels.batch(plan.batch, rng, TEXT_DROPOUT))
    run.train(lambda step: distiller.losses(next(batches)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, required=True, help="folder written by `export.labels`")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a `training.nano` run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="another distillation's weights to begin with, "
                        "such as one of small pictures (default: the teacher's)")
    parser.add_argument("--critic", type=Path, metavar="DIR", help="run of `training.critic` with the same --edge")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--edge", type=int, choices=(128, 256), default=256, help="size of the pictures, px")
    parser.add_argument("--kind", choices=KINDS, default="lcm", help="the sampler that the student is made for")
    parser.add_argument("--guidance", type=float, default=4.0, help="of the teacher, from the empty prompt")
    parser.add_argument("--identity-guidance", type=float, default=1.0,
                        help="of the teacher, from nobody; 1 costs two predictions, others three")
    parser.add_argument("--steps", type=int, default=50, help="of the teacher's DDIM; what LCM and TCD sample out of")
    parser.add_argument("--skip", type=int, default=1, help="how many of these one step of the teacher leaps over: "
                        "more is learnt faster and less exactly")
    parser.add_argument("--target-decay", type=float, default=0.95, help="of the target, whose weights are kept")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="AdamW's")
    parser.add_argument("--muon-rate", type=float, default=3e-3)
    parser.add_argument("--decay-steps", type=int, default=20_000,
                        help="over which the rates fall to a twentieth; 0: over the minutes")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a student is taught; a run keeps to one."""

    kind: str = "lcm"  # one of KINDS
    guidance: float = 4.0  # both of the teacher, and fixed; as the bundle is guided
    identity_guidance: float = 1.0
    solver_steps: int = 50

    @property
    def branches(self) -> list[tuple[bool, bool, float, float]]:
        """The teacher's predictions as (with the prompt, with the person, weight, weight that the head adds).

        What `runtime.denoise` combines, sorted by prediction: e(negative, person) + g (e(prompt, person)
        - e(negative, person)) + (i - 1) m (e(negative, person) - e(negative, nobody)), m being 1 on the head.
        """
        identity = self.identity_guidance - 1
        every = [(True, True, self.guidance, 0.0), (False, True, 1 - self.guidance, identity),
                 (False, False, 0.0, -identity)]
        return [branch for branch in every if any(branch[2:])]


class Compared(NamedTuple):
    """What a student gave, what it should have given, and the clean latents that it sees; (b, 4, h, w) each."""

    given: Tensor
    wanted: Tensor
    clean: Tensor


class Consistency:
    """Pairs of latents on the teacher's trajectory, and the functions that have to agree on both."""

    def __init__(self, kind: str, steps: int, skip: int = 1, device: torch.device | None = None):
        """Raises BadInput for a table of `steps` that there is not, or a `skip` longer than it."""
        if not 1 <= skip <= steps:
            raise BadInput(f"skip is {skip}, expected 1 to {steps}; 1 compares neighbours")
        self.kind, self.skip = kind, skip
        self.alphas, self.timesteps = alphas_cumprod().to(device), solver_timesteps(steps).to(device)

    def compare(self, student: Denoise, teacher: Denoise, target: Denoise, latents: Tensor) -> Compared:
        """One random timestep of the table for each of the clean latents (b, 4, h, w)."""
        index = torch.randint(1, len(self.timesteps), (len(latents),), device=latents.device)
        here, there = self.timesteps[index], self.timesteps[(index - self.skip).clamp(min=0)]
        end = (torch.rand(len(latents), device=latents.device) * (there + 1)).long()  # TCD's s, 0 to `there`
        share = self._share(here)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * torch.randn_like(latents)
        with torch.no_grad():
            quieter = self.step(noisy, teacher(noisy, here), here, there)
            wanted = self.agree(quieter, target(quieter, there), there, end)
        eps = student(noisy, here)
        return Compared(self.agree(noisy, eps, here, end), wanted, self.clean(noisy, eps, here))

    def agree(self, latents: Tensor, eps: Tensor, timestep: Tensor, end: Tensor) -> Tensor:
        """The consistency function: of LCM to the picture, of TCD to timestep `end`. Both are the identity there."""
        if self.kind == "tcd":
            return self.step(latents, eps, timestep, end)
        skip, out = boundary(timestep)
        return skip * latents + out * self.clean(latents, eps, timestep)

    def step(self, latents: Tensor, eps: Tensor, timestep: Tensor, end: Tensor) -> Tensor:
        """DDIM without fresh noise (Song et al. 2021, equation 12) from each latent's timestep to its end."""
        share = self._share(end)
        return share.sqrt() * self.clean(latents, eps, timestep) + (1 - share).sqrt() * eps

    def clean(self, latents: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
        """The latents without the noise that is predicted to be in them."""
        share = self._share(timestep)
        return (latents - (1 - share).sqrt() * eps) / share.sqrt()

    def _share(self, timestep: Tensor) -> Tensor:
        """alpha_bar, (b, 1, 1, 1)."""
        return self.alphas[timestep][:, None, None, None]


def boundary(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of LCM, (b, 1, 1, 1) each: 1 and 0 at timestep 0, nearly 0 and 1 from a few timesteps on."""
    scaled = TIMESTEP_SCALE * timestep.float()[:, None, None, None]
    return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2).sqrt()


def solver_timesteps(steps: int) -> Tensor:
    """0, then the table that distilled samplers pick from, quietest first: 50 steps are 19, 39, ..., 999."""
    if steps < 1 or TRAIN_STEPS % steps:
        raise BadInput(f"steps is {steps}, expected a divisor of {TRAIN_STEPS}; 50 is what LCM and TCD sample out of")
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, steps + 1) * (TRAIN_STEPS // steps) - 1])


class Distiller:
    """Teacher, student and target, and the loss on one batch."""

    def __init__(self, lesson: Lesson, teacher: CapHuman, student: CapHuman, target: CapHuman, empty_caption: Tensor,
                 consistency: Consistency, critic: Critic | None = None):
        """`target` follows the student from outside; `empty_caption`: (77,) ids, the negative prompt of guidance."""
        self.branches, self.consistency = lesson.branches, consistency
        self.teacher, self.student, self.target = teacher, student, target
        device = next(teacher.parameters()).device
        self.critic = critic.to(device) if critic else None
        with torch.no_grad():
            self.negative = teacher.text_encoder(empty_caption[None].to(device))  # (1, 77, width)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Named loss terms; `loss` is minimised, `distance` is the plain error in latents, root mean square.

        `identity`, with a critic only: how hard it is to tell whose picture the student sees.
        """
        with mixed_precision(batch.latents.device):
            text, face = self.conditions(batch)
            given, wanted, clean = self.consistency.compare(
                lambda noisy, timestep: self.student(noisy, timestep, text, [face]).float(),
                lambda noisy, timestep: self.guided(noisy, timestep, text, face),
                lambda noisy, timestep: self.target(noisy, timestep, text, [face]).float(), batch.latents)
        error = given - wanted
        weighted = cost(error) * (1 + FACE_WEIGHT * batch.masks)
        terms = {"loss": weighted.mean(), "distance": error.square().mean().sqrt()}
        if self.critic:
            shown = torch.lerp(batch.latents, clean, batch.masks)  # the face alone, as in nano
            terms["identity"] = unlikeness(self.critic, shown, batch.identities)
            terms["loss"] = terms["loss"] + IDENTITY_WEIGHT * terms["identity"]
        return terms

    @torch.no_grad()
    def conditions(self, batch: Batch) -> tuple[Tensor, FaceCondition]:
        """Text tokens and the face, by the parts that student and teacher share."""
        image_tokens = self.teacher.image_encoder(batch.crops)
        face = self.teacher.face_condition(batch.maps, image_tokens, batch.identities)
        return self.teacher.text_encoder(batch.captions), face

    @torch.no_grad()
    def guided(self, noisy: Tensor, timestep: Tensor, text: Tensor, face: FaceCondition) -> Tensor:
        """The teacher's eps, all branches in one batch."""
        count = len(self.branches)
        texts = [text if prompt else self.negative.expand_as(text) for prompt, *_ in self.branches]
        faces = FaceCondition(torch.cat([face.tokens * somebody for _, somebody, *_ in self.branches]),
                              _repeated(face.hint, count), tuple(_repeated(gate, count) for gate in face.gates))
        eps = self.teacher(_repeated(noisy, count), timestep.repeat(count), torch.cat(texts), [faces]).float()
        return sum((weight + added * face.gates[0]) * part
                   for (_, _, weight, added), part in zip(self.branches, eps.chunk(count), strict=True))


def cost(error: Tensor) -> Tensor:
    """The pseudo-Huber loss of each number (Song and Dhariwal 2023, section 3.3, here with LCM's constant)."""
    return (error.square() + HUBER**2).sqrt() - HUBER


def load_teacher(folder: Path, vae: VaeConfig) -> CapHuman:
    """A `training.nano` run's model without autoencoder, frozen.

    Raises CheckpointError for one that is distilled already, or was trained on latents of another autoencoder.
    """
    metadata = read_metadata(folder)
    if "distilled" in metadata:
        raise CheckpointError(f"{folder} holds a student that needs no guidance, expected the teacher of a "
                              "training.nano run; pass what it was distilled from, and it as --start-from")
    # weights of before this field lack it; every miniature reads identities from the same network
    config = dataclasses.replace(Config.from_json(metadata["config"]), identity_size=NANO.identity_size)
    if config.vae != vae:
        raise CheckpointError(f"{folder} was trained on latents of {config.vae}, expected the labels' {vae}; pass the "
                              "labels that it was trained on")
    model = CapHuman(config, autoencoder=False)
    load_strictly(model, read_weights(folder), str(folder))
    return model.eval().requires_grad_(False)


def student_of(teacher: CapHuman) -> CapHuman:
    """A copy of which UNet and CapFace can be trained, but for what CapFace computes once a portrait."""
    student = copy.deepcopy(teacher)
    for part in (student.unet, student.control_model):
        part.requires_grad_(True)
    for part in (student.control_model.input_hint_block, student.control_model.mask_predict):
        part.requires_grad_(False)
    return student


def facts_of(lesson: Lesson, teacher: Path) -> dict[str, Any]:
    """What a student's weights record of its lesson and its teacher."""
    metadata = read_metadata(teacher)
    return {**dataclasses.asdict(lesson), "teacher_samples": metadata["samples"], "teacher_steps": metadata["step"]}


def check_same_run(folder: Path, facts: dict[str, Any]) -> None:
    """Raise CheckpointError where a folder holds the weights of another lesson, or of a teacher."""
    if any(folder.glob("weights-*.safetensors")) and (kept := read_metadata(folder).get("distilled")) != facts:
        raise CheckpointError(f"{folder} holds weights distilled by {kept}, expected {facts}; give that run's options "
                              "or another --out")


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor.repeat(count, *(1,) * (tensor.ndim - 1))


if __name__ == "__main__":
    guarded(main)
