"""The heads that a user has added, one .npz each in a folder of the user's own."""
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.errors import BadInput, BundleError
from caphuman_edge.runtime.head import npz
from caphuman_edge.runtime.head.storage import OPEN_HEAD

OPEN = "open"  # the name of the head that comes with the package
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)  # a plain file name on every system
TEXTS = ("licence", "license", "sources", "identity_count", "expression_names")


def heads_dir(platform: str = sys.platform) -> Path:
    """The user's folder of heads; it need not exist.

    The environment variable CAPHUMAN_HEADS overrides the platform's own place: XDG_DATA_HOME or ~/.local/share on
    Linux, ~/Library/Application Support on a Mac, %LOCALAPPDATA% on Windows.
    """
    try:
        if override := os.environ.get("CAPHUMAN_HEADS"):
            return Path(override).expanduser()
        if platform == "darwin":
            return Path.home() / "Library" / "Application Support" / "caphuman" / "heads"
        if platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "caphuman" / "heads"
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "caphuman" / "heads"
    except RuntimeError as error:  # pathlib's, where the user has no home
        raise BadInput(f"there is no folder for heads ({error}); set CAPHUMAN_HEADS to one") from error


def list_heads() -> dict[str, Path]:
    """Every head by name, the open head first."""
    folder = heads_dir()
    try:
        files = sorted(folder.glob("*.npz"))
    except OSError as error:
        raise BadInput(f"cannot read {folder} ({error.strerror or error}); set CAPHUMAN_HEADS to another "
                       "folder") from error
    return {OPEN: OPEN_HEAD, **{path.stem: path for path in files if path.stem != OPEN}}


def find_head(name_or_path: str) -> Path:
    """The file of a head that the user added by this name, of the open head, or the file that is named itself."""
    heads = list_heads()
    if name_or_path in heads:
        return heads[name_or_path]
    if os.path.isfile(name_or_path):  # Path.is_file raises where the name is too long, or the folder closed
        return Path(name_or_path)
    raise BadInput(f'head "{name_or_path}" is not known, expected one of {", ".join(heads)} or a file; '
                   "add yours with 'caphuman head add'")


def new_head_file(name: str, replace: bool = False) -> Path:
    """Where a head of this name will lie. Raises BadInput for a name that is no file name, or is taken."""
    if not NAME.fullmatch(name) or name == OPEN:
        raise BadInput(f'head name "{ascii(name)[1:-1]}" cannot be used, expected letters, digits, "_", "-" and "." '
                       f'and not "{OPEN}"; choose another with --name')
    path = heads_dir() / f"{name}.npz"
    if os.path.exists(path) and not replace:  # Path.exists raises where the folder may not be read
        raise BadInput(f'there is a head "{name}" already ({path}); choose another --name, or allow --replace')
    return path


def add_head(name: str, arrays: Mapping[str, np.ndarray], replace: bool = False) -> Path:
    """Write a head into the folder, whole or not at all. Raises BadInput where that is not possible."""
    path = new_head_file(name, replace)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(scratch, path)
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror or error}); make room, or set CAPHUMAN_HEADS to another "
                       "folder") from error
    finally:
        with suppress(OSError):  # nothing was written
            scratch.unlink()
    return path


def describe_head(path: Path) -> dict[str, Any]:
    """What a head file says of itself, ready for JSON. Raises BundleError for a damaged one."""
    with npz.opened(path, BundleError, "head model") as archive:
        held = npz.names(archive)
        headers = npz.read_headers(archive, held)
        texts = npz.read_arrays(archive, held.intersection(TEXTS))
        texture = next((headers[name].shape[0] for name in ("texture_basis", "texture_masks") if name in held), 0)
        licence = str(texts.get("licence", texts.get("license", "not stated")))
        return {
            "file": str(path), "sha256": sha256_of([path])[path], "vertices": headers["v_template"].shape[0],
            "identity": int(texts["identity_count"]), "expression": len(texts["expression_names"]), "texture": texture,
            "licence": _printable(licence),
            "sources": {_printable(str(name)): _printable(str(digest)) for name, digest in texts.get("sources", [])},
        }


def _printable(text: str) -> str:
    """Without what would move the cursor of a terminal."""
    return "".join(letter for letter in text if letter.isprintable())
