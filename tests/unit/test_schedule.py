"""DDIM as the official sampler lays it out, its quirks included."""
import numpy as np
import pytest

from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.schedule import Schedule, alphas_cumprod, ddim_step, ddim_steps, guided, timesteps

# Observed by running the official sampler for every count: these overrun its table.
OVERRUNNING = [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]


def test_twenty_steps_begin_at_951_and_end_at_1():
    np.testing.assert_array_equal(timesteps(20), np.arange(951, 0, -50))


@pytest.mark.parametrize(("asked", "given"), [(30, 31), (15, 16), (48, 50), (1, 1)])
def test_a_count_that_does_not_divide_1000_gives_more_steps(asked, given):
    assert len(timesteps(asked)) == given


def test_exactly_the_counts_that_crash_the_official_sampler_are_refused():
    def refused(steps: int) -> bool:
        try:
            return bool(timesteps(steps)[0] > 999)
        except BadInput:
            return True

    assert [steps for steps in range(1, 1001) if refused(steps)] == OVERRUNNING


@pytest.mark.parametrize(("steps", "nearest"), [
    (3, "2 or 4"), (37, "35 or 38"), (105, "100 or 112"), (1000, "500"), (5000, "500"), (0, "1"), (-4, "1"),
])
def test_a_refused_count_names_the_nearest_that_work(steps, nearest):
    with pytest.raises(BadInput, match=f"^{steps} steps cannot .* the nearest that can: {nearest}$"):
        timesteps(steps)


def test_alphas_fall_from_almost_one_to_almost_none():
    alphas = alphas_cumprod(Schedule())
    assert alphas.shape == (1000,) and (np.diff(alphas) < 0).all()
    np.testing.assert_allclose(alphas[[0, 999]], [0.99915, 0.0046602], rtol=1e-4)


def test_the_last_step_leads_to_timestep_0_not_to_no_noise():
    assert ddim_steps(Schedule(), 20)[-1].alpha_prev == alphas_cumprod(Schedule())[0]


def test_each_step_leads_to_where_the_next_begins():
    steps = ddim_steps(Schedule(), 20)
    assert [step.alpha_prev for step in steps[:-1]] == [step.alpha for step in steps[1:]]


def test_a_perfect_denoiser_recovers_the_picture_in_every_step():
    rng = np.random.default_rng(0)
    picture, eps = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
    step = ddim_steps(Schedule(), 20)[5]
    noisy = np.sqrt(step.alpha) * picture + np.sqrt(1 - step.alpha) * eps
    next_latent, clean = ddim_step(noisy, eps, step)
    np.testing.assert_allclose(clean, picture, atol=1e-5)
    np.testing.assert_allclose(next_latent, np.sqrt(step.alpha_prev) * picture + np.sqrt(1 - step.alpha_prev) * eps,
                               atol=1e-5)


def test_eta_0_is_deterministic_and_eta_1_puts_noise_back_in():
    assert all(step.sigma == 0 for step in ddim_steps(Schedule(), 20))
    step = ddim_steps(Schedule(), 20, eta=1.0)[3]
    zeros, ones = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    np.testing.assert_array_equal(ddim_step(zeros, zeros, step, ones)[0], step.sigma)


def test_everything_stays_float32():
    latent = np.ones((1, 4, 2, 2), np.float32)
    step = ddim_steps(Schedule(), 5, eta=1.0)[0]
    for array in (*ddim_step(latent, latent, step, latent), guided(latent, latent, 7.5)):
        assert array.dtype == np.float32


def test_guidance_one_equals_the_text_alone_and_zero_the_negative_alone():
    text, negative = np.float32([1, 2]), np.float32([5, 7])
    np.testing.assert_array_equal(guided(text, negative, 1.0), text)
    np.testing.assert_array_equal(guided(text, negative, 0.0), negative)
    np.testing.assert_array_equal(guided(text, negative, 2.0), 2 * text - negative)
