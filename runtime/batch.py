"""A batch's jobs: the lines of its jobs file, what each is known by, and the files that it writes.

A job is known by a digest of all that decides its pictures. Each picture carries it in its recipe and the ledger names
it, so that a batch which is killed, wherever that is, and started again neither loses nor repeats anything.
"""
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from .errors import BadImage, BadInput
from .image import read_metadata

LONGEST_LINE = 100_000  # bytes of a job; 27 light coefficients and two long prompts are a few thousand
LONGEST_ID = 150  # bytes; file systems take names of 255, and a suffix and a number come on top
_ID = re.compile(r"\w(?:[\w .,+=@()-]*[\w+=@()-])?")
_DEVICES = re.compile(r"(?i:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")  # names that Windows keeps for itself
_NUMBERED = re.compile(r"(.*)-([1-9]\d*)")


@dataclass(frozen=True)
class Line:
    """A line of a jobs file that is neither blank nor a comment."""

    number: int  # from 1
    offset: int  # bytes from the file's start
    raw: bytes  # at most one byte more than LONGEST_LINE, by which one that is too long is known

    @property
    def digest(self) -> str:
        """Of the line as it is written."""
        return hashlib.sha256(self.raw.strip()).hexdigest()


def read_lines(path: Path) -> Iterator[Line]:
    """The lines that hold jobs, one at a time. Raises BadInput for what cannot be read, or is no file."""
    with _open(path) as file:
        number = offset = 0
        while raw := _readline(file, path, LONGEST_LINE + 1):
            number, start = number + 1, offset
            offset += len(raw)
            rest = raw
            while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):  # of a line that is too long
                rest = _readline(file, path, LONGEST_LINE + 1)
                offset += len(rest)
            text = raw.removeprefix(b"\xef\xbb\xbf").strip()
            if text and not text.startswith(b"#"):
                yield Line(number, start, raw)


def read_line(path: Path, offset: int) -> bytes:
    """One line again."""
    with _open(path) as file:
        file.seek(offset)
        return _readline(file, path, LONGEST_LINE + 1)


def parse_job(raw: bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises BadInput, also for what JSON leaves open: keys given twice, NaN."""
    if len(raw) > LONGEST_LINE:
        raise BadInput(f"it is longer than {LONGEST_LINE} bytes, which no job needs; write one job a line")
    try:
        job = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_each_once, parse_float=_finite,
                         parse_constant=_finite)
    except UnicodeDecodeError as error:
        raise BadInput("it is not UTF-8 text; save the jobs file as that") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"it is not JSON ({str(error)[:80]}); write one object a line, such as "
                       '{"photo": "me.jpg", "yaw": 30}') from error
    if not isinstance(job, dict):
        raise BadInput(f'it is {str(job)[:40]!r}, expected an object, such as {{"photo": "me.jpg", "yaw": 30}}')
    return job


def check_id(given: object) -> str:
    """A job's id, which names its files in one folder on every system. Raises BadInput."""
    name = str(given) if isinstance(given, (str, int)) and not isinstance(given, bool) else ""
    if not _ID.fullmatch(name) or _DEVICES.fullmatch(name) or len(name.encode()) > LONGEST_ID:
        raise BadInput(f"id is {str(given)[:40]!r}, expected a name for a file, without folder or suffix: letters, "
                       f"digits and ' .,+=@()-_' within, at most {LONGEST_ID} bytes")
    return name


def digest_of(content: object) -> str:
    """Of anything that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class FileDigests:
    """The sha256 of the files that jobs read. Each is read once in a run: many jobs share a photo."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def __getitem__(self, path: Path) -> str:
        if path not in self._known:
            with _open(path) as file:
                try:
                    self._known[path] = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise _unreadable(path, error) from error
        return self._known[path]


class Names:
    """Which job writes which files: no two may write one, on systems that ignore case either."""

    def __init__(self) -> None:
        self._jobs: dict[str, tuple[str, int, int]] = {}  # digest, count, line

    def claim(self, name: str, count: int, digest: str, line: int) -> bool:
        """Whether the job is new; a line that repeats an earlier one is the same job. Raises BadInput."""
        key = unicodedata.normalize("NFC", name).casefold()
        known = self._jobs.get(key)
        if known and known[0] == digest:
            return False
        other = known or self._numbered(key, count)
        if other:
            raise BadInput(f"id {name!r} would write a file of line {other[2]}; give it an id of its own")
        self._jobs[key] = digest, count, line
        return True

    def _numbered(self, key: str, count: int) -> tuple[str, int, int] | None:
        """The job of several portraits of which this one has the name of one, or the other way about."""
        number = _NUMBERED.fullmatch(key)
        above = self._jobs.get(number[1]) if number else None
        if count == 1 and number and above and len(number[2]) < 9 and 1 < above[1] >= int(number[2]):
            return above
        below = (self._jobs.get(f"{key}-{k}") for k in range(1, count + 1)) if count > 1 else ()
        return next((job for job in below if job and job[1] == 1), None)


def picture_files(folder: Path, name: str, count: int) -> list[Path]:
    """What a job writes: NAME.png, or for several portraits NAME-1.png, NAME-2.png, ..."""
    return [folder / f"{name}{'' if count == 1 else f'-{k}'}.png" for k in range(1, count + 1)]


def missing_files(files: list[Path], digest: str) -> list[tuple[int, Path]]:
    """Those that this job has still to draw, each with its number from 1; what an earlier job left is drawn over.

    Raises BadInput where one was made by no batch, and so may be anybody's.
    """
    missing = []
    for number, file in enumerate(files, 1):
        owner = _owner(file)
        if owner == "":
            raise BadInput(f"{file} exists and was made by no batch; move it, or give the job another id")
        if owner != digest:
            missing.append((number, file))
    return missing


def _owner(file: Path) -> str | None:
    """The digest of the job that drew a picture; "" where no job did, None where there is no file."""
    if not os.path.lexists(file):
        return None
    try:
        recipe = json.loads(read_metadata(file, "caphuman") or "null")
    except (BadImage, ValueError, RecursionError):
        return ""
    job = recipe.get("job") if isinstance(recipe, dict) else None
    return job if isinstance(job, str) else ""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise BadInput(f"{key[:40]!r} is given twice; leave one out")
        found[key] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadInput(f"{text[:40]} is no number that can be used; write a finite one")
    return value


def _open(path: Path) -> BufferedReader:
    try:
        if os.path.exists(path) and not path.is_file():  # a device or a pipe has no end, and is read only once
            raise BadInput(f"{path} is not a file; check the path")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _readline(file: BinaryIO, path: Path, limit: int) -> bytes:
    try:
        return file.readline(limit)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | ValueError) -> BadInput:
    return BadInput(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); check the path")
