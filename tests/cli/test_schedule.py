"""`--schedule` and `--timesteps`: what is drawn with, told in the recipe, recorded in a bundle."""
import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caphuman_edge.export.build_command import add
from caphuman_edge.export.build_run import _schedule
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.image import load_photo
from caphuman_edge.runtime.schedule import Schedule

DRAW = "--steps", 2, "--guidance", 1, "--identity-guidance", 1, "--renderer", "numpy"


def told(path: Path) -> dict:
    with Image.open(path) as portrait:
        return json.loads(portrait.text["caphuman"])


def test_a_recipe_draws_the_picture_again_with_its_sampler(caphuman, photo, folder):
    for flags, expected in ((("--schedule", "tcd"), ("tcd", "trailing", 0.3)),
                            (("--schedule", "ddim", "--timesteps", "trailing"), ("ddim", "trailing", 0.0))):
        caphuman("generate", photo, "--out", f"{expected[0]}.png", *DRAW, *flags)
        recipe = told(folder / f"{expected[0]}.png")
        assert (recipe["schedule"], recipe["timesteps"], recipe["eta"]) == expected
    caphuman("generate", "--recipe", "tcd.png", photo, "--out", "again.png", "--renderer", "numpy")
    first, again, other = (load_photo(folder / f"{name}.png") for name in ("tcd", "again", "ddim"))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and told(folder / "again.png") == told(folder / "tcd.png")


def test_a_sampler_for_distilled_models_is_warned_of_in_one_line(caphuman, photo):
    done = caphuman("generate", photo, "--out", "out.png", "--schedule", "ddim", *DRAW)
    assert (done.code, done.err.count("\n")) == (0, 1)
    assert "warning: schedule ddim is asked for, but the bundle's model was made for lcm" in done.err


def built(*flags: str) -> Schedule:
    """What `caphuman build` records with these flags."""
    parser = argparse.ArgumentParser()
    add(parser.add_subparsers())
    return _schedule(parser.parse_args(["build", "--out", "x", *flags]))


def test_a_build_records_the_sampler_its_timesteps_and_its_steps():
    assert built() == Schedule()
    assert built("--schedule", "lcm", "--steps", "4", "--guidance", "1") == Schedule(
        kind="lcm", steps=4, guidance=1.0, timesteps="trailing")
    assert built("--timesteps", "trailing", "--steps", "3") == Schedule(steps=3, timesteps="trailing")
    assert built("--schedule", "dpm++", "--timesteps", "leading").timesteps == "leading"


def test_a_build_refuses_what_its_sampler_cannot_lay_out():
    with pytest.raises(BadInput, match="steps is 51, expected 1 to 50"):
        built("--schedule", "tcd", "--steps", "51")
    with pytest.raises(BadInput, match="no schedule 'lcm' with 'leading' timesteps"):
        built("--schedule", "lcm", "--timesteps", "leading", "--steps", "4")
