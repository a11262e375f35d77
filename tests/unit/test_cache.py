"""The user's cache folder, the hashes and the compiled models kept there."""
import hashlib
import os
from pathlib import Path

import pytest

from caphuman_edge.runtime import compiled
from caphuman_edge.runtime.cache import cache_dir, platform_cache, sha256_of
from caphuman_edge.runtime.compiled import compiled_entry, used_bytes
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


def compile_graph(graph: Path, label: str = "vino-1", settings: object = None, size: int = 1000) -> bool:
    """Compile as a backend would; whether there was something to do."""
    with compiled_entry(label, graph, settings) as folder:
        if any(folder.iterdir()):
            return False
        (folder / "blob").write_bytes(graph.read_bytes()[:1] * size)
        return True


@pytest.fixture
def graph(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(b"w")
    (tmp_path / "model" / "graph.onnx").write_bytes(b"graph")
    return tmp_path / "model" / "graph.onnx"


def entries() -> list[Path]:
    return sorted((cache_dir() / "compiled").iterdir())


def test_a_graph_is_compiled_once(graph):
    assert compile_graph(graph) and not compile_graph(graph)
    (entry,) = entries()
    assert entry.name.startswith("vino-1-") and (entry / "blob").exists()
    assert used_bytes() > 1000


def test_another_version_device_setting_graph_or_weight_is_compiled_anew(graph):
    assert compile_graph(graph)
    assert compile_graph(graph, label="vino-2") and compile_graph(graph, settings={"threads": 2})
    graph.write_bytes(b"another graph")
    assert compile_graph(graph)
    (graph.parent / "weights.bin").write_bytes(b"other weights")
    assert compile_graph(graph) and not compile_graph(graph)
    assert len(entries()) == 5


def test_a_graph_that_is_a_folder_is_told_by_what_is_in_it(graph):
    package = graph.parent
    assert compile_folder(package) and not compile_folder(package)
    (package / "weights.bin").write_bytes(b"other weights")
    assert compile_folder(package)


def compile_folder(package: Path) -> bool:
    with compiled_entry("core-1", package, None) as folder:
        new = not (folder / "compiled").exists()
        (folder / "compiled").mkdir(exist_ok=True)
        (folder / "compiled" / "net").write_bytes(b"net")
        return new


@pytest.mark.parametrize("damage", [
    lambda entry: (entry / "blob").write_bytes(b"x" * 1000),
    lambda entry: os.truncate(entry / "blob", 10),
    lambda entry: (entry / "blob").unlink(),
    lambda entry: (entry / "more").touch(),
    lambda entry: (entry / "sha256.json").unlink(),
    lambda entry: (entry / "sha256.json").write_text("{"),
])
def test_a_damaged_entry_is_compiled_anew(graph, damage):
    compile_graph(graph)
    damage(entries()[0])
    assert compile_graph(graph) and not compile_graph(graph)
    assert (entries()[0] / "blob").read_bytes() == b"g" * 1000


def test_what_was_not_used_for_the_longest_time_makes_room(graph, monkeypatch):
    monkeypatch.setattr(compiled, "MAX_BYTES", 2600)
    for age, settings in enumerate("abc"):  # a is the oldest
        compile_graph(graph, settings=settings)
        for entry in entries():
            os.utime(entry, (1000 + age, 1000 + age)) if entry.stat().st_mtime > 2000 else None
        if settings == "b":
            assert not compile_graph(graph, settings="a")  # now b is
    assert not compile_graph(graph, settings="a") and not compile_graph(graph, settings="c")
    assert compile_graph(graph, settings="b")
    assert used_bytes() <= 2600


def test_an_entry_larger_than_the_bound_is_kept_while_it_is_the_newest(graph, monkeypatch):
    monkeypatch.setattr(compiled, "MAX_BYTES", 10)
    assert compile_graph(graph) and not compile_graph(graph)
    compile_graph(graph, label="vino-2")
    assert [entry.name[:6] for entry in entries()] == ["vino-2"]


def test_a_compilation_that_fails_leaves_nothing(graph):
    with pytest.raises(RuntimeError), compiled_entry("vino-1", graph, None) as folder:
        (folder / "blob").touch()
        raise RuntimeError
    assert entries() == []


def test_two_that_compile_at_once_do_not_touch_each_other(graph):
    with compiled_entry("vino-1", graph, None) as first:
        (first / "blob").write_bytes(b"1")
        assert compile_graph(graph)
        (first / "blob").write_bytes(b"12")
    assert len(entries()) == 1 and not compile_graph(graph)


def test_without_a_place_for_it_a_graph_is_compiled_each_time(graph, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(graph / "inside"))
    with pytest.warns(UserWarning, match="compiled models cannot be kept"), \
            compiled_entry("vino-1", graph, None) as folder:
        assert folder is None
