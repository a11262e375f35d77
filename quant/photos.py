"""The pictures that portraits are made of: the held-out ones, or a user's own photos."""
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from caphuman_edge.quant.heldout import ARCHIVES, Pair, Pictures, pair_up
from caphuman_edge.quant.strangers import draw_strangers
from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.cli.output import make_folder
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.framing import Fit
from caphuman_edge.runtime.image import load_photo

SUFFIXES = (".jpg", ".jpeg", ".png")
USUAL, DRAWN = 24, 8  # pairs, where nobody asks for another number; and of people that are drawn
STRANGERS = "strangers"  # their folder


class Source(Protocol):
    """Pictures by name, and how they are to be measured."""

    @property
    def fit(self) -> Fit:
        """Which part of a picture fills the frame."""

    @property
    def least_yaw(self) -> float:
        """Degrees that a head must be turned by to be asked for."""

    @property
    def names(self) -> frozenset[str]:
        """Every picture's name."""

    @property
    def digest(self) -> str:
        """Another one for other pictures."""

    def read(self, name: str) -> np.ndarray:
        """(h, w, 3) uint8."""


@dataclass(frozen=True)
class Photos:
    """A folder of anyone's photos, JPEG or PNG, by file name."""

    folder: Path
    fit: ClassVar[Fit] = "face"
    least_yaw: ClassVar[float] = 0.0

    @cached_property
    def names(self) -> frozenset[str]:
        """Raises BadInput where the folder holds no two photos."""
        try:
            found = frozenset(file.name for file in self.folder.iterdir() if file.suffix.lower() in SUFFIXES)
        except OSError as error:
            raise BadInput(f"{self.folder} cannot be read ({error.strerror}); give a folder of photos with --pictures"
                           ) from error
        if len(found) < 2:
            raise BadInput(f"{self.folder} holds {len(found)} photos ({', '.join(SUFFIXES)}), expected 2 or more: each "
                           "one's person is drawn with the head of the next; give another folder with --pictures")
        return found

    @property
    def digest(self) -> str:
        """Of the files."""
        hashes = sha256_of(self.folder / name for name in sorted(self.names))
        return hashlib.sha256(" ".join(hashes.values()).encode()).hexdigest()[:12]

    def read(self, name: str) -> np.ndarray:
        """(h, w, 3) uint8; raises BadImage for what is no photo."""
        return load_photo(self.folder / name)


def open_pictures(folder: Path, count: int | None = None) -> tuple[Source, list[Pair]]:
    """The folder's pictures and `count` pairs of them, or USUAL, or as many as there are.

    Held-out pictures are paired as in the score. Of other photos each gives a person, and the next one, in the order of
    their names, the head. Raises BadInput for a folder without pictures, and for more pairs than there are.
    """
    if _is_held_out(folder):
        pictures = Pictures(folder)
        people = sum("_" not in name for name in pictures.names)
        return pictures, pair_up(pictures.names, min(USUAL, people) if count is None else count, "--triples")
    photos = Photos(folder)
    names = sorted(photos.names)
    count = min(USUAL, len(names)) if count is None else count
    if not 1 <= count <= len(names):
        raise BadInput(f"--triples is {count}, expected 1 to {len(names)}, the photos in {folder}")
    return photos, [Pair(k, names[k], tuple(names[k + 1:] + names[:k]), (), k) for k in range(count)]


def drawn_pictures(home: Path, count: int | None = None, threads: int | None = None) -> tuple[Source, list[Pair]]:
    """`count` or DRAWN people who exist nowhere, drawn by the embedded miniature, kept in a folder in `home`."""
    folder = home / f"{STRANGERS}-{count or DRAWN}"  # another folder, as the last one's head is the first one's
    make_folder(folder)
    draw_strangers(folder, count or DRAWN, threads)
    return open_pictures(folder, count or DRAWN)


def _is_held_out(folder: Path) -> bool:
    return any((folder / archive).is_file() for archive in ARCHIVES) or any(folder.glob("[0-9]" * 5 + ".jpg"))
