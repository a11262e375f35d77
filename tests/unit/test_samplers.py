"""Each sampler against its reference implementation in diffusers, and what every one has to hold."""
import dataclasses
import functools
import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler
from diffusers.schedulers import scheduling_lcm, scheduling_tcd
from skimage.data import astronaut

from caphuman_edge.runtime import Bundle, Canvas
from caphuman_edge.runtime.errors import BadInput, BundleError
from caphuman_edge.runtime.framing import Region
from caphuman_edge.runtime.manifest import parse
from caphuman_edge.runtime.noise import cuda_normal
from caphuman_edge.runtime.samplers import lay_out, sample, take
from caphuman_edge.runtime.schedule import SPACINGS, SamplerStep, Schedule, alphas_cumprod

SHAPE = 1, 4, 8, 8
MODEL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion 1.5
COUNTS = 1, 2, 4, 8, 20
CASES = [("ddim", "trailing", 0.0), ("ddim", "trailing", 0.6), ("lcm", "trailing", 0.0), ("tcd", "trailing", 0.0),
         ("tcd", "trailing", 0.3), ("tcd", "trailing", 1.0), ("dpm++", "trailing", 0.0), ("dpm++", "leading", 0.0)]
EVERY = [(kind, spacing) for kind, spacings in SPACINGS.items() for spacing in spacings]


def reference(kind, spacing):
    """The scheduler with the options that are published for Stable Diffusion 1.5, but none that are its defaults."""
    if kind == "ddim":
        return DDIMScheduler(**MODEL, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=False)
    if kind == "dpm++":
        return DPMSolverMultistepScheduler(**MODEL, timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
    return {"lcm": LCMScheduler, "tcd": TCDScheduler}[kind](**MODEL, set_alpha_to_one=False)


def draw(index):
    return cuda_normal(7, SHAPE, offset=1 + index)


@functools.cache
def mixing():
    size = int(np.prod(SHAPE))
    return np.random.default_rng(3).normal(size=(size, size)) / size**0.5


def denoise(latent, timestep):
    """A linear denoiser that another timestep makes another; like a real one, it finds less noise where less is."""
    share = np.sqrt(1 - alphas_cumprod(Schedule())[timestep].astype(np.float64))
    mixed = (mixing() @ latent.ravel().astype(np.float64)).reshape(SHAPE)
    return (share * latent + 0.2 * np.cos(timestep / 100) * mixed).astype(np.float32)


@pytest.fixture
def draws(monkeypatch):
    """diffusers takes this very noise: step k the k-th draw."""
    taken = []

    def randn(*_, **__):
        taken.append(len(taken))
        return torch.from_numpy(draw(taken[-1]))

    for module in (scheduling_lcm, scheduling_tcd):
        monkeypatch.setattr(module, "randn_tensor", randn)
    return taken


def reference_steps(kind, spacing, eta, count):
    """Of each step: timestep, latent before, eps and latent after."""
    scheduler = reference(kind, spacing)
    scheduler.set_timesteps(count)
    latent = draw(-1)
    for index, timestep in enumerate(scheduler.timesteps):
        eps = denoise(latent, int(timestep))
        chance = {"ddim": {"eta": eta, "variance_noise": torch.from_numpy(draw(index)) if eta else None},
                  "tcd": {"eta": eta}}.get(kind, {})
        after = scheduler.step(torch.from_numpy(eps), timestep, torch.from_numpy(latent), **chance,
                               return_dict=False)[0].numpy()
        yield int(timestep), latent, eps, after
        latent = after


def layout(kind, spacing, eta, count):
    return lay_out(Schedule(kind=kind, timesteps=spacing), count, eta)


def assert_close(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("kind", "spacing", "eta"), CASES)
def test_each_step_lands_where_diffusers_does(draws, kind, spacing, eta, count):
    steps, clean = layout(kind, spacing, eta, count), None
    expected = list(reference_steps(kind, spacing, eta, count))
    assert [step.timestep for step in steps] == [timestep for timestep, *_ in expected]
    for index, (step, (_, latent, eps, after)) in enumerate(zip(steps, expected, strict=True)):
        found, clean = take(step, latent, eps, draw(index) if step.sigma else None, clean)
        assert_close(found, after)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("kind", "spacing", "eta"), CASES)
def test_a_whole_run_ends_where_diffusers_does(draws, kind, spacing, eta, count):
    *_, (found, _) = sample(denoise, draw(-1), layout(kind, spacing, eta, count), draw)
    *_, (_, _, _, expected) = reference_steps(kind, spacing, eta, count)
    assert_close(found, expected)


def test_the_clean_latent_of_lcm_is_diffusers_denoised_one(draws):
    scheduler, latent = reference("lcm", "trailing"), draw(-1)
    scheduler.set_timesteps(50)
    timestep = scheduler.timesteps[-1]  # the least noisy, where the boundary condition counts the most
    eps = denoise(latent, int(timestep))
    _, expected = scheduler.step(torch.from_numpy(eps), timestep, torch.from_numpy(latent), return_dict=False)
    step = layout("lcm", "trailing", 0.0, 50)[-1]
    assert_close(take(step, latent, eps)[1], expected.numpy())
    assert step.skip == pytest.approx(0.25 / (190**2 + 0.25)) and 0.9999 < step.out < 1


def test_noise_is_asked_for_by_the_step_and_only_where_it_is_used():
    for kind, eta, expected in (("ddim", 0.0, []), ("ddim", 0.5, [0, 1, 2, 3]), ("lcm", 0.0, [0, 1, 2]),
                                ("tcd", 0.3, [0, 1, 2]), ("tcd", 0.0, []), ("dpm++", 0.0, [])):
        asked = []
        steps = layout(kind, "trailing", eta, 4)
        list(sample(denoise, draw(-1), steps, lambda k, asked=asked: asked.append(k) or draw(k)))
        assert asked == expected, kind


@pytest.mark.parametrize(("kind", "spacing"), EVERY)
def test_each_step_leads_to_where_the_next_begins_and_the_last_to_almost_no_noise(kind, spacing):
    for count in (1, 2, 4, 7, 50):
        steps = layout(kind, spacing, 0.0, count)
        assert [step.alpha_prev for step in steps[:-1]] == [step.alpha for step in steps[1:]]
        assert steps[-1].alpha_prev == (1 if kind in ("lcm", "dpm++") else alphas_cumprod(Schedule())[0])


@pytest.mark.parametrize(("kind", "spacing"), EVERY)
def test_trailing_tables_begin_in_pure_noise_and_leading_ones_do_not(kind, spacing):
    assert (layout(kind, spacing, 0.0, 4)[0].timestep == 999) == (spacing == "trailing")


@pytest.mark.parametrize(("kind", "spacing"), EVERY)
def test_a_perfect_denoiser_recovers_the_picture_in_every_count_of_steps(kind, spacing):
    picture, noise = draw(1), draw(2)
    alphas = alphas_cumprod(Schedule())

    def perfect(latent, timestep):
        return (latent - np.sqrt(alphas[timestep]) * picture) / np.sqrt(1 - alphas[timestep])

    for count in (1, 4, 20):
        steps = layout(kind, spacing, 0.0, count)
        start = np.sqrt(steps[0].alpha) * picture + np.sqrt(1 - steps[0].alpha) * noise
        walk = list(sample(perfect, start, steps, draw))
        for _, clean in walk:
            np.testing.assert_allclose(clean, picture, atol=1e-4)
        assert np.abs(walk[-1][0] - picture).max() < (1e-4 if steps[-1].alpha_prev == 1 else 0.2)


def test_without_gamma_tcd_is_ddim_on_its_table():
    steps = layout("tcd", "trailing", 0.0, 4)
    latent, eps = draw(0), draw(1)
    for step in steps:
        same = SamplerStep(step.timestep, step.alpha, step.alpha_prev, np.float32(0))
        assert_close(take(step, latent, eps)[0], take(same, latent, eps)[0])


def test_second_order_follows_a_bend_that_first_order_cuts():
    """A picture that still changes with the noise: 2M comes nearer to the run of very many steps than DDIM."""
    def end(kind, count):
        *_, (latent, clean) = sample(denoise, draw(-1), layout(kind, "trailing", 0.0, count), draw)
        return clean

    truth = end("ddim", 500)
    apart = {kind: np.abs(end(kind, 20) - truth).mean() for kind in ("ddim", "dpm++")}
    assert apart["dpm++"] < 0.6 * apart["ddim"]


@pytest.mark.parametrize(("kind", "spacing", "count", "most"), [
    ("ddim", "trailing", 0, 1000), ("ddim", "trailing", 1001, 1000), ("lcm", "trailing", 51, 50),
    ("tcd", "trailing", 0, 50), ("tcd", "trailing", 51, 50), ("dpm++", "trailing", 1001, 1000),
    ("dpm++", "leading", 999, 998), ("dpm++", "leading", -1, 998),
])
def test_a_count_that_the_table_does_not_have_is_refused_with_its_range(kind, spacing, count, most):
    with pytest.raises(BadInput, match=f"^steps is {count}, expected 1 to {most} ") as caught:
        layout(kind, spacing, 0.0, count)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "spacing", "most"), [("ddim", "trailing", 1000), ("lcm", "trailing", 50),
                                                       ("tcd", "trailing", 50), ("dpm++", "trailing", 1000),
                                                       ("dpm++", "leading", 998)])
def test_the_longest_table_falls_step_by_step_within_the_schedule(kind, spacing, most):
    table = np.array([step.timestep for step in layout(kind, spacing, 0.0, most)])
    assert len(table) == most and (np.diff(table) < 0).all()
    assert table[-1] >= 0 and table[0] <= 999


@pytest.mark.parametrize(("kind", "spacing"), [("euler", "trailing"), ("lcm", "leading"), ("tcd", "leading"),
                                               ("ddim", "linspace")])
def test_what_no_sampler_has_is_refused_with_what_there_is(kind, spacing):
    with pytest.raises(BadInput, match=r"no schedule '.*' with .*, expected one of ddim \(leading or trailing\), lcm"):
        layout(kind, spacing, 0.0, 4)


@pytest.mark.parametrize("kind", ["lcm", "dpm++"])
def test_eta_of_a_sampler_that_has_none_is_refused(kind):
    with pytest.raises(BadInput, match=rf"^eta is 0.3, but {kind[:3]}.* has none; leave it out, or .* ddim or tcd"):
        layout(kind, "trailing", 0.3, 4)


@pytest.mark.parametrize(("kind", "spacing"), EVERY)
def test_bundle_json_records_sampler_and_timesteps(kind, spacing):
    manifest = dataclasses.replace(Bundle.open().manifest, schedule=Schedule(kind=kind, steps=4, timesteps=spacing))
    assert parse(manifest.to_text()).schedule == manifest.schedule


def test_a_bundle_of_before_there_were_trailing_timesteps_is_ddim_with_leading_ones():
    data = json.loads(dataclasses.replace(Bundle.open().manifest, schedule=Schedule()).to_text())
    del data["schedule"]["timesteps"]
    assert parse(json.dumps(data)).schedule.timesteps == "leading"


@pytest.mark.parametrize(("change", "match"), [
    ({"kind": "euler"}, r"schedule.kind is 'euler', expected one of ddim, dpm\+\+, lcm, tcd; rebuild"),
    ({"kind": "lcm", "timesteps": "leading"}, "schedule.timesteps is 'leading', expected one of trailing; rebuild"),
    ({"timesteps": 5}, "schedule.timesteps is 5, expected a str"),
])
def test_a_bundle_with_a_sampler_that_there_is_not_is_refused(change, match):
    data = json.loads(Bundle.open().manifest.to_text())
    data["schedule"].update(change)
    with pytest.raises(BundleError, match=match):
        parse(json.dumps(data))


# On the embedded bundle.


@pytest.fixture(scope="module")
def canvas():
    mask = np.zeros((256, 256), np.float32)
    mask[64:192, 64:192] = 1
    return Canvas(astronaut(), Region(0.0, 0.0, 512.0, 512.0), mask)


def drawn(pipe, subject, **changes):
    """All steps; that a bundle was made for another sampler is not the point here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="schedule .* is asked for")
        return list(pipe.generate(subject, **{"steps": 4, "guidance": 1.0, "identity_guidance": 1.0, **changes}))


@pytest.mark.parametrize(("kind", "spacing"), EVERY)
def test_every_sampler_draws_over_a_part_of_a_canvas(pipe, subject, canvas, kind, spacing):
    steps = drawn(pipe, subject, canvas=canvas, schedule=kind, timesteps=spacing, denoise=0.5)
    table = layout(kind, spacing, 0.0, 4)[2:]
    assert [step.timestep for step in steps] == [step.timestep for step in table]
    noise = cuda_normal(12345, (1, *pipe.bundle.config.latent_shape))
    clean = pipe._known(canvas, noise).clean
    for step, constants in zip(steps, table, strict=True):
        expected = np.sqrt(constants.alpha_prev) * clean + np.sqrt(1 - constants.alpha_prev) * noise
        np.testing.assert_allclose(step.latent[..., 0, :], expected[..., 0, :], atol=1e-5)  # a row that stays
        assert np.abs(step.latent - expected)[..., 16, 16].max() > 1e-3  # and a cell that is drawn
    picture = steps[-1].image.pixels
    np.testing.assert_array_equal(picture[:64], canvas.photo[:64])
    assert (picture[200:300, 200:300] != canvas.photo[200:300, 200:300]).any()


def test_the_samplers_draw_different_pictures_of_which_each_comes_again(pipe, subject):
    ends = {}
    for kind, spacing in EVERY:
        ends[kind, spacing], again = (drawn(pipe, subject, schedule=kind, timesteps=spacing, steps=2)[-1].latent
                                      for _ in range(2))
        np.testing.assert_array_equal(ends[kind, spacing], again)
    for one, other in itertools.combinations(ends.values(), 2):
        assert np.abs(one - other).max() > 1e-2


def test_gamma_and_eta_are_defaults_of_the_sampler_that_is_asked_for(pipe):
    chosen = {kind: pipe.settings(schedule=kind) for kind in SPACINGS}
    assert {kind: settings.eta for kind, settings in chosen.items()} == {"ddim": 0, "lcm": 0, "tcd": 0.3, "dpm++": 0}
    assert pipe.settings(schedule="tcd", eta=0.0).eta == 0


def test_another_sampler_than_the_bundles_takes_its_own_usual_timesteps(pipe):
    own = pipe.bundle.schedule
    assert own.kind == "lcm" and pipe.settings().timesteps == pipe.settings(schedule="lcm").timesteps == own.timesteps
    assert pipe.settings(schedule="ddim").timesteps == "leading"
    assert {pipe.settings(schedule=kind).timesteps for kind in ("lcm", "tcd", "dpm++")} == {"trailing"}
    assert pipe.settings(schedule="dpm++", timesteps="leading").timesteps == "leading"


@pytest.mark.parametrize(("changes", "match"), [
    ({"schedule": "euler"}, "schedule is 'euler', expected one of ddim, lcm, tcd, dpm"),
    ({"schedule": "lcm", "timesteps": "leading"}, "no schedule 'lcm' with 'leading' timesteps"),
    ({"schedule": "lcm", "steps": 51}, "steps is 51, expected 1 to 50"),
    ({"schedule": "dpm++", "eta": 0.5}, "eta is 0.5, but dpm.. has none"),
    ({"schedule": "tcd", "eta": 1.5}, "eta is 1.5, expected 0 to 1"),
])
def test_settings_that_no_sampler_takes_are_refused(pipe, changes, match):
    with pytest.raises(BadInput, match=match):
        pipe.settings(**changes)


@pytest.mark.parametrize(("made_for", "asked", "warned"), [
    ("ddim", "lcm", True), ("lcm", "ddim", True), ("tcd", "lcm", True), ("ddim", "dpm++", False), ("tcd", "tcd", False),
    ("lcm", None, False),
])
def test_a_sampler_that_a_model_was_not_distilled_for_is_warned_of(pipe, subject, monkeypatch, made_for, asked, warned):
    monkeypatch.setattr(Bundle, "schedule", Schedule(kind=made_for, timesteps=SPACINGS[made_for][0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        next(pipe.generate(subject, steps=1, schedule=asked))
    told = [str(warning.message) for warning in caught if "is asked for" in str(warning.message)]
    assert told == ([f"schedule {asked} is asked for, but the bundle's model was made for {made_for}: portraits will "
                     "suffer"] if warned else [])
