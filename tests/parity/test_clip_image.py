"""The CLIP vision encoder and its preprocessing equal Hugging Face's on recorded weights."""
import numpy as np
import pytest
import torch
from PIL import Image

from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.clip import VisionEncoder
from caphuman_edge.runtime.contract import NANO, TINY
from caphuman_edge.runtime.perception.crop import clip_pixels


@pytest.fixture
def suite(golden):
    return golden("clip_image.npz")


@pytest.fixture
def encoder(suite):
    model = VisionEncoder(TINY.vision)
    weights = {key[3:]: torch.from_numpy(value) for key, value in suite.items() if key.startswith("sd/")}
    load_strictly(model, weights, "clip_image.npz")
    return model.eval().requires_grad_(False)


def pictures(suite):
    names = [key.split("/")[1] for key in suite if key.startswith("in/")]
    assert names
    return names


def test_pixel_values_of_every_recorded_picture_equal_the_official_ones(suite):
    for name in pictures(suite):
        pixels = clip_pixels(suite[f"in/{name}/image"], 224)
        np.testing.assert_allclose(pixels[None], suite[f"out/{name}/pixel_values"], atol=1e-5, err_msg=name)


def test_last_hidden_state_of_every_recorded_picture_equals_the_official_one(encoder, suite):
    for name in pictures(suite):
        tokens = encoder(torch.from_numpy(suite[f"out/{name}/pixel_values"]))
        np.testing.assert_allclose(tokens, suite[f"out/{name}/last_hidden_state"], atol=1e-4, err_msg=name)


def test_the_final_norm_is_stored_but_not_applied(encoder, suite):
    name = pictures(suite)[0]
    tokens = encoder(torch.from_numpy(suite[f"out/{name}/pixel_values"]))
    normed = encoder.vision_model.post_layernorm(tokens[:, :1])
    np.testing.assert_allclose(normed, suite[f"out/{name}/post_layernorm_NOT_used"].reshape(normed.shape), atol=1e-4)
    assert (normed - tokens[:, :1]).abs().max() > 0.1


@pytest.mark.parametrize("size", [(300, 451), (200, 160), (96, 96)])
def test_the_crop_is_the_centre_of_the_shortest_edge(size):
    gradient = Image.linear_gradient("L").convert("RGB").resize(size)
    pixels = clip_pixels(np.asarray(gradient), 96)
    assert pixels.shape == (3, 96, 96)
    np.testing.assert_allclose(pixels[0, 47:49].mean(), (127.5 / 255 - 0.48145466) / 0.26862954, atol=0.05)


def test_a_patch_encoder_of_another_size_counts_its_tokens():
    vision = NANO.vision
    tokens = VisionEncoder(vision)(torch.randn(2, 3, vision.image_size, vision.image_size))
    assert tokens.shape == (2, vision.tokens, vision.width)
