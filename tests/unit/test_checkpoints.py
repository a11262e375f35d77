"""Checkpoints load safely and strictly: what does not fit is named."""
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from caphuman_edge.ref.checkpoints import (
    load_strictly,
    read_checkpoint,
    refuse_damaged_archive,
)
from caphuman_edge.runtime.errors import CheckpointError


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


def test_a_safetensors_file_is_known_by_its_beginning(tmp_path, linear):
    save_file(linear.state_dict(), tmp_path / "a.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "a.ckpt")["weight"], linear.weight)


def test_float32_safetensors_and_zips_are_not_copied_into_memory(tmp_path, linear):
    save_file(linear.state_dict(), tmp_path / "a.safetensors")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped")
    for path in (tmp_path / "a.safetensors", saved(tmp_path / "a.ckpt", linear.state_dict())):
        weights = read_checkpoint(path)
        spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(str(path))]
        assert any(int(start, 16) <= weights["weight"].data_ptr() < int(end, 16) for start, end in spans)


def test_assigned_weights_are_the_very_tensors_and_make_a_meta_module_real():
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    weights = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    load_strictly(module, weights, "a.pt", assign=True)
    assert module.weight.data_ptr() == weights["weight"].data_ptr()
    assert not module.bias.is_meta


def test_weights_that_are_not_assigned_are_copies(linear):
    weights = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    load_strictly(linear, weights, "a.pt")
    assert linear.weight.data_ptr() != weights["weight"].data_ptr()


@pytest.mark.parametrize("computed", [True, False])
def test_archives_of_torch_itself_hold_their_checksums(tmp_path, linear, computed):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(computed)
    try:
        path = saved(tmp_path / "a.ckpt", linear.state_dict())
    finally:
        torch.serialization.set_crc32_options(before)
    refuse_damaged_archive(path)


def test_a_changed_byte_in_an_archive_is_told(tmp_path, linear):
    path = saved(tmp_path / "a.ckpt", linear.state_dict())
    data = bytearray(path.read_bytes())
    place = data.find(linear.weight.detach().numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: the checksum of .*data/\d+ does not hold"):
        refuse_damaged_archive(path)


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
