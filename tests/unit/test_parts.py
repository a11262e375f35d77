"""Finished parts of a build: kept until it is whole, made anew only where something changed."""
import json

import pytest

from caphuman_edge.export.parts import Parts
from caphuman_edge.runtime.errors import BundleError


def parts(folder, recipe="a", lines=None):
    return Parts(folder / ".bundle.parts", {"weights": recipe}, 2, [].append if lines is None else lines.append)


def write(text):
    def work(folder):
        (folder / "graph.onnx").write_text(text)
        return {"precision": text}
    return work


def refuse(folder):
    pytest.fail("made again")


def test_a_part_is_made_once(tmp_path):
    first = parts(tmp_path).make("onnx/unet", write("f16"))
    kept = parts(tmp_path).make("onnx/unet", refuse)
    assert kept == first and kept.facts == {"precision": "f16"}
    assert (kept.folder / "graph.onnx").read_text() == "f16"


def test_another_recipe_makes_it_again(tmp_path):
    parts(tmp_path).make("onnx/unet", write("old"))
    part = parts(tmp_path, "b").make("onnx/unet", write("new"))
    assert (part.folder / "graph.onnx").read_text() == "new"


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


def test_progress_counts_the_parts(tmp_path):
    lines = []
    both = parts(tmp_path, lines=lines)
    both.make("onnx/unet", write("f16"))
    both.make("onnx/vae_decoder", write("f16"))
    parts(tmp_path, lines=lines).make("onnx/unet", refuse)
    assert lines == ["[1/2] onnx/unet ...", "[1/2] onnx/unet: 0 s", "[2/2] onnx/vae_decoder ...",
                     "[2/2] onnx/vae_decoder: 0 s", "[1/2] onnx/unet: kept"]


def test_a_whole_bundle_leaves_no_parts(tmp_path):
    build = parts(tmp_path)
    build.make("onnx/unet", write("f16"))
    build.clear()
    assert list(tmp_path.iterdir()) == []
