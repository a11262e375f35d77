"""What export writes: graphs that compute what the reference computes, stored once and without loss."""
import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from caphuman_edge.export.assemble import perception_in
from caphuman_edge.export.builder import Options, Sources, build
from caphuman_edge.export.check import Case, check_cases, check_graph
from caphuman_edge.export.graphs import example_inputs
from caphuman_edge.export.onnx_writer import save, trace
from caphuman_edge.ref.caphuman import CapHuman, ControlSettings, FaceCondition
from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.bundle import EMBEDDED, Bundle
from caphuman_edge.runtime.contract import OFFICIAL_GRAPHS, residual_levels
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.schedule import Schedule
from caphuman_edge.runtime.selftest import psnr_db, self_test


@pytest.fixture(scope="module")
def bundle(micro, tmp_path_factory):
    """A whole bundle of the micro model, built as the embedded one is."""
    out = tmp_path_factory.mktemp("bundles") / "micro"
    lines = []
    sources = Sources(perception_in(EMBEDDED), "micro", Schedule(steps=2), {}, {}, "tests only")
    options = Options(("onnx", "openvino", "ort"), control=True, tiny=True)
    build(micro.model, micro.preview, sources, out, options, lines.append, tiny=micro.tiny)
    assert any("onnx check/denoiser" in line for line in lines)
    assert [path.name for path in out.parent.iterdir()] == ["micro"]  # no parts are left
    return Bundle.open(out)


@pytest.mark.slow
def test_every_graph_reaches_60_db(bundle):
    for kind in ("onnx", "openvino", "ort"):
        parity = {name: part.forms[kind].parity["psnr_db"] for name, part in bundle.manifest.components.items()
                  if kind in part.forms and part.forms[kind].parity}
        assert parity.keys() == {"text_encoder", "image_encoder", "hint_encoder", "denoiser", "capface", "unet",
                                 "control_encoder", "controlnet", "vae_encoder", "vae_decoder", "tiny_decoder",
                                 "preview_decoder"}
        assert min(parity.values()) > 60


@pytest.mark.slow
def test_self_test_passes(bundle, micro):
    verdicts = list(self_test(bundle))
    assert {verdict.graph for verdict in verdicts} >= micro.specs.keys() - set(OFFICIAL_GRAPHS)
    assert all(verdict.passed for verdict in verdicts)


@pytest.mark.slow
def test_fused_equals_split(bundle, micro):
    """Gating and scaling 13 residuals outside gives what the fused graph gives."""
    inputs = {name: value.numpy() for name, value in example_inputs(micro.specs["denoiser"].inputs, seed=3).items()}
    inputs["scales"] = np.linspace(0.2, 1.4, 13, dtype=np.float32)
    fused = bundle.graph("denoiser")(inputs)["eps"]
    raw = bundle.graph("capface")({name: inputs[name] for name in ("latent", "timestep", "face_tokens", "hint")})
    gates = [inputs[f"gate_{level}"] for level in residual_levels(micro.config.unet)]
    gated = {name: residual * gate * scale for (name, residual), gate, scale in
             zip(raw.items(), gates, inputs["scales"], strict=True)}
    shared = {name: inputs[name] for name in ("latent", "timestep", "text_tokens")}
    split = bundle.graph("unet")({**shared, **gated})["eps"]
    np.testing.assert_allclose(fused, split, atol=1e-4 * np.abs(fused).max())


@pytest.mark.slow
def test_a_second_control_joins_the_split_form_as_in_the_reference(bundle, micro):
    """Two texts, whose residuals differ; capface's are gated, those of the ControlNet act everywhere."""
    drawn = example_inputs(micro.specs["denoiser"].inputs, seed=6)
    picture, strength = torch.rand(1, 3, micro.config.height, micro.config.width), np.linspace(0.3, 1.5, 13)
    pose_hint = bundle.graph("control_encoder")({"image": picture.numpy()})["hint"]
    inputs = {name: value.numpy() for name, value in drawn.items()}
    shared = {name: inputs[name] for name in ("latent", "timestep", "text_tokens")}
    pose = bundle.graph("controlnet")({**shared, "hint": pose_hint})
    face = bundle.graph("capface")({name: inputs[name] for name in ("latent", "timestep", "face_tokens", "hint")})
    gates = [inputs[f"gate_{level}"] for level in residual_levels(micro.config.unet)]
    summed = {name: (face[name] * gate + pose[name] * scale).astype(np.float32)
              for name, gate, scale in zip(face, gates, strength, strict=True)}
    unet = bundle.graph("unet")
    assert not np.allclose(pose["residual_09"][0], pose["residual_09"][1])
    person = FaceCondition(drawn["face_tokens"], drawn["hint"], tuple(drawn[f"gate_{level}"] for level in range(4)))
    hint, settings = micro.model.pose_control_model.encode_hint(picture), ControlSettings(pose_scales=tuple(strength))
    for k in range(2):
        alone = {name: value[k:k + 1] for name, value in summed.items()}
        text = shared["text_tokens"][k:k + 1]
        found = unet({"latent": shared["latent"], "timestep": shared["timestep"], "text_tokens": text, **alone})["eps"]
        wanted = micro.model(drawn["latent"], drawn["timestep"], torch.from_numpy(text), [person], [hint], settings)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4 * np.abs(found).max())


@pytest.mark.slow
def test_both_guidance_branches_equal_single_passes(bundle, micro):
    """A batch of two texts is two batches of one."""
    inputs = {name: value.numpy() for name, value in example_inputs(micro.specs["denoiser"].inputs, seed=4).items()}
    denoiser = bundle.graph("denoiser")
    both = denoiser(inputs)["eps"]
    for k in range(2):
        alone = denoiser({**inputs, "text_tokens": inputs["text_tokens"][k:k + 1]})["eps"]
        np.testing.assert_allclose(both[k:k + 1], alone, atol=1e-4 * np.abs(alone).max())


@pytest.mark.slow
def test_denoiser_forms_share_their_weights(bundle, micro):
    folder = bundle.root / "denoiser"
    stored = (folder / "weights.bin").stat().st_size
    count = sum(p.numel() for name, p in CapHuman(micro.config).named_parameters()
                if name.startswith(("model.", "control_model.")))
    files = {path.name for form in ("denoiser", "capface", "unet") for path in
             map(Path, bundle.component(form).forms["onnx"].files)}
    assert files == {"model.onnx", "capface.onnx", "unet.onnx", "weights.bin"}
    assert stored < 2.2 * count  # two bytes a parameter, once


def test_the_vae_encoder_gives_the_distribution_of_the_scaled_latent(micro):
    """What is drawn from it is `latent_scale` times what is drawn from the autoencoder's own."""
    picture, scale = torch.rand(1, 3, 64, 64) * 2 - 1, micro.config.vae.latent_scale
    found_mean, found_log_variance = micro.modules["vae_encoder"](picture).chunk(2, dim=1)
    mean, log_variance = micro.model.first_stage_model.moments(picture)
    torch.testing.assert_close(found_mean, micro.model.first_stage_model.encode(picture))
    torch.testing.assert_close((found_log_variance / 2).exp(), (log_variance / 2).exp() * scale)
    assert mean.std() > 0.1 and log_variance.std() > 0.1


def test_an_error_of_means_does_not_hide_behind_log_variances(micro):
    """Means of 1 % error, 40 dB, beside log variances twenty times as large: together they would be at 66 dB."""
    rng = np.random.default_rng(0)
    mean, log_variance = np.sign(rng.normal(size=(1, 4, 8, 8))), np.full((1, 4, 8, 8), -20.0)
    case = Case({}, {"latent_parameters": np.concatenate([mean, log_variance], axis=1)})
    wrong = {"latent_parameters": np.concatenate([mean * 1.01, log_variance], axis=1)}
    assert psnr_db(wrong["latent_parameters"], case.outputs["latent_parameters"]) > 65
    assert check_cases("vae_encoder", lambda _: wrong, [case], floor=39) == {
        "latent_mean": 40, "latent_log_variance": 200}
    with pytest.raises(BundleError, match=r"vae_encoder: latent_mean differs from the reference, PSNR 40\.0 dB"):
        check_cases("vae_encoder", lambda _: wrong, [case])


def test_unused_words_are_not_stored_and_change_nothing(micro, tmp_path):
    spec = micro.specs["text_encoder"]
    save({"model.onnx": trace(micro.modules["text_encoder"], spec)}, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size < 49_408 * 2 * 2  # the table would be 49,408 rows of 8 halves
    ids = torch.tensor([[0, 4, 5, 48_999, 49_000, 49_407] * 13])[:, :77]
    got = open_backend("ort").load(tmp_path / "model.onnx")({"input_ids": ids.numpy()})["last_hidden_state"]
    np.testing.assert_allclose(got, micro.modules["text_encoder"](ids), atol=1e-5)


def test_weights_become_halves_only_where_that_is_exact(micro, tmp_path):
    exact = torch.nn.Linear(40, 40, bias=False).half().float()
    inexact = torch.nn.Linear(40, 40, bias=False)
    spec = dataclasses.replace(micro.specs["preview_decoder"], inputs=(dataclasses.replace(
        micro.specs["preview_decoder"].inputs[0], shape=(1, 40)),))
    for precision, layer, size in (("f16", exact, 2), ("f32", inexact, 4)):
        assert save({"model.onnx": trace(layer, spec)}, tmp_path / precision) == precision
        assert (tmp_path / precision / "weights.bin").stat().st_size == 40 * 40 * size


def test_a_graph_that_computes_something_else_is_named(micro, tmp_path):
    spec = micro.specs["preview_decoder"]
    model = trace(micro.modules["preview_decoder"], spec)
    weight = next(value for value in model.graph.initializers.values() if len(value.shape) == 4)
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.01), name=weight.name)
    save({"model.onnx": model}, tmp_path)
    assert not (tmp_path / "weights.bin").exists()  # nothing large enough to move out
    with pytest.raises(BundleError, match=r"model\.onnx: sample differs from the reference, PSNR \d+\.\d dB"):
        check_graph(tmp_path / "model.onnx", spec, micro.modules["preview_decoder"], open_backend("ort"))
