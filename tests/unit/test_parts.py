"""Finished parts of a build: kept until it is whole, made anew only where something changed."""
import json

import pytest

from caphuman_edge.export.parts import Parts
from caphuman_edge.runtime.errors import BundleError


def parts(folder, key="a", lines=None):
    keys = {"onnx/unet": key, "onnx/vae_decoder": "other"}
    return Parts(folder / ".bundle.parts", keys, [].append if lines is None else lines.append)


def write(text):
    def work(folder):
        (folder / "graph.onnx").write_text(text)
        return {"precision": text}
    return work


def refuse(folder):
    pytest.fail("made again")


def test_a_part_is_made_once(tmp_path):
    first = parts(tmp_path).make("onnx/unet", write("f16"))
    assert parts(tmp_path).holds("onnx/unet") and not parts(tmp_path).holds("onnx/vae_decoder")
    kept = parts(tmp_path).make("onnx/unet", refuse)
    assert kept == first and kept.facts == {"precision": "f16"}
    assert (kept.folder / "graph.onnx").read_text() == "f16"


def test_another_key_makes_that_part_again_and_no_other(tmp_path):
    for name in ("onnx/unet", "onnx/vae_decoder"):
        parts(tmp_path).make(name, write("old"))
    changed = parts(tmp_path, "b")
    assert not changed.holds("onnx/unet") and changed.holds("onnx/vae_decoder")
    assert (changed.make("onnx/unet", write("new")).folder / "graph.onnx").read_text() == "new"
    assert (changed.make("onnx/vae_decoder", refuse).folder / "graph.onnx").read_text() == "old"


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "graph.onnx").write_text("cut short"),
    lambda folder: (folder / "graph.onnx").unlink(),
    lambda folder: (folder / "part.json").write_text("{"),
    lambda folder: (folder / "part.json").write_text("[]"),
    lambda folder: (folder / "part.json").write_text(json.dumps({"files": {"graph.onnx": 3}})),
])
def test_a_damaged_part_is_made_again(tmp_path, damage):
    damage(parts(tmp_path).make("onnx/unet", write("f16")).folder)
    part = parts(tmp_path).make("onnx/unet", write("f32"))
    assert (part.folder / "graph.onnx").read_text() == "f32"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, BundleError])
def test_a_stopped_part_leaves_nothing_and_the_others_stay(tmp_path, interruption):
    def stopped(folder):
        (folder / "graph.onnx").write_text("half")
        raise interruption

    parts(tmp_path).make("onnx/vae_decoder", write("f16"))
    with pytest.raises(interruption):
        parts(tmp_path).make("onnx/unet", stopped)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {f".bundle.parts/onnx/vae_decoder/{name}" for name in ("graph.onnx", "part.json")}


def test_what_a_killed_build_left_half_made_goes(tmp_path):
    (tmp_path / ".bundle.parts/.making-abc").mkdir(parents=True)
    parts(tmp_path).make("onnx/unet", write("f16"))
    assert [path.name for path in (tmp_path / ".bundle.parts").iterdir()] == ["onnx"]


def test_a_full_disk_is_one_line_that_says_where(tmp_path):
    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(BundleError, match=r"cannot write to .*\.bundle\.parts .*No space left.*goes on from here"):
        parts(tmp_path).make("onnx/unet", full)


def test_a_part_never_writes_into_a_file_that_it_was_given(tmp_path):
    """A link of that name would carry the note into the bundle that it comes from."""
    theirs = tmp_path / "theirs.json"
    theirs.write_text("theirs")
    with pytest.raises(BundleError, match=r"part\.json"):
        parts(tmp_path).make("onnx/unet", lambda folder: (folder / "part.json").hardlink_to(theirs) or {})
    assert theirs.read_text() == "theirs"


def test_progress_counts_the_parts_and_says_where_each_comes_from(tmp_path):
    lines = []
    both = parts(tmp_path, lines=lines)
    both.make("onnx/unet", write("f16"))
    both.make("onnx/vae_decoder", write("f16"), origin="my-bundle")
    again = parts(tmp_path, lines=lines)
    again.make("onnx/unet", refuse)
    again.skip("onnx/vae_decoder")
    assert lines == ["[1/2] onnx/unet ...", "[1/2] onnx/unet: 0 s", "[2/2] onnx/vae_decoder: kept from my-bundle",
                     "[1/2] onnx/unet: kept", "[2/2] onnx/vae_decoder: not needed"]


def test_a_whole_bundle_leaves_no_parts(tmp_path):
    build = parts(tmp_path)
    build.make("onnx/unet", write("f16"))
    build.clear()
    assert list(tmp_path.iterdir()) == []
