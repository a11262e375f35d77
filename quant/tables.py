"""Figures as cells of Markdown tables, and as JSON."""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from caphuman_edge.quant.estimates import Estimate

Style = tuple[float, int, str]  # factor, decimals, unit
PERCENT: Style = (100, 1, " %")
PERCENT_GIVEN: Style = (1, 1, " %")
DEGREES: Style = (1, 1, "°")
PLAIN: Style = (1, 2, "")


def cell(number: Estimate, style: Style, with_interval: bool) -> str:
    """A figure, with its interval in brackets where it has one; - where it has no value."""
    if number.value != number.value:
        return "-"
    unit = style[2]
    value, low, high = (_rounded(part, style) for part in (number.value, number.low, number.high))
    return f"{value}{unit} [{low}, {high}]" if with_interval and number.low == number.low else value + unit


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """Dataclasses by name as numbers for JSON, which knows no NaN."""
    return {name: without_nan(dataclasses.asdict(value)) for name, value in found.items()}


def without_nan(value: Any) -> Any:
    """The same, null for NaN."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and value != value else value


def _rounded(value: float, style: Style) -> str:
    factor, decimals, _ = style
    return f"{round(factor * value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no minus before a zero
