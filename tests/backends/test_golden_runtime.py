"""The runtime's own arithmetic on exported graphs equals the official predictions and runs, fused and split."""
import dataclasses
import json

import numpy as np
import pytest
import torch

from caphuman_edge.export.graphs import PreviewDecoder, modules
from caphuman_edge.export.onnx_writer import save, trace
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.runtime.backends import ort
from caphuman_edge.runtime.contract import TINY, VisionConfig, graphs
from caphuman_edge.runtime.denoise import Conditions, Denoiser
from caphuman_edge.runtime.schedule import Schedule, ddim_step, ddim_steps

CASES = ("tau0", "tau500", "tau500_edge", "tau500_all_dropped", "scales", "strength0", "two_person", "pose",
         "two_person_pose")
SINGLE = tuple(case for case in CASES if "two_person" not in case and case != "pose")  # what the fused graph serves
RUNS = ("s5", "s20", "s20_tau500", "s5_eta1", "s5_scale1")
CONFIG = dataclasses.replace(TINY, vision=VisionConfig(width=1024))  # the recording: tiny nets, full-size projections
NAMES = ("hint_encoder", "denoiser", "capface", "unet", "control_encoder", "controlnet")


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def apply_suite(golden, cache):
    return cache.setdefault("apply", golden("caphuman_apply.npz"))


@pytest.fixture
def ddim_suite(golden, cache):
    return cache.setdefault("ddim", golden("ddim.npz"))


@pytest.fixture
def graph(apply_suite, cache, tmp_path_factory):
    """`graph(name)`: an exported graph with the recorded weights, as the runtime loads it."""
    if "graphs" not in cache:
        model = CapHuman(CONFIG, encoders=True, autoencoder=True, pose_net=True)
        weights = {key[3:]: torch.from_numpy(value) for key, value in apply_suite.items() if key.startswith("sd/")}
        absent = {name: tensor for name, tensor in model.state_dict().items() if name not in weights}
        load_strictly(model, {**weights, **absent}, "caphuman_apply.npz")
        parts = modules(model.requires_grad_(False), PreviewDecoder(torch.ones(3, 4, 1, 1), torch.zeros(3)))
        specs, folder = graphs(CONFIG), tmp_path_factory.mktemp("graphs")
        save({f"{name}.onnx": trace(parts[name], specs[name]) for name in NAMES}, folder)
        cache["graphs"] = {name: ort.load(folder / f"{name}.onnx", threads=1) for name in NAMES}
    return cache["graphs"].__getitem__


def seen(graph, suite, prefix, row):
    """One recorded person, as the pipeline makes it."""
    person = graph("hint_encoder")({
        "maps": suite[f"{prefix}c_concat"][row:row + 1], "identity": suite[f"{prefix}c_crossattn_id"][row:row + 1, 0],
        "image_tokens": suite[f"{prefix}c_crossattn_control"][row:row + 1]})
    return {name: array for name, array in person.items() if name != "mask"}


def predict(graph, suite, case, fused):
    """eps of both recorded samples, one after the other."""
    settings = json.loads(str(suite["config"]))["cases"][case]
    people, rows = "AB" if "two_person" in case else "A", []
    for row in range(2):
        hints = [graph("control_encoder")({"image": suite[f"in/{who}/c_pose_concat"][row:row + 1]})["hint"]
                 for who in people] if settings["pose_scales"] else []
        conditions = Conditions(
            suite[f"in/{people[-1]}/c_crossattn"][row:row + 1],  # the official code takes the last person's text
            [seen(graph, suite, f"in/{who}/", row) for who in people], np.array(settings["scales"], np.float32),
            tau=settings["tau"], control_hints=hints,
            control_scales=np.array(settings["pose_scales"] or [1.0] * 13, np.float32))
        timestep = int(suite[f"in/t/{case}"][row])
        rows.append(Denoiser(graph, fused).eps(suite["in/x"][row:row + 1], timestep, conditions))
    return np.concatenate(rows)


@pytest.mark.parametrize("case", CASES)
def test_split_graphs_give_the_official_prediction(graph, apply_suite, case):
    np.testing.assert_allclose(predict(graph, apply_suite, case, fused=False), apply_suite[f"out/{case}"], atol=2e-4)


@pytest.mark.parametrize("case", SINGLE)
def test_the_fused_graph_gives_the_official_prediction(graph, apply_suite, case):
    np.testing.assert_allclose(predict(graph, apply_suite, case, fused=True), apply_suite[f"out/{case}"], atol=2e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_whole_runs_are_the_official_ones(graph, ddim_suite, run, fused):
    """With the weights of caphuman_apply.npz, which are those of this recording."""
    if f"out/{run}/samples" not in ddim_suite:
        pytest.skip(f"this copy of ddim.npz has no run {run}; set GOLDEN_DIR to a folder that has it")
    settings = json.loads(str(ddim_suite["config"]))["runs"][run]
    texts = [ddim_suite["in/uncond_c_crossattn"], ddim_suite["in/c_crossattn"]][settings["scale"] == 1:]
    conditions = Conditions(np.concatenate(texts), [seen(graph, ddim_suite, "in/", 0)], np.ones(13, np.float32),
                            guidance=settings["scale"], tau=settings["tau"])
    latent, noise = ddim_suite["in/x_T"], ddim_suite.get(f"in/{run}/noise")
    for index, step in enumerate(ddim_steps(Schedule(), settings["S"], settings["eta"])):
        eps = Denoiser(graph, fused).eps(latent, step.timestep, conditions)
        latent, _ = ddim_step(latent, eps, step, None if noise is None else noise[index])
    np.testing.assert_allclose(latent, ddim_suite[f"out/{run}/samples"], atol=1e-2)
