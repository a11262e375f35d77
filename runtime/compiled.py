"""Compiled models on disk, so that a backend compiles a graph once for a machine.

An entry is a folder: what the backend wrote and, written last, the hash of each file in it. It is made elsewhere and
renamed into place, so a killed run leaves no half entry; one that changed since is thrown away, as runtimes take
damaged weights without a word. The name tells all that an entry depends on: nothing is ever read by another version.
"""
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cache import cache_dir, sha256_of
from .errors import BadInput

FOLDER = "compiled"
SEAL = "sha256.json"
MAX_BYTES = 8 << 30  # of all entries: a full-size bundle takes about half of it


@contextmanager
def compiled_entry(label: str, source: Path, settings: object, root: Path | None = None) -> Iterator[Path | None]:
    """The folder for one compiled model: with the files of last time, or empty, to be filled within the block.

    `label` is the runtime with its version and the device, `source` the graph, `settings` whatever else decides what
    is compiled. `root` is None for the user's cache. Afterwards the oldest entries are deleted until all fit into
    MAX_BYTES. Gives None, and warns, where there is no place for it.
    """
    try:
        root = cache_dir() / FOLDER if root is None else root
        entry = root / _name(label, source, settings)
        folder = _opened(entry)
    except (BadInput, OSError) as error:
        warnings.warn(f"compiled models cannot be kept ({error}); each start compiles anew", stacklevel=3)
        yield None
        return
    done = False
    try:
        yield folder
        done = True
    finally:
        if folder != entry and not done:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        _seal(folder)
        if folder != entry:
            _publish(folder, entry)
        _trim(root, keep=entry)
    except OSError as error:
        warnings.warn(f"a compiled model cannot be kept ({error}); the next start compiles anew", stacklevel=3)


def used_bytes(root: Path | None = None) -> int:
    """What all entries take on disk."""
    return _bytes(cache_dir() / FOLDER if root is None else root)


def _name(label: str, source: Path, settings: object) -> str:
    """A folder's name. Weights may lie beside a graph's file, so everything beside it counts."""
    place = source.resolve()
    files = [place, *sorted(path for path in (place.rglob("*") if place.is_dir() else place.parent.iterdir())
                            if path.is_file() and path != place)]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps([stats, settings], default=str).encode()).hexdigest()
    return f"{re.sub('[^A-Za-z0-9._]+', '-', label)}-{digest[:24]}"


def _opened(entry: Path) -> Path:
    """The entry, if it is whole, or a scratch folder beside it."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    if entry.exists():
        if _is_whole(entry):
            os.utime(entry)  # the most recently used
            return entry
        shutil.rmtree(entry)
    return Path(tempfile.mkdtemp(prefix=f"{entry.name}.making-", dir=entry.parent))


def _is_whole(entry: Path) -> bool:
    """Whether every file is what it was; hashes are taken anew only of files that were written to since."""
    try:
        return bool(json.loads((entry / SEAL).read_text()) == _hashes(entry))
    except (OSError, ValueError):
        return False


def _seal(folder: Path) -> None:
    """Note what is in the folder; a runtime may have replaced an entry's files, so each use ends with it."""
    hashes = json.dumps(_hashes(folder))
    if not (folder / SEAL).exists() or (folder / SEAL).read_text() != hashes:
        (folder / SEAL).write_text(hashes)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    return {path.relative_to(folder).as_posix(): digest for path, digest in sha256_of(files).items()}


def _publish(folder: Path, entry: Path) -> None:
    try:
        os.replace(folder, entry)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        if not entry.exists():  # else another process was faster, and made the same
            raise


def _trim(root: Path, keep: Path) -> None:
    """Delete entries, those first that were not used for the longest time, until the rest fits."""
    entries = sorted((path for path in root.iterdir() if path.is_dir() and path != keep),
                     key=lambda path: path.stat().st_mtime)
    excess = _bytes(keep) + sum(map(_bytes, entries)) - MAX_BYTES
    for entry in entries:
        if excess <= 0:
            break
        excess -= _bytes(entry)
        shutil.rmtree(entry, ignore_errors=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
