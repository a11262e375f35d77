"""The CLIP text encoder equals Hugging Face's on recorded weights."""
import numpy as np
import pytest
import torch

from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.clip import TextEncoder
from caphuman_edge.runtime.contract import TINY


@pytest.fixture
def suite(golden):
    return {key: torch.from_numpy(value) for key, value in golden("clip_text.npz").items() if key != "config"}


@pytest.fixture
def encoder(suite):
    model = TextEncoder(TINY.text)
    load_strictly(model, {key[3:]: value for key, value in suite.items() if key.startswith("sd/")}, "clip_text.npz")
    return model.eval().requires_grad_(False)


def test_last_hidden_state_equals_the_official_one(encoder, suite):
    np.testing.assert_allclose(encoder(suite["in/input_ids"]), suite["out/last_hidden_state"], atol=1e-4)


def test_only_the_final_norm_follows_the_last_layer(encoder, suite):
    model = encoder.text_model
    hidden = model.encoder(model.embeddings(suite["in/input_ids"]))
    np.testing.assert_allclose(hidden, suite["dbg/hidden_before_final_ln"], atol=1e-4)


def test_a_token_does_not_see_later_ones(encoder, suite):
    ids = suite["in/input_ids"][:1]
    changed = ids.clone()
    changed[:, 40:] = 320
    before, after = encoder(ids), encoder(changed)
    np.testing.assert_allclose(before[:, :40], after[:, :40], atol=1e-6)
    assert (before[:, 40:] - after[:, 40:]).abs().max() > 0.1
