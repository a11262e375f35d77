"""The face parser equals the official one on recorded weights, at sizes that no power of two divides."""
import numpy as np
import pytest
import torch

from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.parser import FaceParser, normalise
from caphuman_edge.runtime.errors import CheckpointError
from caphuman_edge.runtime.perception.parse import NOT_FACE

TIE = 1e-4  # logits closer than this may swap


def test_logits_labels_and_white_equal_the_official_ones(golden, recipe):
    """Labels but for ties."""
    suite = golden("bisenet.npz")
    network = recipe(FaceParser(), gain=1.0)
    for name in (key.split("/")[1] for key in suite if key.startswith("in/")):
        image = suite[f"in/{name}/image"]
        logits = network(normalise(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)).numpy()
        np.testing.assert_allclose(logits, suite[f"out/{name}/logits"], atol=1e-4, err_msg=name)
        labels, (second, first) = logits[0].argmax(axis=0), np.sort(logits[0], axis=0)[-2:]
        assert ((labels == suite[f"out/{name}/parsing"]) | (first - second < TIE)).all(), name
        masked = np.where(np.isin(labels, NOT_FACE)[..., None], 255, image)
        assert (masked == suite[f"out/{name}/masked_image"]).all(axis=2).mean() > 0.999, name


def test_a_checkpoint_of_another_network_is_refused():
    network = FaceParser()
    with pytest.raises(CheckpointError, match=r"18\.pth does not fit FaceParser: .*unknown \(bn1.*missing \(conv_out"):
        load_strictly(network, network.cp.resnet.state_dict(), "resnet18.pth")
