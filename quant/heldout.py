"""The pictures that no training saw, and how references and target heads are paired from them."""
import hashlib
import io
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from caphuman_edge.runtime.contract import HELD_OUT_SEEDS
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.framing import Fit

ARCHIVES = ("faces_256.tar", "variants_256.tar")
POSES = ("", "_a", "_b")  # an identity's picture, and the same person in two more poses
OTHERS = 10  # random other references that a portrait is compared with
PAIRING_SEED = 20240607
# Seeds whose picture looks, or may look, like a child's. They count in the scores but are never shown. Judged by eye
# on contact sheets of all 300; in doubt a seed stands here.
CHILD_LIKE = frozenset({
    1, 5, 6, 7, 8, 12, 14, 19, 25, 28, 33, 39, 47, 48, 51, 57, 59, 62, 63, 68, 74, 75, 80, 84, 85, 95, 104, 105, 106,
    116, 118, 124, 125, 126, 127, 131, 132, 134, 137, 145, 150, 153, 155, 160, 161, 162, 165, 172, 173, 174, 184, 186,
    187, 193, 196, 199, 200, 204, 207, 210, 214, 215, 216, 219, 223, 230, 231, 232, 239, 240, 243, 244, 249, 250, 252,
    253, 260, 261, 266, 269, 273, 274, 275, 279, 280, 287, 289, 293})


@dataclass(frozen=True)
class Pair:
    """One portrait to make: a person, and pictures of others from which its head may come."""

    number: int
    reference: str  # picture's name: NNNNN, or NNNNN_a
    targets: tuple[str, ...]  # in the order to try; the first that is turned far enough gives the head
    others: tuple[str, ...]  # references of other people
    seed: int  # of the portrait's noise
    shown: bool = True  # whether the reference may stand in a contact sheet


@dataclass(frozen=True)
class Pictures:
    """The held-out pictures by name, from a folder of JPEGs or from one that holds the two archives."""

    folder: Path
    fit: ClassVar[Fit] = "squash"  # all are framed as the training's were
    least_yaw: ClassVar[float] = 10.0  # degrees: a target head nearer the viewer tests little

    @cached_property
    def names(self) -> frozenset[str]:
        """Raises BadInput where the folder holds no held-out pictures."""
        found = self._files or self._members
        names = frozenset(Path(name).stem for name in found if int(Path(name).name[:5]) < HELD_OUT_SEEDS)
        if not names:
            raise BadInput(f"{self.folder} holds no held-out pictures, expected {' and '.join(ARCHIVES)} or 00000.jpg "
                           "and so on: give the folder with --pictures")
        return names

    @property
    def digest(self) -> str:
        """Of what is there, by name."""
        return hashlib.sha256(" ".join(sorted(self.names)).encode()).hexdigest()[:12]

    def read(self, name: str) -> np.ndarray:
        """(h, w, 3) uint8."""
        file = f"{name}.jpg"
        data = self._files[file].read_bytes() if self._files else self._member(file)
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))

    @cached_property
    def _files(self) -> dict[str, Path]:
        return {path.name: path for path in self.folder.glob("[0-9]" * 5 + "*.jpg")}

    @cached_property
    def _members(self) -> dict[str, tuple[Path, int, int]]:
        """Where each picture lies in the archives: uncompressed tar files are read in place."""
        places: dict[str, tuple[Path, int, int]] = {}
        for path in (self.folder / name for name in ARCHIVES):
            if path.is_file():
                with tarfile.open(path, "r:") as archive:
                    places |= {Path(m.name).name: (path, m.offset_data, m.size) for m in archive if m.isfile()}
        return places

    def _member(self, file: str) -> bytes:
        path, start, size = self._members[file]
        with path.open("rb") as archive:
            archive.seek(start)
            return archive.read(size)


def pair_up(names: frozenset[str], count: int, flag: str = "--pairs") -> list[Pair]:
    """The first `count` pairs, each with another reference; the same ones for every bundle and every count.

    Raises BadInput for more pairs than there are identities; `flag` is what the user asked for them with.
    """
    references = sorted(name for name in names if "_" not in name)
    if not 1 <= count <= len(references):
        raise BadInput(f"{flag} is {count}, expected 1 to {len(references)}, the held-out identities at hand")
    order = np.random.default_rng(PAIRING_SEED).permutation(references)
    return [_pair(number, str(order[number]), sorted(names), references) for number in range(count)]


def _pair(number: int, reference: str, names: list[str], references: list[str]) -> Pair:
    rng = np.random.default_rng([PAIRING_SEED, number])
    targets = [str(name) for name in rng.permutation(names) if not str(name).startswith(reference)]
    others = [str(name) for name in rng.permutation(references) if str(name) != reference]
    return Pair(number, reference, tuple(targets), tuple(others[:OTHERS]), number, int(reference) not in CHILD_LIKE)
