"""What int8 graphs are compared with the float ones on: recorded calls of the denoiser, and the self-test's inputs."""
import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from caphuman_edge.export.check import Case
from caphuman_edge.quant.calibration import recorded
from caphuman_edge.runtime.backends import Arrays, Graph
from caphuman_edge.runtime.contract import GraphSpec
from caphuman_edge.runtime.denoise import Conditions, Denoiser
from caphuman_edge.runtime.machine import FUSED, SPLIT

CALLS = 4  # of a graph, spread over the trajectories
STEP = ("latent", "timestep", "text_tokens", "scales")  # what the fused form reads besides the person
Load = Callable[[str], Graph]


def denoiser_cases(graph: str, samples: Path, load: Load) -> list[Case]:
    """Inputs of one of the denoiser's graphs, and what the float graph, which `load` gives, makes of them.

    Where only the fused form was recorded, the split one's inputs are made of its calls as the runtime makes them.
    """
    network, cases = load(graph), []
    for arrays in _calls(graph, samples, load):
        inputs = {spec.name: _coarse(arrays[spec.name]) for spec in network.inputs}
        cases.append(Case(inputs, network(inputs)))
    return cases


def decoder_cases(graph: str, samples: Path, network: Graph) -> list[Case]:
    """Inputs of the decoder at the end of trajectories, and what the float graph makes of them."""
    inputs = ({name: _coarse(array) for name, array in arrays.items()} for arrays in recorded(samples, graph))
    return [Case(arrays, network(arrays)) for arrays in islice(inputs, CALLS)]


def stored_case(selftest: Path, graph: str, network: Graph) -> Case:
    """The self-test's inputs of another graph, and what the float graph makes of them."""
    with np.load(selftest, allow_pickle=False) as rows:
        inputs = {spec.name: rows[f"{graph}/in/{spec.name}"].astype(spec.dtype) for spec in network.inputs}
    return Case(inputs, network(inputs))


def single(case: Case, spec: GraphSpec) -> Case:
    """The first of a batch, as packages of fixed shapes take it; rows do not depend on each other."""
    batched = {tensor.name for tensor in (*spec.inputs, *spec.outputs) if "batch" in tensor.shape[:1]}
    inputs, outputs = ({name: array[:1] if name in batched else array for name, array in arrays.items()}
                       for arrays in (case.inputs, case.outputs))
    return Case(inputs, outputs)


def halved(array: np.ndarray) -> np.ndarray:
    """As a self-test stores it."""
    return array.astype(np.float16) if array.dtype == np.float32 else array


def _calls(graph: str, samples: Path, load: Load) -> Iterator[Arrays]:
    """CALLS of the recorded ones, evenly from the clean end of trajectories to the noisy one."""
    source = graph if any(samples.glob(f"{graph}-*.npz")) else FUSED[0]
    order = np.argsort([float(arrays["timestep"][0]) for arrays in recorded(samples, source)], kind="stable")
    chosen = {order[(2 * k + 1) * len(order) // (2 * CALLS)]: k for k in range(CALLS)}
    found = {chosen[place]: arrays for place, arrays in enumerate(recorded(samples, source)) if place in chosen}
    for _, arrays in sorted(found.items()):
        yield arrays if graph in (source, SPLIT[0]) else _unet_inputs(arrays, load)


def _unet_inputs(fused: Arrays, load: Load) -> Arrays:
    """What the runtime gives the UNet of the split form, of a call of the fused one."""
    noted: Arrays = {}

    def note(arrays: Arrays) -> Arrays:
        noted.update(arrays)
        return {"eps": np.zeros((len(arrays["text_tokens"]), *arrays["latent"].shape[1:]), np.float32)}

    graphs = {name: load(name) for name in SPLIT}
    graphs[SPLIT[1]] = dataclasses.replace(graphs[SPLIT[1]], run=note)
    person = {name: array for name, array in fused.items() if name not in STEP}
    conditions = Conditions(fused["text_tokens"], [person], fused["scales"])
    Denoiser(graphs.__getitem__, fused=False).predict(fused["latent"], int(fused["timestep"][0]), conditions,
                                                      fused["text_tokens"], True)
    return noted


def _coarse(array: np.ndarray) -> np.ndarray:
    """Rounded to what halves hold."""
    return halved(array).astype(array.dtype)
