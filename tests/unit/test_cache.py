"""The user's cache folder and the hashes kept there."""
import hashlib
import os
from pathlib import Path

import pytest

from caphuman_edge.runtime.cache import cache_dir, platform_cache, sha256_of
from caphuman_edge.runtime.errors import BadInput


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))


def test_the_override_wins_and_the_folder_is_made(tmp_path):
    assert cache_dir() == tmp_path / "cache"
    assert cache_dir().is_dir()


def test_a_cache_that_cannot_be_made_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "file" / "inside"))
    with pytest.raises(BadInput, match="set CAPHUMAN_CACHE"):
        cache_dir()


def test_a_user_without_a_home_is_told_the_variable_and_loses_only_speed(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", "~no-such-user/cache")
    with pytest.raises(BadInput, match="set CAPHUMAN_CACHE"):
        cache_dir()
    (tmp_path / "weights").write_bytes(b"one")
    with pytest.warns(UserWarning, match="hashes cannot be remembered"):
        sha256_of([tmp_path / "weights"])


def test_each_platform_has_its_own_place(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("LOCALAPPDATA", "/appdata")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert platform_cache("darwin") == Path("/home/ann/Library/Caches")
    assert platform_cache("win32") == Path("/appdata")
    assert platform_cache("linux") == Path("/home/ann/.cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert platform_cache("linux") == Path("/xdg")


def test_hashes_are_right_and_follow_a_change(tmp_path):
    file = tmp_path / "weights"
    for content in (b"one", b"three"):
        file.write_bytes(content)
        assert sha256_of([file]) == {file: hashlib.sha256(content).hexdigest()}


def test_an_unchanged_file_is_not_read_again(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first, times = sha256_of([file]), os.stat(file)
    file.write_bytes(b"two")  # of the same size
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256_of([file]) == first


def test_a_damaged_cache_is_as_good_as_none(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    for text in ("{", "[]", '{"a": 1}', '{"a": [1]}'):
        (cache_dir() / "sha256.json").write_text(text)
        assert sha256_of([file])[file] == hashlib.sha256(b"one").hexdigest()


def test_a_cache_that_cannot_be_written_is_announced_and_does_no_harm(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    monkeypatch.setenv("CAPHUMAN_CACHE", str(file / "inside"))
    with pytest.warns(UserWarning, match="hashes cannot be remembered"):
        assert sha256_of([file])[file] == hashlib.sha256(b"one").hexdigest()
