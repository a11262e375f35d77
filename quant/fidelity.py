"""Fidelity: what a bundle loses against the float reference, for backend x precision x schedule.

    findings = measure(columns(bundle, reference, ["ort", "openvino"], ["own"]), bench, pairs)

Every column draws the same triples of photo, head and prompt with the same seeds, so differences are paired.
"""
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from caphuman_edge.quant.estimates import Estimate
from caphuman_edge.quant.fidelity_bench import Bench, Pipes
from caphuman_edge.quant.fidelity_columns import OWN, Column, column_of, columns, digest_of, machine_of
from caphuman_edge.quant.fidelity_figures import Compared, StepError, compared, likeness, measures, step_errors
from caphuman_edge.quant.fidelity_graphs import graph_verdicts, kept_verdicts, only_graphs
from caphuman_edge.quant.fidelity_limits import Verdict, verdicts
from caphuman_edge.quant.fidelity_record import (
    Progress,
    record_column,
    record_likeness,
    record_steps,
    record_trajectories,
)
from caphuman_edge.quant.heldout import Pair
from caphuman_edge.quant.judges import Judge, default_path, open_judge, open_parser
from caphuman_edge.quant.measures import Measurer
from caphuman_edge.quant.photos import Source, drawn_pictures, open_pictures
from caphuman_edge.quant.records import Record
from caphuman_edge.quant.tables import Style
from caphuman_edge.runtime.backends import Graph
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.cache import cache_dir
from caphuman_edge.runtime.cli.output import make_folder
from caphuman_edge.runtime.errors import BadInput, MissingExtra
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.selftest import Verdict as GraphVerdict

TRAJECTORIES = 8  # triples whose every step is compared: that costs as much as drawing them again
MOST_GATED = 8  # triples of a gate, which a full-size build can afford


@dataclass(frozen=True)
class Place:
    """What one bundle computes on one backend, whatever the schedule."""

    title: str
    graphs: list[GraphVerdict]
    steps: list[StepError] = field(default_factory=list)  # of eps, along the reference's trajectories
    trajectories: int = 0


@dataclass(frozen=True)
class Candidate:
    """One column's figures beside the reference's."""

    column: Column
    measures: dict[str, tuple[Compared, Style]]
    likeness: dict[str, tuple[Estimate, Style]]
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Findings:
    """All that a report tells."""

    reference: Column
    places: list[Place]
    candidates: list[Candidate] = field(default_factory=list)
    triples: int = 0
    skipped: int = 0  # triples whose reference photo shows no measurable face
    notes: list[str] = field(default_factory=list)  # what was left out, and how to get it

    @property
    def missed(self) -> bool:
        """Whether a limit is not met."""
        return any(not verdict.met for candidate in self.candidates for verdict in candidate.verdicts)

    @property
    def refuted(self) -> list[Verdict]:
        """Limits that are not met even at the better end of their intervals: what few triples can say for sure."""
        return [verdict for candidate in self.candidates for verdict in candidate.verdicts if verdict.refuted]


@dataclass(frozen=True)
class Judging:
    """Who judges portraits: paths of what third parties' networks are read from, None for the usual ones."""

    judge: str = "auto"  # one of judges.JUDGES
    scorer: Path | None = None
    parser: Path | None = None
    fetched: bool = False


def quiet(label: str, done: int, count: int) -> None:
    """Progress that nobody watches."""


def gate(bundle: Bundle, reference: Bundle, out: Path, pictures: Path | None = None, triples: int = MOST_GATED,
         backends: Sequence[str] = ("ort",), judging: Judging | None = None, threads: int | None = None,
         progress: Progress = quiet) -> Findings:
    """Whether a bundle keeps its limits on a few triples, with its own schedule; for builds.

    `Findings.missed` says it. Photos are those in `pictures`, or people whom the embedded miniature draws; what is done
    is kept in `out`. Steps are not compared one by one. Raises BadInput for more than MOST_GATED triples.
    """
    if not 2 <= triples <= MOST_GATED:
        raise BadInput(f"a gate takes 2 to {MOST_GATED} triples, not {triples}; measure more with `caphuman fidelity`")
    compared_columns = columns(bundle, reference, backends, (OWN,), threads)
    source, pairs = open_pictures(pictures, triples) if pictures else drawn_pictures(out, triples, threads)
    with Pipeline(reference, threads=threads) as pipe:
        bench, notes = open_bench(pipe, source, judging or Judging(), out, threads)
        return measure(compared_columns, bench, pairs, 0, progress, notes)


def open_bench(pipe: Pipeline, source: Source, judging: Judging, out: Path,
               threads: int | None = None) -> tuple[Bench, list[str]]:
    """The bench, and notes on judges that are not at hand, whose rows are left out. `pipe` is the reference's."""
    judge: Judge | None = None
    parser: Graph | None = None
    notes = []
    try:
        judge = open_judge(judging.judge, judging.scorer or default_path(), judging.fetched, pipe.bundle, threads)
    except (BadInput, MissingExtra) as error:
        notes.append(f"Left out: identity by an independent network. {error}")
    try:
        parser = open_parser(judging.parser or cache_dir() / "official", judging.fetched, threads=threads)
    except (BadInput, MissingExtra) as error:
        notes.append(f"Left out: hair, background, clothes and glasses of prompts. {error}")
    return Bench.of(pipe, source, judge, Measurer(pipe, parser), out), notes


def measure(compared_columns: Sequence[Column], bench: Bench, pairs: Sequence[Pair], trajectories: int = TRAJECTORIES,
            progress: Progress = quiet, notes: Sequence[str] = ()) -> Findings:
    """Draw and measure what is not on disk yet, and compare; the first column is the reference.

    `trajectories`: so many triples are compared step by step. Raises BadInput where fewer than two can be measured.
    """
    reference, *candidates = compared_columns
    make_folder(bench.out)
    found = [*notes]
    places = [Place(place[0].place, _graphs(place[0], found, bench.out)) for place in _by_place(compared_columns)]
    drawn = [column for column in candidates if not only_graphs(column.machine)]
    if not drawn:
        found.append("Left out: portraits, since Core ML runs on a Mac alone. Run this there.")
        return Findings(reference, places, notes=found)
    for column in (reference, *drawn):
        column.machine.denoiser(column.bundle)  # raises where the bundle holds none for the backend
    with closing(Pipes()) as pipes:
        measurable = _draw(bench, pipes, reference, drawn, pairs, trajectories, progress)
    return Findings(
        reference, [_with_steps(bench, place, drawn, reference) for place in places],
        [_candidate(bench, column, reference, measurable) for column in drawn], len(measurable),
        len(pairs) - len(measurable), found)


def graphs_alone(bundle: Bundle, backends: Sequence[str], threads: int | None = None) -> Findings:
    """The bundle's graphs on these backends against the float reference's recorded answers; no portraits."""
    notes: list[str] = []
    alone = [column_of(bundle, machine_of(backend, threads)) for backend in backends]
    return Findings(alone[0], [Place(column.place, _graphs(column, notes)) for column in alone], notes=notes)


def digest(findings: Findings) -> str:
    """Twelve characters that differ for other columns."""
    return digest_of([findings.reference.key, *(candidate.column.key for candidate in findings.candidates)])


def _draw(bench: Bench, pipes: Pipes, reference: Column, drawn: Sequence[Column], pairs: Sequence[Pair],
          trajectories: int, progress: Progress) -> list[Pair]:
    """Have everything on disk; gives the triples that can be measured. Place by place, since each opens a pipeline."""
    record_column(bench, pipes, reference, pairs, progress)
    records = bench.records(reference).read()
    measurable = [pair for pair in pairs if not records[pair.number].get("skipped")]
    if len(measurable) < 2:
        raise BadInput(f"{len(measurable)} of {len(pairs)} triples can be measured, expected at least 2; use other "
                       "pictures, or more")
    traced = measurable[:trajectories]
    if any(_own_prediction(column, reference) for column in drawn):
        record_trajectories(bench, pipes, reference, traced, progress)
    for place in _by_place(drawn):
        for column in place:
            record_column(bench, pipes, column, pairs, progress)
            record_likeness(bench, column, reference, measurable)
        if _own_prediction(place[0], reference):
            record_steps(bench, pipes, place[0], reference, traced, progress)
    return measurable


def _with_steps(bench: Bench, place: Place, drawn: Sequence[Column], reference: Column) -> Place:
    """A place with its errors by step, where it has any."""
    records = [list(bench.steps(column, reference).read().values()) for column in drawn if column.place == place.title]
    return replace(place, steps=step_errors(records[0]), trajectories=len(records[0])) if records else place


def _candidate(bench: Bench, column: Column, reference: Column, pairs: Sequence[Pair]) -> Candidate:
    one, other = (_rows(bench.records(which).read(), pairs) for which in (reference, column))
    known = measures(bench.judge is not None, bench.measurer.parser is not None)
    rows = {name: (compared(measure, one, other), style) for name, (measure, style) in known.items()}
    alike = likeness(one, other, _rows(bench.against(column, reference).read(), pairs), bench.judge is not None)
    return Candidate(column, rows, alike, verdicts(column, reference, {name: row for name, (row, _) in rows.items()},
                                                   {name: number for name, (number, _) in alike.items()}))


def _rows(records: dict[int, dict[str, object]], pairs: Sequence[Pair]) -> list[Record]:
    return [records[pair.number] for pair in pairs]


def _by_place(compared_columns: Sequence[Column]) -> Iterator[list[Column]]:
    """Columns of one bundle on one backend together, in the order of the first."""
    groups: dict[str, list[Column]] = {}
    for column in compared_columns:
        groups.setdefault(column.place, []).append(column)
    yield from groups.values()


def _graphs(column: Column, notes: list[str], kept: Path | None = None) -> list[GraphVerdict]:
    """Graph by graph; `kept` is a folder where the figures stay."""
    if "selftest" not in column.bundle:
        notes.append(f"Left out: single graphs of {column.label}, which carries no self-test. Rebuild it.")
        return []
    if kept is None:
        return graph_verdicts(column.bundle, column.machine)
    return kept_verdicts(column, kept)


def _own_prediction(column: Column, reference: Column) -> bool:
    """Whether a column's eps is to be the reference's: another place, and no model distilled for another sampling."""
    made_for, other = ((which.kind, which.guidance, which.identity_guidance)
                       for which in (column.bundle.schedule, reference.bundle.schedule))
    return made_for == other and column.place != reference.place
