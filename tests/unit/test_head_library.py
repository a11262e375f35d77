"""The user's folder of heads: what is added is found again, and nothing lands elsewhere or by half."""
from pathlib import Path

import numpy as np
import pytest

from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.errors import BadInput, BundleError
from caphuman_edge.runtime.head import OPEN_HEAD, library, load_head
from caphuman_edge.runtime.head.flame import convert_flame
from caphuman_edge.runtime.head.library import add_head, describe_head, find_head, heads_dir, list_heads
from caphuman_edge.runtime.pipeline import Pipeline


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder of heads, not made yet."""
    monkeypatch.setenv("CAPHUMAN_HEADS", str(tmp_path / "my heads"))
    return tmp_path / "my heads"


@pytest.fixture
def arrays(flame_files):
    return convert_flame(flame_files())


@pytest.mark.parametrize(("platform", "place"), [
    ("linux", ".local/share/caphuman/heads"), ("darwin", "Library/Application Support/caphuman/heads"),
    ("win32", "AppData/Local/caphuman/heads"),
])
def test_each_platform_has_its_own_place(monkeypatch, tmp_path, platform, place):
    for name in ("CAPHUMAN_HEADS", "XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert heads_dir(platform) == tmp_path / place


def test_the_data_folder_of_a_linux_user_is_honoured(monkeypatch, tmp_path):
    monkeypatch.delenv("CAPHUMAN_HEADS")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert heads_dir("linux") == tmp_path / "caphuman" / "heads"


def test_there_is_always_the_open_head():
    assert list_heads() == {"open": OPEN_HEAD}
    assert find_head("open") == OPEN_HEAD


def test_what_is_added_is_found_by_name_and_drawn(folder, arrays):
    path = add_head("flame", arrays)
    assert path == folder / "flame.npz" == find_head("flame")
    assert list(list_heads()) == ["open", "flame"]
    np.testing.assert_array_equal(load_head(path).template, arrays["v_template"])
    with Pipeline(Bundle.open(), renderer="numpy", head=path) as pipe:
        assert len(pipe.head_model.template) == len(arrays["v_template"])


def test_a_file_elsewhere_is_found_by_its_path(tmp_path, arrays):
    np.savez(tmp_path / "other.npz", **arrays)
    assert find_head(str(tmp_path / "other.npz")) == tmp_path / "other.npz"


def test_a_head_that_nobody_added_is_refused_with_those_there_are():
    with pytest.raises(BadInput, match=r'"flame" is not known, expected one of open.*caphuman head add'):
        find_head("flame")


def test_no_file_hides_the_open_head(folder, arrays):
    add_head("flame", arrays)
    (folder / "flame.npz").rename(folder / "open.npz")
    assert find_head("open") == OPEN_HEAD


@pytest.mark.parametrize("name", ["../flame", "a/b", "a\\b", "", ".", "..", ".hidden", "/tmp/flame", "C:flame", "a\n",
                                  "a" * 65, "open", "\x00", "\x1b[31m", "naïve"])
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path, arrays, name):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match="choose another with --name") as caught:
        add_head(name, arrays)
    assert str(caught.value).isprintable()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_head_is_replaced_only_where_that_is_allowed(arrays):
    path = add_head("flame", arrays)
    changed = arrays | {"v_template": arrays["v_template"] + 1}
    with pytest.raises(BadInput, match='a head "flame" already'):
        add_head("flame", changed)
    np.testing.assert_array_equal(load_head(path).template, arrays["v_template"])
    add_head("flame", changed, replace=True)
    np.testing.assert_array_equal(load_head(path).template, changed["v_template"])


def test_a_full_disk_is_one_error_and_leaves_the_former_head(folder, arrays, monkeypatch):
    path = add_head("flame", arrays)
    before = path.read_bytes()

    def full_disk(file, **_):
        file.write(b"half a head")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(BadInput, match=r"flame\.npz \(No space left on device\); make room"):
        add_head("flame", arrays, replace=True)
    assert list(folder.iterdir()) == [path] and path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_one_error(folder, arrays):
    folder.write_text("a file")
    with pytest.raises(BadInput, match="set CAPHUMAN_HEADS to another folder"):
        add_head("flame", arrays)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CAPHUMAN_HEADS")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(BadInput, match="set CAPHUMAN_HEADS"):
        heads_dir("linux")


def test_a_head_tells_what_it_holds_and_where_it_comes_from(arrays):
    told = describe_head(add_head("flame", arrays))
    assert (told["vertices"], told["identity"], told["expression"], told["texture"]) == (642, 100, 50, 0)
    assert "Max Planck Society" in told["licence"] and len(told["sha256"]) == 64
    assert told["sources"] == dict(arrays["sources"].tolist())


def test_the_open_head_tells_of_itself_too():
    told = describe_head(OPEN_HEAD)
    assert (told["vertices"], told["identity"], told["expression"], told["texture"]) == (4917, 80, 52, 16)
    assert told["licence"].startswith("CC0-1.0") and told["sources"] == {}


def test_a_licence_moves_no_cursor(arrays):
    told = describe_head(add_head("flame", arrays | {"licence": np.array("free\x1b[2J\n")}))
    assert told["licence"] == "free[2J"


def test_a_source_moves_no_cursor(arrays):
    told = describe_head(add_head("flame", arrays | {"sources": np.array([["a\x1b[2J.pkl", "\n0"]])}))
    assert told["sources"] == {"a[2J.pkl": "0"}


@pytest.mark.parametrize("name", ["a" * 5000, "nowhere/" * 1000])
def test_a_name_too_long_for_a_file_is_refused_like_any_other(name):
    with pytest.raises(BadInput, match="is not known"):
        find_head(name)


def test_a_folder_that_cannot_be_read_is_one_error(monkeypatch):
    monkeypatch.setenv("CAPHUMAN_HEADS", "a" * 5000)
    with pytest.raises(BadInput, match="set CAPHUMAN_HEADS to another folder"):
        list_heads()


def test_describing_a_head_unpacks_no_more_than_a_few_words(arrays, monkeypatch):
    path = add_head("flame", arrays)
    read = []
    monkeypatch.setattr(library.npz.npy, "read_array", lambda file, **_: read.append(file.name) or np.array(0))
    with pytest.raises(BundleError):  # a head whose names are a number
        describe_head(path)
    assert set(read) <= {"licence.npy", "sources.npy", "identity_count.npy", "expression_names.npy"}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_a_damaged_head_cannot_be_described(tmp_path, content):
    (tmp_path / "head.npz").write_bytes(content)
    with pytest.raises(BundleError, match="is no head model"):
        describe_head(tmp_path / "head.npz")


