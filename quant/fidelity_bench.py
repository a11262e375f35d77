"""What all columns of a comparison share, and where what is drawn and measured of each is kept.

A folder a column holds its portraits as PNG and its records, one JSON line a triple. Its name depends on nothing but
what is drawn, so another comparison finds it done.
"""
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from caphuman_edge.quant.fidelity_columns import Column, digest_of
from caphuman_edge.quant.heldout import Pair
from caphuman_edge.quant.judges import Judge
from caphuman_edge.quant.measures import Measurer, told_by_head
from caphuman_edge.quant.photos import Source
from caphuman_edge.quant.records import Records
from caphuman_edge.quant.tasks import Tasks
from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.contract import OFFICIAL_GRAPHS, PERCEPTION_GRAPHS
from caphuman_edge.runtime.pipeline import Pipeline

MEASURES_VERSION = 1  # counts up whenever a record's meaning changes, so that old records are not mixed in


@dataclass(frozen=True)
class Bench:
    """What all columns share: the reference's perception, the pictures, and the judges that are at hand."""

    pipe: Pipeline  # measures photos for all columns, and all portraits
    pictures: Source
    measurer: Measurer
    tasks: Tasks
    judge: Judge | None
    out: Path

    @classmethod
    def of(cls, pipe: Pipeline, pictures: Source, judge: Judge | None, measurer: Measurer, out: Path) -> "Bench":
        """A bench on these pictures; every one of them is measured once."""
        tasks = Tasks(lambda name: measurer.see(pictures.read(name), pictures.fit), told_by_head, pictures.least_yaw)
        return cls(pipe, pictures, measurer, tasks, judge, out)

    def portrait_file(self, column: Column, pair: Pair) -> Path:
        """What a column drew of a triple."""
        return self.folder(column) / f"{pair.number:05d}.png"

    def trajectory_file(self, column: Column, pair: Pair) -> Path:
        """The way there: timesteps, latents and predictions."""
        return self.folder(column) / f"{pair.number:05d}.npz"

    def folder(self, column: Column) -> Path:
        """Where a column's portraits lie: another one for all that changes them."""
        return self.out / digest_of([column.key, self._given])

    @cached_property
    def _given(self) -> str:
        """What portraits are drawn of: pictures, and what measures them."""
        perception = {name: [record.sha256 for record in part.forms["onnx"].files.values()]
                      for name, part in self.pipe.bundle.manifest.components.items()
                      if name in PERCEPTION_GRAPHS + OFFICIAL_GRAPHS}
        return digest_of([perception, *sha256_of([self.pipe.head_file]).values(), self.pictures.digest])

    def records(self, column: Column) -> Records:
        """What is measured of a column: another file for all that changes it."""
        judged = [self.judge and self.judge.name, self.measurer.parser is not None, MEASURES_VERSION]
        return Records(self.folder(column) / f"measures-{digest_of(judged)}.jsonl")

    def against(self, column: Column, reference: Column) -> Records:
        """A column's portraits beside the reference's."""
        return Records(self.folder(column) / f"against-{self.folder(reference).name}.jsonl")

    def steps(self, column: Column, reference: Column) -> Records:
        """A backend's predictions along the reference's trajectories; the column's own schedule has no part in it."""
        return Records(self.out / f"steps-{digest_of([column.computing, self.folder(reference).name])}.jsonl")


class Pipes:
    """One pipeline at a time, since a full-size bundle fills the memory."""

    def __init__(self) -> None:
        self._column: Column | None = None
        self._pipe: Pipeline | None = None

    def of(self, column: Column) -> Pipeline:
        """The pipeline that draws a column; the last one's is kept where it is the same."""
        kept = self._column
        if self._pipe is None or kept is None or (kept.bundle, kept.machine) != (column.bundle, column.machine):
            self.close()
            m = column.machine
            self._pipe = Pipeline(column.bundle, m.backend, m.threads, device=m.device, precision=m.precision)
            self._column = column
        return self._pipe

    def close(self) -> None:
        """Free what is open."""
        if self._pipe is not None:
            self._pipe.close()
        self._pipe = self._column = None
