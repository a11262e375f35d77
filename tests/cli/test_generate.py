"""`caphuman generate` and `caphuman preview`: the files they write and what those tell of themselves."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.head import OPEN_HEAD, directional_light
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
    (person,) = told["people"]
    assert person["controls"]["yaw"] == -30 and person["controls"]["light"] == [-40, 20]
    assert person["controls"]["expression"] == {"mouthSmile": 0.7, "jawOpen": 0.2}
    assert person["controls"]["angles"][0] == pytest.approx(-30, abs=0.1)
    assert len(person["head"]["pose"]) == 6 and person["head"]["camera"][0] > 0
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
    names = ["faces.png", "normal.png", "albedo.png", "rendered.png", "contact_sheet.png"]
    assert sorted(path.name for path in (folder / "maps").iterdir()) == sorted(names)
    assert report["files"] == [f"maps/{name}" for name in names]
    assert report["controls"]["angles"][0] == pytest.approx(30, abs=0.1)
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
        return json.loads(done.out)["controls"]["angles"]

    own = angles("--pose", mirrored, "--modes", "lighting")
    yaw, _, roll = angles("--pose", mirrored, "--yaw", 20)
    assert yaw == pytest.approx(20, abs=0.2)
    assert roll == pytest.approx(10 - own[2], abs=3)


@pytest.fixture
def previewed(caphuman, photo, folder):
    """Runs `preview` on the photo with these flags; gives its report and what is drawn, as the network reads it."""

    def run(*flags):
        done = caphuman("preview", photo, *flags, "--raw", "maps.npy", "--renderer", "numpy", "--json")
        assert done.code == 0, done.err
        return json.loads(done.out), np.load(folder / "maps.npy", allow_pickle=False)

    return run


def test_raw_maps_are_what_the_network_reads(previewed, folder):
    report, maps = previewed("--yaw", 20)
    config = Bundle.open().config
    assert maps.shape == (9, config.height, config.width) and maps.dtype == np.float32
    assert maps[:3].min() < -0.1 and "maps.npy" in report["files"]
    rendered = load_photo(folder / "preview" / "rendered.png").transpose(2, 0, 1)
    np.testing.assert_allclose(rendered / 255, maps[6:].clip(0, 1), atol=0.003)


def test_a_pose_photos_faces_are_drawn_too(previewed, photo, folder):
    report, _ = previewed("--pose", photo)
    assert "preview/pose_faces.png" in report["files"] and len(report["pose_faces"]) == 1
    assert load_photo(folder / "preview" / "pose_faces.png").shape == (512, 512, 3)


def test_a_portrait_or_a_preview_gives_its_head_to_another_photo(caphuman, previewed, photo, folder):
    report, turned = previewed("--yaw", 35, "--expression", "smile=1", "--light", "60,0")
    (folder / "head.json").write_text(json.dumps(report))
    caphuman("generate", photo, "--yaw", 35, "--expression", "smile=1", "--light", "60,0", "--out", "me.png", *QUICK)
    for source in ("head.json", "me.png"):
        told, again = previewed("--pose-code", source, "--modes", "all")
        np.testing.assert_array_equal(again, turned)
        assert told["controls"]["modes"] == "all"
        told, _ = previewed("--pose-code", source, "--modes", "pose")
        assert told["head"]["expression"] != report["head"]["expression"]
        assert told["controls"]["angles"] == report["controls"]["angles"]


def test_a_pose_photo_with_all_modes_gives_the_light_as_light_from_does(previewed, astronaut, tmp_path):
    mirrored = tmp_path / "mirrored.png"
    astronaut.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    own, posed, lit = (previewed(*flags)[0]["head"] for flags in
                       ((), ("--pose", mirrored, "--modes", "lighting"), ("--light-from", mirrored)))
    assert posed == lit and lit["light"] != own["light"] and lit["pose"] == own["pose"]


def test_every_part_of_the_light_can_be_set(previewed, folder):
    lamp = directional_light(40.0, 10.0, strength=0.9, ambient=0.2, colour=(1.0, 128 / 255, 0.0))
    flags = "--light", "40,10", "--light-strength", 0.9, "--ambient", 0.2
    for colour in ("#ff8000", f"1,{128 / 255},0"):
        report, _ = previewed(*flags, "--light-colour", colour)
        np.testing.assert_allclose(report["head"]["light"], lamp, atol=1e-5)
    (folder / "rows.json").write_text(json.dumps(lamp.tolist()))
    for numbers in (",".join(map(str, lamp.ravel())), "rows.json"):
        report, _ = previewed("--light-coefficients", numbers)
        np.testing.assert_allclose(report["head"]["light"], lamp, atol=1e-5)
    report, _ = previewed("--light", "10,10", "--light-strength", 0.45, "--ambient", 0.1, "--light-colour", "#ff8000",
                          "--light-turn", 30, "--light-gain", 2)
    np.testing.assert_allclose(report["head"]["light"], lamp, atol=1e-5)


def test_without_light_flags_the_photos_own_light_stays_and_can_be_edited(previewed):
    own, turned = (previewed(*flags)[0]["head"]["light"] for flags in ((), ("--light-turn", -90)))
    assert own != turned
    np.testing.assert_allclose(turned[2], own[2], atol=1e-5)  # what comes from above turns about itself


def test_another_head_is_drawn_with_a_notice_that_the_bundle_does_not_know_it(caphuman, photo, folder):
    shutil.copy(OPEN_HEAD, folder / "mine.npz")
    for head, notices in (("open", 0), ("mine.npz", 1)):
        done = caphuman("preview", photo, "--head", head, "--renderer", "numpy", "--out-dir", head.partition(".")[0])
        assert done.code == 0 and done.err.count("was trained with the head it brings along") == notices
    assert (folder / "open" / "albedo.png").read_bytes() == (folder / "mine" / "albedo.png").read_bytes()


def test_the_jaw_opens_by_degrees(previewed):
    shut, opened = (previewed("--jaw", jaw) for jaw in (0, 20))
    assert np.degrees(opened[0]["head"]["pose"][3]) == pytest.approx(20, abs=1e-3)
    changed = np.abs(opened[1] - shut[1]).max(axis=0) > 0.1
    assert not changed[:len(changed) // 3].any() and changed[len(changed) * 2 // 3:].any()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_fit_decides_what_the_frame_shows(previewed, photo, astronaut, tmp_path, fit):
    wide = tmp_path / "wide.png"
    canvas = Image.new("RGB", (1024, 512), "grey")
    canvas.paste(astronaut, (0, 0))
    canvas.save(wide)
    report, maps = previewed("--pose", wide, "--modes", "position", "--fit", fit)
    rows, columns = (np.flatnonzero(maps[:3].any(axis=0).any(axis=axis)) for axis in (1, 0))
    height, width = np.ptp(rows) / len(maps[0]), np.ptp(columns) / len(maps[0, 0])
    assert report["controls"]["fit"] == fit
    tall, square = {"crop": (0.5, 1), "pad": (0.25, 1), "squash": (0.5, 0.5)}[fit]
    assert height == pytest.approx(tall * 0.9, rel=0.35) and width / height == pytest.approx(0.7 * square, rel=0.3)


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
