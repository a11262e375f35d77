"""`caphuman batch --engine ray` on a local cluster of two cores.

One test draws with real workers. The others have workers that draw nothing, so that they can die as told: classes in
functions, which Ray sends to its processes by value.
"""
import json
from pathlib import Path

import numpy as np
import pytest

from caphuman_edge.runtime.image import load_photo, read_metadata

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
QUICK = "--renderer", "numpy"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Starting one takes seconds, so the commands find it running."""
    for last in (False, False, True):  # Ray gives up after 30 s, which a busy machine may need
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            break
        except Exception:
            ray.shutdown()
            if last:
                raise
    yield
    ray.shutdown()


@pytest.fixture
def write_jobs(folder, photo):
    """`write_jobs({...}, ...)` is a jobs file of these jobs of the photo."""

    def write(*jobs):
        lines = [json.dumps({"photo": str(photo), "steps": 1, **job}) for job in jobs]
        (folder / "jobs.jsonl").write_text("\n".join(lines))

    return write


@pytest.fixture
def batch(caphuman):
    """Runs `caphuman batch jobs.jsonl --out out --engine ray`."""
    return lambda *flags: caphuman("batch", "jobs.jsonl", "--out", "out", "--engine", "ray", *QUICK, *flags)


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Puts stand-ins in the workers' place; gives a folder in which they note the portraits they were asked for.

    A file NUMBER-dies, -raises, -fails or -fills in it, NUMBER being the seed, tells what becomes of that one; a file
    open-dies that none of them lives to draw.
    """
    from caphuman_edge.runtime.cli import batch_ray
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(batch_ray, "Worker", _stand_in(notes))
    return notes


def _stand_in(notes: Path) -> type:
    class StandIn:
        def __init__(self, jobs, machine):
            self.process = __import__("os").getpid()

        def open(self):
            from caphuman_edge.runtime.cli.batch_ray import Answer

            if (notes / "open-dies").exists():
                __import__("os")._exit(1)
            return Answer()

        def draw(self, raw, digest, number):
            import json
            import os
            import time

            import numpy

            from caphuman_edge.runtime.cli.batch_ray import Answer
            from caphuman_edge.runtime.image import save_png

            seed = json.loads(raw)["seed"] + number - 1
            with (notes / "drawn").open("a") as file:
                file.write(f"{self.process} {seed}\n")
            time.sleep(0.2)  # so that the other worker has its share
            if (notes / f"{seed}-dies").exists():
                text = (notes / f"{seed}-dies").read_text()
                (notes / f"{seed}-dies").write_text(text[1:])
                if text:
                    os._exit(1)
            if (notes / f"{seed}-raises").exists():
                raise ZeroDivisionError("surprise")
            if (notes / f"{seed}-fails").exists() or (notes / f"{seed}-fills").exists():
                return Answer(error="no face found", full=(notes / f"{seed}-fills").exists())
            save_png(notes / f"{seed}.png", numpy.zeros((64, 64, 3), numpy.uint8),
                     {"caphuman": json.dumps({"job": digest})})
            return Answer((notes / f"{seed}.png").read_bytes(), heard=(f"heard of {seed}",))

    return StandIn


def drawn(notes) -> list[int]:
    return sorted(int(line.split()[1]) for line in (notes / "drawn").read_text().splitlines())


def records(folder) -> dict[str, dict]:
    lines = [json.loads(line) for line in (folder / "out" / "ledger.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in lines}) == len(lines)
    return {record["id"]: record for record in lines}


def test_two_workers_draw_what_one_process_draws(batch, caphuman, write_jobs, folder):
    write_jobs({"id": "a", "yaw": 20}, {"id": "b", "seed": 4, "count": 2}, {"id": "c", "expression": {"grin": 1}})
    done = batch("--workers", 2)
    assert done.code == 2 and "2 done, 1 failed, 0 done before" in done.err
    assert ray.is_initialized()  # who else uses it goes on
    caphuman("batch", "jobs.jsonl", "--out", "here", *QUICK)
    names = ["a.png", "b-1.png", "b-2.png"]
    assert sorted(file.name for file in (folder / "out").glob("*.png")) == names
    for name in names:
        np.testing.assert_array_equal(load_photo(folder / "out" / name), load_photo(folder / "here" / name))
        assert read_metadata(folder / "out" / name, "caphuman") == read_metadata(folder / "here" / name, "caphuman")
    assert "2 done before" in batch().err and "2 done before" in caphuman(
        "batch", "jobs.jsonl", "--out", "out", *QUICK).err


def test_all_workers_share_the_jobs_and_their_warnings_are_told(batch, workers, write_jobs, folder):
    write_jobs(*({"id": f"j{seed}", "seed": seed} for seed in range(8)))
    done = batch("--workers", 2)
    assert done.code == 0 and drawn(workers) == list(range(8))
    processes = {line.split()[0] for line in (workers / "drawn").read_text().splitlines()}
    assert len(processes) == 2
    assert "caphuman: warning: j3: heard of 3\n" in done.err
    assert {record["status"] for record in records(folder).values()} == {"done"} and len(records(folder)) == 8


def test_a_job_whose_worker_dies_is_tried_once_more(batch, workers, write_jobs, folder):
    (workers / "2-dies").write_text("x")  # once
    (workers / "5-dies").write_text("xx")
    write_jobs(*({"id": f"j{seed}", "seed": seed} for seed in range(8)))
    done = batch("--workers", 2)
    assert done.code == 2 and "7 done, 1 failed" in done.err
    assert drawn(workers) == sorted([*range(8), 2, 5])
    assert records(folder)["j5"]["error"].startswith("worker died") and records(folder)["j2"]["status"] == "done"
    assert batch("--retry").code == 0 and drawn(workers)[-1:] == [7]


def test_errors_of_a_worker_fail_its_job_alone(batch, workers, write_jobs, folder):
    (workers / "1-raises").write_text("")
    (workers / "2-fails").write_text("")
    write_jobs(*({"id": f"j{seed}", "seed": seed} for seed in range(4)))
    assert batch("--workers", 2).code == 2
    ended = records(folder)
    assert ended["j1"]["error"].startswith("ZeroDivisionError: surprise") and ended["j2"]["error"] == "no face found"
    assert ended["j0"]["status"] == ended["j3"]["status"] == "done"


def test_portraits_of_a_job_that_are_there_are_not_drawn_again(batch, workers, write_jobs, folder):
    write_jobs({"id": "a", "seed": 1, "count": 3})
    batch()
    (folder / "out" / "a-2.png").unlink()
    (folder / "out" / "ledger.jsonl").unlink()
    assert batch().code == 0 and drawn(workers) == [1, 2, 2, 3]


def test_a_workers_full_disk_stops_the_batch(batch, workers, write_jobs, folder):
    (workers / "0-fills").write_text("")
    write_jobs({"id": "a", "seed": 0}, {"id": "b", "seed": 1})
    done = batch("--workers", 1)
    assert done.code == 2 and "2 left" in done.err and "a worker's disk is full" in done.err
    assert records(folder) == {}


def test_workers_that_die_as_they_start_end_the_batch(batch, workers, write_jobs, folder):
    (workers / "open-dies").write_text("")
    write_jobs({"id": "a", "seed": 0})
    done = batch()
    assert done.code == 2 and "workers died as they opened the bundle" in done.err and records(folder) == {}


def test_a_worker_whose_files_are_others_refuses_the_job(write_jobs, folder):
    from caphuman_edge.runtime.cli import Parser
    from caphuman_edge.runtime.cli import batch as command
    from caphuman_edge.runtime.cli.batch_ray import Answer, Worker, _machine

    write_jobs({"id": "a"})
    parser = Parser()
    command.add(parser.add_subparsers())
    args = parser.parse_args(["batch", "jobs.jsonl", "--out", "out", *QUICK])
    worker = Worker(str(folder / "jobs.jsonl"), _machine(args))
    assert worker.open() == Answer()
    answer = worker.draw((folder / "jobs.jsonl").read_bytes(), "another digest", 1)
    assert answer.png == b"" and "other files under these paths" in answer.error
