"""The reference computes on this processor what it computed on a CUDA machine, and our noise is that machine's."""
import json
import sys

import numpy as np
import pytest
import torch

from caphuman_edge.export import record
from caphuman_edge.runtime.contract import GATE, graphs
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.noise import cuda_normal
from caphuman_edge.runtime.selftest import psnr_db

FLOORS_DB = {"f32": 80.0, "tf32": 45.0}  # TF32 rounds factors to 10 bits of mantissa


@pytest.fixture(scope="module")
def here():
    return record.record(torch.device("cpu"))


def test_every_graph_of_the_contract_is_recorded_in_both_precisions(here):
    specs = graphs(record.CONFIG)
    outputs = {f"{precision}/{graph}/{tensor.name}" for precision in record.PRECISIONS
               for graph in record.parts() for tensor in specs[graph].outputs}
    assert outputs | {"noise/1", "noise/12345", "about"} == here.keys()
    assert json.loads(here["about"])["device"] == "cpu"
    for name in outputs:
        assert np.isfinite(here[name]).all() and (here[name].std() > 0 or GATE in name), name


def test_a_recording_can_be_repeated(here):
    again = record.answers(torch.device("cpu"))
    assert all(np.array_equal(values, here[f"f32/{name}"]) for name, values in again.items())


@pytest.mark.parametrize("precision", FLOORS_DB)
def test_the_reference_here_equals_the_recorded_one(golden, here, precision):
    recorded = golden("cuda.npz")
    found = {name: psnr_db(here[name], recorded[name]) for name in here
             if name.startswith(f"{precision}/") and GATE not in name}  # gates are thresholds of the mask
    assert found and min(found.values()) > FLOORS_DB[precision], found


@pytest.mark.parametrize("seed", record.NOISE_SEEDS)
def test_our_noise_is_the_recorded_generators(golden, seed):
    np.testing.assert_allclose(cuda_normal(seed, record.NOISE_SHAPE), golden("cuda.npz")[f"noise/{seed}"], atol=2e-6)


def test_without_a_cuda_device_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["record", "--out", str(tmp_path / "cuda.npz")])
    with pytest.raises(BadInput, match="no CUDA device is here"):
        record.main()
