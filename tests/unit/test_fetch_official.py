"""Fetching official files from a local server that behaves as servers do: drops, redirects, ignores, lies."""
import dataclasses
import hashlib
import http.server
import json
import re
import socket
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from caphuman_edge.export import download as download_module
from caphuman_edge.export import fetch_official
from caphuman_edge.export.fetch_official import FILES, OfficialFile, consent_of, fetch
from caphuman_edge.runtime.errors import BadInput, CheckpointError

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DROP = 70_000  # bytes after which a dropping server hangs up


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT as `server.behaviour` says; `server.ranges` keeps what was asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        behaviour, ranges = self.server.behaviour, self.server.ranges
        ranges.append(self.headers.get("Range"))
        if self.path == "/file" and "redirect" in behaviour:
            return self.answer(302, {"Location": behaviour["redirect"], **behaviour.get("redirect_headers", {})})
        statuses = behaviour.get("statuses", [])
        if statuses:
            return self.answer(statuses.pop(0), behaviour.get("status_headers", {}))
        content = behaviour.get("content", CONTENT)
        start = int(re.match(r"bytes=(\d+)-", ranges[-1])[1]) if ranges[-1] and not behaviour.get("no_ranges") else 0
        if start >= len(content):
            return self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
        headers = {"Content-Length": str(len(content) - start), **behaviour.get("headers", {})}
        if start:
            headers["Content-Range"] = f"bytes {start + behaviour.get('shift', 0)}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        drops = behaviour.get("drops", 0)
        if drops:
            behaviour["drops"] = drops - 1
            self.wfile.write(content[start:start + behaviour.get("drop_after", DROP)])
            self.close_connection = True
            return None
        self.wfile.write(content[start:])
        return None

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download_module, "PAUSE", 0.001)
    monkeypatch.setattr(download_module, "TIMEOUT", 5.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    running.behaviour, running.ranges = {}, []
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def file(server):
    return OfficialFile("model", "model.ckpt", f"http://127.0.0.1:{server.server_port}/file", "https://example.org/model",
                        len(CONTENT), SHA256, "MIT", False, "--model")


def fetched(file, folder, consent=lambda file: True, **options):
    return fetch([file.name], folder, consent, files={file.name: file}, **options)[file.name]


def refused(file, folder, **options):
    with pytest.raises((CheckpointError, BadInput)) as caught:
        fetched(file, folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- what goes well


def test_a_file_comes_whole_is_verified_and_recorded(file, tmp_path):
    steps, lines = [], []
    got = fetched(file, tmp_path, progress=lambda file, done, total: steps.append((done, total)), report=lines.append)
    assert got.path.read_bytes() == CONTENT
    assert (got.sha256, got.bytes, got.proof) == (SHA256, len(CONTENT), "pinned sha256")
    assert names_in(tmp_path) == ["model.ckpt", "official_files.json"]
    recorded = json.loads((tmp_path / "official_files.json").read_text())["model"]
    assert (recorded["sha256"], recorded["url"], recorded["licence"]) == (SHA256, file.url, "MIT")
    assert steps[0] == (0, len(CONTENT))
    assert steps[-1] == (len(CONTENT), len(CONTENT))
    assert any("MIT" in line for line in lines)


def test_a_file_that_is_there_is_verified_but_not_fetched(server, file, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(CONTENT)
    assert fetched(file, tmp_path).proof == "pinned sha256"
    assert server.ranges == []


def test_an_interrupted_download_goes_on_where_it_broke_off(server, file, tmp_path):
    (tmp_path / "model.ckpt.part").write_bytes(CONTENT[:120_000])
    assert fetched(file, tmp_path).path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=120000-"]


def test_dropped_connections_are_tried_again_from_where_they_were(server, file, tmp_path):
    server.behaviour["drops"] = 3
    assert fetched(file, tmp_path).path.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={DROP}-", f"bytes={2 * DROP}-", f"bytes={3 * DROP}-"]


def test_a_server_that_ignores_ranges_sends_all_again(server, file, tmp_path):
    server.behaviour["no_ranges"] = True
    (tmp_path / "model.ckpt.part").write_bytes(b"x" * 120_000)
    assert fetched(file, tmp_path).path.read_bytes() == CONTENT


def test_a_finished_part_only_needs_to_be_verified(server, file, tmp_path):
    (tmp_path / "model.ckpt.part").write_bytes(CONTENT)
    assert fetched(file, tmp_path).path.read_bytes() == CONTENT
    assert len(server.ranges) == 1


def test_a_part_longer_than_the_file_is_put_aside_and_fetched_again(server, file, tmp_path):
    (tmp_path / "model.ckpt.part").write_bytes(CONTENT + b"more")
    assert fetched(file, tmp_path).path.read_bytes() == CONTENT
    assert (tmp_path / "model.ckpt.bad").read_bytes() == CONTENT + b"more"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, file, tmp_path, status):
    server.behaviour["statuses"] = [status, status]
    assert fetched(file, tmp_path).path.read_bytes() == CONTENT
    assert len(server.ranges) == 3


def test_a_redirect_is_followed_and_its_range_kept(server, file, tmp_path):
    server.behaviour["redirect"] = "/elsewhere"
    (tmp_path / "model.ckpt.part").write_bytes(CONTENT[:50_000])
    assert fetched(file, tmp_path).path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=50000-"] * 2


@pytest.mark.parametrize("where", ["redirect", "answer"])
def test_where_no_hash_is_pinned_the_announced_one_counts_and_is_recorded(server, file, tmp_path, where):
    unpinned = dataclasses.replace(file, sha256=None, bytes=None)
    if where == "redirect":
        server.behaviour |= {"redirect": "/elsewhere", "redirect_headers": {"X-Linked-ETag": f'"{SHA256}"'}}
    else:
        server.behaviour["headers"] = {"ETag": f'"{SHA256}"'}
    lines = []
    assert fetched(unpinned, tmp_path, report=lines.append).proof == "sha256 announced by the server"
    assert any("sha256 announced by the server" in line for line in lines)
    assert fetched(unpinned, tmp_path).proof == "recorded sha256"


def test_a_published_md5_counts_where_there_is_nothing_better(file, tmp_path):
    published = dataclasses.replace(file, sha256=None, md5=hashlib.md5(CONTENT).hexdigest())
    assert fetched(published, tmp_path).proof == "published md5"
    other = dataclasses.replace(published, md5="0" * 32)
    assert "md5" in refused(other, tmp_path / "again")


# --- what goes wrong


def test_a_wrong_hash_is_told_and_what_came_is_kept_aside(server, file, tmp_path):
    wrong = CONTENT[:-1] + b"?"
    server.behaviour["content"] = wrong
    message = refused(file, tmp_path)
    assert f"gave sha256 {hashlib.sha256(wrong).hexdigest()}, expected {SHA256}" in message
    assert "model.ckpt.bad" in message
    assert names_in(tmp_path) == ["model.ckpt.bad"]
    assert (tmp_path / "model.ckpt.bad").read_bytes() == wrong


def test_an_announced_hash_that_does_not_hold_is_told(server, file, tmp_path):
    server.behaviour["headers"] = {"ETag": f'"{"0" * 64}"'}
    assert f"expected {'0' * 64}" in refused(dataclasses.replace(file, sha256=None), tmp_path)


@pytest.mark.parametrize(("behaviour", "what"), [
    ({"headers": {"ETag": f'"{"0" * 64}"'}}, "sha256"), ({"content": CONTENT + b"longer"}, "bytes")])
def test_a_file_replaced_at_its_source_is_told_before_it_is_downloaded(server, file, tmp_path, behaviour, what):
    server.behaviour |= behaviour
    message = refused(file, tmp_path)
    assert f"announces {what}" in message
    assert "was replaced there" in message
    assert names_in(tmp_path) == []


def test_another_file_in_its_place_is_told_and_stays(file, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"mine")
    assert "is another file; move it away" in refused(file, tmp_path)
    assert (tmp_path / "model.ckpt").read_bytes() == b"mine"


@pytest.mark.parametrize(("status", "reason"), [
    (401, "asks for an account"), (403, "refuses it"), (404, "does not have it any more"), (418, "answers 418")])
def test_a_server_that_does_not_give_the_file_is_not_asked_twice(server, file, tmp_path, status, reason):
    server.behaviour["statuses"] = [status]
    message = refused(file, tmp_path)
    assert reason in message
    assert "pass its path" in message
    assert len(server.ranges) == 1


def test_connections_that_bring_nothing_end_and_keep_the_part(server, file, tmp_path):
    (tmp_path / "model.ckpt.part").write_bytes(CONTENT[:1000])
    server.behaviour |= {"drops": 99, "drop_after": 0}
    message = refused(file, tmp_path)
    assert "broke off 5 times in a row" in message
    assert "1000 bytes are kept" in message
    assert (tmp_path / "model.ckpt.part").read_bytes() == CONTENT[:1000]


def test_bytes_from_another_place_are_refused(server, file, tmp_path):
    server.behaviour["shift"] = 5
    (tmp_path / "model.ckpt.part").write_bytes(CONTENT[:1000])
    assert "expected from 1000" in refused(file, tmp_path)


@pytest.mark.parametrize(("place", "message"), [
    ("file:///etc/passwd", "answers 302"), ("ftp://127.0.0.1/file", "expected https")])
def test_a_redirect_away_from_http_is_refused(server, file, tmp_path, place, message):
    server.behaviour["redirect"] = place
    assert message in refused(file, tmp_path)
    assert names_in(tmp_path) == []


def test_a_redirect_from_https_to_http_is_refused():
    request = urllib.request.Request("https://example.org/file")
    with pytest.raises(CheckpointError, match=r"leads to http://example.org/file, expected https"):
        download_module._Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/file")


def test_too_small_a_disk_is_told_before_anything_is_written(file, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "SPARE", 1 << 60)
    message = refused(file, tmp_path)
    assert "GB free, expected" in message
    assert names_in(tmp_path) == []


def test_without_a_network_all_that_is_missing_is_named(server, file, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    first = dataclasses.replace(file, name="first", file="first.ckpt")
    files = {"first": first, "second": dataclasses.replace(first, name="second", file="second.ckpt", url=nowhere),
             "third": dataclasses.replace(first, name="third", file="third.ckpt", url=nowhere, option="--third")}
    with pytest.raises(CheckpointError) as caught:
        fetch(list(files), tmp_path, lambda file: True, files=files)
    message = str(caught.value)
    assert "cannot be reached" in message
    assert "second.ckpt from https://example.org/model (pass it with --model), third.ckpt" in message
    assert "first.ckpt" not in message
    assert "\n" not in message


def test_a_silent_server_counts_as_unreachable(file, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "TIMEOUT", 0.05)
    monkeypatch.setattr(download_module, "PAUSE", 0.001)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        message = refused(dataclasses.replace(file, url=f"http://127.0.0.1:{silent.getsockname()[1]}/"), tmp_path)
    assert "To build without a network, bring: model.ckpt" in message


def test_a_damaged_record_is_told(file, tmp_path):
    (tmp_path / "official_files.json").write_text("{")
    assert "is damaged" in refused(file, tmp_path)


def test_an_unknown_name_lists_the_known_ones(file, tmp_path):
    with pytest.raises(BadInput, match=r"sdxl is no official file, expected some of caphuman, backbone, vae, facenet"):
        fetch(["sdxl"], tmp_path, lambda file: True)


# --- terms


def test_without_consent_nothing_non_commercial_is_fetched(server, file, tmp_path):
    asked = []
    limited = dataclasses.replace(file, non_commercial=True, licence="CC-BY-NC-4.0")
    message = refused(limited, tmp_path, consent=lambda file: asked.append(file.name))
    assert "CC-BY-NC-4.0" in message
    assert "--accept-licences" in message
    assert asked == ["model"]
    assert server.ranges == []
    assert fetched(limited, tmp_path).bytes == len(CONTENT)


def test_free_files_ask_for_no_consent(file, tmp_path):
    assert fetched(file, tmp_path, consent=lambda file: False).bytes == len(CONTENT)


@pytest.mark.parametrize(("accepted", "terminal", "typed", "given"), [
    (True, False, "", True), (False, False, "y\n", False), (False, True, "y\n", True), (False, True, "\n", False)])
def test_consent_is_the_option_or_an_answer_on_a_terminal(monkeypatch, capsys, file, accepted, terminal, typed, given):
    class Typed:
        def isatty(self):
            return terminal

        def readline(self):
            return typed

    monkeypatch.setattr(fetch_official.sys, "stdin", Typed())
    monkeypatch.setattr(fetch_official.sys.stderr, "isatty", lambda: terminal, raising=False)
    assert consent_of(accepted)(file) is given
    assert ("[y/N]" in capsys.readouterr().err) is (terminal and not accepted)


# --- the table


def test_the_table_is_whole_and_invents_nothing():
    for name, file in FILES.items():
        assert name == file.name
        assert file.url.startswith("https://")
        assert file.url.endswith("/" + file.file)
        assert file.page.startswith("https://")
        assert Path(file.file).name == file.file
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.sha256 or file.md5
    assert FILES["caphuman"].non_commercial
    assert "NON-COMMERCIAL" in FILES["caphuman"].notice()
    assert "size unknown" in FILES["caphuman"].notice()
    assert "4.27 GB" in FILES["backbone"].notice()
