"""Which layers hurt in int8, and the recipe that leaves the fewest of them in float for a budget.

    python -m caphuman_edge.quant.sensitivity BUNDLE --photos DIR --recipe onnx.json --budget 0.02 --work DIR

Blocks of layers are quantised alone and the error of eps measured on recorded calls of real trajectories, from noisy to
clean; the worst blocks again layer by layer. Errors add up nearly as independent noise does, in squares: the search
takes out the worst first until the rest fits the budget, then measures the whole, and goes on where that was hopeful.
Figures are kept in DIR, so that a stopped run goes on. Writes the recipe found to DIR, with what it was measured on.
"""
import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir

from caphuman_edge.quant.calibration import photos_in, record, recorded
from caphuman_edge.quant.ranges import Histograms, grids, load_histograms, observe, open_session, save_histograms
from caphuman_edge.quant.recipe import Recipe, Treatment, read_recipe
from caphuman_edge.quant.rewrite import layers_of, quantize_model
from caphuman_edge.runtime.backends import Arrays
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.cli import guarded
from caphuman_edge.runtime.machine import FUSED

GRAPH = FUSED[0]
BLOCK = re.compile(r"\w+\.(?:(?:in|out)put_blocks\.\d+|middle_block)\.\d+|\w+\.\w+")
REFINED = 0.03  # share of all squared errors from which on a block is looked at layer by layer
STRIDE = 1.25  # the search takes out that many times more where the sum was too hopeful
Unit = tuple[str, ...]  # names of layers that stay in float together
Report = Callable[[str], None]


class Probe:
    """Measures eps of the fused denoiser with some of its layers treated as the recipe says."""

    def __init__(self, path: Path, cases: Sequence[Arrays], histograms: Histograms, recipe: Recipe,
                 threads: int | None = None):
        self.path, self.cases, self.recipe, self.threads = path, cases, recipe, threads
        self.sizes = {layer.name: layer.weight().size for layer in layers_of(ir.load(path).graph)
                      if recipe.treatment(GRAPH, layer.name) != "float"}
        self.names = list(self.sizes)
        self.grids = grids(histograms, recipe.clip, recipe.affine)
        self.expected = self._eps(ir.load(path))

    def error(self, treated: Iterable[str]) -> float:
        """RMS of the error of eps in units of its own RMS; over the calls the root of the mean square."""
        treated = set(treated)
        return self.error_of(lambda name: self.recipe.treatment(GRAPH, name) if name in treated else "float")

    def error_of(self, treatment_of: Callable[[str], Treatment]) -> float:
        """The same, each layer treated so."""
        model = ir.load(self.path)
        quantize_model(model, treatment_of, self.grids, self.recipe.round_outputs)
        squares = [((found - wanted) ** 2).mean() / (wanted**2).mean()
                   for found, wanted in zip(self._eps(model), self.expected, strict=True)]
        return float(np.sqrt(np.mean(squares)))

    def _eps(self, model: ir.Model) -> list[np.ndarray]:
        session = open_session(model, self.path.parent, self.threads)
        return [session.run(["eps"], case)[0] for case in self.cases]


def unit_errors(probe: Probe, kept: dict[str, float], report: Report = lambda line: None) -> dict[Unit, float]:
    """The error of each block alone, and of each layer of the worst. `kept`: figures of before, and of this run."""
    def measured(label: str, unit: Unit) -> float:
        if label not in kept:
            kept[label] = probe.error(unit)
            report(f"{label}: {kept[label]:.5f}")
        return kept[label]

    found = {unit: measured(label, unit) for label, unit in blocks_of(probe.names).items()}
    least = REFINED * sum(error**2 for error in found.values())
    for unit in [unit for unit, error in found.items() if error**2 > least and len(unit) > 1]:
        del found[unit]
        found |= {(name,): measured(name, (name,)) for name in unit}
    return found


def search(probe: Probe, errors: Mapping[Unit, float], budget: float,
           report: Report = lambda line: None) -> tuple[list[Unit], float]:
    """The units to leave in float, the worst first, and the error of the rest, which is within the budget.

    The worst are those that cost the most a layer.
    """
    worst = sorted(errors, key=lambda unit: errors[unit] ** 2 / len(unit), reverse=True)
    squares = np.array([errors[unit] ** 2 for unit in worst])
    count = next(k for k in range(len(worst) + 1) if squares[k:].sum() <= budget**2)
    while True:
        error = probe.error(name for unit in worst[count:] for name in unit)
        report(f"{count} of {len(worst)} units in float: error {error:.5f}, budget {budget:g}")
        if error <= budget or count == len(worst):
            return worst[:count], error
        count = min(len(worst), max(count + 1, int(count * STRIDE)))


def with_floats(recipe: Recipe, units: Iterable[Unit], measured_on: str) -> Recipe:
    """The recipe with these units in float; a block of several layers becomes one pattern."""
    patterns = [unit[0] if len(unit) == 1 else f"{block_of(unit[0])}.*" for unit in units]
    rules = {**recipe.rules, GRAPH: (*(("float", pattern) for pattern in patterns), *recipe.rules[GRAPH])}
    return dataclasses.replace(recipe, rules=rules, measured_on=measured_on)


def blocks_of(names: Sequence[str]) -> dict[str, Unit]:
    """The layers of each block, in their order."""
    return {label: tuple(name for name in names if block_of(name) == label)
            for label in dict.fromkeys(map(block_of, names))}


def block_of(name: str) -> str:
    """The block that a layer belongs to: one residual or attention block of one level, or what stands alone."""
    found = BLOCK.match(name)
    return found[0] if found else name


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--recipe", type=Path, required=True, help="what to start from: onnx.json or openvino.json")
    args = parser.parse_args()
    recipe, bundle = read_recipe(args.recipe), Bundle.open(args.bundle)
    probe = open_probe(bundle, recipe, args)
    kept, note = open_notes(args.work / f"errors-{args.recipe.stem}.json")
    errors = unit_errors(probe, kept, note)
    units, error = search(probe, errors, args.budget, note)
    told = measured_on(bundle, probe, args, error)
    (args.work / args.recipe.name).write_text(with_floats(recipe, units, told).to_text())
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a search for a recipe is told."""
    parser.add_argument("bundle", type=Path, help="a float bundle with the fused denoiser as ONNX")
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="photos of faces, or folders of them")
    parser.add_argument("--portraits", type=int, default=16, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=6, help="of the denoiser, to measure on (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=0.04, help="of the error of eps (default: %(default)s)")
    parser.add_argument("--work", type=Path, required=True, help="folder for what was recorded, measured and found")
    parser.add_argument("--threads", type=int)


def open_notes(file: Path) -> tuple[dict[str, float], Report]:
    """Figures of before, and what prints a line and keeps the figures."""
    kept: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def note(line: str) -> None:
        file.write_text(json.dumps(kept, indent=1))
        print(line, file=sys.stderr, flush=True)

    return kept, note


def measured_on(bundle: Bundle, probe: Probe, args: argparse.Namespace, error: float) -> str:
    """What a recipe says of where it comes from."""
    timesteps = sorted({int(case["timestep"][0]) for case in probe.cases})
    return (f"{bundle.manifest.name} {bundle.digest[:12]}, {args.portraits} portraits, timesteps {timesteps}: error of "
            f"eps {error:.4f}, budget {args.budget:g}")


def open_probe(bundle: Bundle, recipe: Recipe, args: argparse.Namespace) -> Probe:
    """Records and calibrates, unless that was done before."""
    path, samples, ranges = bundle.file(GRAPH, "onnx"), args.work / "samples", args.work / "ranges.npz"
    if not ranges.exists():
        samples.mkdir(parents=True, exist_ok=True)
        record(bundle, photos_in(args.photos), args.portraits, samples, args.threads)
        save_histograms(observe(path, lambda: recorded(samples, GRAPH), args.threads), ranges)
    count = len(list(samples.iterdir()))
    stride = max(1, count // args.calls) + 1  # so that timesteps differ from portrait to portrait
    cases = list(islice(recorded(samples, GRAPH), 0, None, stride))
    return Probe(path, cases, load_histograms(ranges), recipe, args.threads)


if __name__ == "__main__":
    sys.exit(guarded(main))
