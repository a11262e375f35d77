"""Checkpoints load safely and strictly: what does not fit is named."""
import dataclasses
import os
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.checkpoints import load_official, load_strictly, prefixed, read_checkpoint
from caphuman_edge.runtime.contract import NANO, TextConfig, UNetConfig, VaeConfig, VisionConfig
from caphuman_edge.runtime.errors import CheckpointError

SMALL = dataclasses.replace(
    NANO, unet=UNetConfig(model_channels=8, channel_mult=(1, 1, 1, 1), num_heads=2, norm_groups=4, context_width=16,
                          hint_widths=(4, 4, 4, 4)),
    text=TextConfig(width=16, layers=1, heads=2, vocabulary=64),
    vision=VisionConfig(width=16, layers=1, heads=2, image_size=24, patch_size=12),
    vae=VaeConfig(channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4))


class RunsCode:
    """A pickle of this would call os.mkdir."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def linear():
    return nn.Linear(3, 2)


def saved(path, content):
    torch.save(content, path)
    return path


def test_a_nested_state_dict_is_unwrapped(tmp_path, linear):
    path = saved(tmp_path / "a.ckpt", {"state_dict": {"state_dict": linear.state_dict()}, "epoch": 3})
    assert read_checkpoint(path).keys() == {"weight", "bias"}


def test_files_from_before_zip_archives_are_read_as_safely(tmp_path, linear):
    torch.save(linear.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pth").keys() == {"weight", "bias"}
    torch.save({"weight": RunsCode(tmp_path / "made")}, tmp_path / "evil.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_safetensors_are_read_like_pickles(tmp_path, linear):
    save_file(linear.state_dict(), tmp_path / "a.safetensors")
    weights = read_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(weights["weight"], linear.weight)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = saved(tmp_path / "evil.pt", {"weight": RunsCode(tmp_path / "made")})
    with pytest.raises(CheckpointError, match=r"evil\.pt .*more than tensors"):
        read_checkpoint(path)
    assert not (tmp_path / "made").exists()


def test_training_classes_beside_the_weights_are_passed_over(tmp_path, linear, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.Checkpoint = type("Checkpoint", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {"state_dict": linear.state_dict(), "callbacks": {module.Checkpoint: {"best": 1}}}
    path = saved(tmp_path / "a.ckpt", content)
    monkeypatch.undo()
    assert read_checkpoint(path).keys() == {"weight", "bias"}


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.safetensors"])
def test_a_file_that_is_no_checkpoint_is_one_clear_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>Not found</html>")
    with pytest.raises(CheckpointError, match=name) as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_one_clear_error(tmp_path, linear):
    path = saved(tmp_path / "a.pt", linear.state_dict())
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        read_checkpoint(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "gone.ckpt")


def test_a_checkpoint_of_other_things_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tensors"):
        read_checkpoint(saved(tmp_path / "a.pt", {"weight": torch.ones(1), "epoch": 3}))


@pytest.mark.parametrize("content", [
    {1: torch.ones(1)}, {"weight": torch.ones(2).to_sparse()}, {"weight": torch.ones(2, device="meta")},
    {"weight": torch.ones(2, dtype=torch.complex64)}])
def test_tensors_that_cannot_be_copied_into_a_network_are_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="tensors"):
        read_checkpoint(saved(tmp_path / "a.pt", content))


def test_a_file_that_wraps_itself_is_refused(tmp_path):
    content: dict[str, object] = {"epoch": 3}
    content["state_dict"] = content
    with pytest.raises(CheckpointError, match="tensors"):
        read_checkpoint(saved(tmp_path / "a.pt", content))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_however_a_checkpoint_is_altered_the_error_is_one_of_ours(tmp_path, linear, zipped):
    path, rng = tmp_path / "a.pt", np.random.default_rng(0)
    torch.save(linear.state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole, refusals = path.read_bytes(), 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 30


def test_unknown_missing_and_mis_shaped_names_are_told_in_one_error(linear):
    with pytest.raises(CheckpointError) as caught:
        load_strictly(linear, {"weight": torch.ones(2, 2), "extra": torch.ones(1)}, "a.pt")
    assert "1 unknown (extra); 1 missing (bias); 1 mis-shaped (weight is (2, 2) not (2, 3))" in str(caught.value)


def test_a_refused_load_changes_nothing(linear):
    before = linear.weight.clone()
    with pytest.raises(CheckpointError):
        load_strictly(linear, {"weight": torch.ones(2, 3)}, "a.pt")
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("leftover", ["betas", "logvar", "text_model.embeddings.position_ids", "model_ema.decay",
                                      "bn1.num_batches_tracked"])
def test_schedule_buffers_and_training_state_may_be_there(linear, leftover):
    load_strictly(linear, {"weight": torch.ones(2, 3), "bias": torch.ones(2), leftover: torch.ones(1)}, "a.pt")
    assert linear.weight.eq(1).all()


def test_later_official_files_override_earlier_ones(tmp_path):
    weights = {name: torch.zeros_like(tensor) for name, tensor in CapHuman(SMALL, pose_net=True).state_dict().items()}
    pose_net = {name: tensor for name, tensor in weights.items() if name.startswith("pose_control_model.")}
    whole = saved(tmp_path / "caphuman.ckpt", {"state_dict": {n: t for n, t in weights.items() if n not in pose_net}})
    sd = saved(tmp_path / "sd.ckpt", {"state_dict": _filled(weights, ("model.", "first_stage_model."), 1)})
    vae = saved(tmp_path / "vae.ckpt", _filled(_inner(weights, "first_stage_model."), ("",), 2))
    pose = saved(tmp_path / "pose.pth", prefixed(_filled(_inner(weights, "pose_control_model."), ("",), 3),
                                                 "control_model."))
    model = CapHuman(SMALL, pose_net=True)
    load_official(model, whole, sd, vae, pose)
    parts = (model.control_model, model.unet, model.first_stage_model, model.pose_control_model)
    assert [next(part.parameters()).unique().tolist() for part in parts] == [[0], [1], [2], [3]]


def _inner(weights, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _filled(weights, prefixes, value):
    return {name: torch.full_like(tensor, value) for name, tensor in weights.items() if name.startswith(prefixes)}
