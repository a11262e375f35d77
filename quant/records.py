"""Records of what is done, one JSON line a pair, so that a stopped run goes on."""
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caphuman_edge.runtime.ledger import unwritable

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Records:
    """A file of records, each with its pair's number under "pair"."""

    path: Path

    def read(self) -> dict[int, dict[str, Any]]:
        """What is done, by pair. A last line that a kill cut short is dropped from the file."""
        if not self.path.exists():
            return {}
        whole, _, cut = self.path.read_text().rpartition("\n")
        if cut:
            self.path.write_text(whole + "\n" if whole else "")
        return {record["pair"]: record for record in map(json.loads, whole.splitlines())}

    def add(self, record: Record) -> None:
        """Append one pair's record, at once and whole. Raises BadInput where it cannot be written."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error
