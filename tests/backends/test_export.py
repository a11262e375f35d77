"""What export writes: graphs that compute what the reference computes, stored once and without loss."""
import dataclasses

import numpy as np
import onnx
import pytest
import torch

from caphuman_edge.export.builder import Sources, build
from caphuman_edge.export.check import check_graph
from caphuman_edge.export.graphs import PreviewDecoder, example_inputs, modules
from caphuman_edge.export.onnx_writer import save, trace
from caphuman_edge.ref.capface import residual_levels
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.bundle import EMBEDDED, Bundle
from caphuman_edge.runtime.contract import (
    NANO,
    OFFICIAL_GRAPHS,
    Config,
    TextConfig,
    UNetConfig,
    VaeConfig,
    VisionConfig,
    graphs,
)
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.schedule import Schedule
from caphuman_edge.runtime.selftest import self_test

MICRO = Config(  # as small as 13 residuals allow
    height=64, width=64, identity_width=NANO.identity_width, identity_size=NANO.identity_size,
    unet=UNetConfig(model_channels=8, channel_mult=(1, 1, 2, 2), attention_levels=(2,), num_heads=1, norm_groups=4,
                    context_width=8, hint_widths=(4, 4, 4, 8), prediction="v"),
    text=TextConfig(width=8, layers=1, heads=1),
    vision=VisionConfig(width=8, layers=1, heads=1, image_size=24, patch_size=12),
    vae=VaeConfig(channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4))
SPECS = graphs(MICRO)


@pytest.fixture(scope="module")
def model():
    """Weights that are halves, keep variance, and hold no zero tensor but the unused rows of the vocabulary."""
    torch.manual_seed(0)
    model = CapHuman(MICRO).eval().requires_grad_(False)
    for parameter in model.parameters():
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 10
        parameter.copy_((torch.randn_like(parameter) / fan_in**0.5).half())
    model.text_encoder.text_model.embeddings.token_embedding.weight[5:49_000] = 0
    return model


@pytest.fixture(scope="module")
def parts(model):
    preview = PreviewDecoder(torch.randn(3, 4, 1, 1).half().float(), torch.zeros(3))
    for parameter in preview.parameters():
        parameter.requires_grad_(False)
    return modules(model, preview)


@pytest.fixture(scope="module")
def bundle(model, parts, tmp_path_factory):
    """A whole bundle of the micro model, built as the embedded one is."""
    out = tmp_path_factory.mktemp("bundles") / "micro"
    lines = []
    build(model, parts["preview_decoder"], Sources(EMBEDDED, "micro", Schedule(steps=2), {}, {}, "tests only"), out,
          lines.append)
    assert "checking denoiser" in lines
    return Bundle.open(out)


@pytest.mark.slow
def test_every_graph_reaches_60_db(bundle):
    parity = {name: part.parity["psnr_db"] for name, part in bundle.manifest.components.items() if part.parity}
    assert parity.keys() == {"text_encoder", "image_encoder", "hint_encoder", "denoiser", "capface", "unet",
                             "vae_decoder", "preview_decoder"}
    assert min(parity.values()) > 60


@pytest.mark.slow
def test_self_test_passes(bundle):
    verdicts = list(self_test(bundle))
    assert {verdict.graph for verdict in verdicts} >= SPECS.keys() - set(OFFICIAL_GRAPHS)
    assert all(verdict.passed for verdict in verdicts)


@pytest.mark.slow
def test_fused_equals_split(bundle):
    """Gating and scaling 13 residuals outside gives what the fused graph gives."""
    inputs = {name: value.numpy() for name, value in example_inputs(SPECS["denoiser"].inputs, seed=3).items()}
    inputs["scales"] = np.linspace(0.2, 1.4, 13, dtype=np.float32)
    fused = bundle.graph("denoiser")(inputs)["eps"]
    raw = bundle.graph("capface")({name: inputs[name] for name in ("latent", "timestep", "face_tokens", "hint")})
    gates = [inputs[f"gate_{level}"] for level in residual_levels(MICRO.unet)]
    gated = {name: residual * gate * scale for (name, residual), gate, scale in
             zip(raw.items(), gates, inputs["scales"], strict=True)}
    shared = {name: inputs[name] for name in ("latent", "timestep", "text_tokens")}
    split = bundle.graph("unet")({**shared, **gated})["eps"]
    np.testing.assert_allclose(fused, split, atol=1e-4 * np.abs(fused).max())


@pytest.mark.slow
def test_both_guidance_branches_equal_single_passes(bundle):
    """A batch of two texts is two batches of one."""
    inputs = {name: value.numpy() for name, value in example_inputs(SPECS["denoiser"].inputs, seed=4).items()}
    denoiser = bundle.graph("denoiser")
    both = denoiser(inputs)["eps"]
    for k in range(2):
        alone = denoiser({**inputs, "text_tokens": inputs["text_tokens"][k:k + 1]})["eps"]
        np.testing.assert_allclose(both[k:k + 1], alone, atol=1e-4 * np.abs(alone).max())


@pytest.mark.slow
def test_denoiser_forms_share_their_weights(bundle):
    folder = bundle.root / "denoiser"
    stored = (folder / "weights.bin").stat().st_size
    count = sum(p.numel() for name, p in CapHuman(MICRO).named_parameters()
                if name.startswith(("model.", "control_model.")))
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "capface.onnx", "unet.onnx", "weights.bin"}
    assert stored < 2.2 * count  # two bytes a parameter, once


def test_unused_words_are_not_stored_and_change_nothing(parts, tmp_path):
    spec = SPECS["text_encoder"]
    save({"model.onnx": trace(parts["text_encoder"], spec)}, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size < 49_408 * 2 * 2  # the table would be 49,408 rows of 8 halves
    ids = torch.tensor([[0, 4, 5, 48_999, 49_000, 49_407] * 13])[:, :77]
    got = open_backend("ort").load(tmp_path / "model.onnx")({"input_ids": ids.numpy()})["last_hidden_state"]
    np.testing.assert_allclose(got, parts["text_encoder"](ids), atol=1e-5)


def test_weights_become_halves_only_where_that_is_exact(tmp_path):
    exact = torch.nn.Linear(40, 40, bias=False).half().float()
    inexact = torch.nn.Linear(40, 40, bias=False)
    spec = dataclasses.replace(SPECS["preview_decoder"], inputs=(dataclasses.replace(
        SPECS["preview_decoder"].inputs[0], shape=(1, 40)),))
    for precision, layer, size in (("f16", exact, 2), ("f32", inexact, 4)):
        assert save({"model.onnx": trace(layer, spec)}, tmp_path / precision) == precision
        assert (tmp_path / precision / "weights.bin").stat().st_size == 40 * 40 * size


def test_a_graph_that_computes_something_else_is_named(parts, tmp_path):
    spec = SPECS["preview_decoder"]
    model = trace(parts["preview_decoder"], spec)
    weight = next(tensor for tensor in model.graph.initializer if onnx.numpy_helper.to_array(tensor).ndim == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
    save({"model.onnx": model}, tmp_path)
    assert not (tmp_path / "weights.bin").exists()  # nothing large enough to move out
    with pytest.raises(BundleError, match=r"model\.onnx: sample differs from the reference, PSNR \d+\.\d dB"):
        check_graph(tmp_path / "model.onnx", spec, parts["preview_decoder"], open_backend("ort"))
