"""The figures as a Markdown table, and as JSON."""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.score_figures import (
    ANSWER,
    COLUMNS,
    FOUND,
    LANDMARKS,
    NEARER,
    OWN,
    RANDOM,
    AttributeFigures,
    Record,
    attribute_figures,
    figures,
    goals,
)
from caphuman_edge.quant.estimates import CONFIDENCE
from caphuman_edge.quant.tables import DEGREES, PERCENT, PERCENT_GIVEN, PLAIN, cell, plain, table, without_nan

UNIT_ROWS = [(f"{unit} {fit}", PLAIN) for unit in ("jawOpen", "mouthSmile", "eyeBlink") for fit in ("error", "r")]
ANGLE_ROWS = [(f"{angle} {fit}", style) for angle in ("yaw", "pitch", "roll")
              for fit, style in (("slope", PLAIN), ("r", PLAIN), ("error", DEGREES))]
ROWS = [(FOUND, PERCENT), *ANGLE_ROWS, (LANDMARKS, PERCENT_GIVEN), *UNIT_ROWS, (OWN, PLAIN), (RANDOM, PLAIN),
        (NEARER, PERCENT)]
NOTES = {LANDMARKS: "landmark distance, of the eyes'"}


def as_json(records: Sequence[Record], skipped: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the table says, unrounded."""
    columns = _columns(records)
    return {
        "settings": dict(settings), "pairs": len(records), "skipped": skipped, "confidence_percent": CONFIDENCE,
        "figures": {column: plain(figures(records, column)) for column in columns},
        "attributes": {column: plain(attribute_figures(records, column)) for column in columns},
        "goals": [without_nan(dataclasses.asdict(goal)) for goal in goals(records)],
    }


def as_markdown(records: Sequence[Record], skipped: int, settings: Mapping[str, Any]) -> str:
    """Three tables: measures, attributes, goals."""
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    head = f"{len(records)} pairs, {skipped} skipped (no measurable reference); {told}."
    notes = f"Brackets: {CONFIDENCE} % intervals, by bootstrap over pairs. What cannot be told of a portrait is wrong."
    return "\n\n".join([f"{head} {notes}", _measures(records), _attributes(records), _goals(records)])


def _measures(records: Sequence[Record]) -> str:
    columns = _columns(records)
    found = {column: figures(records, column) for column in columns}
    rows = [[NOTES.get(name, name), *(cell(found[column][name], style, column == ANSWER) for column in columns)]
            for name, style in ROWS]
    return table(["", *(COLUMNS[column] for column in columns)], rows)


def _attributes(records: Sequence[Record]) -> str:
    """Chance stands beside the accuracy: prompts shuffled among the portraits, and always the commonest wish."""
    columns = _columns(records)
    found = {column: attribute_figures(records, column) for column in columns}
    rows = [_attribute_row(name, {column: found[column][name] for column in columns}) for name in found[ANSWER]]
    return table(["prompt names", "prompts", COLUMNS[ANSWER], "of those told", "shuffled", "commonest",
                   *(COLUMNS[column] for column in columns[1:])], rows)


def _attribute_row(name: str, found: Mapping[str, AttributeFigures]) -> list[str]:
    answer = found[ANSWER]
    others = [_percent(dummy.right.value) for column, dummy in found.items() if column != ANSWER]
    return [name, str(answer.named), cell(answer.right, PERCENT, True), _percent(answer.right_if_told.value),
            _percent(answer.shuffled), _percent(answer.commonest), *others]


def _goals(records: Sequence[Record]) -> str:
    return table(["goal", "found", ""], [
        [goal.text, f"{goal.found:.2f}" if goal.found == goal.found else "-", "met" if goal.met else "missed"]
        for goal in goals(records)])


def _columns(records: Sequence[Record]) -> list[str]:
    return [column for column in COLUMNS if column in records[0]["answers"]]


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.0f} %"
