"""The identity encoder equals the official one on recorded weights; the classifier of its checkpoint is passed over."""
import numpy as np
import pytest
import torch

from caphuman_edge.ref.checkpoints import load_network
from caphuman_edge.ref.identity import CLASSIFIER, FaceNet
from caphuman_edge.runtime.errors import CheckpointError


def saved(path, network, **more):
    """A checkpoint in which each tensor is one stored number, shown in the network's shape."""
    weights = {name: torch.tensor(0.5).expand(tensor.shape) for name, tensor in network.state_dict().items()}
    torch.save({**weights, **more}, path)
    return path


@pytest.fixture(scope="module")
def network():
    return FaceNet().eval()


def test_embedding_equals_the_official_one(golden, recipe, network):
    suite = golden("facenet.npz")
    recipe(network, gain=1.4)
    faces = torch.from_numpy(suite["out/x"])
    np.testing.assert_allclose(network.features(faces), suite["out/pre_norm"], atol=1e-4)
    np.testing.assert_allclose(network(faces), suite["out/embedding"], atol=1e-6)


def test_the_names_of_people_are_left_out(network, tmp_path):
    path = saved(tmp_path / "vggface2.pt", network, **{"logits.weight": torch.ones(8631, 1)})
    load_network(network, path, ignored=(CLASSIFIER,))
    assert all(parameter.eq(0.5).all() for parameter in network.parameters())


def test_any_other_stranger_is_refused(network, tmp_path):
    path = saved(tmp_path / "vggface2.pt", network, **{"block9.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"vggface2\.pt does not fit FaceNet: 1 unknown \(block9\.weight\)"):
        load_network(network, path, ignored=(CLASSIFIER,))
