"""Where results go, checked before the work that leads to them."""
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import BadInput

DEFAULT = Path("portrait.png")


def portrait_files(out: Path | None, count: int) -> list[Path]:
    """One name a portrait: `out` itself, or for several out-1.png, out-2.png, ...

    Raises BadInput where one exists that the user did not name letter by letter.
    """
    named = out or DEFAULT
    files = [named] if count == 1 else [named.with_stem(f"{named.stem}-{k}") for k in range(1, count + 1)]
    taken = [file for file in files if os.path.exists(file) and file != out]
    if taken:
        raise BadInput(f"{taken[0]} exists; move it, or choose another name with --out "
                       "(only a file named there is overwritten)")
    return files


def check_writable(files: Iterable[Path]) -> None:
    """Raise BadInput where one of these files cannot be written, whether or not its folder exists already."""
    for file in files:
        place = file
        try:
            if file.is_dir():
                raise BadInput(f"{file} is a folder; name a file in it, such as {file / DEFAULT}")
            place = _existing(file.parent)
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:  # is_dir and exists raise it too: a name is too long, a folder closed
            raise BadInput(f"cannot write to {place} ({error.strerror or error}); choose another place") from error


def check_apart(files: Iterable[Path], photos: Iterable[Path]) -> None:
    """Raise BadInput where a result would be written over a photo that is read, or over another result."""
    taken = {os.path.realpath(photo) for photo in photos}
    for file in files:
        place = os.path.realpath(file)
        if place in taken:
            raise BadInput(f"{file} is also a photo or another result of this command; choose another name for it")
        taken.add(place)


def make_folder(folder: Path) -> None:
    """Make a folder for results, and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {folder} ({error.strerror or error}); choose another place") from error


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
