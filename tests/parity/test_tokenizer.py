"""Ids against those that the official tool's tokenizer recorded, over-long prompt included."""
import json

import numpy as np
import pytest

from caphuman_edge.runtime.tokenizer import Tokenizer


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_ids_are_the_official_ones(golden):
    clip = golden("clip_text.npz")
    tokenizer = Tokenizer()
    ids = np.concatenate([tokenizer.encode(prompt) for prompt in json.loads(str(clip["config"]))["prompts"]])
    np.testing.assert_array_equal(ids, clip["in/input_ids"])
