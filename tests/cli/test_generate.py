"""`caphuman generate` and `caphuman preview`: the files they write and what those tell of themselves."""
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.image import load_photo

QUICK = "--steps", 1, "--renderer", "numpy"


def recipe(path) -> dict:
    with Image.open(path) as portrait:
        return json.loads(portrait.text["caphuman"])


def test_generate_writes_a_portrait_of_the_bundles_size_and_names_it(caphuman, photo, folder):
    done = caphuman("generate", "--photo", photo, "--prompt", "a person", *QUICK)
    assert (done.code, done.out, done.err) == (0, "portrait.png\n", "")
    config = Bundle.open().config
    assert load_photo(folder / "portrait.png").shape == (config.height, config.width, 3)
    assert [path.name for path in folder.iterdir()] == ["portrait.png"]


def test_the_portrait_carries_its_recipe_with_the_head(caphuman, photo, folder):
    caphuman("generate", "--photo", photo, "--prompt", "a person, smiling", "--seed", 7, "--yaw", -30,
             "--light", "-40,20", "--expression", "mouthSmile=0.7", "jawOpen=0.2", "--out", "me.png", *QUICK)
    told = recipe(folder / "me.png")
    assert (told["prompt"], told["seed"], told["steps"]) == ("a person, smiling", 7, 1)
    assert told["bundle_sha256"] == Bundle.open().digest
    assert told["controls"]["yaw"] == -30 and told["controls"]["light"] == [-40, 20]
    assert told["controls"]["expression"] == {"mouthSmile": 0.7, "jawOpen": 0.2}
    assert told["controls"]["angles"][0] == pytest.approx(-30, abs=0.1)
    assert len(told["head"]["pose"]) == 6 and told["head"]["camera"][0] > 0
    with Image.open(folder / "me.png") as portrait:
        assert len(portrait.text["caphuman"]) < 20_000
        assert portrait.text["AI-generated"] == "true"


def test_several_portraits_are_numbered_and_their_seeds_count_up(caphuman, photo, folder):
    done = caphuman("generate", "--photo", photo, "--count", 2, "--seed", 5, "--out", "me.png", "--sheet", "sheet.png",
                    "--json", *QUICK)
    made = json.loads(done.out)["portraits"]
    assert [(portrait["file"], portrait["recipe"]["seed"]) for portrait in made] == [("me-1.png", 5), ("me-2.png", 6)]
    assert recipe(folder / "me-2.png") == made[1]["recipe"]
    assert sorted(path.name for path in folder.iterdir()) == ["me-1.png", "me-2.png", "sheet.png"]


def test_only_a_file_that_is_named_is_overwritten(caphuman, refusal, photo, folder):
    (folder / "portrait.png").write_text("mine")
    assert "portrait.png exists" in refusal("generate", "--photo", photo, *QUICK)
    (folder / "me-2.png").write_text("mine")
    assert "me-2.png exists" in refusal("generate", "--photo", photo, "--out", "me.png", "--count", 2, *QUICK)
    assert caphuman("generate", "--photo", photo, "--out", "portrait.png", *QUICK).code == 0
    assert recipe(folder / "portrait.png")


def test_preview_writes_the_maps_and_a_contact_sheet(caphuman, photo, folder):
    done = caphuman("preview", "--photo", photo, "--yaw", 30, "--out-dir", "maps", "--renderer", "numpy", "--json")
    report = json.loads(done.out)
    names = ["normal.png", "albedo.png", "rendered.png", "contact_sheet.png"]
    assert sorted(path.name for path in (folder / "maps").iterdir()) == sorted(names)
    assert report["files"] == [f"maps/{name}" for name in names]
    assert report["head"]["angles"][0] == pytest.approx(30, abs=0.1)
    (face,) = report["faces"]
    assert 170 < face["left"] < face["right"] < 280 and 60 < face["top"] < face["bottom"] < 230  # where she is


@pytest.mark.parametrize("order", [("{}", "--yaw", 30), ("--yaw", 30, "{}"), ("--photo", "{}", "--yaw", 30)])
def test_preview_needs_no_more_than_a_photo_which_may_stand_anywhere(caphuman, photo, folder, order):
    argv = [str(part).format(photo) for part in order]
    done = caphuman("preview", *argv, "--renderer", "numpy")
    assert done.code == 0 and "preview/rendered.png" in done.out
    assert (folder / "preview" / "rendered.png").is_file()


def test_preview_shows_normals_around_grey(caphuman, photo, folder):
    caphuman("preview", "--photo", photo, "--yaw", 0, "--out-dir", ".", "--renderer", "numpy")
    normal = load_photo(folder / "normal.png")
    np.testing.assert_array_equal(normal[0, 0], 128)
    assert normal[len(normal) // 2, len(normal) // 2, 2] > 200  # the face looks at the viewer


def test_a_pose_photo_turns_the_head_and_sliders_go_on_top(caphuman, photo, astronaut, tmp_path):
    mirrored = tmp_path / "mirrored.png"
    astronaut.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(-10, fillcolor="white").save(mirrored)

    def angles(*flags):
        done = caphuman("preview", "--photo", photo, *flags, "--out-dir", "maps", "--renderer", "numpy", "--json")
        return json.loads(done.out)["head"]["angles"]

    own = angles("--pose", mirrored, "--modes", "lighting")
    yaw, _, roll = angles("--pose", mirrored, "--yaw", 20)
    assert yaw == pytest.approx(20, abs=0.2)
    assert roll == pytest.approx(10 - own[2], abs=3)


def test_a_terminal_sees_a_bar_of_the_steps(caphuman, photo, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = caphuman("generate", "--photo", photo, "--steps", 2, "--renderer", "numpy")
    assert "portrait.png [" in done.err and "1/2 steps" in done.err and done.err.endswith("2/2 steps, 0 s left \n")


def test_generate_runs_where_nothing_but_the_base_installation_can_be_imported(photo, folder):
    blocked = ("torch", "onnx", "openvino", "coremltools", "moderngl", "scipy", "skimage", "cv2")
    script = (f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
              f"from caphuman_edge.runtime.cli import main\n"
              f"sys.exit(main(['generate', '--photo', {str(photo)!r}, '--steps', '1']))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (folder / "portrait.png").is_file()
    assert "drawing maps with numpy" in done.stderr and done.stderr.count("\n") == 1
