"""The sampler equals the official one: tables, steps on recorded predictions, and whole runs with the nets."""
import dataclasses
import json

import numpy as np
import pytest
import torch

from caphuman_edge.ref.caphuman import CapHuman, ControlSettings
from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.sampler import alphas_cumprod, betas, ddim, ddim_schedule, guided, uniform_timesteps
from caphuman_edge.runtime.contract import TINY, VisionConfig
from caphuman_edge.runtime.errors import BadInput

RUNS = ("s5", "s20", "s20_tau500", "s5_eta1", "s5_scale1")
TEXT, NEGATIVE = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)  # markers that a fake denoiser tells apart
CRASHING = (3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001))  # in the official code


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def suite(golden, cache):
    if "suite" not in cache:
        cache["suite"] = golden("ddim.npz")
    return cache["suite"]


@pytest.fixture
def model(suite, cache):
    weights = {key[3:]: torch.from_numpy(value) for key, value in suite.items() if key.startswith("sd/")}
    if not weights:
        pytest.skip("this copy of ddim.npz has no weights; set GOLDEN_DIR to a folder that has them")
    if "model" not in cache:
        model = CapHuman(dataclasses.replace(TINY, vision=VisionConfig(width=1024)), encoders=False, autoencoder=False)
        load_strictly(model, weights, "ddim.npz")
        cache["model"] = model.eval().requires_grad_(False)
    return cache["model"]


@pytest.fixture
def recorded_run(suite, request):
    if f"out/{request.param}/samples" not in suite:
        pytest.skip(f"this copy of ddim.npz has no run {request.param}; set GOLDEN_DIR to a folder that has it")
    return request.param


def settings(suite, run):
    return json.loads(str(suite["config"]))["runs"][run]


def start(suite, run):
    """x_T, schedule and noise of a recorded run."""
    noise = suite.get(f"in/{run}/noise")
    schedule = ddim_schedule(settings(suite, run)["S"], settings(suite, run)["eta"])
    return torch.from_numpy(suite["in/x_T"]), schedule, None if noise is None else list(torch.from_numpy(noise))


def test_betas_and_alphas_have_the_official_bits(suite):
    np.testing.assert_array_equal(betas(), suite["sched/betas_f64"])
    np.testing.assert_array_equal(alphas_cumprod(), suite["sched/model_alphas_cumprod"])


def test_timestep_tables_equal_the_official_ones_quirks_included(suite):
    tables = {int(key.split("_")[1]): table for key, table in suite.items() if key.startswith("sched/uniform_")}
    assert len(tables[30]) == 31  # the quirk: 30 does not divide 1000
    for steps, table in tables.items():
        np.testing.assert_array_equal(uniform_timesteps(steps), table, err_msg=str(steps))


def test_the_first_of_twenty_steps_is_951():
    assert ddim_schedule(20).timesteps[-1] == 951


@pytest.mark.parametrize("run", RUNS)
def test_step_constants_have_the_official_bits(suite, run):
    schedule = start(suite, run)[1]
    np.testing.assert_array_equal(schedule.timesteps, suite[f"sched/{run}/timesteps"])
    np.testing.assert_array_equal(schedule.alpha_bars.double(), suite[f"sched/{run}/ddim_alphas"])
    np.testing.assert_array_equal(schedule.alpha_bars_prev.double(), suite[f"sched/{run}/ddim_alphas_prev"])
    np.testing.assert_array_equal(schedule.sigmas, suite[f"sched/{run}/ddim_sigmas"])


def test_step_counts_that_crash_the_official_sampler_are_refused():
    refused = [steps for steps in range(1, 1001) if _is_refused(steps)]
    assert refused == list(CRASHING)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_outside_the_schedule_are_refused(steps):
    assert _is_refused(steps)


@pytest.mark.parametrize("recorded_run", RUNS, indirect=True)
def test_steps_on_recorded_predictions_equal_the_official_ones(suite, recorded_run):
    latent, schedule, noise = start(suite, recorded_run)
    denoise = _replay(suite, recorded_run, settings(suite, recorded_run)["scale"])
    for step in ddim(denoise, latent, schedule, noise):
        expected = suite[f"out/{recorded_run}/x_inter"][step.index + 1]
        np.testing.assert_allclose(step.latent, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(step.clean, suite[f"out/{recorded_run}/pred_x0"][step.index], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recorded_run", RUNS, indirect=True)
def test_whole_runs_equal_the_official_ones(model, suite, recorded_run):
    latent, schedule, noise = start(suite, recorded_run)
    run = settings(suite, recorded_run)
    denoise = _denoiser(model, suite, run["scale"], ControlSettings(tau=run["tau"]))
    *_, last = ddim(denoise, latent, schedule, noise)
    np.testing.assert_allclose(last.latent, suite[f"out/{recorded_run}/samples"], atol=1e-2)


def test_guidance_one_runs_only_the_conditional_pass():
    texts = []
    denoise = guided(lambda latent, timestep, text: texts.append(text) or latent, TEXT, NEGATIVE, 1.0)
    denoise(torch.ones(1), torch.ones(1))
    assert len(texts) == 1
    assert texts[0] is TEXT


def test_eta_without_noise_is_refused():
    with pytest.raises(BadInput, match="noise"):
        next(ddim(lambda latent, timestep: latent, torch.ones(1, 4, 2, 2), ddim_schedule(5, eta=1.0)))


def _is_refused(steps):
    try:
        ddim_schedule(steps)
    except BadInput:
        return True
    return False


def _replay(suite, run, scale):
    """A denoiser that answers from the recording, guidance included."""
    conditional = iter(torch.from_numpy(suite[f"out/{run}/eps_cond"]) if scale != 1 else _conditional_only(suite, run))
    unconditional = iter(torch.from_numpy(suite[f"out/{run}/eps_uncond"])) if scale != 1 else None
    return guided(lambda latent, timestep, text: next(conditional if text is TEXT else unconditional),
                  TEXT, NEGATIVE, scale)


def _conditional_only(suite, run):
    """The run at guidance 1 has no recorded eps; DDIM's x_0 equation gives it back."""
    schedule = start(suite, run)[1]
    pairs = zip(suite[f"out/{run}/x_inter"], suite[f"out/{run}/pred_x0"], reversed(schedule.alpha_bars), strict=False)
    return torch.stack([(torch.from_numpy(x) - a.sqrt() * torch.from_numpy(x0)) / (1 - a).sqrt() for x, x0, a in pairs])


def _denoiser(model, suite, scale, control):
    inputs = [torch.from_numpy(suite[f"in/{name}"]) for name in ("c_concat", "c_crossattn_control", "c_crossattn_id")]
    face = model.face_condition(inputs[0], inputs[1], inputs[2][:, 0])
    texts = (torch.from_numpy(suite[f"in/{name}"]) for name in ("c_crossattn", "uncond_c_crossattn"))
    return guided(lambda latent, timestep, text: model(latent, timestep, text, [face], control=control), *texts, scale)
