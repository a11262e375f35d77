"""What became of each job of a batch, on the disk before the next one begins; and the lock that keeps others out."""
import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import BadInput
from .image import replace_file

LEDGER, LOCK = "ledger.jsonl", ".batch.lock"
LONGEST_RECORD = 1_000_000  # bytes; the names of 1000 portraits are at most 200,000
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # nothing more can be written, whatever the job
_SCRATCH = re.compile(r"\..+\.png\.\d+")  # how a picture is named that is not whole yet


class Ledger:
    """A folder's ledger.jsonl: a line for each job that ended. Of several lines about one job the last one counts.

    Raises BadInput where it cannot be read or written. A line that a killed process left half written is taken off.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        self._last: dict[str, tuple[str, bool]] = {}  # by id, or where there is none by digest: digest, done
        try:
            self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666),
                                   "r+b", 0)
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            self._end = self._read()
            self._file.truncate(self._end)
        except OSError as error:
            self._file.close()
            raise unwritable(self.path, error) from error

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def done(self, name: str, digest: str) -> bool:
        """Whether this is what the job of that name did last."""
        return self._last.get(name) == (digest, True)

    def failed(self, name: str, digest: str) -> bool:
        """Whether this is what it failed at last."""
        return self._last.get(name) == (digest, False)

    def add(self, digest: str, name: str | None, **facts: object) -> None:
        """Record how a job ended: `files` or `error`. Raises BadInput, with nothing written, where there is no room."""
        record = {"job": digest, "id": name, "status": "failed" if "error" in facts else "done", **facts}
        self._append(json.dumps(record).encode() + b"\n")
        self._note(record)

    def _append(self, line: bytes) -> None:
        left = line
        try:
            self._file.seek(self._end)
            while left:
                left = left[self._file.write(left):]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # what cannot be taken off now, the next start does
                self._file.truncate(self._end)
            raise unwritable(self.path, error) from error
        self._end += len(line)

    def _read(self) -> int:
        """Take in what is recorded; gives the length of it."""
        end = number = 0
        with self.path.open("rb") as file:
            while raw := file.readline(LONGEST_RECORD):
                number += 1
                whole = self._note(_parsed(raw))
                if not raw.endswith(b"\n"):
                    if len(raw) == LONGEST_RECORD:
                        raise BadInput(f"{self.path} is no ledger: line {number} is longer than {LONGEST_RECORD} "
                                       "bytes; move it away, and the pictures will tell what is done")
                    return self._closed(end + len(raw)) if whole else end
                end += len(raw)
                if not whole:
                    warnings.warn(f"{self.path}: line {number} is no record of a job; it is passed over", stacklevel=3)
        return end

    def _closed(self, end: int) -> int:
        """End a last line that was written but for its end."""
        self._file.seek(end)
        return end + self._file.write(b"\n")

    def _note(self, record: object) -> bool:
        """Whether this is a record, which then is the last one of its job."""
        if not isinstance(record, dict):
            return False
        digest, name, status = (record.get(key) for key in ("job", "id", "status"))
        if not isinstance(digest, str) or status not in ("done", "failed"):
            return False
        self._last[name if isinstance(name, str) else digest] = digest, status == "done"
        return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other batch out of a folder. The lock goes with the process, however that ends.

    Raises BadInput where another one is at work in it.
    """
    try:
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise unwritable(folder / LOCK, error) from error
    with file:
        try:
            _lock(file)
        except (BlockingIOError, PermissionError) as error:
            raise BadInput(f"another batch is at work in {folder}; wait for it, or choose another folder with --out"
                           ) from error
        except OSError as error:  # a network's file system may know no locks
            warnings.warn(f"{folder} cannot be locked ({error.strerror}); start no second batch in it", stacklevel=3)
        yield


def clear_scratch(folder: Path) -> None:
    """Delete the pictures that a killed batch left half written; for who holds the folder's lock."""
    for file in folder.iterdir():
        if _SCRATCH.fullmatch(file.name):
            file.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises BadInput where it cannot be written."""
    try:
        replace_file(path, data)
    except OSError as error:
        raise unwritable(path, error) from error


def settle(files: list[Path]) -> None:
    """Have files on the disk before anything says that they are. Raises BadInput."""
    for file in files:
        try:
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
        except OSError as error:
            raise unwritable(file, error) from error


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that nothing more can be written here."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    return False


def unwritable(path: Path, error: OSError) -> BadInput:
    """The error of a user whose file cannot be written."""
    remedy = "make room, and start the same command again" if disk_is_full(error) else "choose another place"
    return BadInput(f"cannot write {path} ({error.strerror or error}); {remedy}")


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _parsed(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
