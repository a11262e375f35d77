"""How many bits each layer's palette needs: the smallest weights of a Core ML denoiser within a budget.

    python -m caphuman_edge.quant.mixed BUNDLE --photos DIR --budget 0.02 --work DIR

Blocks of layers get palettes of 4, 6 and 8 bits alone, and the error of eps is measured on recorded calls. Errors add
up nearly as independent noise does, in squares. The search starts with 8 bits everywhere, takes the steps down that
cost the least for each byte they save while the sum fits the budget, then measures the whole and goes back where that
was hopeful. Figures are kept in DIR. Writes coreml-mixed.json there, a recipe for `caphuman quantize`.
"""
import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from caphuman_edge.quant.recipe import FOLDER, Recipe, Treatment, palette_bits, read_recipe
from caphuman_edge.quant.sensitivity import (
    GRAPH,
    STRIDE,
    Probe,
    Report,
    Unit,
    add_arguments,
    blocks_of,
    measured_on,
    open_notes,
    open_probe,
)
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.cli import guarded

PALETTES: tuple[Treatment, ...] = ("palette-8", "palette-6", "palette-4")  # from fine to coarse
NAME = "coreml-mixed.json"


class Step(NamedTuple):
    """One block's palette made coarser."""

    block: str
    palette: Treatment
    cost: float  # squared error that it adds
    saved: float  # bytes


def steps_down(blocks: Mapping[str, Unit], errors: Callable[[str, Treatment], float],
               weights: Callable[[Unit], int]) -> list[Step]:
    """Every step from one palette to the next coarser one, the cheapest a byte first, a block's in their order."""
    found = []
    for block, unit in blocks.items():
        squares = [errors(block, palette) ** 2 for palette in PALETTES]
        slope = 0.0
        for fine, coarse, before, after in zip(PALETTES, PALETTES[1:], squares, squares[1:], strict=False):
            saved = weights(unit) * (palette_bits(fine) - palette_bits(coarse)) / 8
            slope = max(slope, (after - before) / saved)  # never before the step that it follows
            found.append((slope, Step(block, coarse, after - before, saved)))
    return [step for _, step in sorted(found, key=lambda pair: pair[0])]


def search(probe: Probe, blocks: Mapping[str, Unit], steps: Sequence[Step], finest: float, budget: float,
           report: Report = lambda line: None) -> tuple[dict[str, Treatment], float]:
    """Each block's palette, and the error of the whole, which is within the budget if 8 bits everywhere are.

    `finest`: the sum of squared errors of 8 bits everywhere.
    """
    count, total = 0, finest
    while count < len(steps) and total + steps[count].cost <= budget**2:
        total, count = total + steps[count].cost, count + 1
    while True:
        chosen: dict[str, Treatment] = dict.fromkeys(blocks, PALETTES[0])
        chosen |= {step.block: step.palette for step in steps[:count]}
        by_layer = {name: chosen[block] for block, unit in blocks.items() for name in unit}
        error = probe.error_of(partial(_of, by_layer))
        report(f"{count} of {len(steps)} steps down: error {error:.5f}, budget {budget:g}")
        if error <= budget or not count:
            return chosen, error
        count = min(count - 1, int(count / STRIDE))


def _of(by_layer: Mapping[str, Treatment], name: str) -> Treatment:
    return by_layer.get(name, "float")


def as_recipe(base: Recipe, chosen: Mapping[str, Treatment], told: str) -> Recipe:
    """`base`, whose floats stay, with a rule a block."""
    floats = [rule for rule in base.rules[GRAPH] if rule[0] == "float"]
    rules = {**base.rules, GRAPH: (*floats, *((palette, f"{block}.*") for block, palette in chosen.items()),
                                   (PALETTES[0], "*"))}
    return dataclasses.replace(base, rules=rules, measured_on=told)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args()
    base, bundle = read_recipe(FOLDER / "coreml.json"), Bundle.open(args.bundle)
    probe = open_probe(bundle, base, args)
    kept, note = open_notes(args.work / "errors-palettes.json")
    blocks = blocks_of(probe.names)

    def error(block: str, palette: Treatment) -> float:
        label, unit = f"{palette} {block}", {*blocks[block]}
        if label not in kept:
            kept[label] = probe.error_of(lambda name: palette if name in unit else "float")
            note(f"{label}: {kept[label]:.5f}")
        return kept[label]

    steps = steps_down(blocks, error, lambda unit: sum(probe.sizes[name] for name in unit))
    finest = sum(error(block, PALETTES[0]) ** 2 for block in blocks)
    chosen, found = search(probe, blocks, steps, finest, args.budget, note)
    bits = sum(palette_bits(chosen[block]) * probe.sizes[name] for block, unit in blocks.items() for name in unit)
    told = f"{measured_on(bundle, probe, args, found)}; {bits / sum(probe.sizes.values()):.2f} bits a weight"
    (args.work / NAME).write_text(as_recipe(base, chosen, told).to_text())
    note(told)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
