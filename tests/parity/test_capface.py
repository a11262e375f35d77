"""CapFace equals the official control network on recorded weights."""
import dataclasses

import numpy as np
import pytest
import torch

from caphuman_edge.ref.capface import CapFace
from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.runtime.contract import NANO, RESIDUALS, TINY, residual_shapes


@pytest.fixture
def suite(golden):
    return {key: torch.from_numpy(value) for key, value in golden("capface.npz").items() if key != "config"}


@pytest.fixture
def capface(suite):
    model = CapFace(TINY.unet)
    load_strictly(model, {key[3:]: value for key, value in suite.items() if key.startswith("sd/")}, "capface.npz")
    return model.eval().requires_grad_(False)


def test_guided_hint_equals_the_official_one(capface, suite):
    np.testing.assert_allclose(capface.encode_hint(suite["in/hint"]), suite["dbg/guided_hint"], atol=1e-4)


def test_face_mask_equals_the_official_one(capface, suite):
    mask = capface.predict_mask(capface.encode_hint(suite["in/hint"]))
    np.testing.assert_allclose(mask, suite["out/mask"], atol=1e-4)


def test_every_residual_equals_the_official_one_relative_to_its_size(capface, suite):
    hint = capface.encode_hint(suite["in/hint"])
    residuals = capface(suite["in/x"], suite["in/t"], suite["in/context"], hint)
    for i, residual in enumerate(residuals):
        expected = suite[f"out/control_{i:02}"]
        np.testing.assert_allclose(residual, expected, atol=1e-4 * float(expected.abs().max()), err_msg=str(i))


@pytest.mark.parametrize("config", [TINY, NANO])
def test_residuals_have_the_shapes_of_the_contract(config):
    capface, (_, rows, columns) = CapFace(config.unet), config.latent_shape
    hint = capface.encode_hint(torch.zeros(1, 9, config.height, config.width))
    tokens = torch.zeros(1, config.face_tokens, config.unet.context_width)
    residuals = capface(torch.zeros(1, 4, rows, columns), torch.tensor([1]), tokens, hint)
    assert [tuple(r.shape[1:]) for r in residuals] == residual_shapes(config)


def test_a_fresh_capface_changes_nothing():
    capface = CapFace(NANO.unet)
    residuals = capface(torch.randn(1, 4, 8, 8), torch.tensor([9]), torch.randn(1, 5, 64), torch.randn(1, 32, 8, 8))
    assert len(residuals) == RESIDUALS
    assert not any(residual.any() for residual in residuals)


def test_a_fresh_mask_starts_at_its_bias():
    capface = CapFace(NANO.unet, mask_bias=2.0)
    mask = capface.predict_mask(capface.encode_hint(torch.randn(1, 9, 64, 64)))
    np.testing.assert_allclose(mask.detach(), 1 / (1 + np.exp(-2.0)), rtol=1e-6)


def test_a_pose_net_reads_three_channels_and_has_no_mask():
    pose_net = CapFace(dataclasses.replace(NANO.unet, hint_channels=3), mask_head=False)
    assert pose_net.encode_hint(torch.randn(1, 3, 64, 64)).shape == (1, 32, 8, 8)
    assert not any("mask" in name for name in pose_net.state_dict())
