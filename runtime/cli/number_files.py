"""Numbers that stand in files: the head of an earlier run, and light coefficients. Others may have written them."""
import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..image import PICTURES, read_metadata
from ..recipe import KEY

LARGEST_TEXT = 1_000_000  # bytes or characters; a head's numbers are a few thousand
LIGHT_COEFFICIENTS, LARGEST_COEFFICIENT = 27, 100.0


def head_numbers(path: Path) -> object:
    """A head as `HeadCode.numbers` wrote it: out of what `preview --json` printed, or out of a portrait's recipe."""
    report = _parsed(path, read_metadata(path, KEY) if path.suffix.lower() in PICTURES else _text(path))
    if isinstance(report, dict) and isinstance(people := report.get("people"), list) and people:
        report = people[0]  # the first of a portrait's
    if not isinstance(report, dict) or "head" not in report:
        raise BadInput(f"{path} holds no head, expected what 'caphuman preview --json' printed, or a portrait that "
                       "'caphuman generate' made")
    return report["head"]


def light_coefficients(text: str) -> list[float]:
    """27 numbers, of nine harmonics red, green and blue: separated by commas, or in a JSON file, in rows or not."""
    if os.path.isfile(text):  # no Path: its is_file raises where 27 numbers are too long for a name
        try:
            values = _flat(_parsed(Path(text), _text(Path(text))))
        except BadInput as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    else:
        values = [_number(part) for part in text.split(",")]
    if len(values) != LIGHT_COEFFICIENTS or not all(abs(value) <= LARGEST_COEFFICIENT for value in values):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {LIGHT_COEFFICIENTS} numbers with commas between, or a "
                                         f"JSON file of them, each from {-LARGEST_COEFFICIENT:g} to "
                                         f"{LARGEST_COEFFICIENT:g}")
    return values


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:  # a device has no size, and no end
            return file.read(LARGEST_TEXT + 1).decode("utf-8-sig")  # which PowerShell writes
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text, expected JSON; photos go with --pose or --light-from") from error


def _parsed(path: Path, text: str) -> Any:
    if len(text) > LARGEST_TEXT:
        raise BadInput(f"{path} is longer than a head's numbers, expected at most {LARGEST_TEXT} characters; "
                       "check the path")
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON that can be read ({str(error)[:80]}); write it again") from error


def _flat(values: Any) -> list[float]:
    """The numbers of a list, or of a list of lists; NaN for what is none."""
    parts = values if isinstance(values, list) else [values]
    rows = [part if isinstance(part, list) else [part] for part in parts]
    return [_number(value) for row in rows for value in row]


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, (str, int, float)) else math.nan
    except (ValueError, OverflowError):
        return math.nan
