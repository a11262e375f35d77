"""The figures as a Markdown table, and as JSON."""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.estimates import CONFIDENCE, Estimate
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

PERCENT, DEGREES, PLAIN = (100, 1, " %"), (1, 1, "°"), (1, 2, "")  # factor, decimals, unit
PERCENT_GIVEN = (1, 1, " %")
UNIT_ROWS = [(f"{unit} {fit}", PLAIN) for unit in ("jawOpen", "mouthSmile", "eyeBlink") for fit in ("error", "r")]
ANGLE_ROWS = [(f"{angle} {fit}", style) for angle in ("yaw", "pitch", "roll")
              for fit, style in (("slope", PLAIN), ("r", PLAIN), ("error", DEGREES))]
ROWS = [(FOUND, PERCENT), *ANGLE_ROWS, (LANDMARKS, PERCENT_GIVEN), *UNIT_ROWS, (OWN, PLAIN), (RANDOM, PLAIN),
        (NEARER, PERCENT)]
NOTES = {LANDMARKS: "landmark distance, of the eyes'"}
Style = tuple[float, int, str]


def as_json(records: Sequence[Record], skipped: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the table says, unrounded."""
    columns = _columns(records)
    return {
        "settings": dict(settings), "pairs": len(records), "skipped": skipped, "confidence_percent": CONFIDENCE,
        "figures": {column: _plain(figures(records, column)) for column in columns},
        "attributes": {column: _plain(attribute_figures(records, column)) for column in columns},
        "goals": [_without_nan(dataclasses.asdict(goal)) for goal in goals(records)],
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
    rows = [[NOTES.get(name, name), *(_cell(found[column][name], style, column == ANSWER) for column in columns)]
            for name, style in ROWS]
    return _table(["", *(COLUMNS[column] for column in columns)], rows)


def _attributes(records: Sequence[Record]) -> str:
    """Chance stands beside the accuracy: prompts shuffled among the portraits, and always the commonest wish."""
    columns = _columns(records)
    found = {column: attribute_figures(records, column) for column in columns}
    rows = [_attribute_row(name, {column: found[column][name] for column in columns}) for name in found[ANSWER]]
    return _table(["prompt names", "prompts", COLUMNS[ANSWER], "of those told", "shuffled", "commonest",
                   *(COLUMNS[column] for column in columns[1:])], rows)


def _attribute_row(name: str, found: Mapping[str, AttributeFigures]) -> list[str]:
    answer = found[ANSWER]
    others = [_percent(dummy.right.value) for column, dummy in found.items() if column != ANSWER]
    return [name, str(answer.named), _cell(answer.right, PERCENT, True), _percent(answer.right_if_told.value),
            _percent(answer.shuffled), _percent(answer.commonest), *others]


def _goals(records: Sequence[Record]) -> str:
    return _table(["goal", "found", ""], [
        [goal.text, f"{goal.found:.2f}" if goal.found == goal.found else "-", "met" if goal.met else "missed"]
        for goal in goals(records)])


def _columns(records: Sequence[Record]) -> list[str]:
    return [column for column in COLUMNS if column in records[0]["answers"]]


def _cell(number: Estimate, style: Style, with_interval: bool) -> str:
    if number.value != number.value:
        return "-"
    factor, decimals, unit = style
    value, low, high = (f"{factor * part:.{decimals}f}" for part in (number.value, number.low, number.high))
    return f"{value}{unit} [{low}, {high}]" if with_interval else value + unit


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.0f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers for JSON, which knows no NaN."""
    return {name: _without_nan(dataclasses.asdict(value)) for name, value in found.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and value != value else value
