"""A batch's books: lines, ids, digests, names and the ledger, without a pipeline."""
import errno
import json
import os

import numpy as np
import pytest

from caphuman_edge.runtime import batch, ledger
from caphuman_edge.runtime.batch import (
    FileDigests,
    Names,
    check_id,
    digest_of,
    missing_files,
    parse_job,
    picture_files,
    read_line,
    read_lines,
)
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.image import save_png
from caphuman_edge.runtime.ledger import Ledger, clear_scratch, disk_is_full, locked, write_whole

# Lines of a jobs file.


@pytest.fixture
def jobs(tmp_path):
    """`jobs(content)` is a jobs file of it."""

    def write(content: bytes):
        file = tmp_path / "jobs.jsonl"
        file.write_bytes(content)
        return file

    return write


def test_blank_lines_and_comments_are_passed_over_but_counted(jobs):
    file = jobs(b'\xef\xbb\xbf{"a": 1}\r\n\n  # no job\n{"b": 2}')
    assert [(line.number, parse_job(line.raw)) for line in read_lines(file)] == [(1, {"a": 1}), (4, {"b": 2})]


def test_a_line_is_found_again_by_its_offset(jobs):
    file = jobs(b'# one\n{"a": 1}\n' + b"x" * 250_000 + b'\n{"b": 2}\n')
    lines = list(read_lines(file))
    assert [line.number for line in lines] == [2, 3, 4]
    assert [read_line(file, line.offset) for line in lines] == [line.raw for line in lines]


def test_a_line_without_end_is_not_read_into_memory(jobs):
    (line,) = read_lines(jobs(b"[" * 1_000_000))
    assert len(line.raw) == batch.LONGEST_LINE + 1
    with pytest.raises(BadInput, match=f"longer than {batch.LONGEST_LINE} bytes"):
        parse_job(line.raw)


@pytest.mark.parametrize("raw, message", [
    (b"{", "is not JSON"), (b"[1]", "expected an object"), (b'{"a": 1, "a": 2}', "'a' is given twice"),
    (b'{"a": NaN}', "NaN is no number"), (b'{"a": 1e999}', "1e999 is no number"), (b'{"a": "\xff"}', "not UTF-8"),
    (b'{"a": ' * 20_000, "longer|not JSON"), (b"[" * 90_000, "not JSON"), (b'{"a": ' + b"9" * 9000 + b"}", "not JSON")])
def test_what_is_no_job_is_refused(raw, message):
    with pytest.raises(BadInput, match=message):
        parse_job(raw)


def test_only_a_file_holds_jobs(tmp_path):
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadInput, match="check the path"):
            next(read_lines(place))


# What jobs are known by, and what they write.


@pytest.mark.parametrize("name", ["anna-1", "Zoë 2 (night)", "a", "v1.2+b", "山田", 7, "con2"])
def test_an_id_is_the_name_of_a_file(name):
    assert check_id(name) == str(name)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", ".hidden", "a.", "a ", "con", "NUL.png", "a\nb", "a\0b",
                                  "C:x", "x" * 151, "é" * 76, True, 1.5, ["a"], "\ud800", "-rf"])
def test_an_id_that_leaves_the_folder_or_is_no_name_everywhere_is_refused(name):
    with pytest.raises(BadInput, match="expected a name for a file"):
        check_id(name)


def test_digests_follow_content_and_not_the_order_of_keys():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert len({digest_of(content) for content in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"})}) == 4


def test_a_files_digest_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    digests = FileDigests()
    assert digests[tmp_path / "a"] == digests[tmp_path / "b"]
    (tmp_path / "b").write_bytes(b"2")
    assert FileDigests()[tmp_path / "b"] != digests[tmp_path / "a"]
    with pytest.raises(BadInput, match="is not a file"):
        digests[tmp_path]


@pytest.mark.parametrize("first, second", [(("a", 1), ("A", 1)), (("a", 3), ("a-3", 1)), (("a-3", 1), ("a", 3)),
                                           (("é", 1), ("e\N{COMBINING ACUTE ACCENT}", 1)), (("a", 2), ("a", 1))])
def test_no_two_jobs_may_write_one_file(first, second):
    names = Names()
    assert names.claim(*first, "digest", 4)
    with pytest.raises(BadInput, match="line 4"):
        names.claim(*second, "another", 9)


def test_names_that_only_look_alike_are_left_alone():
    names = Names()
    for line, (name, count) in enumerate([("a", 2), ("a-3", 1), ("a-01", 1), ("a-1-1", 1), ("b-1", 2), ("b", 1)]):
        assert names.claim(name, count, str(line), line)


def test_a_line_that_is_there_twice_is_one_job():
    names = Names()
    assert names.claim("a", 1, "same", 1)
    assert not names.claim("a", 1, "same", 2)


def test_pictures_of_the_same_job_are_kept_and_those_of_an_earlier_one_drawn_over(tmp_path, pixels):
    files = picture_files(tmp_path, "a", 3)
    assert [file.name for file in files] == ["a-1.png", "a-2.png", "a-3.png"]
    save_png(files[0], pixels, {"caphuman": json.dumps({"job": "mine"})})
    save_png(files[1], pixels, {"caphuman": json.dumps({"job": "of before"})})
    assert missing_files(files, "mine") == [(2, files[1]), (3, files[2])]


def test_a_picture_that_no_batch_made_is_not_drawn_over(tmp_path, pixels):
    (file,) = picture_files(tmp_path, "a", 1)
    for write in (lambda: file.write_text("mine"), lambda: save_png(file, pixels),
                  lambda: save_png(file, pixels, {"caphuman": "[" * 900_000}),
                  lambda: save_png(file, pixels, {"caphuman": '{"job": 1}'})):
        write()
        with pytest.raises(BadInput, match="made by no batch"):
            missing_files([file], "mine")


@pytest.fixture
def pixels():
    return np.zeros((64, 64, 3), np.uint8)


# The ledger.


def test_the_ledger_remembers_how_a_job_ended_last(tmp_path):
    with Ledger(tmp_path) as books:
        books.add("first", "a", error="no face")
        books.add("first", "a", files=["a.png"])
        books.add("line", None, error="line 7: no job")
    with Ledger(tmp_path) as books:
        assert books.done("a", "first") and not books.failed("a", "first")
        assert not books.done("a", "second") and books.failed("line", "line")
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert lines[1] == {"job": "first", "id": "a", "status": "done", "files": ["a.png"]}


def test_a_job_that_has_its_former_content_again_is_not_done_by_that(tmp_path):
    with Ledger(tmp_path) as books:
        books.add("first", "a", files=["a.png"])
        books.add("second", "a", files=["a.png"])  # over it
        assert not books.done("a", "first") and books.done("a", "second")


def test_a_line_torn_anywhere_is_taken_off_and_the_ledger_goes_on(tmp_path):
    with Ledger(tmp_path) as books:
        books.add("first", "a", files=["a.png"])
    whole = (tmp_path / "ledger.jsonl").read_bytes()
    torn = json.dumps({"job": "second", "id": "b", "status": "done"}).encode()
    for length in range(1, len(torn)):
        (tmp_path / "ledger.jsonl").write_bytes(whole + torn[:length])
        with Ledger(tmp_path) as books:
            assert books.done("a", "first") and not books.done("b", "second")
            assert (tmp_path / "ledger.jsonl").read_bytes() == whole
            books.add("third", "c", files=[])
        with Ledger(tmp_path) as books:
            assert books.done("c", "third")


def test_a_last_line_that_lacks_nothing_but_its_end_counts(tmp_path):
    torn = json.dumps({"job": "first", "id": "a", "status": "done"}).encode()
    (tmp_path / "ledger.jsonl").write_bytes(torn)
    with Ledger(tmp_path) as books:
        assert books.done("a", "first")
        books.add("second", "b", files=[])
    with Ledger(tmp_path) as books:
        assert books.done("a", "first") and books.done("b", "second")


def test_a_damaged_line_within_is_announced_and_passed_over(tmp_path):
    record = json.dumps({"job": "first", "id": "a", "status": "done"})
    (tmp_path / "ledger.jsonl").write_text(f'[1]\n{record}\n{{"job": 1}}\n')
    with pytest.warns(UserWarning, match="line [13] is no record") as heard, Ledger(tmp_path) as books:
        assert books.done("a", "first")
    assert len(heard) == 2


def test_a_file_without_lines_is_no_ledger(tmp_path):
    (tmp_path / "ledger.jsonl").write_bytes(b"x" * 1_500_000)
    with pytest.raises(BadInput, match="is no ledger"):
        Ledger(tmp_path)
    assert (tmp_path / "ledger.jsonl").stat().st_size == 1_500_000


def test_a_full_disk_leaves_the_ledger_whole(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Ledger(tmp_path) as books:
        books.add("first", "a", files=[])
        whole = books.path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(ledger.os, "fsync", full)  # where a delayed write tells it
            with pytest.raises(BadInput, match=r"No space left on device\); make room") as refused:
                books.add("second", "b", files=[])
        assert disk_is_full(refused.value)
        assert books.path.read_bytes() == whole and not books.done("b", "second")
        books.add("second", "b", files=[])
        assert books.done("b", "second")


def test_a_folder_belongs_to_one_batch_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(BadInput, match="another batch is at work"), locked(tmp_path):
        pass
    with locked(tmp_path):  # and the lock file that is left stops nobody
        assert (tmp_path / ledger.LOCK).exists()


def test_half_pictures_of_a_killed_batch_are_cleared_away_and_nothing_else(tmp_path):
    kept = ["a.png", ".a.png", "ledger.jsonl", ".a.txt.12"]
    for name in (*kept, ".a.png.12", ".b c.png.999999"):
        (tmp_path / name).write_text("x")
    clear_scratch(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


def test_bytes_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    write_whole(file, b"first")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadInput, match="make room"):
        write_whole(file, b"second")
    assert file.read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_known_through_the_errors_that_it_led_to():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise BadInput("cannot write") from error
    except BadInput as error:
        assert disk_is_full(error)
    assert not disk_is_full(BadInput("cannot write")) and not disk_is_full(OSError(errno.EACCES, "closed"))
