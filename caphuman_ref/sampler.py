"""DDIM as the official sampler runs it, and the noise schedule of Stable Diffusion 1.x.

Source: Song et al. 2021, "Denoising Diffusion Implicit Models". Symbols as there, with alpha_bar for the
cumulative product (the paper's alpha). Precisions follow the official code, so that float32 results agree.
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from caphuman_edge.runtime.errors import BadInput

TRAIN_STEPS = 1000
BETA_FIRST, BETA_LAST = 0.00085, 0.012

Denoise = Callable[[Tensor, Tensor], Tensor]  # (latent, timestep (b,)) -> eps
TextDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (latent, timestep (b,), text tokens) -> eps


@dataclass(frozen=True)
class DdimSchedule:
    """Per-step constants in ascending time; sampling walks them from the end."""

    timesteps: Int64[Tensor, "n"]  # 1..999
    alpha_bars: Float32[Tensor, "n"]
    alpha_bars_prev: Float32[Tensor, "n"]  # of the next, less noisy step
    sigmas: Float64[Tensor, "n"]  # rounded to float32 where a step uses them

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class DdimStep:
    """The state after one step."""

    index: int  # 0 for the first, noisiest step
    timestep: int  # 1..999, the one this step removed
    latent: Float[Tensor, "b c h w"]
    clean: Float[Tensor, "b c h w"]  # x_0 as predicted by this step, not clipped


def ddim(denoise: Denoise, latent: Float[Tensor, "b c h w"], schedule: DdimSchedule,
         noise: Sequence[Float[Tensor, "b c h w"]] | None = None) -> Iterator[DdimStep]:
    """Denoise `latent` (x_T, unit variance) step by step; `noise` holds one draw a step and is needed if eta > 0."""
    if noise is None and schedule.sigmas.any():
        raise BadInput("noise is None, expected one draw for each step because eta > 0; pass noise or use eta 0")
    for index, k in enumerate(reversed(range(len(schedule)))):
        timestep = schedule.timesteps[k].to(latent.device)
        eps = denoise(latent, timestep.expand(len(latent)))
        draw = noise[index] if noise is not None else torch.zeros_like(latent)
        latent, clean = ddim_step(latent, eps, draw, schedule, k)
        yield DdimStep(index, int(timestep), latent, clean)


def ddim_step(latent: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"],
              schedule: DdimSchedule, k: int) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """(x_prev, predicted x_0) by equation 12 of the paper."""
    alpha_bar, alpha_bar_prev = schedule.alpha_bars[k], schedule.alpha_bars_prev[k]
    sigma = schedule.sigmas[k].float()
    clean = (latent - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    direction = (1 - alpha_bar_prev - sigma**2).sqrt() * eps
    return alpha_bar_prev.sqrt() * clean + direction + sigma * noise, clean


def guided(denoise: TextDenoise, text: Float[Tensor, "b n ctx"], negative: Float[Tensor, "b n ctx"],
           guidance: float) -> Denoise:
    """Classifier-free guidance as two passes of the same batch; at guidance 1 only the conditional one runs.

    Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance".
    """

    def denoise_guided(latent: Tensor, timestep: Tensor) -> Tensor:
        conditional = denoise(latent, timestep, text)
        if guidance == 1:
            return conditional
        unconditional = denoise(latent, timestep, negative)
        return unconditional + guidance * (conditional - unconditional)

    return denoise_guided


def ddim_schedule(steps: int, eta: float = 0.0) -> DdimSchedule:
    """Constants of an official DDIM run; raises BadInput for step counts that run past the training schedule."""
    timesteps = uniform_timesteps(steps)
    if timesteps[-1] >= TRAIN_STEPS:
        raise BadInput(f"steps is {steps}, whose last timestep is {int(timesteps[-1])}, expected below {TRAIN_STEPS}; "
                       "use a divisor of 1000 such as 20, 25 or 50")
    table = alphas_cumprod()
    alpha_bars = table[timesteps]
    alpha_bars_prev = torch.cat([table[:1], alpha_bars[:-1]])  # ends at alpha_bar_0, not at 1
    return DdimSchedule(timesteps, alpha_bars, alpha_bars_prev, eta * _unit_sigmas(alpha_bars, alpha_bars_prev))


def uniform_timesteps(steps: int) -> Int64[Tensor, "n"]:
    """The official table: 1000 // steps apart from 1 on. It is longer than asked if steps does not divide 1000."""
    if not 1 <= steps <= TRAIN_STEPS:
        raise BadInput(f"steps is {steps}, expected 1 to {TRAIN_STEPS}; 20 is usual")
    return torch.arange(0, TRAIN_STEPS, TRAIN_STEPS // steps) + 1


def alphas_cumprod() -> Float32[Tensor, "1000"]:
    """alpha_bar of every training timestep: a float64 product, then rounded."""
    return torch.cumprod(1 - betas(), dim=0).float()


def betas() -> Float64[Tensor, "1000"]:
    """Noise variance of every training timestep, linear in its square root."""
    return torch.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2


def _unit_sigmas(alpha_bars: Float32[Tensor, "n"], alpha_bars_prev: Float32[Tensor, "n"]) -> Float64[Tensor, "n"]:
    """Equation 16 at eta 1. The float32 reciprocal is what the official mix of numpy and torch computes."""
    previous = alpha_bars_prev.double()
    return ((1 - previous) * (1 - alpha_bars).reciprocal().double() * (1 - alpha_bars.double() / previous)).sqrt()
