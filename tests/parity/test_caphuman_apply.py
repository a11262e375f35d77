"""One noise prediction of the whole model equals the official one: tau, scales, several people, pose net."""
import dataclasses
import json

import numpy as np
import pytest
import torch

from caphuman_edge.ref.caphuman import CapHuman, ControlSettings, drop_tokens, face_gates
from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.runtime.contract import RESIDUALS, TINY, VisionConfig

CASES = ("tau0", "tau500", "tau500_edge", "tau500_all_dropped", "scales", "strength0", "two_person", "pose",
         "two_person_pose")
RECORDED_SIZE = dataclasses.replace(TINY, vision=VisionConfig(width=1024))  # tiny nets, full-size projections


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def suite(golden, cache):
    if "suite" not in cache:
        cache["suite"] = golden("caphuman_apply.npz")
    return cache["suite"]


@pytest.fixture
def model(suite, cache):
    if "model" not in cache:
        model = CapHuman(RECORDED_SIZE, encoders=False, autoencoder=False, pose_net=True)
        weights = {key[3:]: torch.from_numpy(value) for key, value in suite.items() if key.startswith("sd/")}
        load_strictly(model, weights, "caphuman_apply.npz")
        cache["model"] = model.eval().requires_grad_(False)
    return cache["model"]


def tensor(suite, key):
    return torch.from_numpy(suite[key])


def person(model, suite, name):
    return model.face_condition(tensor(suite, f"in/{name}/c_concat"), tensor(suite, f"in/{name}/c_crossattn_control"),
                                tensor(suite, f"in/{name}/c_crossattn_id")[:, 0])


def predict(model, suite, case, people, pose, control):
    faces = [person(model, suite, name) for name in people]
    poses = [model.pose_control_model.encode_hint(tensor(suite, f"in/{name}/c_pose_concat")) for name in people]
    text = tensor(suite, f"in/{people[-1]}/c_crossattn")  # the official code takes the last person's text
    return model(tensor(suite, "in/x"), tensor(suite, f"in/t/{case}"), text, faces, poses if pose else (), control)


@pytest.mark.parametrize("case", CASES)
def test_prediction_equals_the_official_one(model, suite, case):
    settings = json.loads(str(suite["config"]))["cases"][case]
    pose_scales = settings["pose_scales"]
    control = ControlSettings(tuple(settings["scales"]), tuple(pose_scales or (1.0,) * RESIDUALS), settings["tau"])
    eps = predict(model, suite, case, "AB" if "two_person" in case else "A", pose_scales is not None, control)
    np.testing.assert_allclose(eps, suite[f"out/{case}"], atol=1e-4)


def test_face_tokens_are_the_official_control_context(model, suite):
    tokens = person(model, suite, "A").tokens
    np.testing.assert_allclose(tokens, suite["dbg/tau0/last_context"], atol=1e-4)
    dropped = drop_tokens(tokens, tensor(suite, "in/t/tau500"), tau=500)
    np.testing.assert_allclose(dropped, suite["dbg/tau500/last_context"], atol=1e-4)


def test_masks_are_those_of_each_person(model, suite):
    for name, case in (("A", "tau0"), ("B", "two_person")):
        hint = person(model, suite, name).hint
        np.testing.assert_allclose(model.control_model.predict_mask(hint), suite[f"dbg/{case}/last_mask"], atol=1e-4)


def test_strength_zero_is_the_plain_unet(model, suite):
    plain = model(tensor(suite, "in/x"), tensor(suite, "in/t/strength0"), tensor(suite, "in/A/c_crossattn"))
    np.testing.assert_allclose(plain, suite["out/strength0"], atol=1e-4)


def test_one_timestep_serves_a_whole_batch(model, suite):
    face, text = person(model, suite, "A"), tensor(suite, "in/A/c_crossattn")
    one = model(tensor(suite, "in/x"), torch.tensor([500]), text, [face], control=ControlSettings(tau=400))
    each = model(tensor(suite, "in/x"), torch.tensor([500, 500]), text, [face], control=ControlSettings(tau=400))
    np.testing.assert_allclose(one, each, atol=1e-5)


def test_tokens_are_kept_at_tau_and_dropped_above_it():
    kept = drop_tokens(torch.ones(3, 2, 4), torch.tensor([499, 500, 501]), tau=500)
    assert kept[:, 0, 0].tolist() == [1, 1, 0]


def test_tau_zero_never_drops():
    assert drop_tokens(torch.ones(1, 2, 4), torch.tensor([999]), tau=0).all()


def test_gates_are_resized_before_the_threshold():
    mask = torch.tensor([[[[0.6, 0.6], [0.6, 0.0]]]])
    fine, coarse = face_gates(mask, levels=2)
    assert fine.flatten().tolist() == [1, 1, 1, 0]
    assert coarse.item() == 0  # the mean is 0.45, though three of four cells are open


def test_gates_are_resized_without_antialiasing():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, 1:3] = 1
    assert face_gates(mask, levels=3)[2].item() == 1  # only the four centre cells are read; their area mean is 1/4


def test_a_gate_at_one_half_is_closed():
    assert face_gates(torch.full((1, 1, 2, 2), 0.5), levels=1)[0].sum() == 0
