"""At full size, names and shapes of all weights equal those of the official models."""
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from caphuman_edge.ref.capface import CapFace
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.checkpoints import is_leftover
from caphuman_edge.ref.deca import HeadEncoder
from caphuman_edge.ref.identity import FaceNet
from caphuman_edge.ref.mtcnn import OutputNet, ProposalNet, RefineNet
from caphuman_edge.ref.parser import FaceParser
from caphuman_edge.runtime.contract import FULL

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))


def recorded(name):
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"{name} is not in {GOLDEN}; set GOLDEN_DIR to a folder that has it")
    return json.loads(path.read_text())


def official_shapes(name, prefix=""):
    keys = recorded(name)["keys"]
    return {key.removeprefix(prefix): tuple(shape) for key, (shape, _) in keys.items()
            if key.startswith(prefix) and not is_leftover(key)}


def shapes(build):
    with torch.device("meta"):  # no memory is filled
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items() if not is_leftover(name)}


def test_caphuman_has_the_official_names_and_shapes():
    assert shapes(lambda: CapHuman(FULL)) == official_shapes("keys_caphuman_full.json")


def test_pose_net_has_the_official_names_and_shapes():
    pose_config = dataclasses.replace(FULL.unet, hint_channels=3)
    pose_net = shapes(lambda: CapFace(pose_config, mask_head=False))
    assert pose_net == official_shapes("keys_openpose_controlnet_full.json")


@pytest.mark.parametrize(("build", "name", "prefix"), [
    (HeadEncoder, "keys_deca.json", "E_flame/"), (FaceParser, "keys_bisenet.json", ""),
    (ProposalNet, "keys_mtcnn.json", "pnet/"), (RefineNet, "keys_mtcnn.json", "rnet/"),
    (OutputNet, "keys_mtcnn.json", "onet/")])
def test_perception_networks_have_the_official_names_and_shapes(build, name, prefix):
    assert shapes(build) == official_shapes(name, prefix)


def test_identity_encoder_lacks_the_classifier_alone():
    official = official_shapes("keys_facenet_inception_resnet_v1.json")
    assert official.keys() - shapes(FaceNet).keys() == {"logits.weight", "logits.bias"}
    assert shapes(FaceNet).items() <= official.items()


def test_only_buffers_are_tolerated_as_leftovers():
    assert all(is_leftover(name) for name in recorded("keys_caphuman_buffers.json"))
