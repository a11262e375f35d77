"""The recipe that a portrait carries: out of the picture's metadata, checked, since the file may be a stranger's."""
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import BadInput
from .image import read_metadata

KEY, MARK = "caphuman", "AI-generated"  # of the metadata: the recipe as JSON, and "true"
DEEPEST = 12  # lists and objects in each other; a recipe has five
LONGEST_TEXT = 20_000  # characters
SHA256 = re.compile("[0-9a-f]{64}")
Kind = tuple[str, Callable[[Any], bool]]
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
NAME: Kind = ("a text or null", lambda value: value is None or isinstance(value, str))
HASH: Kind = ("a sha256", lambda value: isinstance(value, str) and SHA256.fullmatch(value) is not None)
WHOLE: Kind = ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
FACE: Kind = ("a whole number or null", lambda value: value is None or WHOLE[1](value))
NUMBER: Kind = ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool))
STRENGTH: Kind = ("a number or a list of such", lambda value: NUMBER[1](value) or (
    isinstance(value, list) and all(map(NUMBER[1], value))))
OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
OBJECTS: Kind = ("a list of objects", lambda value: isinstance(value, list) and bool(value)
                 and all(isinstance(each, dict) for each in value))
NEEDED = {"prompt": TEXT, "negative": TEXT, "seed": WHOLE, "steps": WHOLE, "guidance": NUMBER}
OPTIONAL = {"identity_guidance": NUMBER, "strength": STRENGTH, "tau": WHOLE, "eta": NUMBER, "enhancement": NUMBER,
            "control_strength": STRENGTH, "denoise": NUMBER, "schedule": TEXT, "timesteps": TEXT,
            "decoder": TEXT,
            "backend": TEXT, "device": NAME, "precision": NAME, "people": OBJECTS, "canvas": OBJECT,
            "control_sha256": HASH, "head": OBJECT, "controls": OBJECT, "head_sha256": HASH, "bundle": TEXT,
            "bundle_sha256": HASH, "made_with": TEXT}
PERSON = {"photo_sha256": HASH, "face": FACE, "fit": TEXT, "head": OBJECT, "controls": OBJECT, "mask_sha256": HASH}


def recipe_of(path: str | Path) -> dict[str, Any]:
    """The recipe of a portrait that caphuman wrote: PNG, JPEG or WebP.

    What is there has the type that it has in a recipe, is finite and not nested deep; ranges are checked where numbers
    are used, and keys of other versions are left as they are. Raises BadImage for what is no picture, BadInput for one
    without a recipe or with one that was altered.
    """
    text = read_metadata(path, KEY)
    if not text:
        raise BadInput(f"{path} carries no recipe; pictures that caphuman wrote do, unless an editor, a messenger or a "
                       "website took it out")
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _altered(path, f"is not JSON ({str(error)[:80]})") from error
    if not isinstance(recipe, dict):
        raise _altered(path, "is no object")
    _check_values(path, recipe)
    _check_kinds(path, "", recipe, {**OPTIONAL, **NEEDED})
    for name in NEEDED:
        if name not in recipe:
            raise _altered(path, f"has no {name}")
    for number, person in enumerate(recipe.get("people", []), 1):
        _check_kinds(path, f"person {number}: ", person, PERSON)
    return recipe


def is_marked(path: str | Path) -> bool:
    """Whether the picture's metadata say that it is AI-generated, in the words of caphuman."""
    return read_metadata(path, MARK) == "true"


def _check_kinds(path: str | Path, place: str, values: dict[str, Any], kinds: dict[str, Kind]) -> None:
    for name, value in values.items():
        expected, fits = kinds.get(name, ("", lambda _: True))
        if not fits(value):
            raise _altered(path, f"holds {place}{name} {_short(value)}, expected {expected}")


def _check_values(path: str | Path, value: Any, depth: int = 0) -> None:
    """Raise BadInput for anything nested too deep, no finite number, or too long a text."""
    if depth > DEEPEST:
        raise _altered(path, f"is nested more than {DEEPEST} deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise _altered(path, f"holds {value}, expected finite numbers")
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise _altered(path, f"holds a text of {len(value)} characters, expected at most {LONGEST_TEXT}")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for each in value if isinstance(value, list) else ():
        _check_values(path, each, depth + 1)


def _short(value: Any) -> str:
    text = json.dumps(value)  # in ASCII: control characters of a stranger's stay out of messages
    return text if len(text) <= 40 else f"{text[:39]}…"


def _altered(path: str | Path, what: str) -> BadInput:
    return BadInput(f"the recipe in {path} {what}; it was altered after caphuman wrote it, or another version did")
