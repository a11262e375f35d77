"""`caphuman recipe`: what made a portrait, for a person or as JSON, and the command that makes it again."""
import argparse
import json
import shlex

import numpy as np
import pytest

from caphuman_edge.runtime.cli.values import picture, png
from caphuman_edge.runtime.image import save_picture, save_png

RECIPE = {
    "prompt": "a caf\u00e9, (smile:1.2)", "negative": "hat", "seed": 7, "steps": 4, "guidance": 1.5, "tau": 0,
    "strength": [0.5] * 13, "backend": "ort", "device": None, "bundle": "nano", "bundle_sha256": "ab" * 32,
    "people": [
        {"photo_sha256": "cd" * 32, "face": None, "fit": "face", "head": {"pose": [0.0, np.pi / 6, 0.0, 0.1, 0.2]},
         "controls": {"yaw": 30.0, "expression": {"smile": 0.7}, "angles": [30.0, 0.0, 0.0]}},
        {"photo_sha256": "ef" * 32, "face": 2, "fit": "pad", "head": {}, "odd": [1, {"a": 2}]}],
    "made_with": "caphuman-edge 0.1.0", "of_a_later_version": {"kept": [1]},
}


def portrait(folder, recipe: object, name: str = "out.png"):
    save_picture(folder / name, np.zeros((64, 64, 3), np.uint8),
                 {"caphuman": json.dumps(recipe), "AI-generated": "true"})
    return folder / name


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp"])
def test_a_person_is_told_what_made_the_picture(caphuman, folder, name):
    done = caphuman("recipe", portrait(folder, RECIPE, name))
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].endswith(f"{name}: AI-generated")
    rows = {line[2:].split("  ")[0]: line[2:].split("  ", 1)[-1].strip() for line in lines[1:]}
    want = {"prompt": "a caf\u00e9, (smile:1.2)", "negative": "hat", "seed": "7", "steps": "4", "guidance": "1.5",
            "bundle": "nano", "bundle sha256": "ab" * 32, "backend": "ort", "made with": "caphuman-edge 0.1.0",
            "of a later version": '{"kept": [1]}'}
    assert {key: rows[key] for key in want} == want
    assert "device" not in rows  # which was not set


def test_each_person_is_told_with_photo_angles_and_controls(caphuman, folder):
    lines = [line.strip() for line in caphuman("recipe", portrait(folder, RECIPE)).out.splitlines()]
    first, second = lines[lines.index("person 1"):lines.index("person 2")], lines[lines.index("person 2"):]
    assert "photo sha256  " + "cd" * 32 in first and "angles        yaw 30.0, pitch 0.0, roll 0.0" in first
    assert "controls      yaw 30.0, expression smile 0.7" in first
    assert "photo sha256  " + "ef" * 32 in second and 'odd           [1, {"a": 2}]' in second


def test_the_command_that_makes_it_again_names_the_file_and_asks_for_every_photo(caphuman, folder):
    file = portrait(folder, RECIPE, "my out.png")
    command = shlex.split(caphuman("recipe", file).out.splitlines()[-1])
    assert command == ["caphuman", "generate", "--recipe", str(file), "--photo", "PHOTO", "--out", "NEW.png",
                       "--with", "PHOTO2"]


def test_the_command_asks_for_canvas_control_and_masks_where_there_were_some(caphuman, folder):
    people = [{**RECIPE["people"][0], "mask_sha256": "12" * 32}, {**RECIPE["people"][1], "mask_sha256": "34" * 32}]
    file = portrait(folder, {**RECIPE, "people": people, "canvas": {"photo_sha256": "x"}, "control_sha256": "56" * 32})
    assert caphuman("recipe", file).out.splitlines()[-1].split("--photo ")[1] == (
        "PHOTO --mask MASK --canvas CANVAS --control CONTROL --out NEW.png --with PHOTO2 --mask MASK2")


def test_an_older_recipe_whose_head_stands_in_it_is_told_without_a_command(caphuman, folder):
    old = {key: value for key, value in RECIPE.items() if key != "people"}
    done = caphuman("recipe", portrait(folder, {**old, "head": {"pose": [0.0, 0.0, 0.0]}, "controls": {"fit": "pad"}}))
    assert "person 1\n  angles    yaw 0.0, pitch 0.0, roll 0.0\n  controls  fit pad\n" in done.out
    assert "--recipe cannot make it again" in done.out and "caphuman generate --recipe" not in done.out


def test_json_is_the_recipe_itself(caphuman, folder):
    assert json.loads(caphuman("recipe", portrait(folder, RECIPE), "--json").out) == RECIPE


def test_a_picture_without_a_recipe_is_one_line(refusal, tmp_path):
    save_png(tmp_path / "plain.png", np.zeros((64, 64, 3), np.uint8))
    assert "plain.png carries no recipe" in refusal("recipe", tmp_path / "plain.png")
    assert "does not exist" in refusal("recipe", tmp_path / "none.png")


def test_a_recipe_that_was_altered_is_one_line(refusal, tmp_path):
    assert "holds seed" in refusal("recipe", portrait(tmp_path, {**RECIPE, "seed": "\x1b[2J"}))


def test_nothing_of_a_strangers_recipe_steers_the_terminal(caphuman, folder):
    hostile = "\x1b[2J\x07\r\nperson 9\u202e\ud800\x9b"
    person = {**RECIPE["people"][0], hostile: hostile, "controls": {hostile: hostile}}
    done = caphuman("recipe", portrait(folder, {**RECIPE, "prompt": hostile, hostile: [hostile], "people": [person]}))
    assert done.code == 0
    assert all(sign.isprintable() or sign == "\n" for sign in done.out)
    assert r"\x1b[2J\x07\r\nperson 9\u202e" in done.out and "\nperson 9" not in done.out


@pytest.mark.parametrize("head", [
    {"pose": [1e300, 0, 0]}, {"pose": "up"}, {"pose": [10 ** 400, 0, 0]}, {"pose": [None] * 3}, {"pose": [1]}, {"x": 1},
])
def test_a_head_of_no_sense_has_no_angles(caphuman, folder, head):
    done = caphuman("recipe", portrait(folder, {**RECIPE, "people": [{"head": head}]}))
    assert done.code == 0 and "person 1" in done.out and "angles" not in done.out


def test_a_recipe_of_countless_entries_is_told_in_part(caphuman, folder):
    done = caphuman("recipe", portrait(folder, {**RECIPE, **{f"entry {k}": "x" * 9 for k in range(5_000)}}))
    assert "more, which --json prints" in done.out and len(done.out) < 10_000


@pytest.mark.parametrize(("convert", "good", "bad"), [
    (picture, ["a.png", "a.JPG", "b/a.jpeg", "a.webp"], ["a", "a.gif", ".png"]), (png, ["a.png", "a.PNG"], ["a.jpg"]),
])
def test_names_of_results_are_those_of_formats_that_are_written(convert, good, bad):
    assert [str(convert(name)) for name in good] == good
    for name in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not named .png"):
            convert(name)
