"""The autoencoder equals the official one on recorded weights."""
import json

import numpy as np
import pytest
import torch

from caphuman_edge.ref.autoencoder import Autoencoder, image_to_uint8
from caphuman_edge.runtime.contract import VaeConfig


@pytest.fixture
def suite(golden):
    return golden("vae.npz")


@pytest.fixture
def vae(suite):
    sizes = json.loads(str(suite["config"]))["ddconfig"]
    model = Autoencoder(VaeConfig(channels=sizes["ch"], channel_mult=tuple(sizes["ch_mult"])))
    model.load_state_dict({k[3:]: torch.from_numpy(v) for k, v in suite.items() if k.startswith("sd/")})
    return model.eval().requires_grad_(False)


def test_moments_equal_the_official_ones(vae, suite):
    mean, logvar = vae.moments(torch.from_numpy(suite["in/image"]))
    np.testing.assert_allclose(mean, suite["out/mean"], atol=1e-4)
    np.testing.assert_allclose(logvar, suite["out/logvar"], atol=1e-4)


def test_encode_is_the_scaled_mean(vae, suite):
    np.testing.assert_allclose(vae.encode(torch.from_numpy(suite["in/image"])), suite["out/scaled_mean"], atol=1e-4)


@pytest.mark.parametrize(("latent", "image"), [("in/z", "out/decoded"), ("in/z_rect", "out/decoded_rect")])
def test_decode_equals_the_official_one_also_when_not_square(vae, suite, latent, image):
    np.testing.assert_allclose(vae.decode(torch.from_numpy(suite[latent])), suite[image], atol=1e-4)


def test_pixels_are_truncated_not_rounded(suite):
    pixels = image_to_uint8(torch.from_numpy(suite["out/decoded"])).numpy()
    assert (pixels == suite["out/decoded_u8"]).mean() == 1.0
