"""The samplers: DDIM, LCM, TCD and DPM-Solver++ 2M, pure functions in float32.

A sampler lays out its steps for a schedule (`lay_out`), and each step turns a latent and the noise predicted in it into
a less noisy latent and a clean one (`take`). `sample` walks them. Symbols as in `schedule`; eps arrives guided.

Options are those of the published models for Stable Diffusion 1.5: predictions are not clipped; LCM and TCD take their
timesteps from the 50 that distillation used; DPM-Solver++ is multistep of order 2 in the midpoint form, begins and ends
with order 1, and its last step leads to no noise at all.
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from .errors import BadInput
from .schedule import (
    SPACINGS,
    TRAILING,
    SamplerStep,
    Schedule,
    alphas_cumprod,
    check_steps,
    clean_latent,
    ddim_step,
    ddim_steps,
    trailing_timesteps,
)

DISTILLED = ("lcm", "tcd")  # samplers of models that were distilled for them
ETAS = {"ddim": 0.0, "tcd": 0.3}  # samplers with an eta, and its usual value; TCD's paper calls it gamma
DISTILLATION_STEPS = 50  # of the solver that LCM and TCD are distilled with
SIGMA_DATA, TIMESTEP_SCALE = 0.5, 10.0  # of LCM's boundary condition
LEADING_OFFSET = 1  # of DPM-Solver++'s leading timesteps, as in Stable Diffusion's own configuration


@dataclass(frozen=True)
class LcmStep(SamplerStep):
    """One step of a latent consistency model."""

    skip: np.float32  # c_skip and c_out: near timestep 0 the latent is the picture, whatever the model says
    out: np.float32


@dataclass(frozen=True)
class TcdStep(SamplerStep):
    """One step of trajectory consistency: down to `alpha_low` without noise, then up to `alpha_prev` with it."""

    alpha_low: np.float32


@dataclass(frozen=True)
class DpmStep(SamplerStep):
    """One step of DPM-Solver++ 2M."""

    lead: np.float32  # 1 / 2r: how much of the last change of the clean latent is added to it; 0 is order 1


def sample(
    denoise: Callable[[Float32[np.ndarray, "*shape"], int], Float32[np.ndarray, "*shape"]],
    latent: Float32[np.ndarray, "*shape"], steps: Sequence[SamplerStep],
    noise: Callable[[int], Float32[np.ndarray, "*shape"]],
    kept: Callable[[Float32[np.ndarray, "*shape"], SamplerStep], Float32[np.ndarray, "*shape"]] | None = None,
) -> Iterator[tuple[Float32[np.ndarray, "*shape"], Float32[np.ndarray, "*shape"]]]:
    """The latent after each step, and the clean latent that the step predicts.

    `denoise(latent, timestep)` predicts eps. `noise(k)` draws standard normal noise for step k; it is asked for where a
    step takes some. `kept(latent, step)` may change the latent after a step. `steps` may be the last ones of a table:
    DPM-Solver++ then begins with order 1.
    """
    clean = None
    for index, step in enumerate(steps):
        eps = denoise(latent, step.timestep)
        latent, clean = take(step, latent, eps, noise(index) if step.sigma else None, clean)
        latent = kept(latent, step) if kept else latent
        yield latent, clean


def lay_out(schedule: Schedule, steps: int, eta: float = 0.0) -> Sequence[SamplerStep]:
    """The steps of the schedule's sampler from noise to picture, in the order they are walked.

    Raises BadInput for a kind or timesteps that there are not, a count that the table does not have, and an eta of a
    sampler that has none.
    """
    kind = schedule.kind
    if schedule.timesteps not in SPACINGS.get(kind, ()):
        known = ", ".join(f"{name} ({' or '.join(spacings)})" for name, spacings in SPACINGS.items())
        raise BadInput(f"there is no schedule {kind!r:.40} with {schedule.timesteps!r:.40} timesteps, expected one of "
                       f"{known}; change schedule or timesteps")
    if eta and kind not in ETAS:
        raise BadInput(f"eta is {eta}, but {kind} has none; leave it out, or choose schedule {' or '.join(ETAS)}")
    if kind == "ddim":
        return ddim_steps(schedule, steps, eta)
    if kind == "tcd":
        return tcd_steps(schedule, steps, eta)
    return lcm_steps(schedule, steps) if kind == "lcm" else dpm_steps(schedule, steps)


def take(
    step: SamplerStep, latent: Float32[np.ndarray, "*shape"], eps: Float32[np.ndarray, "*shape"],
    noise: Float32[np.ndarray, "*shape"] | None = None, previous: Float32[np.ndarray, "*shape"] | None = None,
) -> tuple[Float32[np.ndarray, "*shape"], Float32[np.ndarray, "*shape"]]:
    """The less noisy latent, and the clean latent that this step predicts. Neither is clipped.

    `noise` is standard normal and needed where `step.sigma` is not 0; `previous` is what the step before predicted.
    """
    if isinstance(step, LcmStep):
        return lcm_step(latent, eps, step, noise)
    if isinstance(step, TcdStep):
        return tcd_step(latent, eps, step, noise)
    return dpm_step(latent, eps, step, previous) if isinstance(step, DpmStep) else ddim_step(latent, eps, step, noise)


def lcm_steps(schedule: Schedule, steps: int) -> list[LcmStep]:
    """Multistep consistency sampling (Luo et al. 2023, Latent Consistency Models)."""
    table, alphas = distilled_timesteps(steps, schedule.train_steps), alphas_cumprod(schedule)
    there = np.append(alphas[table[1:]], np.float32(1))  # the last step's latent is its clean one
    scaled = table * TIMESTEP_SCALE
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
    constants = np.stack([alphas[table], there, np.sqrt(1 - there), skip, out], axis=1).astype(np.float32)
    return [LcmStep(int(t), *row) for t, row in zip(table, constants, strict=True)]


def lcm_step(
    latent: Float32[np.ndarray, "*shape"], eps: Float32[np.ndarray, "*shape"], step: LcmStep,
    noise: Float32[np.ndarray, "*shape"] | None = None,
) -> tuple[Float32[np.ndarray, "*shape"], Float32[np.ndarray, "*shape"]]:
    """The consistency function, c_skip latent + c_out clean, made as noisy again as the next step begins."""
    clean = step.out * clean_latent(latent, eps, step.alpha) + step.skip * latent
    return (clean if noise is None else np.sqrt(step.alpha_prev) * clean + step.sigma * noise), clean


def tcd_steps(schedule: Schedule, steps: int, gamma: float = ETAS["tcd"]) -> list[TcdStep]:
    """Strategic stochastic sampling (Zheng et al. 2024, Trajectory Consistency Distillation).

    Each step goes down to timestep (1 - gamma) t' without noise, and from there up to t' with it. gamma 0 is DDIM with
    this table, 1 draws as much as LCM. Hyper-SD's unified models (Ren et al. 2024) are sampled in this way, too.
    """
    table, alphas = distilled_timesteps(steps, schedule.train_steps), alphas_cumprod(schedule)
    leads_to = np.append(table[1:], 0)
    low = alphas[np.floor(np.float32(1 - gamma) * leads_to.astype(np.float32)).astype(np.int64)]
    there = alphas[leads_to]
    constants = np.stack([alphas[table], there, np.sqrt(1 - there / low), low], axis=1)
    return [TcdStep(int(t), *row) for t, row in zip(table, constants, strict=True)]


def tcd_step(
    latent: Float32[np.ndarray, "*shape"], eps: Float32[np.ndarray, "*shape"], step: TcdStep,
    noise: Float32[np.ndarray, "*shape"] | None = None,
) -> tuple[Float32[np.ndarray, "*shape"], Float32[np.ndarray, "*shape"]]:
    """Down the trajectory by a step of DDIM, then back up by the forward process."""
    clean = clean_latent(latent, eps, step.alpha)
    lower = np.sqrt(step.alpha_low) * clean + np.sqrt(1 - step.alpha_low) * eps
    return (lower if noise is None else np.sqrt(step.alpha_prev / step.alpha_low) * lower + step.sigma * noise), clean


def dpm_steps(schedule: Schedule, steps: int) -> list[DpmStep]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) in the variance-preserving form: alpha_t is sqrt(alpha) here.

    lambda is half the logarithm of the signal-to-noise ratio alpha / (1 - alpha), h its growth in a step, and r the
    growth in the step before as a share of it.
    """
    trailing = schedule.timesteps == TRAILING
    table = (trailing_timesteps if trailing else _leading_timesteps)(steps, schedule.train_steps)
    here = alphas_cumprod(schedule)[table]
    there = np.append(here[1:], np.float32(1))
    leads, growth = np.zeros(len(table), np.float32), np.diff(_half_log_snr(here))
    leads[1:-1] = growth[1:] / growth[:-1] / 2
    return [DpmStep(int(t), alpha, alpha_prev, np.float32(0), lead)
            for t, alpha, alpha_prev, lead in zip(table, here, there, leads, strict=True)]


def dpm_step(
    latent: Float32[np.ndarray, "*shape"], eps: Float32[np.ndarray, "*shape"], step: DpmStep,
    previous: Float32[np.ndarray, "*shape"] | None = None,
) -> tuple[Float32[np.ndarray, "*shape"], Float32[np.ndarray, "*shape"]]:
    """Towards the clean latent extrapolated from the last two; from one alone this is DDIM (Lu et al. 2022).

    With e^-h = sqrt(alpha (1 - alpha') / (alpha' (1 - alpha))), sqrt(alpha') (1 - e^-h) is written so that the last
    step, whose h is infinite, needs no case of its own.
    """
    clean = clean_latent(latent, eps, step.alpha)
    ahead = clean if previous is None else clean + step.lead * (clean - previous)
    ratio = np.sqrt((1 - step.alpha_prev) / (1 - step.alpha))
    return ratio * latent + (np.sqrt(step.alpha_prev) - np.sqrt(step.alpha) * ratio) * ahead, clean


def distilled_timesteps(steps: int, train_steps: int = 1000) -> Int64[np.ndarray, "n"]:
    """Evenly picked out of the 50 timesteps of distillation, noisiest first: 4 steps are 999, 759, 499, 259.

    Raises BadInput outside 1 to 50.
    """
    count = min(DISTILLATION_STEPS, train_steps)
    check_steps(steps, count)
    solver = np.arange(count, 0, -1) * (train_steps // count) - 1
    return solver[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(np.int64)].astype(np.int64)


def _leading_timesteps(steps: int, train_steps: int) -> Int64[np.ndarray, "n"]:
    """Multiples of train_steps // (steps + 1), plus 1: 4 steps are 801, 601, 401, 201."""
    check_steps(steps, train_steps - 2)  # beyond, the noisiest would be train_steps itself
    return np.arange(steps, 0, -1, dtype=np.int64) * (train_steps // (steps + 1)) + LEADING_OFFSET


def _half_log_snr(alpha: Float32[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    wide = alpha.astype(np.float64)
    return np.asarray(np.log(wide / (1 - wide)) / 2)
