"""Random weights in the official layout: seeded, none zero, lively."""
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from caphuman_edge.export.random_weights import (
    official_shapes,
    random_weight,
    random_weights,
    write_checkpoints,
)
from caphuman_edge.export.weights import WeightFiles, load_model
from caphuman_edge.ref.checkpoints import is_leftover, refuse_damaged_archive
from caphuman_edge.runtime.contract import FULL, NANO, TextConfig, UNetConfig, VaeConfig, VisionConfig

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
SMALL = dataclasses.replace(
    NANO, height=64, width=64,
    unet=UNetConfig(model_channels=16, channel_mult=(1, 2, 2, 2), attention_levels=(1, 2), num_heads=2, norm_groups=8,
                    context_width=32, hint_widths=(8, 8, 16, 16)),
    text=TextConfig(width=32, layers=2, heads=2, vocabulary=64),
    vision=VisionConfig(width=32, layers=2, heads=2, image_size=24, patch_size=12),
    vae=VaeConfig(channels=16, channel_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=8))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("weights"), SMALL, seed=3)


@pytest.fixture(scope="module")
def model(files):
    return load_model(WeightFiles(**files), SMALL)[0]


def test_names_and_shapes_are_the_official_ones_at_full_size():
    recorded = json.loads((GOLDEN / "keys_caphuman_full.json").read_text())["keys"]
    assert official_shapes(FULL) == {name: tuple(shape) for name, (shape, _) in recorded.items()
                                     if not is_leftover(name)}


def test_a_weight_is_a_function_of_its_name_and_the_seed():
    weights = dict(random_weights(SMALL, 3))
    name = "control_model.zero_convs.0.0.weight"
    assert np.array_equal(weights[name], random_weight(name, weights[name].shape, 3))
    assert not np.array_equal(weights[name], random_weight(name, weights[name].shape, 4))
    other = "control_model.zero_convs.1.0.weight"
    assert not np.array_equal(weights[name], weights[other])


def test_no_tensor_is_zero_and_all_are_float32():
    for name, weight in random_weights(SMALL, 3):
        assert weight.dtype == np.float32
        assert np.abs(weight).max() > 1e-3, name


def test_equal_seeds_write_equal_files(files, tmp_path):
    again = write_checkpoints(tmp_path, SMALL, seed=3)
    assert all(again[role].read_bytes() == path.read_bytes() for role, path in files.items())


def test_torch_reads_the_nested_checkpoint_with_aligned_tensors(files):
    content = torch.load(files["caphuman"], weights_only=True, mmap=True)
    weights = content["state_dict"]
    expected = dict(random_weights(SMALL, 3))
    assert weights.keys() - expected.keys() == {
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "control_cond_stage_model.transformer.vision_model.embeddings.position_ids"}
    assert all(np.array_equal(weights[name].numpy(), weight) for name, weight in expected.items())
    assert all(weights[name].data_ptr() % 16 == 0 for name in expected)
    refuse_damaged_archive(files["caphuman"])


def test_activations_neither_vanish_nor_explode(model):
    torch.manual_seed(0)
    latent, text = torch.randn(1, *SMALL.latent_shape), model.text_encoder(torch.arange(77)[None] % 64)
    image = model.first_stage_model.decode(latent)
    eps = model(latent, torch.tensor([500]), text)
    assert all(0.3 < value.std() < 3 for value in (text, eps, image))
    for changed in (model(latent, torch.tensor([20]), text), model(latent, torch.tensor([500]), text.roll(1, 2))):
        assert (changed - eps).std() > 0.01


def test_the_face_mask_opens_and_closes_gates(model):
    torch.manual_seed(0)
    tokens = model.image_encoder(torch.randn(1, 3, 24, 24))
    identity = torch.nn.functional.normalize(torch.randn(1, SMALL.identity_width), dim=1)
    face = model.face_condition(torch.randn(1, 9, 64, 64), tokens, identity)
    assert 0.1 < face.gates[0].mean() < 0.9
    assert 0.3 < face.tokens[:, -1].std() < 3  # the identity is heard
    latent, text = torch.randn(1, *SMALL.latent_shape), torch.randn(1, 77, 32)
    step = torch.tensor([500])
    assert (model(latent, step, text, [face]) - model(latent, step, text)).std() > 0.02
