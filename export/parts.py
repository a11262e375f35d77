"""Finished parts of a build, kept beside the bundle until it is whole, so that a killed build goes on where it was."""
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caphuman_edge.runtime.errors import BundleError

FACTS = "part.json"
SCRATCH = ".making-"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A folder of files, and what its maker said about them."""

    folder: Path
    facts: Facts


class Parts:
    """The parts of one build. Those that another build left, of other sources or options, are made anew."""

    def __init__(self, folder: Path, recipe: Facts, count: int, report: Callable[[str], None]):
        """`recipe`: all that decides what the parts contain. `report` gets a line a part, `count` of them in all."""
        self.folder, self.count, self.report = folder, count, report
        self.recipe = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        self.asked = 0
        for scratch in folder.glob(f"{SCRATCH}*"):  # of a build that was killed
            shutil.rmtree(scratch, ignore_errors=True)

    def make(self, name: str, work: Callable[[Path], Facts]) -> Part:
        """The part of that name: what an earlier run left, or what `work` writes now into the folder it is given.

        Raises BundleError where the disk does not take it; what was finished before stays.
        """
        self.asked += 1
        label = f"[{self.asked}/{self.count}] {name}"
        folder = self.folder / name
        if (facts := self._left(folder)) is not None:
            self.report(f"{label}: kept")
            return Part(folder, facts)
        started = time.monotonic()
        self.report(f"{label} ...")
        with self._scratch() as scratch:
            facts = work(scratch)
            self._publish(scratch, folder, facts)
        self.report(f"{label}: {time.monotonic() - started:.0f} s")
        return Part(folder, facts)

    def clear(self) -> None:
        """Delete all parts: the bundle is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _left(self, folder: Path) -> Facts | None:
        """The facts of a part that is whole and of this recipe."""
        try:
            record = json.loads((folder / FACTS).read_text())
            whole = all((folder / name).stat().st_size == size for name, size in record["files"].items())
            facts: Facts = record["facts"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return facts if whole and record.get("recipe") == self.recipe else None

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        scratch = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.folder))
            yield scratch
        except OSError as error:
            raise BundleError(f"cannot write to {self.folder} ({error}); mend that, then the same command goes on "
                              "from here") from error
        finally:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)

    def _publish(self, scratch: Path, folder: Path, facts: Facts) -> None:
        files = {file.relative_to(scratch).as_posix(): file.stat().st_size
                 for file in scratch.rglob("*") if file.is_file()}
        (scratch / FACTS).write_text(json.dumps({"recipe": self.recipe, "facts": facts, "files": files}))
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch.rename(folder)
