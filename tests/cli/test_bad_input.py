"""What a person can do wrong, and the one line that says so: the value, what was expected, the remedy."""
import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from caphuman_edge.runtime.cli import main
from caphuman_edge.runtime.denoise import Denoiser
from caphuman_edge.runtime.head import HeadCode, load_head
from caphuman_edge.runtime.pipeline import Pipeline

QUICK = "--steps", 1, "--renderer", "numpy", "--out", "out.png"


@pytest.fixture
def generate_refused(refusal):
    """`generate_refused(photo, *flags)` is the line that refuses it."""
    return lambda photo, *flags: refusal("generate", "--photo", photo, *QUICK, *flags)


def previewed(photo, folder) -> tuple[list[float], bytes]:
    """The head's angles and the rendered map that `preview` makes of a photo."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["preview", "--photo", str(photo), "--out-dir", str(folder), "--renderer", "numpy", "--json"]) == 0
    return json.loads(out.getvalue())["controls"]["angles"], (folder / "rendered.png").read_bytes()


@pytest.fixture(scope="module")
def upright(astronaut_file, tmp_path_factory) -> tuple[list[float], bytes]:
    """What it makes of the photo as it is."""
    return previewed(astronaut_file, tmp_path_factory.mktemp("upright"))


def saved(image: Image.Image, path, **settings):
    image.save(path, **settings)
    return path


# Photos that are refused.


def test_a_landscape_has_no_face(generate_refused, tmp_path):
    noise = np.random.default_rng(0).integers(0, 60, (256, 256, 3))
    hills = (np.linspace(190, 40, 256)[:, None, None] + noise).astype(np.uint8)
    message = generate_refused(saved(Image.fromarray(hills), tmp_path / "hills.png"))
    assert "hills.png: no face found" in message and "use one where" in message


@pytest.fixture
def pair(astronaut, tmp_path):
    """A photo of two faces, the one at the right a little larger."""
    both = Image.new("RGB", (1024, 512))
    both.paste(astronaut.resize((480, 480)), (0, 0))
    both.paste(astronaut, (512, 0))
    return saved(both, tmp_path / "pair.png")


def test_a_face_that_is_not_there_is_refused(generate_refused, photo, pair):
    assert "--face 3, but the photo shows 2" in generate_refused(pair, "--face", 3)
    message = generate_refused(photo, "--pose", pair, "--pose-face", 3)
    assert "pair.png: --pose-face 3" in message


def test_text_is_no_photo_whatever_its_name(generate_refused, tmp_path):
    (tmp_path / "notes.png").write_text("dear diary")
    assert "notes.png is not a picture" in generate_refused(tmp_path / "notes.png")


def test_a_photo_that_is_not_there_is_named(generate_refused):
    assert "nobody.jpg does not exist" in generate_refused("nobody.jpg")


def test_one_pixel_is_too_small(generate_refused, tmp_path):
    assert "1x1 px" in generate_refused(saved(Image.new("RGB", (1, 1)), tmp_path / "dot.png"))


def test_sixteen_thousand_pixels_an_edge_are_too_large(generate_refused, tmp_path):
    message = generate_refused(saved(Image.new("1", (16_000, 16_000)), tmp_path / "poster.png"))
    assert "megapixels; at most 100 are read, scale it down" in message


def test_half_a_photo_is_refused(generate_refused, photo):
    photo.write_bytes(photo.read_bytes()[:100_000])
    assert "damaged or cut short" in generate_refused(photo)


# Photos that are odd, and welcome.


def test_of_two_faces_the_largest_is_taken_with_a_notice(caphuman, pair, folder):
    done = caphuman("preview", pair, "--renderer", "numpy", "--out-dir", "any", "--json")
    assert done.code == 0 and done.err.count("\n") == 1
    assert done.err.startswith(f"caphuman: warning: {pair}: 2 faces") and "--face N" in done.err
    faces = json.loads(done.out)["faces"]
    assert faces[0]["left"] > 512 > faces[1]["right"]
    for number in (1, 2):
        done = caphuman("preview", pair, "--face", number, "--renderer", "numpy", "--out-dir", number)
        assert (done.code, done.err) == (0, "")
    shown = [(folder / name / "rendered.png").read_bytes() for name in ("any", "1", "2")]
    assert shown[0] == shown[1] != shown[2]


@pytest.mark.parametrize(("flag", "choice"), [("--pose", "--pose-face N"), ("--light-from", "--light-face N")])
def test_two_faces_in_another_photo_name_their_own_flag(caphuman, photo, pair, flag, choice):
    done = caphuman("preview", photo, flag, pair, "--renderer", "numpy")
    assert done.code == 0 and f"{pair}: 2 faces" in done.err and choice in done.err


@pytest.mark.parametrize(("mode", "name"), [("RGBA", "odd.png"), ("CMYK", "odd.tiff"), ("P", "odd.gif"),
                                              ("L", "odd.jpg")])
def test_photos_of_every_colour_mode_show_the_same_head(astronaut, upright, folder, tmp_path, mode, name):
    angles, _ = previewed(saved(astronaut.convert(mode), tmp_path / name), folder)
    assert angles == pytest.approx(upright[0], abs=2)


@pytest.mark.parametrize(("orientation", "turn"), [
    (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270),
])
def test_exif_turns_a_photo_upright_to_the_pixel(astronaut, upright, folder, tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert previewed(saved(astronaut.transpose(turn), tmp_path / "turned.png", exif=exif), folder) == upright


# Controls out of range.


@pytest.mark.parametrize(("flags", "words"), [
    (("--expression", "grin=1"), ('"grin"', "mouthSmileLeft")),
    (("--expression", "mouthSmile"), ("'mouthSmile'", "name=value")),
    (("--expression", "smile=1", "me.jpg"), ("'me.jpg'", "before the flags")),
    (("--expression", "mouthSmile=nan"), ("'mouthSmile=nan'", "-5 to 5")),
    (("--yaw", "nan"), ("--yaw", "-180 to 180")),
    (("--yaw", "left"), ("--yaw", "'left'")),
    (("--scale", "0"), ("--scale", "0.1 to 10")),
    (("--light", "above"), ("'above'", "azimuth,elevation")),
    (("--light", "nan,20"), ("'nan,20'", "azimuth,elevation")),
    (("--light", "200,20"), ("'200,20'", "-180 to 180")),
    (("--light", "20"), ("'20'", "azimuth,elevation")),
    (("--light-colour", "red"), ("'red'", "#rrggbb")),
    (("--light-colour", "#ff00"), ("'#ff00'", "#rrggbb")),
    (("--light-colour", "1,0.5"), ("'1,0.5'", "red,green,blue")),
    (("--light-colour", "1,0.5,nan"), ("'1,0.5,nan'", "0 to 1")),
    (("--light-colour", "255,128,0"), ("'255,128,0'", "0 to 1")),
    (("--light-strength", "-1"), ("--light-strength", "0 to 10")),
    (("--ambient", "inf"), ("--ambient", "0 to 10")),
    (("--light-turn", "360"), ("--light-turn", "-180 to 180")),
    (("--light-gain", "nan"), ("--light-gain", "0 to 10")),
    (("--light-coefficients", "1,2,3"), ("'1,2,3'", "27 numbers")),
    (("--light-coefficients", ",".join(["nan"] * 27)), ("27 numbers", "-100 to 100")),
    (("--light-coefficients", ",".join(["101"] * 27)), ("27 numbers", "-100 to 100")),
    (("--light-coefficients", "sun.json"), ("'sun.json'", "JSON file")),
    (("--light-from", "nobody.jpg"), ("nobody.jpg does not exist",)),
    (("--light", "0,0", "--light-from", sys.executable), ("is not a picture",)),
    (("--light", "0,0", "--light-coefficients", ",".join(["1"] * 27)), ("replace the light", "one of them")),
    (("--ambient", "1", "--light-coefficients", ",".join(["1"] * 27)), ("replace the light", "one of them")),
    (("--jaw", "90"), ("--jaw", "-10 to 45")),
    (("--head", "nobody"), ('"nobody"', "caphuman head add")),
    (("--fit", "stretch"), ("'stretch'", "squash")),
    (("--face", "0"), ("'0'", "1 to 1000")),
    (("--pose-code", "nobody.json"), ("cannot read nobody.json",)),
    (("--pose-code", "nobody.png"), ("nobody.png does not exist",)),
    (("--pose", "a.png", "--pose-code", "b.png"), ("--pose-code", "not allowed with")),
    (("--modes", "pose"), ("--modes pose", "add --pose or --pose-code")),
    (("--pose-face", "2"), ("--pose-face 2", "photo of --pose;")),
    (("--light-face", "2"), ("--light-face 2", "photo of --light-from;")),
    (("--expression", "jaw=1"), ('"jaw"', "jawLeft")),
    (("--seed", "-2"), ("seed is -2", "expected 0 to")),
    (("--seed", 2**63), (str(2**63), "expected 0 to")),
    (("--seed", 2**63 - 1, "--count", 2), (str(2**63), "expected 0 to")),
    (("--guidance", "nan"), ("guidance is nan", "expected 0 to 30")),
    (("--schedule", "ddim", "--steps", "0"), ("0 steps", "the nearest that can: 1")),
    (("--schedule", "ddim", "--steps", "300"), ("300 steps", "250 or 334")),
    (("--count", "0"), ("'0'", "1 to 1000")),
    (("--prompt", "word " * 2000), ("10000 characters", "shorten it")),
    (("--backend", "tensorrt"), ("'tensorrt'", "ort, openvino, coreml")),
    (("--device", "npu"), ("no device npu here", "choose cpu")),
    (("--precision", "int8"), ("no precision int8 here", "choose f32")),
    (("--renderer", "vulkan"), ("'vulkan'", "numpy")),
    (("--out", "portrait.gif"), ("'portrait.gif'", ".png")),
    (("--shiny",), ("--shiny", "caphuman generate --help")),
])
def test_a_control_out_of_range_is_named_with_what_was_expected(generate_refused, photo, flags, words):
    message = generate_refused(photo, *flags)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("content", "words"), [
    ("", "holds no head"), ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[1, 2]", "holds no head"),
    ('{"head": 5}', "not the numbers of a head"), ('{"head": {"pose": [0, 0, 0]}}', "not the numbers of a head"),
    ("{}" + " " * 1_000_000, "at most 1000000"), (b"\xff\xfe\x00", "no text")])
def test_a_strangers_pose_code_is_refused(generate_refused, photo, tmp_path, content, words):
    path = tmp_path / "head.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = generate_refused(photo, "--pose-code", path)
    assert f"{path}" in message and words in message


def test_a_pose_code_with_strange_numbers_is_refused(generate_refused, photo, tmp_path):
    numbers = HeadCode.neutral(load_head().layout).numbers()
    for name, value in (("pose", [float("nan")] * 6), ("camera", [1, 2]), ("identity", "me"), ("crop", 5)):
        (tmp_path / "head.json").write_text(json.dumps({"head": numbers | {name: value}}))
        assert f"head.json: the head's {name}" in generate_refused(photo, "--pose-code", tmp_path / "head.json")


def test_a_picture_with_a_gigantic_text_is_no_pose_code(generate_refused, photo, tmp_path):
    text = PngInfo()
    text.add_text("caphuman", '{"head": [' + "0," * 600_000 + "0]}")
    Image.new("RGB", (64, 64)).save(tmp_path / "head.png", pnginfo=text)
    assert "at most 1000000" in generate_refused(photo, "--pose-code", tmp_path / "head.png")


@pytest.mark.parametrize("flag", ["--photo", "--pose", "--pose-code", "--head", "--out", "--sheet", "--bundle"])
def test_a_name_too_long_for_a_file_is_one_line(refusal, photo, flag):
    person = () if flag == "--photo" else (photo,)
    assert "aaaa" in refusal("generate", *person, flag, "a" * 5000 + ".png")


def test_a_photo_holds_no_pose_code(generate_refused, photo):
    assert f"{photo} holds no head" in generate_refused(photo, "--pose-code", photo)


@pytest.mark.parametrize("content", ["[1, 2, 3]", "{}", '"sun"', "[[1, [2]]]", "27"])
def test_light_that_is_not_27_numbers_is_refused(generate_refused, photo, tmp_path, content):
    (tmp_path / "light.json").write_text(content)
    assert "27 numbers" in generate_refused(photo, "--light-coefficients", tmp_path / "light.json")


def test_an_unknown_mode_is_named(generate_refused, photo):
    message = generate_refused(photo, "--pose", photo, "--modes", "pose,hair")
    assert '"hair"' in message and "position" in message


def test_a_prompt_of_too_many_tokens_is_cut_with_a_warning(caphuman, photo):
    done = caphuman("generate", "--photo", photo, *QUICK, "--prompt", "a person " * 200)
    assert done.code == 0
    assert done.err.startswith("caphuman: warning: the prompt has 400 tokens, 300 are read")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("argv", [(), ("paint",), ("generate",), ("preview", "x.png", "--photo", "x.png")])
def test_a_wrong_call_is_one_line_that_points_to_the_help(refusal, argv):
    assert "--help" in refusal(*argv)


def test_a_bad_number_of_steps_is_refused_before_anybody_looks_at_the_photo(generate_refused, photo, monkeypatch):
    monkeypatch.setattr(Pipeline, "perceive", lambda *_: pytest.fail("the photo was measured"))
    assert "300 steps" in generate_refused(photo, "--schedule", "ddim", "--steps", 300)


@pytest.mark.parametrize("flags", [
    ("--sheet", "out.png"), ("--sheet", "../here/out.png"), ("--out", "photo.png"), ("--sheet", "pose.png"),
    ("--count", 2, "--sheet", "out-2.png"),
])
def test_a_result_never_replaces_a_photo_or_another_result(refusal, photo, folder, monkeypatch, flags):
    for name in ("photo.png", "pose.png"):
        shutil.copy(photo, folder / name)
    monkeypatch.setattr(Pipeline, "__init__", lambda *_: pytest.fail("the work began"))
    message = refusal("generate", "photo.png", "--pose", "pose.png", *QUICK, *flags)
    assert "is also a photo or another result" in message


def test_a_preview_never_replaces_its_photo(refusal, photo, folder):
    shutil.copy(photo, folder / "albedo.png")
    assert "albedo.png is also a photo" in refusal("preview", "albedo.png", "--out-dir", ".")
    assert "albedo.png is also a photo" in refusal("preview", photo, "--light-from", "albedo.png", "--out-dir", ".")
    assert "albedo.png is also a photo" in refusal("preview", photo, "--pose-code", "albedo.png", "--out-dir", ".")


def test_raw_maps_go_to_a_numpy_file_alone(refusal, photo, folder):
    assert "'maps.png' is not named .npy" in refusal("preview", photo, "--raw", "maps.png")
    (folder / "file").write_text("no folder")
    assert "file" in refusal("preview", photo, "--raw", "file/maps.npy")


@pytest.mark.parametrize(("flags", "match"), [
    (("--schedule", "lcm", "--steps", 51), "steps is 51, expected 1 to 50"),
    (("--schedule", "tcd", "--timesteps", "leading"), "no schedule 'tcd' with 'leading' timesteps"),
    (("--schedule", "dpm++", "--eta", 0.5), "eta is 0.5, but dpm++ has none"),
    (("--schedule", "ddim", "--timesteps", "trailing", "--steps", 1001), "steps is 1001, expected 1 to 1000"),
    (("--schedule", "euler"), "--schedule"),
])
def test_what_a_sampler_cannot_do_is_refused(generate_refused, photo, flags, match):
    assert match in generate_refused(photo, *flags)


# Bundles.


def rewritten(path, content: bytes):
    path.unlink()  # the file is a link to the embedded bundle's
    path.write_bytes(content)


def test_a_truncated_bundle_is_refused_with_the_files_name(generate_refused, photo, bundle_copy):
    graph = bundle_copy / "vae_decoder" / "model.onnx"
    rewritten(graph, graph.read_bytes()[:-1])
    message = generate_refused(photo, "--bundle", bundle_copy)
    assert str(graph) in message and "cut short" in message


def test_an_altered_bundle_is_refused_by_its_hash(generate_refused, photo, bundle_copy):
    graph = bundle_copy / "vae_decoder" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    rewritten(graph, bytes(content))
    message = generate_refused(photo, "--bundle", bundle_copy)
    assert str(graph) in message and "sha256" in message


def test_a_decoder_that_the_bundle_lacks_is_refused(generate_refused, photo, bundle_copy):
    described = json.loads((bundle_copy / "bundle.json").read_text())
    described["components"].pop("tiny_decoder")
    rewritten(bundle_copy / "bundle.json", json.dumps(described).encode())
    message = generate_refused(photo, "--bundle", bundle_copy, "--decoder", "tiny")
    assert "has no tiny_decoder, which this needs; leave --decoder out, or build it with --tiny-decoder" in message
    assert "--decoder: invalid choice: 'best'" in generate_refused(photo, "--decoder", "best")


def test_a_folder_that_is_no_bundle_is_refused(generate_refused, photo, tmp_path):
    assert "is not a bundle" in generate_refused(photo, "--bundle", tmp_path)


# The machine.


def test_a_missing_extra_prints_its_install_command(generate_refused, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "moderngl", None)  # makes the import fail
    assert "pip install 'caphuman-edge[gl]'" in generate_refused(photo, "--renderer", "gl")


def test_without_gl_numpy_draws_and_says_so_once(caphuman, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "moderngl", None)
    done = caphuman("generate", "--photo", photo, *QUICK, "--renderer", "auto", "--count", 2)
    assert done.code == 0
    assert done.err.startswith("caphuman: drawing maps with numpy") and done.err.count("\n") == 1


@pytest.mark.parametrize("out", ["file/out.png", "folder.png"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(generate_refused, photo, folder, monkeypatch, out):
    (folder / "file").write_text("no folder")
    (folder / "folder.png").mkdir()
    monkeypatch.setattr(Pipeline, "__init__", lambda *_: pytest.fail("the work began"))
    assert str(out).split("/")[0] in generate_refused(photo, "--out", out)


def test_a_full_disk_leaves_no_half_portrait(generate_refused, photo, monkeypatch):
    written = Path.write_bytes

    def full_disk(self, data):
        written(self, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert "cannot write out.png (No space left on device)" in generate_refused(photo)


def test_an_interrupted_portrait_leaves_nothing(caphuman, photo, folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Denoiser, "eps", interrupted)
    done = caphuman("generate", "--photo", photo, *QUICK)
    assert (done.code, done.out, done.err) == (130, "", "caphuman: interrupted\n")
    assert not list(folder.iterdir())
