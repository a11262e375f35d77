"""What is put together at each step: people, second control, enhancement, guidance on the person."""
import dataclasses

import numpy as np
import pytest

from caphuman_edge.runtime import Person, Pipeline
from caphuman_edge.runtime.denoise import Conditions, Denoiser, scales_of, within
from caphuman_edge.runtime.errors import BadInput, BundleError

ONES = np.ones(13, np.float32)


@pytest.fixture(scope="module")
def start(pipe):
    return np.random.default_rng(1).normal(size=(1, *pipe.bundle.config.latent_shape)).astype(np.float32)


@pytest.fixture(scope="module")
def person(pipe, subject):
    return pipe._person(Person(subject))


@pytest.fixture(scope="module")
def other(pipe, subject):
    somebody = dataclasses.replace(subject, identity=-subject.identity, face_crop=-subject.face_crop)
    return pipe._person(Person(somebody, subject.head.moved(x=0.5)))


@pytest.fixture(scope="module")
def text(pipe):
    return pipe._text_tokens(pipe.settings(prompt="a portrait, blue background", guidance=3.0))


@pytest.fixture
def eps(pipe, start, text):
    """`eps(people, **changes)` is what one step predicts."""
    def predict(people, timestep=501, fused=True, **changes):
        conditions = Conditions(**{"text": text, "people": people, "scales": ONES, "guidance": 3.0, **changes})
        return Denoiser(pipe.graph, fused).eps(start, timestep, conditions)
    return predict


def largest(a, b):
    return float(np.abs(a - b).max())


def test_the_same_person_twice_is_one_at_double_strength(eps, person):
    np.testing.assert_allclose(eps([person, person]), eps([person], scales=2 * ONES), atol=2e-4)


def test_the_order_of_people_does_not_matter_and_each_one_does(eps, person, other):
    both = eps([person, other])
    np.testing.assert_allclose(both, eps([other, person]), atol=2e-4)
    assert largest(both, eps([person])) > 0.01 and largest(both, eps([other])) > 0.01


def test_a_mask_keeps_a_person_to_its_side(pipe, eps, person, other):
    left = np.zeros((pipe.bundle.config.height, pipe.bundle.config.width), np.float32)
    left[:, :128] = 1
    halves = within(person, left), within(other, 1 - left)
    for half in halves:
        assert all(array.any() for name, array in half.items() if name.startswith("gate_0"))
    assert not (halves[0]["gate_0"] * halves[1]["gate_0"]).any()
    assert largest(eps(halves), eps([person, other])) > 0.01
    nowhere = within(person, np.zeros_like(left))
    np.testing.assert_allclose(eps([nowhere]), eps([person], scales=0 * ONES), atol=1e-5)


def test_enhancement_adds_the_head_without_the_person(eps, person):
    nobody = {**person, "face_tokens": np.zeros_like(person["face_tokens"])}
    np.testing.assert_allclose(eps([person], enhancement=1.0), eps([person, nobody]), atol=2e-4)
    assert largest(eps([person], enhancement=0.5), eps([person])) > 0.005


def test_dropped_tokens_leave_the_head_to_be_enhanced(eps, person):
    nobody = {**person, "face_tokens": np.zeros_like(person["face_tokens"])}
    np.testing.assert_allclose(eps([person], enhancement=0.5, tau=400), eps([nobody], scales=1.5 * ONES), atol=2e-4)


def test_identity_guidance_pulls_from_nobody_to_the_person_where_the_head_is(eps, person, text):
    nobody = {**person, "face_tokens": np.zeros_like(person["face_tokens"])}
    negative = {"text": text[:1], "guidance": 1.0}
    e00, e01, e11 = eps([nobody], **negative), eps([person], **negative), eps([person], text=text[1:], guidance=1.0)
    expected = e01 + 3 * (e11 - e01) + person["gate_0"] * (e01 - e00)
    np.testing.assert_allclose(eps([person], identity_guidance=2.0), expected, atol=1e-4)
    assert largest(e00, e01) > 1e-3 and person["gate_0"].min() < person["gate_0"].max()


def test_identity_guidance_reaches_every_persons_head(eps, person):
    halves = [{**person, "gate_0": person["gate_0"].copy()} for _ in range(2)]
    halves[0]["gate_0"][..., :16] = 0
    halves[1]["gate_0"][..., 16:] = 0
    change = eps(halves, identity_guidance=3.0) - eps(halves)
    np.testing.assert_array_equal(change.any(axis=1), person["gate_0"][:, 0].astype(bool))


def test_identity_guidance_of_one_is_the_official_guidance(eps, person, text):
    negative, positive = (eps([person], text=text[k:k + 1], guidance=1.0) for k in (0, 1))
    np.testing.assert_allclose(eps([person], identity_guidance=1.0), negative + 3 * (positive - negative), atol=1e-4)


def test_where_tokens_are_dropped_there_is_nobody_to_be_guided_to(eps, person):
    np.testing.assert_array_equal(eps([person], tau=400, identity_guidance=5.0), eps([person], tau=400))


def test_the_split_form_predicts_what_the_fused_one_does(eps, person):
    scales = np.linspace(0.2, 1.4, 13, dtype=np.float32)
    np.testing.assert_allclose(eps([person], scales=scales, fused=False), eps([person], scales=scales), atol=1e-4)


def test_thirteen_strengths_reach_their_own_residual(eps, person):
    only = [eps([person], scales=np.eye(13, dtype=np.float32)[k]) for k in (0, 12)]
    none = eps([person], scales=0 * ONES)
    assert largest(only[0], none) > 1e-4 and largest(only[1], none) > 1e-4 and largest(*only) > 1e-4


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan"), (1.0,) * 12, (1.0,) * 12 + (3.0,)])
def test_strengths_are_one_number_or_thirteen(strength):
    with pytest.raises(BadInput, match="expected 0 to 2, as one number or 13"):
        scales_of(strength)


def test_several_people_are_refused_before_anything_is_measured_where_there_is_no_split_form(pipe):
    parts = {name: part for name, part in pipe.bundle.manifest.components.items() if name != "capface"}
    bundle = dataclasses.replace(pipe.bundle, manifest=dataclasses.replace(pipe.bundle.manifest, components=parts))
    fused = Pipeline(bundle, renderer="numpy")
    assert fused.settings()
    for needs in ({"people": 2}, {"enhancement": 0.5}):
        with pytest.raises(BundleError, match="expected capface and unet .* several people"):
            fused.settings(**needs)


def test_a_second_control_needs_a_bundle_with_one(pipe):
    with pytest.raises(BundleError, match="has no control_encoder.*--controlnet"):
        pipe.settings(control=True)


def test_two_people_make_a_portrait(pipe, subject):
    heads = [subject.head.moved(x=side, scale=0.6) for side in (-0.4, 0.4)]
    *_, last = pipe.generate([Person(subject, head) for head in heads], steps=2)
    assert last.image.pixels.shape == (256, 256, 3)
    assert [len(one["head"]["pose"]) for one in last.recipe["people"]] == [6, 6]


def test_a_mask_of_another_size_is_refused(pipe, subject):
    with pytest.raises(BadInput, match="mask has 8x8 px, expected 256x256"):
        next(pipe.generate([Person(subject, None, np.ones((8, 8), np.float32))]))




def test_a_prompt_longer_than_the_unet_reads_is_refused_in_words(pipe, subject, monkeypatch):
    """As on Core ML, whose UNet reads 77 tokens."""
    denoiser = pipe.graph("denoiser")
    inputs = tuple(dataclasses.replace(spec, shape=(spec.shape[0], 77, spec.shape[2])) if spec.name == "text_tokens"
                   else spec for spec in denoiser.inputs)
    monkeypatch.setitem(pipe._graphs, "denoiser", dataclasses.replace(denoiser, inputs=inputs))
    with pytest.raises(BadInput, match="prompts take 154 tokens, this bundle's UNet reads 77 on backend ort; shorten"):
        next(pipe.generate(subject, prompt="smiling, " * 50))


def test_a_long_prompt_reaches_the_picture_to_its_end(pipe, subject):
    start = "a portrait, " * 30
    ends = [next(pipe.generate(subject, steps=2, prompt=start + end)).clean for end in ("red background", "blue hair")]
    assert largest(*ends) > 0.01
