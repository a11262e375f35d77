"""Where the runtime keeps what it can make again: hashes of large files, compiled models."""
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from .errors import BadInput

HASHES = "sha256.json"


def cache_dir() -> Path:
    """The user's cache folder for caphuman, made if it is not there.

    The environment variable CAPHUMAN_CACHE overrides the platform's own place: XDG_CACHE_HOME or ~/.cache on Linux,
    ~/Library/Caches on a Mac, %LOCALAPPDATA% on Windows. Raises BadInput where the folder cannot be made.
    """
    override = os.environ.get("CAPHUMAN_CACHE")
    try:
        folder = Path(override).expanduser() if override else platform_cache() / "caphuman"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # pathlib raises the latter where the user has no home
        raise BadInput(f"the cache folder cannot be made ({error}); "
                       "set CAPHUMAN_CACHE to a folder that can be written") from error
    return folder


def sha256_of(paths: Iterable[Path]) -> dict[Path, str]:
    """The sha256 of each file, read anew only where its size or modification time changed since it was last taken.

    Raises OSError for a file that cannot be read. A cache that cannot be written is announced as a warning.
    """
    known = _read_hashes()
    fresh: dict[str, tuple[int, int, str]] = {}
    hashes = {}
    for path in paths:
        key, stat = str(path.resolve()), path.stat()
        size, modified, digest = known.get(key, (None, None, ""))
        if (size, modified) != (stat.st_size, stat.st_mtime_ns):
            digest = _sha256(path)
            fresh[key] = stat.st_size, stat.st_mtime_ns, digest
        hashes[path] = digest
    if fresh:
        _write_hashes({key: row for key, row in known.items() if Path(key).exists()} | fresh)
    return hashes


def platform_cache(platform: str = sys.platform) -> Path:
    """The folder under which programs of this user keep their caches."""
    if platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_hashes() -> dict[str, tuple[int, int, str]]:
    """path: (size, modification time in ns, sha256); empty where there is no cache or an unreadable one."""
    try:
        return {path: (size, modified, digest) for path, (size, modified, digest) in
                json.loads((cache_dir() / HASHES).read_text()).items()}
    except (BadInput, OSError, ValueError, TypeError, AttributeError):
        return {}  # only speed is lost: every file is hashed again


def _write_hashes(hashes: dict[str, tuple[int, int, str]]) -> None:
    try:
        scratch = cache_dir() / f"{HASHES}.{os.getpid()}"
        scratch.write_text(json.dumps(hashes))
        os.replace(scratch, scratch.with_name(HASHES))
    except (BadInput, OSError) as error:
        warnings.warn(f"hashes cannot be remembered ({error}); bundles are hashed anew each time", stacklevel=2)
