"""`caphuman head`: FLAME's files in, one head out, and a list that says what there is."""
import json
import os
import zipfile

import numpy as np
import pytest

from caphuman_edge.runtime.head.library import find_head


@pytest.fixture(autouse=True)
def heads(tmp_path, monkeypatch):
    """The folder of heads, empty."""
    monkeypatch.setenv("CAPHUMAN_HEADS", str(tmp_path / "heads"))
    return tmp_path / "heads"


def arguments(files, *more):
    return "head", "add", files.model, "--template", files.template, "--landmarks", files.landmarks, *more


@pytest.fixture
def add_refused(refusal, heads):
    """The line that refuses to add a head; nothing is left in the folder of heads."""

    def why(files, *more):
        message = refusal(*arguments(files, *more))
        assert not heads.exists()
        return message

    return why


def test_a_head_is_added_listed_and_said_to_be_grey(caphuman, flame_files):
    files = flame_files()
    added = caphuman(*arguments(files))
    assert added.code == 0 and "flame: 642 vertices" in added.out
    assert added.err == "caphuman: without --texture the head is grey-skinned all over\n"
    listed = caphuman("head", "list")
    assert listed.code == 0 and listed.err == ""
    for words in ("open: 4917 vertices", "CC0-1.0", "flame: 642 vertices", "100 identity, 50 expression",
                  "non-commercial research", "may not be shared", str(find_head("flame")),
                  *(path.name for path in (files.model, files.template, files.landmarks))):
        assert words in listed.out


def test_the_list_is_told_to_programs_too(caphuman, flame_files):
    caphuman(*arguments(flame_files(), "--name", "flame-2023", "--licence", "CC-BY-4.0"))
    heads = json.loads(caphuman("head", "list", "--json").out)
    assert list(heads) == ["open", "flame-2023"]
    told = heads["flame-2023"]
    assert (told["vertices"], told["identity"], told["expression"], told["texture"]) == (642, 100, 50, 0)
    assert told["licence"] == "CC-BY-4.0"
    assert [len(digest) for digest in told["sources"].values()] == [64, 64, 64]


def test_a_damaged_head_is_listed_with_what_is_wrong_and_hides_no_other(caphuman, flame_files, heads):
    caphuman(*arguments(flame_files()))
    (heads / "broken.npz").write_bytes(b"half a head")
    done = caphuman("head", "list")
    assert done.code == 0 and "broken.npz is no head model" in done.out and "flame: 642" in done.out
    assert "error" in json.loads(caphuman("head", "list", "--json").out)["broken"]


def test_a_name_that_is_taken_needs_leave(caphuman, refusal, flame_files):
    files = flame_files()
    caphuman(*arguments(files))
    assert 'a head "flame" already' in refusal(*arguments(files))
    assert caphuman(*arguments(files, "--replace")).code == 0


@pytest.mark.parametrize("name", ["../flame", "open", ".."])
def test_a_name_is_refused_before_the_work(add_refused, flame_files, name):
    files = flame_files()
    files.model.unlink()
    assert "cannot be used" in add_refused(files, "--name", name)


def test_a_model_that_runs_code_is_refused_before_it_does(add_refused, flame_files, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    message = add_refused(flame_files(shapedirs=Evil()))
    assert "generic_model.pkl asks for posix.system, which no head file needs" in message
    assert not (tmp_path / "ran").exists()


def test_landmarks_that_run_code_are_refused_before_they_do(add_refused, flame_files, tmp_path):
    class Evil:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    message = add_refused(flame_files(static_lmk_bary_coords=Evil()))
    assert "landmark_embedding.npy asks for builtins.eval" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({"weights": np.zeros((3, 5))}, "weights has shape (3, 5), expected (642, 5)"),
    ({"v_template": np.full((642, 3), np.nan)}, "not finite"),
    ({"f": np.full((1280, 3), 700)}, "has other faces"),
    ({"static_lmk_faces_idx": np.full(51, 1280)}, "points outside"),
])
def test_a_damaged_model_is_one_line(add_refused, flame_files, changes, words):
    assert words in add_refused(flame_files(**changes))


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02}q\x00("])
def test_a_file_that_is_no_pickle_is_one_line(add_refused, flame_files, content):
    files = flame_files()
    files.model.write_bytes(content)
    assert "generic_model.pkl is no pickled dictionary" in add_refused(files)


def test_a_texture_that_unpacks_to_terabytes_is_one_line(add_refused, flame_files, tmp_path):
    path = tmp_path / "FLAME_texture.npz"
    shape = {"descr": "<f8", "fortran_order": False, "shape": (512, 512, 3, 10**6)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("mean.npy", "w") as file:
            np.lib.format.write_array(file, np.zeros((512, 512, 3), np.float32))
        with archive.open("tex_dir.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, shape)
            file.write(bytes(10_000_000))
    assert "FLAME_texture.npz is no FLAME texture" in add_refused(flame_files(), "--texture", path)


def test_a_full_disk_is_one_line_and_leaves_nothing(refusal, heads, flame_files, monkeypatch):
    def full_disk(file, **_):
        file.write(b"half a head")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    np.savez_compressed("texture.npz", mean=np.zeros((512, 512, 3), np.uint8),
                        tex_dir=np.zeros((512, 512, 3, 50), np.int8))
    message = refusal(*arguments(flame_files(), "--texture", "texture.npz"))
    assert "cannot write" in message and "No space left on device" in message
    assert not list(heads.iterdir())


def test_the_help_says_where_each_file_comes_from(caphuman):
    told = caphuman("head", "add", "--help").out
    for words in ("flame.is.tue.mpg.de", "register", "DECA", "FLAME_texture.npz", "head_template.obj",
                  "landmark_embedding.npy", "CAPHUMAN_HEADS", "non-commercial"):
        assert words in told


@pytest.mark.parametrize("argv", [("head",), ("head", "remove"), ("head", "add"), ("head", "add", "model.pkl")])
def test_a_wrong_call_points_to_the_help(refusal, argv):
    assert "--help" in refusal(*argv)
