"""DECA's encoder equals the official one on recorded weights, and reads its part of deca_model.tar."""
import numpy as np
import pytest
import torch

from caphuman_edge.ref.checkpoints import load_network
from caphuman_edge.ref.deca import PARAMETERS, PART, HeadEncoder
from caphuman_edge.runtime.errors import CheckpointError


def saved(path, **networks):
    """A checkpoint of several networks; each tensor is one stored number, shown in the network's shape."""
    torch.save({name: {key: torch.tensor(0.5).expand(tensor.shape) for key, tensor in network.state_dict().items()}
                for name, network in networks.items()}, path)
    return path


@pytest.fixture(scope="module")
def network():
    return HeadEncoder().eval()


def test_parameters_equal_the_official_ones(golden, recipe, network):
    suite = golden("deca_encoder.npz")
    recipe(network, gain=1.4, bn_scale=lambda name: 0.3 if "bn3.weight" in name else 1.0)
    image = torch.from_numpy(suite["in/image_u8"]).permute(0, 3, 1, 2) / 255
    found = network(image)
    np.testing.assert_allclose(found, suite["out/parameters"], atol=1e-4)
    parts = found.split(list(PARAMETERS.values()), dim=1)
    for part, name in zip(parts, ("shape", "tex", "exp", "pose", "cam", "light"), strict=True):
        np.testing.assert_allclose(part, suite[f"out/code_{name}"].reshape(part.shape), atol=1e-4)


def test_the_other_networks_of_the_file_are_passed_over(network, tmp_path):
    path = saved(tmp_path / "deca_model.tar", E_flame=network, E_detail=torch.nn.Linear(2, 2))
    load_network(network, path, part=PART)
    assert all(parameter.eq(0.5).all() for parameter in network.parameters())


def test_a_file_without_the_encoder_is_refused(network, tmp_path):
    path = saved(tmp_path / "deca_model.tar", E_detail=torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"deca_model\.tar holds no network E_flame"):
        load_network(network, path, part=PART)


def test_another_encoder_s_names_are_told(network, tmp_path):
    path = saved(tmp_path / "deca_model.tar", E_flame=network.encoder)
    with pytest.raises(CheckpointError, match=r"does not fit HeadEncoder: .*unknown \(bn1\.bias.*missing \(encoder"):
        load_network(network, path, part=PART)
