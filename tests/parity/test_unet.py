"""The UNet equals the official one on recorded weights, with and without control."""
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from caphuman_edge.ref.caphuman import face_gates
from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.sampler import alphas_cumprod
from caphuman_edge.ref.unet import SpatialTransformer, UNet, sinusoids
from caphuman_edge.runtime.contract import NANO, RESIDUALS, TINY, residual_levels


@pytest.fixture
def suite(golden):
    return {key: torch.from_numpy(value) for key, value in golden("unet.npz").items() if key != "config"}


@pytest.fixture
def unet(suite):
    model = UNet(TINY.unet)
    load_strictly(model, {key[3:]: value for key, value in suite.items() if key.startswith("sd/")}, "unet.npz")
    return model.eval().requires_grad_(False)


def predict(unet, suite, residuals=None):
    return unet(suite["in/x"], suite["in/t"], suite["in/context"], residuals)


def recorded(suite, name):
    return [suite[f"in/{name}_{i:02}"] for i in range(RESIDUALS)]


def gated(suite, residuals, mask):
    gates = face_gates(suite[f"in/{mask}"], 4)
    return [r * gates[level] for r, level in zip(residuals, residual_levels(TINY.unet), strict=True)]


def test_timestep_features_are_cosines_then_sines(suite):
    np.testing.assert_allclose(sinusoids(suite["in/t"], 32), suite["dbg/plain/t_emb_sin"], atol=1e-6)


def test_every_encoder_feature_equals_the_official_one(unet, suite):
    features = unet.encode(suite["in/x"], unet.embed_time(suite["in/t"], torch.float32), suite["in/context"])
    names = [*(f"h_in_{i}" for i in range(12)), "h_mid"]
    for feature, name in zip(features, names, strict=True):
        np.testing.assert_allclose(feature[:1], suite[f"dbg/plain/{name}"], atol=1e-4, err_msg=name)


def test_prediction_without_control_equals_the_official_one(unet, suite):
    np.testing.assert_allclose(predict(unet, suite), suite["out/plain"], atol=1e-4)


def test_ungated_residuals_act_as_in_the_official_code(unet, suite):
    np.testing.assert_allclose(predict(unet, suite, recorded(suite, "c1")), suite["out/control_nomask"], atol=1e-4)


def test_gated_residuals_act_as_in_the_official_code(unet, suite):
    residuals = gated(suite, recorded(suite, "c1"), "mask1")
    np.testing.assert_allclose(predict(unet, suite, residuals), suite["out/control_masked"], atol=1e-4)


def test_two_people_and_ungated_poses_sum_as_in_the_official_code(unet, suite):
    parts = [gated(suite, recorded(suite, "c1"), "mask1"), gated(suite, recorded(suite, "c2"), "mask2"),
             recorded(suite, "p1"), recorded(suite, "p2")]
    residuals = [sum(same) for same in zip(*parts, strict=True)]
    np.testing.assert_allclose(predict(unet, suite, residuals), suite["out/two_control_pose"], atol=1e-4)


def test_the_last_residual_is_the_middle_one(unet, suite):
    masked = gated(suite, recorded(suite, "c1"), "mask1")
    residuals = [*(torch.zeros_like(r) for r in masked[:-1]), masked[-1]]
    np.testing.assert_allclose(predict(unet, suite, residuals), suite["out/only_mid"], atol=1e-4)


def test_a_wrong_number_of_residuals_is_refused(unet, suite):
    with pytest.raises(ValueError, match="shorter"):
        predict(unet, suite, recorded(suite, "c1")[:-1])


def test_only_the_transformers_input_norm_has_the_smaller_epsilon():
    norms = {name: module.eps for name, module in UNet(TINY.unet).named_modules() if isinstance(module, nn.GroupNorm)}
    assert {eps for name, eps in norms.items() if name.endswith(".norm")} == {1e-6}
    assert {eps for name, eps in norms.items() if not name.endswith(".norm")} == {1e-5}


def test_a_v_predicting_unet_gives_the_eps_of_its_v():
    config = dataclasses.replace(TINY.unet, prediction="v")
    unet = UNet(config).eval()
    torch.nn.init.normal_(unet.out[2].weight, std=0.1)
    plain = UNet(TINY.unet).eval()
    plain.load_state_dict(unet.state_dict())  # equal names: the table of alphas is no weight
    latent, context, timestep = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 64), torch.tensor([1.0, 901.0])
    with torch.no_grad():
        v, eps = (net(latent, timestep, context) for net in (plain, unet))
    alpha_bar = alphas_cumprod()[[1, 901]][:, None, None, None]
    clean = (latent - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    torch.testing.assert_close(v, alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * clean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [TINY.unet, dataclasses.replace(NANO.unet, prediction="eps"),
                                    dataclasses.replace(TINY.unet, attention_levels=())])
def test_a_fresh_unet_of_any_size_predicts_zero(config):
    unet = UNet(config)
    latent, text = torch.randn(1, 4, 16, 8), torch.randn(1, 77, config.context_width)
    assert not unet(latent, torch.tensor([500.0]), text).any()


def test_pooled_keys_are_means_of_squares_and_the_finest_attention_alone_has_them(suite, unet):
    config = dataclasses.replace(TINY.unet, key_pooling=2)
    pooled = UNet(config)
    load_strictly(pooled, unet.state_dict(), "the exact one's")
    layers = [layer for layer in pooled.modules() if isinstance(layer, SpatialTransformer)]
    assert [layer.pooling for layer in layers].count(2) == 5  # of SD-1.5's shape: two on the way down, three up
    hidden, context = torch.randn(1, 32, 4, 6), torch.randn(1, 77, 64)
    finest = next(layer for layer in layers if layer.pooling == 2)
    keys = []
    finest.transformer_blocks[0].attn1.to_k.register_forward_hook(lambda _, inputs, __: keys.append(inputs[0]))
    normed = []
    finest.transformer_blocks[0].norm1.register_forward_hook(lambda _, __, output: normed.append(output))
    finest(hidden, context)
    squares = normed[0].reshape(1, 2, 2, 3, 2, 32).mean(dim=(2, 4)).reshape(1, 6, 32)
    assert torch.allclose(keys[0], squares, atol=1e-6)


def test_pooling_where_cells_are_alike_changes_nothing():
    exact = SpatialTransformer(TINY.unet, 32).eval()
    pooled = SpatialTransformer(TINY.unet, 32, pooling=2).eval()
    pooled.load_state_dict(exact.state_dict())
    torch.nn.init.normal_(exact.proj_out.weight), pooled.load_state_dict(exact.state_dict())
    coarse, context = torch.randn(1, 32, 3, 3), torch.randn(1, 77, 64)
    alike = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(pooled(alike, context), exact(alike, context), atol=1e-5)
    mixed = torch.randn(1, 32, 6, 6)
    assert not torch.allclose(pooled(mixed, context), exact(mixed, context), atol=1e-3)
