"""The engine `ray` of `caphuman batch`: actors draw, each with a model of its own, and send pictures back as bytes.

Only the driver, which is this process, knows what is left, writes pictures and keeps the ledger. Workers read photos,
masks and bundle themselves, under the same paths; one whose files are others than the driver's refuses the job.
"""
import argparse
import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ..errors import BadInput, CapHumanError
from ..ledger import disk_is_full, write_whole
from . import generate
from .batch import MARK, Batch, Planned, told
from .job_flags import JobReader, shared_actions

cluster: Any = ray  # for what carries no types: actors, and questions about the cluster
TRIES = 2  # of a job whose worker dies
FALSE_STARTS = 3  # workers that die in a row before they can draw; then there is no point in more
PATIENCE = 60.0  # seconds without any news, after which a person is told what is waited for


@dataclass(frozen=True)
class Answer:
    """What a worker sends: a picture, or why there is none."""

    png: bytes = b""
    error: str = ""
    full: bool = False  # whether the worker's disk is, so that it cannot draw any other either
    heard: tuple[str, ...] = ()  # warnings


@dataclass(eq=False)
class Task:
    """A job in work."""

    planned: Planned
    raw: bytes  # its line
    missing: deque[tuple[int, Path]]  # numbers and files of the portraits that are still to be drawn
    start: float = field(default_factory=time.monotonic)
    deaths: int = 0  # of workers that had it


class Worker:
    """An actor: opens a pipeline once, then draws a portrait a call. Errors are answers, which any driver can read."""

    def __init__(self, jobs: str, machine: dict[str, Any]) -> None:
        self._jobs, self._machine = Path(jobs), argparse.Namespace(**machine)

    def open(self) -> Answer:
        """Load what all jobs share."""
        try:
            self._pipe = generate.opened(self._machine)
            self._reader = JobReader(self._jobs, self._pipe, self._machine)
        except CapHumanError as error:
            return Answer(error=told(error))
        return Answer()

    def draw(self, raw: bytes, digest: str, number: int) -> Answer:
        """One portrait of the job on a line; `digest` is the job's on the driver."""
        with warnings.catch_warnings(record=True) as heard, tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("always")
            try:
                png = self._drawn(raw, digest, number, Path(folder) / "portrait.png")
            except Exception as error:  # noqa: BLE001  the driver records it, as it does its own
                return Answer(error=told(error), full=disk_is_full(error))
        return Answer(png, heard=tuple(dict.fromkeys(str(warning.message) for warning in heard)))

    def _drawn(self, raw: bytes, digest: str, number: int, file: Path) -> bytes:
        job = self._reader.read(raw)
        if job.digest != digest:
            raise BadInput("a worker finds another bundle or other files under these paths than this machine; share "
                           "the folder between them, or copy it anew")
        generate.make(job.one(number, file), lambda: contextlib.nullcontext(self._pipe), {MARK: digest})
        return file.read_bytes()


def draw_on_ray(batch: Batch) -> None:
    """Do all jobs that are left. Raises BadInput where no worker can start, or a disk is full."""
    if batch.todo:
        with _cluster():
            Crew(batch).work()


class Crew:
    """The workers, and what each is at."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self._todo = batch, deque(batch.todo)
        self._again: deque[Task] = deque()  # whose worker died
        self._busy: dict[Any, tuple[Any, Task | None]] = {}  # by awaited answer: worker, and its task once it is open
        self._false_starts = 0
        threads = batch.args.threads
        self._actor = cluster.remote(Worker).options(num_cpus=threads or 1, scheduling_strategy="SPREAD")
        self._size = min(batch.args.workers or _fitting(threads), len(batch.todo))

    def work(self) -> None:
        """Until no job is left."""
        try:
            for _ in range(self._size):
                self._hire()
            while self._todo or self._again or self._drawing():
                answers, _ = ray.wait(list(self._busy), timeout=PATIENCE)
                if not answers and not self._drawing():
                    _wait_told()
                for answer in answers:
                    self._settle(answer, *self._busy.pop(answer))
        finally:  # workers that were not open yet, or all where something ends this early
            for worker, _ in self._busy.values():
                ray.kill(worker)

    def _drawing(self) -> bool:
        return any(task for _, task in self._busy.values())

    def _hire(self) -> None:
        worker = self._actor.remote(str(self._batch.args.jobs.absolute()), _machine(self._batch.args))
        self._busy[worker.open.remote()] = worker, None

    def _settle(self, awaited: Any, worker: Any, task: Task | None) -> None:
        """Take in what a worker answers, or that it is dead, and give it or its successor the next portrait."""
        try:
            answer = ray.get(awaited)
        except RayTaskError as error:  # what a worker foresees, it answers
            answer = Answer(error=told(error.cause if isinstance(error.cause, Exception) else error))
        except RayError:  # dead, out of reach, or stopped for the memory that it took
            ray.kill(worker)
            self._buried(task)
            self._hire()
            return
        if task is None:
            self._opened(answer)
        else:
            self._take(task, answer)
        self._give(worker, task)

    def _opened(self, answer: Answer) -> None:
        if answer.error:
            raise BadInput(f"a worker cannot start: {answer.error}")
        self._false_starts = 0

    def _buried(self, task: Task | None) -> None:
        """A worker died: its job is tried once more."""
        if task is None:
            self._false_starts += 1
            if self._false_starts >= FALSE_STARTS:
                raise BadInput(f"{FALSE_STARTS} workers died as they opened the bundle; give them more memory, or "
                               "fewer --workers")
            return
        task.deaths += 1
        if task.deaths < TRIES:
            self._again.append(task)
        else:
            self._failed(task, BadInput(f"worker died, {TRIES} times; its log is with Ray's, and memory is the usual "
                                        "reason"))

    def _take(self, task: Task, answer: Answer) -> None:
        """A portrait of a task, or the end of it."""
        for message in answer.heard:
            warnings.warn(f"{task.planned.id}: {message}", stacklevel=2)
        if answer.full:
            raise BadInput(f"a worker's disk is full ({answer.error}); what is done is recorded")
        if answer.error:
            self._failed(task, BadInput(answer.error))
            return
        _, file = task.missing.popleft()
        try:
            write_whole(file, answer.png)
        except CapHumanError as error:
            self._failed(task, error)
            return
        self._batch.progress.made(task.planned.id)
        if not task.missing:
            self._batch.done(task.planned, time.monotonic() - task.start)

    def _failed(self, task: Task, error: Exception) -> None:
        task.missing.clear()
        self._batch.failed(task.planned, error, time.monotonic() - task.start)

    def _give(self, worker: Any, task: Task | None) -> None:
        """The rest of its task, or the next one; a worker without either is let go."""
        if task is None or not task.missing:
            task = self._again.popleft() if self._again else self._next()
        if task is None:
            ray.kill(worker)
            return
        number, _ = task.missing[0]
        self._busy[worker.draw.remote(task.raw, task.planned.digest, number)] = worker, task

    def _next(self) -> Task | None:
        """The next job that has something to draw; those that have not are recorded."""
        while self._todo:
            planned = self._todo.popleft()
            try:
                missing = deque(self._batch.missing(self._batch.job(planned)))
            except Exception as error:  # noqa: BLE001  one bad job does not stop the rest
                self._batch.failed(planned, error, 0.0)
                continue
            if missing:
                return Task(planned, self._batch.raw(planned), missing)
            self._batch.done(planned, 0.0)
        return None


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that a worker needs, with paths that do not depend on where it runs."""
    head = args.head and (str(Path(args.head).absolute()) if os.path.isfile(args.head) else args.head)
    return {**{action.dest: vars(args)[action.dest] for action in shared_actions()},
            "bundle": args.bundle and args.bundle.absolute(), "head": head}


@contextmanager
def _cluster() -> Iterator[None]:
    """A connection to Ray, or the one that is there; where no cluster is named or found, Ray starts one here."""
    if ray.is_initialized():
        yield
        return
    local = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        cluster.init(**({} if "://" in os.environ.get("RAY_ADDRESS", "") else local))
    except Exception as error:  # Ray raises bare ones, too
        raise BadInput(f"Ray cannot be reached or started ({told(error)}); check RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


def _fitting(threads: int | None) -> int:
    """How many workers the cluster has room for: one a machine where each uses all of its cores."""
    if threads is None:
        return max(1, sum(node["Alive"] for node in cluster.nodes()))
    return max(1, int(cluster.cluster_resources().get("CPU", 1) // threads))


def _wait_told() -> None:
    print(f"caphuman: no worker has started for {PATIENCE:.0f} s; the cluster has "
          f"{cluster.cluster_resources().get('CPU', 0):.0f} cores, and one needs as many as --threads says",
          file=sys.stderr)
