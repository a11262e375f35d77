"""`caphuman batch`: what becomes of a file of jobs, however often it is started and however it is stopped.

Where books are kept and not pictures, a stand-in for `generate.make` draws: it writes a picture with a job's mark.
"""
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.cli import generate
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.image import load_photo, read_metadata, save_png
from caphuman_edge.runtime.ledger import locked

QUICK = "--renderer", "numpy"


@pytest.fixture
def write_jobs(folder, photo):
    """`write_jobs({...}, ...)` is a jobs file of these jobs of the photo, one step each; text goes in as it is."""

    def write(*jobs):
        lines = [job if isinstance(job, str) else json.dumps({"photo": str(photo), "steps": 1, **job}) for job in jobs]
        (folder / "jobs.jsonl").write_text("\n".join(lines))
        return folder / "jobs.jsonl"

    return write


@pytest.fixture
def batch(caphuman):
    """Runs `caphuman batch jobs.jsonl --out out`."""
    return lambda *flags: caphuman("batch", "jobs.jsonl", "--out", "out", *QUICK, *flags)


@pytest.fixture
def drawn(monkeypatch):
    """Lets the stand-in draw; gives the files that it was asked for, in order."""
    files = []

    def make(args, open_pipe, mark, watch):
        files.append(args.out.name)
        with open_pipe() as pipe:
            size = pipe.bundle.config.height, pipe.bundle.config.width
        save_png(args.out, np.full((*size, 3), args.seed % 256, np.uint8), {"caphuman": json.dumps(mark)})

    monkeypatch.setattr(generate, "make", make)
    return files


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "ledger.jsonl").read_text().splitlines()]


def pictures(folder) -> dict[str, tuple[int, int]]:
    """Names of the pictures, and what changes when one is written anew."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in (folder / "out").glob("*.png")}


# What a job makes.


def test_a_job_makes_what_generate_makes_of_the_same_flags(batch, caphuman, write_jobs, photo, folder):
    write_jobs({"id": "anna", "photo": "../photo.png", "yaw": -20, "expression": {"mouthSmile": 0.7, "jawOpen": 0.2},
                "light": [-40, 20], "prompt": "-- a person", "seed": 6, "count": 2, "negative": None,
                "decoder": "tiny"})
    done = batch()
    assert (done.code, done.out) == (0, "")
    assert done.err == "caphuman: 1 done, 0 failed, 0 done before: see out/ledger.jsonl\n"
    assert sorted(pictures(folder)) == ["anna-1.png", "anna-2.png"]
    caphuman("generate", photo, "--yaw", -20, "--expression", "mouthSmile=0.7", "jawOpen=0.2", "--light", "-40,20",
             "--prompt=-- a person", "--seed", 7, "--steps", 1, "--decoder", "tiny", *QUICK)
    np.testing.assert_array_equal(load_photo(folder / "out" / "anna-2.png"), load_photo(folder / "portrait.png"))
    told, expected = (json.loads(read_metadata(file, "caphuman"))
                      for file in (folder / "out" / "anna-2.png", folder / "portrait.png"))
    (record,) = records(folder)
    assert told == {**expected, "job": record["job"]}
    assert record["files"] == ["anna-1.png", "anna-2.png"] and record["status"] == "done" and record["seconds"] > 0


def test_further_people_are_objects_of_their_own(batch, write_jobs, photo, folder):
    write_jobs({"id": "both", "x": -0.5, "scale": 0.5, "with": [{"photo": "../photo.png", "x": 0.5, "yaw": -10}]})
    assert batch().code == 0
    recipe = json.loads(read_metadata(folder / "out" / "both.png", "caphuman"))
    first, second = (person["controls"] for person in recipe["people"])
    assert (first["x"], first["scale"]) == (-0.5, 0.5) and (second["x"], second["yaw"]) == (0.5, -10)


# Jobs that fail.


BAD = {
    "{": "it is not JSON", '"photo.jpg"': "expected an object", '{"id": "../a"}': "id is '../a'",
    '{"prompt": "a person"}': "photo --photo is required", '{"photo": "missing.png"}': "missing.png cannot be read",
    '{"photo": 5}': "photo is '5', expected the path", '{"photo": ""}': "photo is '', expected the path",
    '{"photo": "me.png", "yaw": 500}': "'500' is not a number from -180 to 180",
    '{"photo": "me.png", "yaw": "left"}': "'left' is not a number", '{"photo": "me.png", "yaw": true}': "yaw is 'True'",
    '{"photo": "me.png", "steps": 2.5}': "invalid int value: '2.5'",
    '{"photo": "me.png", "steps": 0}': "steps is 0",
    '{"photo": "me.png", "jaw": null, "jaw": 3}': "given twice",
    '{"photo": "me.png", "light_from": "me.png", "light-from": "me.png"}': "'light-from' is given twice",
    '{"photo": "me.png", "colour": "red"}': "--colour=red is not known",
    '{"photo": "me.png", "help": true}': "--help is not known", '{"photo": "me.png", "ya": 3}': "--ya=3 is not known",
    '{"photo": "me.png", "yaw=3 --out": "x"}': "is no key", '{"photo": "me.png", "prompt": {"a": 1}}': "prompt is",
    '{"photo": "me.png", "expression": {"grin": 1}}': "grin",
    '{"photo": "me.png", "out": "x.png"}': "out is not a job's", '{"photo": "me.png", "json": true}': "json is not a",
    '{"photo": "me.png", "sheet": "x.png"}': "sheet is not a job's",
    '{"photo": "me.png", "backend": "ort"}': "give caphuman batch --backend",
    '{"photo": "me.png", "head": "flame"}': "give caphuman batch --head",
    '{"photo": "me.png", "safety_check": "none"}': "give caphuman batch --safety-check",
    '{"photo": "me.png", "with": {"photo": "me.png"}}': "not a list of people",
    '{"photo": "me.png", "with": [{"photo": "me.png", "seed": 3}]}': "is no flag of a person",
    '{"photo": "me.png", "with": [{"photo": "me.png", "bundle": "x"}]}': "give caphuman batch --bundle",
    '{"photo": "me.png", "modes": "pose"}': "add --pose",
}


def test_each_line_that_is_no_job_is_recorded_with_its_number_and_the_rest_is_done(batch, drawn, write_jobs, folder,
                                                                                    photo):
    (folder / "me.png").write_bytes(photo.read_bytes())
    write_jobs({"id": "first"}, *BAD, {"id": "last"})
    done = batch()
    assert (done.code, drawn) == (2, ["first.png", "last.png"])
    assert done.err == f"caphuman: 2 done, {len(BAD)} failed, 0 done before: see out/ledger.jsonl\n"
    failed = [record for record in records(folder) if record["status"] == "failed"]
    for number, (record, expected) in enumerate(zip(failed, BAD.values(), strict=True), 2):
        assert record["line"] == number and record["error"].startswith(f"line {number}: ")
        assert expected in record["error"], record["error"]
        assert "\n" not in record["error"]


def test_such_lines_are_told_of_each_time_and_recorded_once(batch, drawn, write_jobs, folder):
    write_jobs("{", {"id": "a"})
    batch()
    again = batch()
    assert again.code == 2 and "0 done, 1 failed, 1 done before" in again.err
    assert len(records(folder)) == 2


def test_a_job_that_fails_as_it_is_drawn_does_not_stop_the_rest(batch, drawn, write_jobs, folder, monkeypatch):
    draw = generate.make

    def make(args, *rest):
        if args.seed == 1:
            raise BadInput("no face\nfound")
        return {}["surprise"] if args.seed == 2 else draw(args, *rest)

    monkeypatch.setattr(generate, "make", make)
    write_jobs(*({"id": f"job {seed}", "seed": seed} for seed in range(4)))
    done = batch()
    assert done.code == 2 and "2 done, 2 failed" in done.err
    assert [record.get("error", "")[:32] for record in records(folder)] == [
        "", "no face found", "KeyError: 'surprise' (test_batch", ""]


def test_a_failed_job_is_tried_again_only_with_retry(batch, drawn, write_jobs, folder, monkeypatch):
    draw = generate.make
    monkeypatch.setattr(generate, "make", lambda *_: {}["surprise"])
    write_jobs({"id": "a"}, {"id": "b"})
    batch()
    monkeypatch.setattr(generate, "make", draw)
    again = batch()
    assert again.code == 2 and drawn == []
    assert "0 done, 0 failed, 0 done before, 2 failed before (--retry tries them again)" in again.err
    assert batch("--retry").code == 0 and drawn == ["a.png", "b.png"]
    assert "0 failed, 2 done before:" in batch().err


def test_two_jobs_of_one_name_are_the_first_ones(batch, drawn, write_jobs, folder):
    write_jobs({"id": "a"}, {"id": "A", "seed": 2}, {"id": "a"}, {"id": "b-1"}, {"id": "b", "count": 2})
    done = batch()
    assert done.code == 2 and "2 done, 2 failed" in done.err and drawn == ["a.png", "b-1.png"]
    assert [record["error"].split(";")[0] for record in records(folder) if "error" in record] == [
        "line 2: id 'A' would write a file of line 1", "line 5: id 'b' would write a file of line 4"]


def test_a_picture_that_no_batch_made_is_not_drawn_over(batch, drawn, write_jobs, folder):
    (folder / "out").mkdir()
    (folder / "out" / "a.png").write_text("mine")
    write_jobs({"id": "a"})
    assert batch().code == 2 and "made by no batch" in records(folder)[0]["error"]
    assert (folder / "out" / "a.png").read_text() == "mine"


# Started again.


def test_what_is_done_is_not_done_again_in_any_order(batch, drawn, write_jobs, folder):
    jobs = [{"id": "a"}, {"seed": 2}, {"seed": 3, "count": 2}]
    write_jobs(*jobs)
    assert batch().code == 0 and len(drawn) == 4
    before = pictures(folder)
    write_jobs("# sorted", *jobs[::-1], {"id": "new"})
    done = batch()
    assert "1 done, 0 failed, 3 done before" in done.err and drawn[4:] == ["new.png"]
    assert before.items() <= pictures(folder).items()


def test_what_has_changed_is_done_again(batch, drawn, write_jobs, folder, photo):
    (folder / "other.png").write_bytes(photo.read_bytes())
    jobs = [{"id": "a"}, {"id": "b"}, {"id": "posed", "pose": "other.png"},
            {"id": "two", "with": [{"photo": "other.png"}]}]
    write_jobs(*jobs)
    batch()
    write_jobs({"id": "a", "seed": 9}, *jobs[1:])
    Image.new("RGB", (64, 64)).save(folder / "other.png")
    (folder / "out" / "b.png").unlink()
    drawn.clear()
    assert batch().code == 0 and drawn == ["a.png", "b.png", "posed.png", "two.png"]
    assert "4 done before" in batch().err


def test_another_bundle_draws_everything_anew(batch, drawn, write_jobs, bundle_copy):
    write_jobs({"id": "a"})
    batch()
    assert "1 done before" in batch("--bundle", bundle_copy).err  # the same one elsewhere
    manifest = bundle_copy / "bundle.json"
    text = manifest.read_text()
    manifest.unlink()
    manifest.write_text(text + "\n")
    drawn.clear()
    assert batch("--bundle", bundle_copy).code == 0 and drawn == ["a.png"]


def test_pictures_tell_what_is_done_where_the_ledger_is_lost(batch, drawn, write_jobs, folder):
    write_jobs({"id": "a"}, {"id": "b", "count": 3})
    batch()
    (folder / "out" / "ledger.jsonl").unlink()
    (folder / "out" / "b-2.png").unlink()
    drawn.clear()
    assert batch().code == 0 and drawn == ["b-2.png"]
    assert [record["id"] for record in records(folder)] == ["a", "b"]


def test_json_reports_how_many_jobs_ended_how(batch, drawn, write_jobs):
    write_jobs({"id": "a"}, "{")
    assert json.loads(batch("--json").out) == {"done": 1, "failed": 1, "done_before": 0, "failed_before": 0, "left": 0,
                                               "ledger": "out/ledger.jsonl"}


def test_a_terminal_is_told_how_long_all_that_is_left_takes(batch, write_jobs, monkeypatch):
    write_jobs({"id": "a"}, {"id": "b"})
    assert "batch [" not in batch().err  # nobody watches
    write_jobs({"id": "a"}, {"id": "b", "seed": 3}, {"id": "c", "count": 2})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars = [bar.split("] ")[1] for bar in batch().err.split("\r") if "batch [" in bar]
    assert [bar.split(",")[0] for bar in bars] == ["0/3 portraits", "1/3 portraits", "1/3 portraits", "2/3 portraits",
                                                   "2/3 portraits", "3/3 portraits"]
    assert bars[-1].startswith("3/3 portraits, 0 s left") and not bars[0].startswith("0/3 portraits, 0 s left")


# Stopped.


def test_ctrl_c_stops_at_once_and_leaves_the_books_in_order(batch, drawn, write_jobs, folder, monkeypatch):
    draw = generate.make

    def make(args, *rest):
        if args.seed == 1:
            raise KeyboardInterrupt
        draw(args, *rest)

    monkeypatch.setattr(generate, "make", make)
    write_jobs(*({"id": f"{seed}", "seed": seed} for seed in range(3)))
    stopped = batch()
    assert stopped.code == 130
    assert stopped.err.splitlines() == ["caphuman: 1 done, 0 failed, 0 done before, 2 left: see out/ledger.jsonl",
                                        "caphuman: interrupted"]
    monkeypatch.setattr(generate, "make", draw)
    assert batch().code == 0 and drawn == ["0.png", "1.png", "2.png"]


def test_a_full_disk_stops_the_batch_and_fails_no_job(batch, drawn, write_jobs, folder, monkeypatch):
    replace = os.replace

    def full(source, target):
        if os.fspath(target).endswith("b.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    write_jobs({"id": "a"}, {"id": "b"}, {"id": "c"})
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        stopped = batch()
    assert stopped.code == 2
    summary, reason = stopped.err.splitlines()
    assert "1 done, 0 failed, 0 done before, 2 left" in summary
    assert "No space left on device" in reason and "what is done is recorded" in reason
    assert sorted(pictures(folder)) == ["a.png"] and len(records(folder)) == 1
    assert batch().code == 0 and drawn == ["a.png", "b.png", "b.png", "c.png"]


def test_a_second_batch_in_the_folder_is_refused(batch, drawn, write_jobs, folder):
    write_jobs({"id": "a"})
    (folder / "out").mkdir()
    with locked(folder / "out"):
        refused = batch()
    assert refused.code == 2 and "another batch is at work in out" in refused.err and drawn == []
    assert batch().code == 0


@pytest.mark.parametrize("flags, message", [
    (("missing.jsonl", "--out", "out"), "missing.jsonl cannot be read"), ((".", "--out", "out"), "is not a file"),
    (("jobs.jsonl",), "--out"), (("jobs.jsonl", "--out", "jobs.jsonl"), "cannot make the folder"),
    (("jobs.jsonl", "--out", "out", "--workers", 2), "--engine ray"),
    (("jobs.jsonl", "--out", "out", "--bundle", "missing"), "missing is not a bundle")])
def test_what_keeps_a_batch_from_starting_is_one_line(refusal, write_jobs, flags, message):
    write_jobs({"id": "a"})
    assert message in refusal("batch", *flags, *QUICK)


def test_a_missing_ray_is_named_with_its_extra(refusal, write_jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "caphuman_edge.runtime.cli.batch_ray", raising=False)
    write_jobs({"id": "a"})
    assert "pip install 'caphuman-edge[batch]'" in refusal("batch", "jobs.jsonl", "--out", "out", "--engine", "ray")


# Killed. Each stop is a process of its own that kills itself where it is most delicate.

STOPS = {
    "before a picture is in place": "os.replace = at(2, os.replace, before=True)",
    "between a picture and its record": "os.replace = at(2, os.replace, before=False)",
    "within a record": "ledger.Ledger._append = at(2, ledger.Ledger._append, torn=True)",
    "after a record": "ledger.Ledger._append = at(2, ledger.Ledger._append, before=False)",
}
SCRIPT = """
import os, signal, sys
from caphuman_edge.runtime import ledger, portrait
from caphuman_edge.runtime.cli import main

calls = 0
def at(count, call, before=False, torn=False):
    def run(*args):
        global calls
        if call is replace and not os.fspath(args[1]).endswith(".png"):
            return call(*args)
        calls += 1
        if calls == count and torn:
            os.write(args[0]._file.fileno(), args[1][:20])
        if calls == count and (before or torn):
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return run

replace, save = os.replace, portrait.Portrait.save
def saved(self, path):
    with open("drawn.txt", "a") as file:  # before the rename that may be the last thing this process does
        file.write(os.path.basename(path) + "\\n")
    save(self, path)
portrait.Portrait.save = saved
%s
sys.exit(main(sys.argv[1:]))
"""


def start(stop: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT % stop, "batch", "jobs.jsonl", "--out", "out", *QUICK]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_batch_that_is_killed_wherever_loses_and_repeats_nothing(write_jobs, folder):
    write_jobs(*({"id": f"job{number}", "seed": number} for number in range(6)), {"id": "more", "count": 2})
    kept: dict[str, tuple[int, int]] = {}
    for stop in STOPS.values():
        with start(stop) as process:
            assert process.wait() == -signal.SIGKILL
        assert kept.items() <= pictures(folder).items()
        kept = pictures(folder)
    with start() as process:
        assert process.wait() == 0, process.stderr.read()
    assert kept.items() <= pictures(folder).items()
    names = [*(f"job{number}.png" for number in range(6)), "more-1.png", "more-2.png"]
    assert sorted(pictures(folder)) == names
    assert sorted(record["id"] for record in records(folder)) == [*(f"job{number}" for number in range(6)), "more"]
    assert {record["status"] for record in records(folder)} == {"done"}
    drawn = (folder / "drawn.txt").read_text().split()
    lost = [name for name in drawn if drawn.count(name) == 2][:1]  # that was drawn, but not in place
    assert sorted(drawn) == sorted(names + lost)
    assert [file for file in (folder / "out").iterdir() if file.name.startswith(".job")] == []


def test_a_batch_that_is_killed_from_outside_goes_on_where_it_was(write_jobs, folder, photo):
    write_jobs(*({"id": f"job{number}", "seed": number} for number in range(3)))
    with start() as process:
        while not pictures(folder) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    kept = pictures(folder)
    assert 1 <= len(kept) < 3
    with start() as process:
        assert process.wait() == 0
    assert kept.items() <= pictures(folder).items()
    assert [record["id"] for record in records(folder)] == ["job0", "job1", "job2"]
    assert all(json.loads(read_metadata(folder / "out" / name, "caphuman"))["bundle_sha256"] == Bundle.open().digest
               for name in pictures(folder))
