"""The pipeline on the embedded bundle: what each setting does to what the denoiser is given."""
import dataclasses
import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from caphuman_edge.runtime import Bundle, Pipeline
from caphuman_edge.runtime.backends import Graph
from caphuman_edge.runtime.contract import OFFICIAL_GRAPHS, PERCEPTION_GRAPHS, TensorSpec, graphs
from caphuman_edge.runtime.errors import BadInput, BundleError
from caphuman_edge.runtime.head import HeadCode
from caphuman_edge.runtime.machine import Machine, row_by_row
from caphuman_edge.runtime.schedule import alphas_cumprod


@pytest.fixture
def calls(pipe, monkeypatch):
    """Every call of the denoiser: its inputs and its eps."""
    recorded, denoiser = [], pipe.graph("denoiser")

    def record(arrays):
        outputs = denoiser(arrays)
        recorded.append({**arrays, **outputs})
        return outputs

    monkeypatch.setitem(pipe._graphs, "denoiser", dataclasses.replace(denoiser, run=record))
    return recorded


def draw(pipe, subject, **changes):
    """With the official sampler and guidance unless told: one call a step."""
    return list(pipe.generate(subject, **{"schedule": "ddim", "steps": 2, "prompt": "smiling", "identity_guidance": 1.0,
                                          **changes}))


def test_steps_walk_the_official_table_and_end_with_the_portrait(pipe, subject, calls):
    steps = draw(pipe, subject, steps=4)
    assert [step.timestep for step in steps] == [751, 501, 251, 1] == [int(call["timestep"][0]) for call in calls]
    assert [step.last for step in steps] == [False, False, False, True]
    assert steps[-1].image.pixels.shape == (256, 256, 3) == steps[0].preview().shape


def test_guidance_one_is_the_prompt_alone(pipe, subject, calls):
    draw(pipe, subject, steps=1, guidance=1.0)
    assert calls[0]["eps"].shape[0] == 1


def test_guidance_moves_away_from_the_negative_prompt(pipe, subject, calls):
    step, _ = draw(pipe, subject, steps=2, guidance=4.0, negative="black background", prompt="white background")
    negative, positive = calls[0]["eps"]
    alpha = alphas_cumprod(pipe.bundle.schedule)[501]  # where two steps start
    eps = negative + 4 * (positive - negative)
    np.testing.assert_allclose(step.clean[0], (calls[0]["latent"][0] - np.sqrt(1 - alpha) * eps) / np.sqrt(alpha),
                               atol=1e-4)
    assert np.abs(positive - negative).max() > 0.005


def test_a_head_outside_the_frame_is_warned_of(pipe, subject):
    with pytest.warns(UserWarning, match="outside the frame"):
        assert not pipe.maps(subject.head.moved(x=9.0)).any()


def test_tau_drops_the_face_tokens_above_it_only(pipe, subject, calls):
    draw(pipe, subject, steps=4, tau=501)
    assert [bool(call["face_tokens"].any()) for call in calls] == [False, True, True, True]


def test_one_seed_is_one_picture_and_another_seed_another(pipe, subject):
    first, again, other = (draw(pipe, subject, seed=seed)[-1].image.pixels for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_the_head_reaches_the_picture_unless_strength_is_zero(pipe, subject):
    turned = subject.head.posed(yaw=30.0)
    for strength, differs in ((1.0, True), (0.0, False)):
        straight = draw(pipe, subject, strength=strength)[-1].latent
        yawed = draw(pipe, subject, head=turned, strength=strength)[-1].latent
        assert (np.abs(straight - yawed).max() > 1e-3) == differs


@pytest.mark.parametrize("feature", ["identity", "face_crop"])
def test_the_person_reaches_the_picture(pipe, subject, feature):
    somebody_else = dataclasses.replace(subject, **{feature: -getattr(subject, feature)})
    assert np.abs(draw(pipe, subject)[-1].latent - draw(pipe, somebody_else)[-1].latent).max() > 0.001


def test_the_prompt_colours_the_background(pipe, subject):
    """Measured on trained weights: with red for blue, the upper corners turn from one to the other."""
    corners = {}
    for colour in ("red", "blue"):
        steps = draw(pipe, subject, schedule="lcm", steps=4, prompt=f"a portrait, {colour} background")
        portrait = steps[-1].image.pixels
        corners[colour] = np.concatenate([portrait[:48, :32], portrait[:48, -32:]]).reshape(-1, 3).mean(axis=0)
    assert corners["red"][0] > corners["red"][2] + 40 and corners["blue"][2] > corners["blue"][0] + 10


def test_closing_the_generator_stops_the_work(pipe, subject, calls):
    steps = pipe.generate(subject, steps=20, identity_guidance=1.0)
    next(steps)
    steps.close()
    assert len(calls) == 1


def test_a_saved_portrait_carries_its_recipe(pipe, subject, tmp_path):
    draw(pipe, subject, seed=9)[-1].image.save(tmp_path / "out.png")
    text = Image.open(tmp_path / "out.png").text
    recipe = json.loads(text["caphuman"])
    assert (recipe["seed"], recipe["prompt"], recipe["bundle_sha256"]) == (9, "smiling", pipe.bundle.digest)
    assert recipe["head_sha256"] == hashlib.sha256(pipe.bundle.file("head").read_bytes()).hexdigest()
    assert text["AI-generated"] == "true"
    assert len(text["caphuman"]) < 20_000


def test_the_recipe_holds_the_head_that_was_drawn(pipe, subject):
    turned = subject.head.posed(yaw=30.0)
    told = draw(pipe, subject, head=turned, steps=1)[-1].recipe["people"][0]["head"]
    again = HeadCode(turned.layout, **{name: np.array(numbers) for name, numbers in told.items()})
    assert again.angles == pytest.approx((30, 0, 0), abs=1e-3)
    for name in told:
        np.testing.assert_array_equal(getattr(again, name), getattr(turned, name))


def test_leaving_the_pipeline_frees_its_renderer(monkeypatch):
    closed = []
    with Pipeline(Bundle.open(), renderer="numpy") as pipe:
        monkeypatch.setattr(type(pipe.renderer), "close", lambda self: closed.append(self))
        assert not closed
    assert closed == [pipe.renderer]


@pytest.mark.parametrize(("name", "value"), [("guidance", 31.0), ("guidance", float("nan")), ("strength", -0.1),
                                             ("tau", 1001), ("eta", 1.5), ("seed", -1), ("steps", 0), ("steps", 333)])
def test_settings_out_of_range_are_named_with_their_range(pipe, subject, name, value):
    with pytest.raises(BadInput, match=str(value)):
        next(pipe.generate(subject, schedule="ddim", **{name: value}))


def stored_as(bundle, format, *names):
    """The bundle with these graphs in another format alone, of which nothing is there to load."""
    components = {name: dataclasses.replace(part, forms={format: part.forms["onnx"]}) if name in names else part
                  for name, part in bundle.manifest.components.items()}
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, components=components))


def without(bundle, *names):
    components = {name: part for name, part in bundle.manifest.components.items() if name not in names}
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, components=components))


def test_the_split_denoiser_draws_the_same_portrait(pipe, subject):
    split = Pipeline(without(pipe.bundle, "denoiser"), renderer="numpy")
    forms = [it.machine.denoiser(it.bundle) for it in (pipe, split)]
    assert forms == [("denoiser",), ("capface", "unet")]
    one, other = (draw(it, subject, strength=0.7, tau=501)[-1].latent for it in (pipe, split))
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert "denoiser" not in split._graphs


def test_without_any_denoiser_nothing_is_measured_first(pipe):
    with pytest.raises(BundleError, match=r"holds capface \(onnx\), expected .* which backend ort reads"):
        Pipeline(without(pipe.bundle, "denoiser", "unet"), renderer="numpy").settings()


def test_an_unknown_backend_is_refused_when_the_pipeline_is_made():
    with pytest.raises(BadInput, match="'tpu' is unknown"):
        Pipeline(Bundle.open(), "tpu", renderer="numpy")
    with pytest.raises(BadInput, match="no device npu here; choose cpu"):
        Pipeline(Bundle.open(), renderer="numpy", device="npu")


def test_another_backend_leaves_what_is_stored_as_onnx_alone_to_ort(pipe):
    """As in a bundle for Core ML: all that makes the portrait has a form of its own, what measures photos has none."""
    drawn = [name for name, part in pipe.bundle.manifest.components.items() if part.inputs
             and name not in PERCEPTION_GRAPHS + OFFICIAL_GRAPHS]
    bundle, machine = stored_as(pipe.bundle, "coreml", *drawn), Machine("coreml")
    assert {machine.runner(bundle, name) for name in PERCEPTION_GRAPHS} == {"ort"}
    assert {machine.runner(bundle, name) for name in drawn} == {"coreml"}
    assert machine.load(bundle, "face_detector")  # runs here, although Core ML does not


def test_what_runs_at_each_step_is_never_handed_to_another_backend(pipe):
    with pytest.raises(BundleError, match=r"denoiser \(onnx\), .* unet as coreml, which backend coreml reads; choose"):
        Machine("coreml").denoiser(pipe.bundle)
    with pytest.raises(BundleError, match="unet of .* is stored as onnx, expected coreml"):
        Machine("coreml").runner(pipe.bundle, "unet")


def test_the_fast_decoder_draws_the_same_latent_nearly_alike(pipe, subject):
    """Whichever draws, the steps are the same; the recipe tells which it was."""
    kl, tiny = (draw(pipe, subject, seed=3, decoder=name)[-1] for name in (None, "tiny"))
    assert (kl.recipe["decoder"], tiny.recipe["decoder"]) == ("kl", "tiny")
    np.testing.assert_array_equal(kl.latent, tiny.latent)
    np.testing.assert_array_equal(tiny.image.pixels, pipe.decode(kl.latent, "tiny_decoder"))
    error = np.square(kl.image.pixels.astype(float) - tiny.image.pixels).mean()
    assert 0 < error < 255**2 / 10**2.2  # 22 dB


def test_an_unknown_decoder_is_refused(pipe):
    with pytest.raises(BadInput, match="decoder is 'best', expected one of kl, tiny; choose one of them"):
        pipe.settings(decoder="best")


@pytest.mark.parametrize(("decoder", "remedy"), [
    ("tiny", "has no tiny_decoder, which this needs; leave --decoder out, or build it with --tiny-decoder"),
    (None, "has no vae_decoder, which this needs; build it with this version")])
def test_a_bundle_without_the_decoder_is_told_before_anything_is_drawn(pipe, monkeypatch, decoder, remedy):
    components = {name: part for name, part in pipe.bundle.manifest.components.items() if "decoder" not in name}
    manifest = dataclasses.replace(pipe.bundle.manifest, components=components)
    monkeypatch.setattr(pipe, "bundle", dataclasses.replace(pipe.bundle, manifest=manifest))
    with pytest.raises(BundleError, match=remedy):
        pipe.settings(decoder=decoder)


def test_core_ml_takes_the_split_form_where_the_fused_one_is_not_stored_for_it(pipe):
    assert Machine("coreml").denoiser(stored_as(pipe.bundle, "coreml", "capface", "unet")) == ("capface", "unet")


def test_a_graph_that_draws_is_not_handed_to_ort_without_a_word(pipe):
    bundle = stored_as(pipe.bundle, "coreml", "capface", "unet")
    with pytest.warns(UserWarning, match="text_encoder is not stored for backend coreml: ort runs it"):
        Machine("coreml").load(bundle, "text_encoder")


@pytest.mark.parametrize(("name", "given"), [("hint_encoder", ("cpu", "f32")), ("vae_decoder", ("gpu", "f16"))])
def test_gates_are_thresholds_and_computed_exactly_whatever_is_asked_for(pipe, monkeypatch, name, given):
    asked = []

    def load(self, name, backend, *, device, threads, cache_dir, precision, by_shape, in_halves):
        asked.append((device, precision))
        return Graph(name, *(getattr(graphs(self.config)[name], side) for side in ("inputs", "outputs")), dict)

    monkeypatch.setattr(Bundle, "graph", load)
    Machine("openvino", device="gpu", precision="f16").load(pipe.bundle, name)
    assert asked == [given]


def test_a_graph_for_one_row_takes_any_number_in_turn(pipe):
    text = graphs(pipe.bundle.config)["text_encoder"]
    one_row = [tuple(TensorSpec(spec.name, (1, *spec.shape[1:]), spec.dtype) for spec in side)
               for side in (text.inputs, text.outputs)]
    counts = []

    def run(arrays):
        counts.append(len(arrays["input_ids"]))
        return {"last_hidden_state": np.repeat(arrays["input_ids"][..., None], 64, axis=2).astype(np.float32)}

    ids = np.arange(3 * 77).reshape(3, 77)
    tokens = row_by_row(Graph("text", *one_row, run), text)({"input_ids": ids})["last_hidden_state"]
    assert counts == [1, 1, 1] and tokens.shape == (3, 77, 64)
    np.testing.assert_array_equal(tokens[..., 5], ids)


def test_a_graph_for_any_number_of_rows_is_called_once(pipe):
    text = graphs(pipe.bundle.config)["text_encoder"]
    graph = Graph("text", text.inputs, text.outputs, dict)
    assert row_by_row(graph, text) is graph


def test_a_predictor_gives_at_any_latent_what_generate_would_be_given(pipe, subject, calls):
    draw(pipe, subject, guidance=1.0)
    last = calls[-1]
    eps = pipe.predictor(subject, prompt="smiling", guidance=1.0, identity_guidance=1.0)
    assert np.array_equal(eps(last["latent"], int(last["timestep"][0])), last["eps"])
