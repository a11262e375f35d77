"""DDIM against trajectories that the official sampler recorded: constants exactly, latents to the last bits."""
import json

import numpy as np
import pytest

from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.schedule import Schedule, alphas_cumprod, ddim_step, ddim_steps, guided, timesteps

RUNS = ("s5", "s20", "s20_tau500", "s5_eta1")


@pytest.fixture
def ddim(golden):
    return golden("ddim.npz")


@pytest.fixture(params=RUNS)
def run(request, ddim):
    """Each recorded run; tests/golden leaves the long ones out."""
    if f"out/{request.param}/x_inter" not in ddim:
        pytest.skip(f"this ddim.npz is trimmed: no run {request.param}")
    return request.param


def settings(ddim, run):
    return json.loads(str(ddim["config"]))["runs"][run]


def recorded(ddim, run, name):
    """A recorded array with one entry a step; "eps" is the two branches guided, "noise" None where eta is 0."""
    if name == "eps":
        return guided(ddim[f"out/{run}/eps_cond"], ddim[f"out/{run}/eps_uncond"], settings(ddim, run)["scale"])
    if name == "noise":
        return ddim[f"in/{run}/noise"] if f"in/{run}/noise" in ddim else [None] * settings(ddim, run)["n_steps_actual"]
    return ddim[f"out/{run}/{name}"]


def test_alphas_are_the_official_ones_bit_for_bit(ddim):
    np.testing.assert_array_equal(alphas_cumprod(Schedule()), ddim["sched/model_alphas_cumprod"])


def test_timestep_tables_are_the_official_ones(ddim):
    overruns = json.loads(str(ddim["config"]))["uniform_index_out_of_range"]
    for steps in (int(steps) for steps, overrun in overruns.items() if not overrun):
        np.testing.assert_array_equal(timesteps(steps)[::-1], ddim[f"sched/uniform_{steps}"])


def test_tables_that_overrun_are_refused(ddim):
    overruns = json.loads(str(ddim["config"]))["uniform_index_out_of_range"]
    for steps in (int(steps) for steps, overrun in overruns.items() if overrun):
        with pytest.raises(BadInput):
            timesteps(steps)


def test_constants_are_the_official_ones(ddim, run):
    steps = ddim_steps(Schedule(), settings(ddim, run)["S"], settings(ddim, run)["eta"])[::-1]
    np.testing.assert_array_equal([step.timestep for step in steps], ddim[f"sched/{run}/timesteps"])
    np.testing.assert_array_equal([step.alpha for step in steps], ddim[f"sched/{run}/ddim_alphas"])
    np.testing.assert_array_equal([step.alpha_prev for step in steps], ddim[f"sched/{run}/ddim_alphas_prev"])
    np.testing.assert_allclose([step.sigma for step in steps], ddim[f"sched/{run}/ddim_sigmas"], atol=3e-7)


def test_each_step_lands_where_the_official_one_does(ddim, run):
    steps = ddim_steps(Schedule(), settings(ddim, run)["S"], settings(ddim, run)["eta"])
    latents, cleans, noises, eps = (recorded(ddim, run, name) for name in ("x_inter", "pred_x0", "noise", "eps"))
    for i, step in enumerate(steps):
        next_latent, clean = ddim_step(latents[i], eps[i], step, noises[i])
        np.testing.assert_allclose(next_latent, latents[i + 1], rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(clean, cleans[i], rtol=1e-6, atol=2e-5)


def test_a_whole_trajectory_ends_at_the_official_sample(ddim, run):
    """The recorded eps are fed in, so that only the sampler's own rounding can accumulate."""
    latent, noises, eps = ddim["in/x_T"], recorded(ddim, run, "noise"), recorded(ddim, run, "eps")
    for i, step in enumerate(ddim_steps(Schedule(), settings(ddim, run)["S"], settings(ddim, run)["eta"])):
        latent, _ = ddim_step(latent, eps[i], step, noises[i])
    np.testing.assert_allclose(latent, ddim[f"out/{run}/samples"], atol=1e-4)
