"""Downloads of large files over HTTP: resumed where they broke off, retried, checked against the disk's free space.

Only the standard library is used. A file grows as `<name>.part` beside its place; who calls checks it and moves it.
"""
import errno
import http.client
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO

from caphuman_edge.runtime.errors import CheckpointError

ATTEMPTS = 5  # in a row that bring nothing
PAUSE = 1.0  # seconds before the second attempt, doubled each time
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20  # bytes
SPARE = 64 << 20  # bytes that must stay free on the disk
SHA256 = re.compile(r'(?:W/)?"?([0-9a-f]{64})"?')
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")
BROKEN = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, TimeoutError, ssl.SSLEOFError,
          http.client.HTTPException)
REFUSALS = {401: "asks for an account", 403: "refuses it", 404: "does not have it any more",
            410: "does not have it any more"}

Progress = Callable[[int, int | None], None]  # (bytes so far, bytes in all if known)


class Unreachable(CheckpointError):
    """No server answered: there is no network, or not to that host."""


@dataclass(frozen=True)
class Announced:
    """What a server says about a file before it sends it."""

    bytes: int | None
    sha256: str | None  # the model hub's ETag of a large file is its sha256


class _Broken(Exception):
    """The connection broke, or the server is busy: worth another attempt."""


def download(url: str, part: Path, check: Callable[[Announced], None], progress: Progress) -> Announced:
    """Bring `part` to its full length, going on where it ends. `check` may raise before anything is written.

    Raises Unreachable where nothing answers, CheckpointError where the server has not the file, where the connection
    breaks again and again, or where the disk is too small. What was downloaded is kept.
    """
    failures = 0
    while True:
        start = _size(part)
        try:
            return _attempt(url, part, check, progress)
        except _Broken as error:
            failures = 1 if _size(part) > start else failures + 1
            if failures >= ATTEMPTS:
                raise _given_up(url, part, str(error)) from error
            time.sleep(PAUSE * 2 ** (failures - 1))


def require_space(folder: Path, missing: int) -> None:
    """Raise CheckpointError unless the disk has room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if free < missing + SPARE:
        raise CheckpointError(f"{folder} has {free / 1e9:.1f} GB free, expected {(missing + SPARE) / 1e9:.1f}; "
                              "make room or choose another folder")


def _attempt(url: str, part: Path, check: Callable[[Announced], None], progress: Progress) -> Announced:
    """One request, for what is missing. Raises _Broken where another one may help."""
    start = _size(part)
    headers = {"User-Agent": "caphuman-edge", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={start}-"} if start else {}))
    redirects = _Redirects()
    try:
        with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT) as response:
            start = _begin(response.headers, response.status, start, url)
            announced = _announced([*redirects.headers, response.headers], start)
            check(announced)
            if announced.bytes is not None:
                require_space(part.parent, announced.bytes - start)
            _copy(response, part, start, announced.bytes, progress)
    except urllib.error.HTTPError as error:
        return _complete_or_raise(error, url, part, redirects.headers)
    except urllib.error.URLError as error:
        if isinstance(error.reason, BROKEN):
            raise _Broken(str(error.reason)) from error
        raise Unreachable(f"{url} cannot be reached ({error.reason}); check the network") from error
    except BROKEN as error:
        raise _Broken(str(error) or type(error).__name__) from error
    if announced.bytes is not None and _size(part) < announced.bytes:
        raise _Broken(f"the connection ended after {_size(part)} of {announced.bytes} bytes")
    return announced


def _begin(headers: Message, status: int, start: int, url: str) -> int:
    """Where the body begins in the file: 0 from servers that know no ranges."""
    if status != http.client.PARTIAL_CONTENT:
        return 0
    found = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if not found or found[1] is None or int(found[1]) != start:
        raise CheckpointError(f"{url} answers with bytes from {headers.get('Content-Range')}, expected from {start}; "
                              "delete the .part file and fetch again")
    return start


def _announced(answers: list[Message], start: int) -> Announced:
    """Length and hash, from the hub's redirect or from the last answer."""
    length, sha256 = None, None
    for headers in answers:
        tag = SHA256.fullmatch(headers.get("X-Linked-ETag") or headers.get("ETag") or "")
        sha256 = sha256 or (tag[1] if tag else None)
        length = length or _number(headers.get("X-Linked-Size"))
    last = answers[-1]
    whole = CONTENT_RANGE.fullmatch(last.get("Content-Range", ""))
    body = _number(last.get("Content-Length"))
    total = _number(whole[2]) if whole else (start + body if body is not None else None)
    return Announced(total if total is not None else length, sha256)


def _copy(response: IO[bytes], part: Path, start: int, total: int | None, progress: Progress) -> None:
    try:
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            done = start
            progress(done, total)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise CheckpointError(f"{part} cannot grow: the disk is full; make room and fetch again") from error


def _complete_or_raise(error: urllib.error.HTTPError, url: str, part: Path, redirects: list[Message]) -> Announced:
    """What a status other than success means; an answer of 416 to a finished part is success."""
    if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        found = CONTENT_RANGE.fullmatch(error.headers.get("Content-Range", ""))
        if found and _number(found[2]) == _size(part):
            return Announced(_size(part), _announced([*redirects, error.headers], 0).sha256)
        kept = part.replace(part.with_suffix(".bad"))
        raise _Broken(f"{kept} was longer than the file, and was put aside") from error
    if error.code == http.client.TOO_MANY_REQUESTS or error.code >= http.client.INTERNAL_SERVER_ERROR:
        raise _Broken(f"the server answers {error.code} {error.reason}") from error
    reason = REFUSALS.get(error.code, f"answers {error.code}")
    raise CheckpointError(f"{url}: the server {reason} ({error.code}), expected the file; "
                          "get it with a browser and pass its path") from error


def _given_up(url: str, part: Path, reason: str) -> CheckpointError:
    if not _size(part):
        return Unreachable(f"{url} cannot be reached ({reason}); check the network")
    return CheckpointError(f"{url} broke off {ATTEMPTS} times in a row ({reason}); {_size(part)} bytes are kept in "
                           f"{part}: fetch again to go on from there")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, never to a less safe protocol, and keeps the headers of each: the hub puts the hash there."""

    def __init__(self) -> None:
        self.headers: list[Message] = []

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str,
                         headers: http.client.HTTPMessage, newurl: str) -> urllib.request.Request | None:
        if not newurl.startswith(("https://", "http://") if req.full_url.startswith("http://") else "https://"):
            raise CheckpointError(f"{req.full_url} leads to {newurl}, expected https; fetch it with a browser")
        self.headers.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
