"""The report of fidelity: Markdown for a person, JSON for a program, and a contact sheet."""
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from caphuman_edge.quant.estimates import CONFIDENCE
from caphuman_edge.quant.fidelity import Findings, Place, digest
from caphuman_edge.quant.fidelity_bench import Bench
from caphuman_edge.quant.fidelity_columns import Column, disk_bytes, told, weights, written
from caphuman_edge.quant.fidelity_figures import Compared
from caphuman_edge.quant.heldout import Pair
from caphuman_edge.quant.tables import Style, cell, table, without_nan
from caphuman_edge.runtime.cli.inspect import size
from caphuman_edge.runtime.image import load_photo, save_png
from caphuman_edge.runtime.portrait import AI_GENERATED
from caphuman_edge.runtime.selftest import EXACT
from caphuman_edge.runtime.sheet import Tile, contact_sheet, map_pictures

SHOWN = 12  # rows of the contact sheet, at most


def stem(findings: Findings, folder: Path) -> Path:
    """What the report's files are named, but for their suffix."""
    name = (findings.candidates[0].column if findings.candidates else findings.reference).bundle.manifest.name
    return folder / "-".join([re.sub(r"[^\w.-]+", "-", name), digest(findings)])


def as_json(findings: Findings) -> dict[str, Any]:
    """Everything the tables say, unrounded."""
    reference = findings.reference
    data = {
        "reference": _facts(reference), "triples": findings.triples, "skipped": findings.skipped,
        "confidence_percent": CONFIDENCE, "notes": findings.notes,
        "places": {place.title: {"graphs": [dataclasses.asdict(graph) for graph in place.graphs],
                                 "steps": [dataclasses.asdict(step) for step in place.steps]}
                   for place in findings.places},
        "candidates": {candidate.column.title: {
            **_facts(candidate.column),
            "likeness": {name: dataclasses.asdict(number) for name, (number, _) in candidate.likeness.items()},
            "measures": {name: dataclasses.asdict(row) for name, (row, _) in candidate.measures.items()},
            "limits": [dataclasses.asdict(verdict) for verdict in candidate.verdicts],
        } for candidate in findings.candidates},
        "missed": findings.missed,
    }
    return without_nan(data)


def as_markdown(findings: Findings) -> str:
    """Tables: what is compared, limits, portraits, graphs, steps."""
    parts = [_opening(findings), *findings.notes]
    if findings.candidates:
        parts += [_columns(findings), _limits(findings), _portraits(findings)]
    return "\n\n".join([*parts, *_graphs(findings.places), *_steps(findings.places)])


def write_sheet(findings: Findings, bench: Bench, pairs: Sequence[Pair], path: Path) -> bool:
    """A row a triple: photo, head, the reference's portrait, every candidate's. False where none may be shown."""
    drawn = [findings.reference, *(candidate.column for candidate in findings.candidates)]
    tasks = ((pair, bench.tasks.task(pair)) for pair in [pair for pair in pairs if pair.shown][:SHOWN])
    tiles = [tile for pair, task in tasks if task is not None for tile in (
        Tile(f"photo {pair.reference}", task.reference.photo),
        Tile(f"head of {task.target_name}", map_pictures(bench.pipe.maps(task.head))["rendered"]),
        *(Tile(column.title, load_photo(bench.portrait_file(column, pair))) for column in drawn))]
    if tiles:
        save_png(path, contact_sheet(tiles, 2 + len(drawn)), AI_GENERATED)
    return bool(tiles)


def _opening(findings: Findings) -> str:
    reference = findings.reference
    if not findings.candidates:
        return (f"Fidelity of the graphs of {reference.label} to the float reference's recorded answers.")
    skipped = f", {findings.skipped} skipped (no face in the reference photo)" if findings.skipped else ""
    return (f"Fidelity against {reference.title}: {findings.triples} triples of photo, head and prompt{skipped}, each "
            f"drawn with the same seed by all. Photos are measured once, by the reference. Brackets: {CONFIDENCE} % "
            "intervals by bootstrap over triples; differences are paired, candidate minus reference.")


def _columns(findings: Findings) -> str:
    drawn = [findings.reference, *(candidate.column for candidate in findings.candidates)]
    rows = []
    for column in drawn:
        sizes, settings = disk_bytes(column), column.settings
        rows.append([column.title, column.bundle.digest[:12], size(sizes["all"]), size(sizes["denoiser"]),
                     weights(column), told(column.machine), f"{settings.schedule} ({settings.timesteps})",
                     str(settings.steps), f"{settings.guidance:g}"])
    return table(["column", "bundle", "on disk", "denoiser", "its weights", "backend", "sampler", "steps", "guidance"],
                 rows)


def _limits(findings: Findings) -> str:
    rows = [[verdict.candidate, verdict.measure, f"{verdict.limit:g}", cell(verdict.found, (1, 3, ""), True),
             "met" if verdict.met else "missed"]
            for candidate in findings.candidates for verdict in candidate.verdicts]
    return table(["limit of", "measure", "limit", "found", ""], rows)


def _portraits(findings: Findings) -> str:
    """Each candidate's figures, and in brackets how they differ from the reference's."""
    first, titles = findings.candidates[0], [candidate.column.title for candidate in findings.candidates]
    rows = [[name, "", *(cell(candidate.likeness[name][0], style, True) for candidate in findings.candidates)]
            for name, (_, style) in first.likeness.items()]
    rows += [[name, cell(row.reference, style, True),
              *(_compared(candidate.measures[name][0], style) for candidate in findings.candidates)]
             for name, (row, style) in first.measures.items()]
    return table(["portraits", findings.reference.title, *titles], rows)


def _compared(row: Compared, style: Style) -> str:
    sign = "+" if row.difference.value >= 0 else ""
    return f"{cell(row.candidate, style, False)}; {sign}{cell(row.difference, style, True)}"


def _graphs(places: Sequence[Place]) -> Iterator[str]:
    """PSNR in dB of each graph; * where it is below its floor."""
    if any(place.graphs for place in places):
        def shown(place: Place, name: str) -> str:
            found = [graph for graph in place.graphs if graph.graph == name]
            if not found:
                return "-"
            decibels = "exact" if found[0].psnr_db >= EXACT else f"{found[0].psnr_db:.1f} dB"
            return decibels + ("" if found[0].passed else " *")

        names = dict.fromkeys(graph.graph for place in places for graph in place.graphs)
        yield _by_place("graph, PSNR of its worst output", list(names), places, shown)
        if any(not graph.passed for place in places for graph in place.graphs):
            yield "\\* below what `caphuman verify` asks of it."


def _steps(places: Sequence[Place]) -> Iterator[str]:
    """The error of eps by timestep."""
    compared = [place for place in places if place.steps]
    if compared:
        def shown(place: Place, timestep: int) -> str:
            found = [step for step in place.steps if step.timestep == timestep]
            return f"{100 * found[0].relative.value:.2g} %, {found[0].psnr_db:.1f} dB" if found else "-"

        timesteps = dict.fromkeys(step.timestep for place in compared for step in place.steps)
        count = max(place.trajectories for place in compared)
        yield _by_place(f"error of eps at the latents of {count} of the reference's portraits, by timestep",
                        list(timesteps), compared, shown)


def _by_place(head: str, names: Sequence[Any], places: Sequence[Place], shown: Callable[[Place, Any], str]) -> str:
    return table([head, *(place.title for place in places)],
                 [[str(name), *(shown(place, name) for place in places)] for name in names])


def _facts(column: Column) -> dict[str, Any]:
    sizes = disk_bytes(column)
    return {"title": column.title, "folder": str(column.bundle.root), **column.key, "bytes": sizes["all"],
            "denoiser_bytes": sizes["denoiser"], "weights": weights(column), "written": written(column.settings)}
