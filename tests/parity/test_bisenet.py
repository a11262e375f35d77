"""The face parser equals the official one on recorded weights, at sizes that no power of two divides."""
import numpy as np
import pytest
import torch

from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.parser import FaceParser, normalise
from caphuman_edge.runtime.errors import CheckpointError
from caphuman_edge.runtime.perception.parse import NOT_FACE

TIE = 1e-4  # logits closer than this may swap


@pytest.fixture(params=["a", "b_odd"])
def case(request, golden, recipe):
    """(image, logits, suite, prefix of the recorded outputs)."""
    suite = golden("bisenet.npz")
    network = recipe(FaceParser(), gain=1.0)
    image = suite[f"in/{request.param}/image"]
    logits = network(normalise(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)).numpy()
    return image, logits, suite, f"out/{request.param}"


def test_logits_equal_the_official_ones(case):
    _, logits, suite, out = case
    np.testing.assert_allclose(logits, suite[f"{out}/logits"], atol=1e-4)


def test_labels_equal_the_official_ones_but_for_ties(case):
    _, logits, suite, out = case
    second, first = np.sort(logits[0], axis=0)[-2:]
    assert ((logits[0].argmax(axis=0) == suite[f"{out}/parsing"]) | (first - second < TIE)).all()


def test_what_is_no_face_becomes_white(case):
    image, logits, suite, out = case
    masked = np.where(np.isin(logits[0].argmax(axis=0), NOT_FACE)[..., None], 255, image)
    assert (masked == suite[f"{out}/masked_image"]).all(axis=2).mean() > 0.999


def test_a_checkpoint_of_another_network_is_refused():
    network = FaceParser()
    with pytest.raises(CheckpointError, match=r"18\.pth does not fit FaceParser: .*unknown \(bn1.*missing \(conv_out"):
        load_strictly(network, network.cp.resnet.state_dict(), "resnet18.pth")
