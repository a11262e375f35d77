"""How many bits each layer's palette needs: the smallest weights of a Core ML denoiser within a budget.

    python -m caphuman_edge.quant.mixed BUNDLE --photos DIR --budget 0.02 --work DIR

Blocks of layers get palettes of 4, 6 and 8 bits alone, and the error of eps is measured on recorded calls. From 8 bits
everywhere, steps down are put in the order of what they add to the squared error for each byte they save; how many of
them fit the budget is found by measuring the whole, halving the range each time. Figures are kept in DIR. Writes
coreml-mixed.json there, a recipe for `caphuman quantize`.
"""
import argparse
import dataclasses
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from caphuman_edge.quant.recipe import FOLDER, Recipe, Treatment, palette_bits, read_recipe
from caphuman_edge.quant.sensitivity import (
    GRAPH,
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
            found.append((slope, Step(block, coarse)))
    return [step for _, step in sorted(found, key=lambda pair: pair[0])]


def search(probe: Probe, blocks: Mapping[str, Unit], steps: Sequence[Step], budget: float,
           report: Report = lambda line: None) -> tuple[dict[str, Treatment], float]:
    """Each block's palette after the most steps whose error, measured of the whole, is within the budget; that error.

    Where 8 bits everywhere are not, that is 8 bits everywhere.
    """
    @cache
    def error_after(count: int) -> float:
        chosen = _after(steps[:count], blocks)
        by_layer = {name: chosen[block] for block, unit in blocks.items() for name in unit}
        error = probe.error_of(lambda name: by_layer.get(name, "float"))
        report(f"{count} of {len(steps)} steps down: error {error:.5f}, budget {budget:g}")
        return error

    count = max(0, bisect_right(range(len(steps) + 1), budget, key=error_after) - 1)
    return _after(steps[:count], blocks), error_after(count)


def _after(steps: Sequence[Step], blocks: Iterable[str]) -> dict[str, Treatment]:
    chosen: dict[str, Treatment] = dict.fromkeys(blocks, PALETTES[0])
    return chosen | {step.block: step.palette for step in steps}


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
    chosen, found = search(probe, blocks, steps, args.budget, note)
    bits = sum(palette_bits(chosen[block]) * probe.sizes[name] for block, unit in blocks.items() for name in unit)
    told = f"{measured_on(bundle, probe, args, found)}; {bits / sum(probe.sizes.values()):.2f} bits a weight"
    (args.work / NAME).write_text(as_recipe(base, chosen, told).to_text())
    note(told)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
