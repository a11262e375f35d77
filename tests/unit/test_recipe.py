"""Recipes out of pictures, which may be strangers', so a recipe may hold anything; and the hook for safety checks."""
import json
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from caphuman_edge.runtime import safety
from caphuman_edge.runtime.errors import BadImage, BadInput, Refused
from caphuman_edge.runtime.image import PICTURES, save_picture
from caphuman_edge.runtime.recipe import is_marked, recipe_of
from caphuman_edge.runtime.safety import load_check, require_safe

PIXELS = np.zeros((64, 64, 3), np.uint8)
RECIPE = {
    "prompt": "a caf\u00e9, (smile:1.2)", "negative": "", "seed": 7, "steps": 4, "guidance": 1.0,
    "strength": [0.5] * 13, "backend": "ort", "device": None, "bundle": "nano", "bundle_sha256": "ab" * 32,
    "people": [{"photo_sha256": "cd" * 32, "face": None, "fit": "face", "head": {"pose": [0.0, 0.5, 0.0]}}],
    "made_with": "caphuman-edge 0.1.0", "of_a_later_version": {"kept": [1]},
}


@pytest.fixture
def picture(tmp_path):
    """Writes a picture with this recipe, or with this text in place of one."""
    def write(recipe: object, suffix: str = ".png"):
        text = recipe if isinstance(recipe, str) else json.dumps(recipe)
        save_picture(tmp_path / f"out{suffix}", PIXELS, {"caphuman": text, "AI-generated": "true"})
        return tmp_path / f"out{suffix}"

    return write


@pytest.mark.parametrize("suffix", sorted(PICTURES))
def test_a_recipe_comes_back_as_it_was_from_every_format(picture, suffix):
    assert recipe_of(picture(RECIPE, suffix)) == RECIPE
    assert is_marked(picture(RECIPE, suffix))


def test_a_picture_without_a_recipe_is_refused(tmp_path):
    save_picture(tmp_path / "plain.webp", PIXELS)
    with pytest.raises(BadInput, match="plain.webp carries no recipe"):
        recipe_of(tmp_path / "plain.webp")
    assert not is_marked(tmp_path / "plain.webp")


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "notes.png").write_text(json.dumps(RECIPE))
    with pytest.raises(BadImage, match="not a picture"):
        recipe_of(tmp_path / "notes.png")


@pytest.mark.parametrize(("text", "match"), [
    ("{", "is not JSON"), ("[" * 50_000, "is not JSON"), ("9" * 5_000, "is not JSON"), ("[]", "is no object"),
    ('{"x": ' * 13 + "1" + "}" * 13, "nested more than 12 deep"), ('{"x": NaN}', "holds nan"),
    ('{"x": [1e999]}', "holds inf"), (json.dumps({"x": "y" * 20_001}), "a text of 20001 characters"),
    (json.dumps({"y" * 20_001: 1}), "a text of 20001 characters"),
])
def test_a_recipe_that_is_no_recipe_is_refused_in_one_line(picture, text, match):
    with pytest.raises(BadInput, match=match) as caught:
        recipe_of(picture(text))
    assert "out.png" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["prompt", "negative", "seed", "steps", "guidance"])
def test_a_recipe_without_the_settings_that_all_have_is_refused(picture, missing):
    with pytest.raises(BadInput, match=f"has no {missing}"):
        recipe_of(picture({key: value for key, value in RECIPE.items() if key != missing}))


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("prompt", None, "a text"), ("seed", 1.5, "a whole number"), ("seed", True, "a whole number"),
    ("guidance", "1", "a number"), ("strength", [1, "x"], "a number or a list of such"),
    ("device", 3, "a text or null"),
    ("people", {}, "a list of objects"), ("people", [], "a list of objects"), ("people", [[1]], "a list of objects"),
    ("bundle_sha256", "AB" * 15, "a sha256"), ("controls", [], "an object"),
])
def test_a_value_of_another_type_is_refused_with_value_and_expectation(picture, name, value, expected):
    with pytest.raises(BadInput) as caught:
        recipe_of(picture({**RECIPE, name: value}))
    assert f"holds {name} {json.dumps(value)}, expected {expected};" in str(caught.value)


def test_a_person_with_a_value_of_another_type_is_refused_by_number(picture):
    people = [RECIPE["people"][0], {"photo_sha256": "\x1b[2Jx"}]
    with pytest.raises(BadInput, match=r'person 2: photo_sha256 "\\u001b\[2Jx", expected a sha256'):
        recipe_of(picture({**RECIPE, "people": people}))


def dark(pixels: np.ndarray) -> str | None:
    """The fake check of these tests; it also tries to change the picture."""
    reason = "it is\nall black" if not pixels.any() else None
    pixels[:] = 1
    return reason


@pytest.fixture
def installed(monkeypatch):
    """Makes checks of this module installed: by name, what stands behind the colon."""
    def install(**checks: str) -> None:
        entries = [EntryPoint(name, f"{__name__}:{function}", safety.GROUP) for name, function in checks.items()]
        monkeypatch.setattr(safety, "entry_points", lambda group: entries if group == "caphuman.safety" else [])

    return install


def test_a_check_is_found_by_name_and_refuses_with_its_reason_in_one_line(installed, monkeypatch):
    monkeypatch.setattr(EntryPoint, "load", lambda entry: globals()[entry.value.partition(":")[2]])
    installed(dark="dark")
    check = load_check("dark")
    with pytest.raises(Refused, match="'dark' turned the picture down .it is all black.; change the prompt"):
        require_safe("dark", check, PIXELS)
    assert not PIXELS.any()
    require_safe("dark", check, PIXELS + 1)


@pytest.mark.parametrize("answer", [False, True, "", 0.9])
def test_an_answer_that_is_no_reason_counts_as_no(answer):
    with pytest.raises(Refused, match="its answer was"):
        require_safe("odd", lambda pixels: answer, PIXELS)


def test_an_unknown_check_lists_the_installed_ones(installed):
    installed(dark="dark", bright="dark")
    with pytest.raises(BadInput, match="'nsfw' is not known, installed: bright, dark"):
        load_check("nsfw")


def test_where_no_check_is_installed_it_says_how_one_gets_there(installed):
    installed()
    with pytest.raises(BadInput, match="none is installed: .* an entry point in the group caphuman.safety"):
        load_check("nsfw")


def test_a_check_that_cannot_be_loaded_is_one_line(installed, monkeypatch):
    monkeypatch.setattr(safety, "entry_points", lambda group: [
        EntryPoint("gone", "no_such_package:check", group), EntryPoint("none", "json:nothing", group),
        EntryPoint("number", "math:pi", group)])
    with pytest.raises(BadInput, match="'gone' cannot be loaded"):
        load_check("gone")
    with pytest.raises(BadInput, match="'none' cannot be loaded"):
        load_check("none")
    with pytest.raises(BadInput, match="'number' is no function, expected math:pi"):
        load_check("number")
