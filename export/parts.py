"""Finished parts of a build, kept beside the bundle until it is whole, so that a killed build goes on where it was."""
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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
    """The parts of one build. Those of another key, that a build of other sources or options left, are made anew."""

    def __init__(self, folder: Path, keys: Mapping[str, str], report: Callable[[str], None]):
        """`keys`: of each part by name, what decides its content; `report` gets a line a part."""
        self.folder, self.keys, self.report = folder, keys, report
        self.asked = 0
        for scratch in folder.glob(f"{SCRATCH}*"):  # of a build that was killed
            shutil.rmtree(scratch, ignore_errors=True)

    def holds(self, name: str) -> bool:
        """Whether an earlier run left that part."""
        return self._left(name) is not None

    def make(self, name: str, work: Callable[[Path], Facts], origin: str | None = None) -> Part:
        """The part of that name: what an earlier run left, or what `work` writes now into the folder it is given.

        `origin`: the bundle that `work` takes it from, where it makes nothing.
        Raises BundleError where the disk does not take it; what was finished before stays.
        """
        label = self._label(name)
        if (facts := self._left(name)) is not None:
            self.report(f"{label}: kept")
            return Part(self.folder / name, facts)
        started = time.monotonic()
        if origin is None:
            self.report(f"{label} ...")
        with self._scratch() as scratch:
            facts = work(scratch)
            self._publish(scratch, name, facts)
        self.report(f"{label}: kept from {origin}" if origin else f"{label}: {time.monotonic() - started:.0f} s")
        return Part(self.folder / name, facts)

    def skip(self, name: str) -> None:
        """Pass over a part: all that would be made from it is there."""
        self.report(f"{self._label(name)}: not needed")

    def clear(self) -> None:
        """Delete all parts: the bundle is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _label(self, name: str) -> str:
        self.asked += 1
        return f"[{self.asked}/{len(self.keys)}] {name}"

    def _left(self, name: str) -> Facts | None:
        """The facts of a part that is whole and of this build's key."""
        folder = self.folder / name
        try:
            record = json.loads((folder / FACTS).read_text())
            whole = all((folder / name).stat().st_size == size for name, size in record["files"].items())
            facts: Facts = record["facts"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return facts if whole and record.get("key") == self.keys[name] else None

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

    def _publish(self, scratch: Path, name: str, facts: Facts) -> None:
        files = {file.relative_to(scratch).as_posix(): file.stat().st_size
                 for file in scratch.rglob("*") if file.is_file()}
        with (scratch / FACTS).open("x") as new:  # never into a file that a bundle shares
            json.dump({"key": self.keys[name], "facts": facts, "files": files}, new)
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch.rename(folder)
