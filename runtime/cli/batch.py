"""`caphuman batch`: many portraits from a file of jobs, so that it may be killed at any moment and started again."""
import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batch import Line, Names, missing_files, picture_files, read_line, read_lines
from ..errors import BadInput, CapHumanError, MissingExtra
from ..ledger import LEDGER, Ledger, clear_scratch, disk_is_full, locked, settle
from ..pipeline import Pipeline
from ..portrait import Step
from . import USER_ERROR, generate
from .job_flags import MACHINE, Job, JobReader, check, shared_actions
from .output import make_folder
from .progress import WIDTH
from .report import add_json_flag, show
from .values import whole

EVERY = 500  # lines; how often a person is told how many were looked at
MARK = "job"  # of a picture's recipe: the digest of the job that drew it


@dataclass(frozen=True)
class Planned:
    """A job that is left to do: enough to find it again, since there may be a hundred thousand."""

    id: str
    digest: str
    offset: int  # bytes, of its line in the jobs file
    line: int  # from 1
    count: int  # of portraits


@dataclass
class Tally:
    """How many jobs ended how."""

    done: int = 0
    failed: int = 0
    done_before: int = 0
    failed_before: int = 0
    left: int = 0

    def __str__(self) -> str:
        more = [f", {self.failed_before} failed before (--retry tries them again)" if self.failed_before else "",
                f", {self.left} left" if self.left else ""]
        return f"{self.done} done, {self.failed} failed, {self.done_before} done before{''.join(more)}"


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "batch", help="make portraits from a file of jobs", description=(
            "Makes the portraits of a jobs file, DIR/ID.png or DIR/ID-1.png, ... each. Start the same command again "
            "after a stop, whatever stopped it: nothing is lost, nothing is drawn twice. Lines may be added, moved and "
            "changed in between; a job is done again where it, a file that it reads or the bundle has changed, or its "
            "picture is gone."),
        epilog='A job is a line: {"id": "anna-1", "photo": "me.jpg", "yaw": 30, "expression": {"smile": 0.7}, '
               '"prompt": "...", "with": [{"photo": "you.jpg", "x": 0.5}]}. Keys are the long flags of caphuman '
               "generate, paths are relative to the jobs file, blank lines and # lines are passed over. Without an "
               f"id, a job is named by what it says. DIR/{LEDGER} tells of each job how it ended. Exit code: 0 if no "
               "job failed, now or before, else 2.")
    parser.add_argument("jobs", type=Path, metavar="JOBS", help="file with a job a line, in JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pictures and ledger")
    parser.add_argument("--retry", action="store_true", help="try jobs again that failed before")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray spreads the jobs over a Ray "
                        "cluster, that of RAY_ADDRESS or one on this machine; workers read photos and bundle under the "
                        "same paths, pictures come back through Ray (default: local)")
    parser.add_argument("--workers", type=whole(1, 10_000), metavar="N", help="with ray: how many, each with a model "
                        "of its own (default: with --threads as many as there are cores for, else one a machine)")
    group = parser.add_argument_group(MACHINE, "Of all jobs.")
    for action in shared_actions():
        group._add_action(action)
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan all jobs, do those that are left, tell how they ended."""
    if args.workers and args.engine == "local":
        raise BadInput(f"--workers {args.workers}: one process draws here, on all cores; leave it out, or add "
                       "--engine ray")
    draw = ray_engine() if args.engine == "ray" else draw_here
    next(read_lines(args.jobs), None)  # refuses what cannot be read before anything is made
    with generate.opened(args) as pipe:
        make_folder(args.out)
        with locked(args.out), Ledger(args.out) as ledger:
            clear_scratch(args.out)
            batch = Batch(args, pipe, ledger)
            with batch.told():
                draw(batch)
    if args.json:
        show({**vars(batch.tally), "ledger": str(ledger.path)}, True, str)
    return USER_ERROR if batch.tally.failed or batch.tally.failed_before else 0


def draw_here(batch: "Batch") -> None:
    """The engine `local`: one portrait after another, in this process."""
    for planned in batch.todo:
        with batch.recording(planned):
            job = batch.job(planned)
            for number, file in batch.missing(job):
                generate.make(job.one(number, file), lambda: contextlib.nullcontext(batch.pipe), {MARK: job.digest},
                              batch.progress.watch)
                batch.progress.made(job.id)


def ray_engine() -> Any:
    """The engine `ray`. Raises MissingExtra where that is not installed."""
    try:
        from .batch_ray import draw_on_ray
    except ModuleNotFoundError as error:
        if error.name == "ray":
            raise MissingExtra("ray", "batch", "--engine ray") from error
        raise
    return draw_on_ray


class Batch:
    """The jobs of one file on their way into one folder. Only who holds this writes the ledger."""

    def __init__(self, args: argparse.Namespace, pipe: Pipeline, ledger: Ledger) -> None:
        self.args, self.pipe, self.ledger = args, pipe, ledger
        self.tally = Tally()
        self.reader, self._names = JobReader(args.jobs, pipe, args), Names()
        self.todo = [planned for line in read_lines(args.jobs) if (planned := self._plan(line))]
        self.tally.left = len(self.todo)
        self.progress = Progress(sum(planned.count for planned in self.todo))

    def job(self, planned: Planned) -> Job:
        """A planned job, read again. Raises BadInput where it is another one by now."""
        job = self.reader.read(self.raw(planned))
        if job.digest != planned.digest:
            raise BadInput(f"line {planned.line} of {self.args.jobs} was changed while the batch ran; start it again")
        return job

    def raw(self, planned: Planned) -> bytes:
        """Its line."""
        return read_line(self.args.jobs, planned.offset)

    def missing(self, job: Job) -> list[tuple[int, Path]]:
        """The portraits that a job has still to draw, each with its number: a kill may have left some."""
        missing = missing_files(self.files(job.id, job.count), job.digest)
        self.progress.there(job.id, job.count - len(missing))
        return missing

    def files(self, name: str, count: int) -> list[Path]:
        """What a job writes."""
        return picture_files(self.args.out, name, count)

    @contextmanager
    def recording(self, planned: Planned) -> Iterator[None]:
        """Do a job within: it is recorded as done, or with what is raised as failed. Raises where the disk is full."""
        start = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001  one bad job does not stop the rest
            self.failed(planned, error, time.monotonic() - start)
        else:
            self.done(planned, time.monotonic() - start)

    def done(self, planned: Planned, seconds: float) -> None:
        """Record a job whose pictures are all there."""
        files = self.files(planned.id, planned.count)
        settle(files)
        self.ledger.add(planned.digest, planned.id, files=[file.name for file in files], seconds=round(seconds, 3))
        self.tally.done, self.tally.left = self.tally.done + 1, self.tally.left - 1
        self.progress.ended(planned.id, planned.count)

    def failed(self, planned: Planned, error: Exception, seconds: float) -> None:
        """Record a job that failed; raises the error where it would be every other job's, too."""
        if disk_is_full(error):
            raise BadInput(f"{told(error)}; what is done is recorded") from error
        self.ledger.add(planned.digest, planned.id, error=told(error), seconds=round(seconds, 3))
        self.tally.failed, self.tally.left = self.tally.failed + 1, self.tally.left - 1
        self.progress.ended(planned.id, planned.count)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell at the end how the jobs ended, also where it comes too early."""
        try:
            yield
        finally:
            self.progress.close()
            print(f"caphuman: {self.tally}: see {self.ledger.path}", file=sys.stderr)

    def _plan(self, line: Line) -> Planned | None:
        """What is left to do of a line; one that is no job is recorded as failed."""
        if line.number % EVERY == 0:
            _say_over(f"{line.number} lines looked at ")
        try:
            job = self.reader.read(line.raw)
            if not self._names.claim(job.id, job.count, job.digest, line.number) or self._ended(job):
                return None
            check(self.pipe, job.args)
        except Exception as error:  # noqa: BLE001  as in `recording`
            self._refused(line, error)
            return None
        return Planned(job.id, job.digest, line.offset, line.number, job.count)

    def _ended(self, job: Job) -> bool:
        """Whether there is nothing left to do of a job; counts those."""
        if self.ledger.done(job.id, job.digest) and all(map(Path.exists, self.files(job.id, job.count))):
            self.tally.done_before += 1
            return True
        if self.ledger.failed(job.id, job.digest) and not self.args.retry:
            self.tally.failed_before += 1
            return True
        return False

    def _refused(self, line: Line, error: Exception) -> None:
        """Each run looks at such lines anew; only the first records it."""
        self.tally.failed += 1
        if not self.ledger.failed(line.digest, line.digest):
            self.ledger.add(line.digest, None, line=line.number, error=f"line {line.number}: {told(error)}")


class Progress:
    """A bar on stderr of how many portraits are done, and how long the others take: none where nobody watches."""

    def __init__(self, count: int) -> None:
        self._count, self._ended, self._drawn, self._start = count, 0, 0, time.monotonic()
        self._parts: dict[str, int] = {}  # portraits that are there, of jobs that have not ended

    def there(self, job: str, portraits: int) -> None:
        """So many of a job were there already, which tells nothing of how long one takes."""
        self._parts[job] = portraits

    def watch(self, steps: Iterator[Step], label: str) -> Iterator[Step]:
        """The steps of a portrait; part of the bar."""
        for step in steps:
            self._show((step.index + 1) / step.count)
            yield step

    def made(self, job: str) -> None:
        """One more was drawn."""
        self._drawn += 1
        self._parts[job] = self._parts.get(job, 0) + 1
        self._show(0.0)

    def _show(self, part: float) -> None:
        """`part`: how much of one more portrait is drawn."""
        done = self._ended + sum(self._parts.values())
        left = (time.monotonic() - self._start) / (self._drawn + part) * max(0, self._count - done - part)
        bar = "#" * int(WIDTH * (done + part) / self._count)
        _say_over(f"batch [{bar:{WIDTH}}] {done}/{self._count} portraits, {_span(left)} left ")

    def ended(self, job: str, portraits: int) -> None:
        """A job of so many is done or failed."""
        self._parts.pop(job, None)
        self._ended += portraits

    def close(self) -> None:
        """What is printed next gets a line of its own."""
        if sys.stderr.isatty():
            print(file=sys.stderr)


def told(error: BaseException) -> str:
    """An error in one line: the user's as it is, any other with its kind and where it was raised."""
    message = " ".join(str(error).split())
    if isinstance(error, CapHumanError):
        return message
    place = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {message}" + "".join(f" ({Path(at.filename).name}:{at.lineno})" for at in place)


def _say_over(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}", end="", file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
