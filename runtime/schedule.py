"""The noise schedule of Stable Diffusion and the DDIM sampler, pure functions in float32 as the official tool computes.

The other samplers are in `samplers`.

Symbols as in Denoising Diffusion Implicit Models (Song et al. 2021, equations 12 and 16): alpha is the cumulative
product of 1 - beta, sigma the noise put back in, eps the predicted noise.
"""
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from .errors import BadInput

LEADING, TRAILING = "leading", "trailing"  # tables that end at the least noisy timestep, or begin at the noisiest
SPACINGS = {"ddim": (LEADING, TRAILING), "lcm": (TRAILING,), "tcd": (TRAILING,), "dpm++": (TRAILING, LEADING)}
SCHEDULES = tuple(SPACINGS)  # the samplers that there are, each with its tables, the usual one first


@dataclass(frozen=True)
class Schedule:
    """A model's noise schedule, and the sampling defaults it was trained for. The defaults are SD-1.5's."""

    kind: str = "ddim"  # one of SCHEDULES
    steps: int = 20
    guidance: float = 7.0
    identity_guidance: float = 1.0
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000
    timesteps: str = LEADING  # one of SPACINGS[kind]


@dataclass(frozen=True)
class SamplerStep:
    """One step's constants: what every sampler has, and all that DDIM needs."""

    timestep: int  # what the denoiser is told, 0..train_steps - 1
    alpha: np.float32  # of this timestep
    alpha_prev: np.float32  # of the less noisy latent that the step leads to
    sigma: np.float32  # of the fresh noise in that; 0 where the step takes none


def ddim_steps(schedule: Schedule, steps: int, eta: float = 0.0) -> list[SamplerStep]:
    """The steps from noise to picture, in the order they are walked. Raises BadInput for a count with no table.

    eta 0 is deterministic, 1 is ancestral sampling (equation 16). The last step leads to the alpha of timestep 0, not
    to 1: the official sampler leaves that trace of noise in, and so does Hyper-SD (Ren et al. 2024), whose few steps
    are these with trailing timesteps. Each step leads to where the next begins, also for counts that do not divide
    train_steps, with which diffusers' trailing DDIM aims up to a timestep beside it.
    """
    table = (trailing_timesteps if schedule.timesteps == TRAILING else timesteps)(steps, schedule.train_steps)
    alphas = alphas_cumprod(schedule)
    here, there = alphas[table], alphas[np.append(table[1:], 0)]
    sigmas = np.float32(eta) * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
    return [SamplerStep(int(t), *constants) for t, *constants in zip(table, here, there, sigmas, strict=True)]


def ddim_step(
    latent: Float32[np.ndarray, "*shape"], eps: Float32[np.ndarray, "*shape"], step: SamplerStep,
    noise: Float32[np.ndarray, "*shape"] | None = None,
) -> tuple[Float32[np.ndarray, "*shape"], Float32[np.ndarray, "*shape"]]:
    """The less noisy latent, and the clean latent that this step predicts (equation 12). Neither is clipped.

    `noise` is standard normal and needed only where `step.sigma` is not 0.
    """
    clean = clean_latent(latent, eps, step.alpha)
    direction = np.sqrt(1 - step.alpha_prev - step.sigma**2) * eps
    next_latent = np.sqrt(step.alpha_prev) * clean + direction
    return (next_latent if noise is None else next_latent + step.sigma * noise), clean


def clean_latent(
    latent: Float32[np.ndarray, "*shape"], eps: Float32[np.ndarray, "*shape"], alpha: np.float32,
) -> Float32[np.ndarray, "*shape"]:
    """The latent without the noise that is predicted to be in it (the left part of equation 12)."""
    return np.asarray((latent - np.sqrt(1 - alpha) * eps) / np.sqrt(alpha))


def guided(
    eps_text: Float32[np.ndarray, "*shape"], eps_negative: Float32[np.ndarray, "*shape"], guidance: float,
) -> Float32[np.ndarray, "*shape"]:
    """Classifier-free guidance (Ho and Salimans 2022): away from the negative prompt; 1 is the text alone."""
    return eps_negative + np.float32(guidance) * (eps_text - eps_negative)


def timesteps(steps: int, train_steps: int = 1000) -> Int64[np.ndarray, "n"]:
    """The official table for this many steps, noisiest first: 20 steps are 951, 901, .., 51, 1.

    Its stride is train_steps // steps, so a count that does not divide train_steps gives more steps than asked (30
    gives 31). Some counts make the official table overrun its schedule: they raise BadInput, which names the nearest
    that do not.
    """
    if not _allowed(steps, train_steps):
        fewer, more = range(min(steps - 1, train_steps), 0, -1), range(max(steps + 1, 1), train_steps + 1)
        nearest = [next((str(n) for n in counts if _allowed(n, train_steps)), None) for counts in (fewer, more)]
        raise BadInput(f"{steps} steps cannot be laid out in {train_steps} timesteps; "
                       f"the nearest that can: {' or '.join(filter(None, nearest))}")
    return np.arange(0, train_steps, train_steps // steps, dtype=np.int64)[::-1] + 1


def trailing_timesteps(steps: int, train_steps: int = 1000) -> Int64[np.ndarray, "n"]:
    """Evenly spaced from the noisiest on (Lin et al. 2024, table 2): 4 steps are 999, 749, 499, 249.

    Raises BadInput outside 1 to train_steps.
    """
    check_steps(steps, train_steps)
    return np.round(train_steps - np.arange(steps) * (train_steps / steps)).astype(np.int64) - 1


def check_steps(steps: int, most: int) -> None:
    """Raise BadInput for a count of steps that a table does not have."""
    if not 1 <= steps <= most:
        raise BadInput(f"steps is {steps}, expected 1 to {most} with this sampler and these timesteps; choose one of "
                       "them")


def alphas_cumprod(schedule: Schedule) -> Float32[np.ndarray, "t"]:
    """Share of the picture left at each timestep; betas are linear in their square roots, products in float64."""
    roots = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.train_steps)
    return np.cumprod(1 - roots**2).astype(np.float32)


def _allowed(steps: int, train_steps: int) -> bool:
    """Whether the table, which counts from 1, stays clear of the index train_steps that no schedule has."""
    return 1 <= steps <= train_steps and (train_steps - 1) % (train_steps // steps) != 0
