"""Where a score keeps what it has done, so that a stopped run goes on: one JSON line a pair, strips for the sheet."""
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from caphuman_edge.quant.records import Records
from caphuman_edge.runtime.image import save_png
from caphuman_edge.runtime.sheet import Tile, contact_sheet

SHOWN = 24  # portraits in the sheet
STRIPS_A_ROW = 4
SHRINK = 2


@dataclass(frozen=True)
class Store:
    """The files of one bundle under one choice of settings, whatever the number of pairs."""

    stem: Path

    @classmethod
    def open(cls, folder: Path, name: str, settings: Mapping[str, Any]) -> "Store":
        """`settings` are all that changes a record; others get other files."""
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
        return cls(folder / f"{name}-{digest[:12]}")

    @property
    def records_file(self) -> Path:
        """One line a pair."""
        return self.stem.with_name(self.stem.name + ".jsonl")

    @property
    def sheet_file(self) -> Path:
        """The contact sheet."""
        return self.stem.with_name(self.stem.name + ".png")

    def records(self) -> dict[int, dict[str, Any]]:
        """What is done, by pair."""
        return Records(self.records_file).read()

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep one pair's record, at once and whole."""
        Records(self.records_file).add(record)

    def keep_strip(self, pair: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Keep one pair's pictures, by label, for the sheet."""
        self.stem.mkdir(exist_ok=True)
        tiles = [Tile(label, pixels) for label, pixels in pictures.items()]
        save_png(self._strip(pair), contact_sheet(tiles, len(tiles)))

    def has_strip(self, pair: int) -> bool:
        """Whether `keep_strip` was called for it."""
        return self._strip(pair).exists()

    def write_sheet(self, pairs: list[int]) -> None:
        """The strips of these pairs in one picture."""
        strips = [np.array(Image.open(self._strip(pair))) for pair in pairs]
        blank = np.full_like(strips[0], strips[0][0, 0])
        strips += [blank] * (-len(strips) % STRIPS_A_ROW)
        rows = [np.concatenate(strips[start:start + STRIPS_A_ROW], axis=1)
                for start in range(0, len(strips), STRIPS_A_ROW)]
        sheet = Image.fromarray(np.concatenate(rows)).reduce(SHRINK)
        save_png(self.sheet_file, np.array(sheet), {"AI-generated": "true"})

    def _strip(self, pair: int) -> Path:
        return self.stem / f"{pair:03d}.png"
