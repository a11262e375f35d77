"""`caphuman recipe`: what made a portrait, read out of the picture, and the command that makes it again."""
import argparse
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..head.skinning import rotation_matrices
from ..perception.rotation import yaw_pitch_roll
from ..recipe import is_marked, recipe_of
from .report import add_json_flag, show

APART = ("people", "head", "controls")  # told a person each
LONGEST, MOST_ROWS = 200, 60  # characters of a value that is no text; rows of a table
LARGEST_ANGLE = 100.0  # radians: beyond, a turn is no one's head


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("recipe", help="what made a portrait, and how to make it again", description=(
        "Reads the recipe that a portrait carries: settings, people, bundle. The photos themselves are not in it."))
    parser.add_argument("file", type=Path, metavar="FILE", help="portrait made by 'caphuman generate'")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Report on a picture that has a recipe; BadInput for one that has none."""
    recipe, marked = recipe_of(args.file), is_marked(args.file)
    show(recipe, args.json, lambda told: text(told, args.file, marked))
    return 0


def text(recipe: dict[str, Any], file: Path, marked: bool) -> str:
    """A recipe for a person. Nothing of it reaches the terminal but printable characters."""
    people = _people(recipe)
    lines = [f"{file}: {'AI-generated' if marked else 'its metadata no longer say that it is AI-generated'}",
             *_table({key: value for key, value in recipe.items() if key not in APART})]
    for number, person in enumerate(people, 1):
        lines += [f"person {number}", *_table(_person(person))]
    if "people" in recipe:
        lines += ["to make it again, from the same photos and with the same bundle", f"  {command(recipe, file)}"]
    else:
        lines.append("an older caphuman made it, so --recipe cannot make it again; give generate the same settings")
    return "\n".join(map(_printable, lines))


def command(recipe: dict[str, Any], file: Path) -> str:
    """The command line that makes the picture again; what the user has to put in is in capitals."""
    people = _people(recipe)
    words = ["caphuman generate --recipe", shlex.quote(str(file)), "--photo PHOTO"]
    words += ["--mask MASK"] * ("mask_sha256" in people[0])
    words += ["--canvas CANVAS"] * ("canvas" in recipe) + ["--control CONTROL"] * ("control_sha256" in recipe)
    words += ["--out NEW.png"]  # before --with, behind which stand the flags of people alone
    for number, person in enumerate(people[1:], 2):
        words += [f"--with PHOTO{number}", *[f"--mask MASK{number}"] * ("mask_sha256" in person)]
    return " ".join(words)


def _people(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Everybody in the portrait; in the first recipes one person's head stood in the recipe itself."""
    people: list[dict[str, Any]] = recipe.get("people") or [recipe]
    return people if people[0] is not recipe else [{key: recipe[key] for key in APART[1:] if key in recipe}]


def _person(person: dict[str, Any]) -> dict[str, Any]:
    """What there is to tell about one person: angles in place of the head's numbers."""
    rows = {key: value for key, value in person.items() if key not in APART}
    if angles := _angles(person.get("head")):
        rows["angles"] = angles
    controls = person.get("controls")
    if isinstance(controls, dict) and (set_ones := {key: controls[key] for key in controls if key != "angles"}):
        rows["controls"] = ", ".join(f"{key} {_value(value)}" for key, value in set_ones.items())
    return rows


def _angles(head: Any) -> str:
    """Yaw, pitch and roll in degrees of a head's numbers, or nothing where these are none."""
    pose = head.get("pose") if isinstance(head, dict) else None
    turn = pose[:3] if isinstance(pose, list) else []
    if len(turn) < 3 or not all(isinstance(part, (int, float)) and abs(part) <= LARGEST_ANGLE for part in turn):
        return ""
    angles = yaw_pitch_roll(rotation_matrices(np.array([turn], np.float64))[0])
    return ", ".join(f"{name} {angle + 0.0:.1f}" for name, angle in zip(("yaw", "pitch", "roll"), angles, strict=True))


def _table(values: dict[str, Any]) -> Iterator[str]:
    """A row for each value that is set."""
    rows = {key.replace("_", " "): _value(value) for key, value in values.items() if value is not None}
    width = max((len(key) for key in rows if len(key) <= 24), default=0)
    for key, value in [*rows.items()][:MOST_ROWS]:
        yield f"  {key:{width}}  {value}".rstrip()
    if len(rows) > MOST_ROWS:
        yield f"  and {len(rows) - MOST_ROWS} more, which --json prints"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value and not any(isinstance(part, (dict, list)) for part in value.values()):
        line = ", ".join(f"{key} {part}" for key, part in value.items())
    else:
        line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= LONGEST else f"{line[:LONGEST - 1]}…"


def _printable(line: str) -> str:
    """The line with escapes in place of control characters, with which a stranger's file could steer the terminal."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode()
                   for sign in line)
