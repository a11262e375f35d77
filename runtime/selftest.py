"""A bundle's self-test: the graphs that this machine runs, against the outputs that were stored when it was built.

selftest.npz holds `<graph>/in/<tensor>` and `<graph>/out/<tensor>`; floats may be stored as halves to save space.
"""
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from .backends import Arrays, Graph, open_backend
from .bundle import Bundle
from .contract import GATE
from .errors import BundleError, ShapeMismatch
from .machine import FUSED, SPLIT, Machine
from .manifest import Form

FLOOR_COARSE, FLOOR_HALF, FLOOR_FLOAT = 35.0, 45.0, 60.0  # dB; see `floor_db`
MEASURED, MARGIN = ("int8", "palettised-mixed"), 5.0  # dB; machines differ by some of what rounded activations cost
FLOORS_PALETTE = {"palettised-6": 25.0, "palettised-4": 12.0}  # dB; weights of 64 and 16 values are noisy themselves
FLOOR_GATES = 30.0  # dB; gates are 0 or 1, and this is one in a thousand flipped
PARAMETERS, MOMENTS = "latent_parameters", ("latent_mean", "latent_log_variance")
EXACT = 200.0  # dB; stands for no difference at all, which JSON has no infinity for


@dataclass(frozen=True)
class Verdict:
    """How close one graph comes to what it should compute."""

    graph: str  # its gates have a verdict of their own
    psnr_db: float  # of its worst output
    floor_db: float
    backend: str  # that ran it

    @property
    def passed(self) -> bool:
        """Whether the graph may be trusted here."""
        return self.psnr_db >= self.floor_db


def self_test(bundle: Bundle, machine: Machine | None = None) -> Iterator[Verdict]:
    """Run every graph that the self-test covers, but the form of the denoiser that this machine has no use for.

    Raises BundleError where the bundle has no self-test, it does not fit, or the backend cannot run the bundle.
    """
    machine = machine or Machine()
    arrays = _load(bundle.file("selftest"))
    if not arrays:
        raise BundleError(f"{bundle.file('selftest')} is empty, expected inputs and outputs; rebuild the bundle")
    for name in _covered(bundle, machine, {key.split("/")[0] for key in arrays}):
        graph, runner = machine.load(bundle, name), machine.runner(bundle, name)
        expected = _tensors(arrays, f"{name}/out/")
        outputs = graph(_inputs(graph, _tensors(arrays, f"{name}/in/")))
        _check_expected(name, outputs, expected)
        form = bundle.form(name, open_backend(runner).FORMATS)
        yield from _verdicts(name, runner, floor_db(form, machine.in_halves(bundle, name), expected), outputs, expected)


def floor_db(form: Form, in_halves: bool, expected: Mapping[str, np.ndarray]) -> float:
    """What a graph must reach: 45 dB where its expectations are stored as halves, else 60; 35 where it is coarse.

    Rounding an expectation to halves leaves 70 dB and more. Coarse are arithmetic of 16 bits (`in_halves`), weights of
    8, and what was so far from the reference when it was built. With weights of fewer bits the floor is FLOORS_PALETTE,
    for MEASURED precisions what the build measured less MARGIN, if that is less.
    """
    if form.precision in FLOORS_PALETTE:
        return FLOORS_PALETTE[form.precision]
    if form.precision in MEASURED:
        return min(FLOOR_COARSE, form.parity.get("psnr_db", EXACT) - MARGIN)
    rounded = form.precision.startswith(("int", "palettised")) or form.parity.get("psnr_db", EXACT) < FLOOR_FLOAT
    if in_halves or rounded:
        return FLOOR_COARSE
    return FLOOR_HALF if any(array.dtype == np.float16 for array in expected.values()) else FLOOR_FLOAT


def psnr_db(found: np.ndarray, expected: np.ndarray) -> float:
    """20 log10(max |expected| / RMSE), limited to +-200; -200 where anything found is not finite."""
    if not np.isfinite(found).all():
        return -EXACT
    reference = expected.astype(np.float64)
    peak, error = np.abs(reference).max(), np.sqrt(np.mean((found - reference) ** 2))
    return EXACT if error == 0 else float(np.clip(20 * np.log10(max(peak, 1e-10) / error), -EXACT, EXACT))


def told_apart(outputs: Mapping[str, np.ndarray]) -> Arrays:
    """The outputs as their PSNR is measured: of a latent's distribution mean and log variance each for itself.

    Log variances reach -20 where means reach 1: an error that would spoil the means is 26 dB below the joint peak.
    """
    apart: Arrays = {}
    for name, array in outputs.items():
        apart |= dict(zip(MOMENTS, np.split(array, 2, axis=1), strict=True)) if name == PARAMETERS else {name: array}
    return apart


def _covered(bundle: Bundle, machine: Machine, names: Iterable[str]) -> list[str]:
    """Those of the graphs that this machine would run."""
    formats = open_backend(machine.backend).FORMATS
    unused = {name for name in FUSED + SPLIT if name in bundle and not bundle.stored(name, formats)}
    if unused:
        machine.denoiser(bundle)  # raises where it needs one of them
    return sorted(set(names) - unused)


def _load(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise BundleError(f"{path} is not a self-test ({error}); rebuild the bundle") from error


def _tensors(arrays: Arrays, prefix: str) -> Arrays:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def _inputs(graph: Graph, stored: Arrays) -> Arrays:
    """The stored inputs in the graph's own dtypes; a foreign one goes in as it is, for the graph to refuse."""
    dtypes = {spec.name: spec.dtype for spec in graph.inputs}
    return {name: array.astype(dtypes.get(name, array.dtype)) for name, array in stored.items()}


def _check_expected(name: str, outputs: Arrays, expected: Arrays) -> None:
    if all(tensor.startswith(GATE) for tensor in expected):
        raise BundleError(f"{name}: selftest.npz holds no output to compare with; rebuild the bundle")
    for tensor, array in expected.items():
        if tensor not in outputs or outputs[tensor].shape != array.shape:
            raise ShapeMismatch(f"{name}: selftest.npz expects {tensor} of shape {array.shape}, which the graph does "
                                "not give; rebuild the bundle")


def _verdicts(name: str, backend: str, floor: float, outputs: Arrays, expected: Arrays) -> Iterator[Verdict]:
    """On a graph's outputs and, where it has any, on its gates: all in one row, as the finest has most of the cells."""
    outputs, expected = told_apart(outputs), told_apart(expected)
    gates = [tensor for tensor in expected if tensor.startswith(GATE)]
    worst = min(psnr_db(outputs[tensor], array) for tensor, array in expected.items() if tensor not in gates)
    yield Verdict(name, worst, floor, backend)
    if gates:
        found, stored = (np.concatenate([side[gate].ravel() for gate in gates]) for side in (outputs, expected))
        yield Verdict(f"{name} gates", psnr_db(found, stored), FLOOR_GATES, backend)
