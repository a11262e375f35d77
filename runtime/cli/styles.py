"""Styles: words around a prompt, by name. Ours lie in `data/styles.json`; a file of the user's may add to them.

A style is `{"prompt": "... {prompt} ...", "negative": "..."}`; a file is an object of such, by name. It may come from
a stranger: templates are filled in by plain replacement, never by formatting.
"""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadInput

STYLES = Path(__file__).parents[1] / "data" / "styles.json"
PLACE = "{prompt}"
LARGEST_FILE = 1_000_000  # bytes
LONGEST = 2_000  # characters of a template
FORM = f'{{"name": {{"prompt": "... {PLACE} ...", "negative": "..."}}}}'


def apply_style(name: str, prompt: str, negative: str, file: Path | None = None) -> tuple[str, str]:
    """The prompt in the style's words, and the negative prompt with the style's behind it.

    `file` adds styles and comes before ours of the same name. Raises BadInput for an unknown name, listing the known
    ones, and for a file that is none of styles.
    """
    styles = {**read_styles(STYLES), **(read_styles(file) if file else {})}
    if name not in styles:
        raise BadInput(f"style {name!r} is not known, expected one of {', '.join(sorted(styles))}")
    before, _, after = styles[name]["prompt"].partition(PLACE)
    worded = f"{before}{prompt}{after}" if prompt.strip() else f"{before.strip(', ')}{after}".strip(", ")
    return worded, ", ".join(part for part in (negative.strip(), styles[name].get("negative", "").strip()) if part)


def read_styles(file: Path) -> dict[str, Mapping[str, str]]:
    """Every style of a file by name, checked. Raises BadInput."""
    styles = _parsed(file)
    if not isinstance(styles, dict) or not styles:
        raise BadInput(f"{file} holds no styles, expected {FORM}")
    for name, style in styles.items():
        _check(f"{file}: style {name[:40]!r}", style)
    return styles


def _check(label: str, style: Any) -> None:
    if not isinstance(style, dict) or "prompt" not in style or not set(style) <= {"prompt", "negative"}:
        raise BadInput(f'{label} is not {{"prompt": "...", "negative": "..."}} and nothing else; mend the file')
    for key, text in style.items():
        if not isinstance(text, str) or len(text) > LONGEST:
            raise BadInput(f"{label} has a {key} that is no text of at most {LONGEST} characters; mend the file")
    if style["prompt"].count(PLACE) != 1:
        raise BadInput(f"{label} has {PLACE} {style['prompt'].count(PLACE)} times in its prompt, expected it once: "
                       "where the user's words go")


def _parsed(file: Path) -> Any:
    try:
        with file.open("rb") as stream:  # a device has no size, and no end
            data = stream.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise BadInput(f"{file} is longer than {LARGEST_FILE} bytes, expected a short file of styles; "
                           "check the path")
        return json.loads(data.decode("utf-8-sig"))  # with the mark that Windows' editors write
    except OSError as error:
        raise BadInput(f"cannot read {file} ({error.strerror or error}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not JSON that can be read ({str(error)[:80]}), expected {FORM}") from error
