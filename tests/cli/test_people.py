"""`caphuman generate` with several people, masks, styles, recipes made again, and what it refuses."""
import argparse
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from caphuman_edge.runtime.cli.people import crowd
from caphuman_edge.runtime.image import load_photo, read_metadata

QUICK = "--steps", 1, "--renderer", "numpy"


def recipe(path) -> dict:
    return json.loads(read_metadata(path, "caphuman"))


def pixels(path) -> np.ndarray:
    return load_photo(path).astype(int)


@pytest.fixture
def mirrored(astronaut, tmp_path):
    """Another photo: the same person, mirrored."""
    astronaut.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    return tmp_path / "mirrored.png"


def test_two_people_stand_where_they_are_put(caphuman, photo, mirrored, folder):
    one = "generate", photo, "--x", -0.45, "--scale", 0.5, *QUICK
    assert caphuman(*one, "--out", "one.png").code == 0
    done = caphuman(*one, "--out", "two.png", "--with", mirrored, "--x", 0.45, "--scale", 0.5, "--yaw", -20)
    assert (done.code, done.out, done.err) == (0, "two.png\n", "")
    told = recipe(folder / "two.png")["people"]
    assert [person["controls"]["x"] for person in told] == [-0.45, 0.45]
    assert told[1]["controls"]["angles"][0] == pytest.approx(-20, abs=0.1)
    assert told[0]["photo_sha256"] != told[1]["photo_sha256"]
    change = np.abs(pixels(folder / "two.png") - pixels(folder / "one.png")).mean(axis=(0, 2))
    assert change[160:].mean() > 2 * change[:64].mean()  # the second one is in the right half


def test_a_mask_keeps_somebody_out(caphuman, photo, folder):
    Image.new("L", (64, 64)).save(folder / "nowhere.png")
    for out, flags in (("all.png", ()), ("none.png", ("--mask", "nowhere.png")), ("off.png", ("--strength", 0))):
        assert caphuman("generate", photo, *flags, "--out", out, "--steps", 2, "--renderer", "numpy").code == 0
    assert np.abs(pixels(folder / "none.png") - pixels(folder / "off.png")).max() <= 1
    assert np.abs(pixels(folder / "none.png") - pixels(folder / "all.png")).max() > 10
    assert len(recipe(folder / "none.png")["people"][0]["mask_sha256"]) == 64


def test_everybody_behind_with_has_flags_of_their_own(photo):


    words = ["a.png", "--yaw", "20", "--with", "b.png", "--expression", "smile=1", "--mask", "m.png"]
    people = crowd(argparse.Namespace(others=words, recipe=None))
    assert [str(person.photo) for person in people[1:]] == ["a.png", "b.png"]
    assert (people[1].yaw, people[2].yaw, str(people[2].mask)) == (20, None, "m.png")
    assert people[2].expression == [("smile", 1.0)] and people[1].expression == []


def test_flags_of_the_picture_stand_before_with(refusal, photo):
    said = refusal("generate", photo, "--with", photo, "--seed", 3)
    assert "--seed 3 behind --with is no flag of a person" in said


def test_a_portrait_is_made_again_byte_by_byte_from_its_recipe(caphuman, photo, folder):
    caphuman("generate", photo, "--yaw", 25, "--expression", "smile=0.6", "--prompt", "a (smiling:1.2) person",
             "--strength", ",".join(["0.9"] * 13), "--seed", 4, "--guidance", 2, "--out", "first.jpg", *QUICK)
    done = caphuman("generate", "--recipe", "first.jpg", photo, "--out", "again.jpg", "--renderer", "numpy")
    assert (done.code, done.err) == (0, "")
    assert (folder / "first.jpg").read_bytes() == (folder / "again.jpg").read_bytes()
    caphuman("generate", "--recipe", "first.jpg", photo, "--seed", 5, "--out", "other.jpg", "--renderer", "numpy")
    assert recipe(folder / "other.jpg") == {**recipe(folder / "first.jpg"), "seed": 5}
    assert (pixels(folder / "other.jpg") != pixels(folder / "first.jpg")).any()


def test_a_recipe_remembers_the_decoder(caphuman, photo, folder):
    caphuman("generate", photo, "--decoder", "tiny", "--out", "first.png", *QUICK)
    assert recipe(folder / "first.png")["decoder"] == "tiny"
    caphuman("generate", "--recipe", "first.png", photo, "--out", "again.png", "--renderer", "numpy")
    caphuman("generate", photo, "--out", "kl.png", *QUICK)
    first, again, other = (pixels(folder / f"{name}.png") for name in ("first", "again", "kl"))
    assert (first == again).all() and (first != other).any()


def test_another_photo_than_the_recipes_is_warned_of(caphuman, photo, mirrored, folder):
    caphuman("generate", photo, "--out", "first.png", *QUICK)
    done = caphuman("generate", "--recipe", "first.png", mirrored, "--out", "again.png", "--renderer", "numpy")
    assert done.code == 0 and "mirrored.png is not the photo that first.png was made from" in done.err
    assert recipe(folder / "again.png")["people"][0]["head"] == recipe(folder / "first.png")["people"][0]["head"]


def test_a_recipe_of_two_wants_two_photos(caphuman, refusal, photo):
    caphuman("generate", photo, "--out", "two.png", *QUICK, "--with", photo)
    assert "two.png shows 2 people, but 1 photos are given" in refusal("generate", "--recipe", "two.png", photo,
                                                                       "--out", "again.png")


def test_style_and_added_prompt_are_words_around_the_prompt(caphuman, photo, folder):
    (folder / "mine.json").write_text('{"dark": {"prompt": "night, {prompt}, stars", "negative": "sun"}}')
    caphuman("generate", photo, "--prompt", "a man", "--added", "happy", "--negative", "blur", "--styles", "mine.json",
             "--style", "dark", "--out", "me.png", *QUICK)
    told = recipe(folder / "me.png")
    assert (told["prompt"], told["negative"]) == ("night, a man, happy, stars", "blur, sun")


def test_the_picture_so_far_is_shown(caphuman, photo, folder):
    caphuman("generate", photo, "--preview", "so-far.png", "--out", "me.png", "--steps", 5, "--renderer", "numpy")
    assert np.abs(pixels(folder / "so-far.png") - pixels(folder / "me.png")).mean() < 20
    assert read_metadata(folder / "so-far.png", "AI-generated") == "true"


def test_thirteen_strengths_are_taken_and_told(caphuman, photo, folder):
    scales = [0.1 * k for k in range(13)]
    caphuman("generate", photo, "--strength", ",".join(map(str, scales)), "--out", "me.png", *QUICK)
    assert recipe(folder / "me.png")["strength"] == pytest.approx(scales)


@pytest.mark.parametrize(("flags", "said"), [
    (("--strength", "1,1"), "neither a number from 0 to 2 nor 13"),
    (("--size", "512x768"), "built for 256x256; build one with 'caphuman build --size 512x768"),
    (("--control-face",), "has no control_encoder, which this needs; build it with --controlnet"),
    (("--denoise", 0.5), "--denoise is about the photo of --canvas"),
    (("--styles", "x.json"), "add --style NAME"),
    (("--style", "nonsense"), "style 'nonsense' is not known, expected one of"),
    (("--safety-check", "nobody"), "safety check 'nobody' is not known"),
    (("--enhancement", 3), "enhancement is 3.0, expected 0 to 2"),
    (("--identity-guidance", "nan"), "identity_guidance is nan, expected 0 to 30"),
])
def test_slips_are_told_before_anything_is_drawn(refusal, photo, flags, said):
    assert said in refusal("generate", photo, *flags)


def test_a_safety_check_may_turn_portraits_down(caphuman, refusal, photo, folder, monkeypatch):
    seen = []
    monkeypatch.setattr("caphuman_edge.runtime.cli.generate.load_check",
                        lambda name: lambda picture: seen.append(picture.shape) or "too dark")
    said = refusal("generate", photo, "--safety-check", "mine", "--out", "me.png", *QUICK)
    assert "safety check 'mine' turned the picture down (too dark)" in said and seen == [(256, 256, 3)]
    assert "--preview shows pictures that --safety-check mine has not seen" in refusal(
        "generate", photo, "--safety-check", "mine", "--preview", "p.png")


def test_an_interrupt_stops_within_one_step_and_leaves_no_picture(photo, folder):
    words = ["generate", photo, "--steps", "50", "--guidance", "3", "--identity-guidance", "2",  # for some seconds
             "--preview", "so-far.png", "--out", "me.png", "--renderer", "numpy"]
    running = subprocess.Popen([sys.executable, "-c", "import sys; from caphuman_edge.runtime.cli import main; "
                                "sys.exit(main())", *map(str, words)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "so-far.png").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (130, "caphuman: interrupted\n")
    assert time.monotonic() - started < 20
    assert [path.name for path in folder.iterdir()] == ["so-far.png"]
