"""`generate --recipe`: a portrait once more, by settings and heads out of its metadata. A stranger may have made it."""
import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import BadInput
from ..framing import FITS
from ..pipeline import Pipeline
from ..recipe import recipe_of
from ..request import Settings
from . import controls


def fill_in(args: argparse.Namespace, crowd: Sequence[argparse.Namespace]) -> list[dict[str, Any]]:
    """Settings and framing of the recipe for every flag that is not set; gives what it tells of each person.

    Raises BadInput for a recipe that does not fit, such as one of more people.
    """
    recipe, unset = recipe_of(args.recipe), Settings()
    for field in dataclasses.fields(Settings):
        if vars(args)[field.name] == getattr(unset, field.name) and recipe.get(field.name) is not None:
            value = recipe[field.name]
            setattr(args, field.name, tuple(value) if isinstance(value, list) else value)
    if args.canvas is None:
        args.denoise = None if args.denoise == 1 else args.denoise
    told: list[dict[str, Any]] = recipe.get("people", [])
    if len(told) != len(crowd):
        raise BadInput(f"{args.recipe} shows {len(told)} people, but {len(crowd)} photos are given; give as many, the "
                       "first as PHOTO, each of the others behind --with")
    for one, person in zip(crowd, told, strict=True):
        _frame(one, person)
    return told


def with_heads(told: Sequence[dict[str, Any]], sources: Sequence[controls.Sources],
               crowd: Sequence[argparse.Namespace]) -> list[controls.Sources]:
    """What is read, with the heads as they were drawn for those who are given no other."""
    return [dataclasses.replace(source, head_numbers=None if one.pose or one.pose_code else person.get("head"))
            for person, source, one in zip(told, sources, crowd, strict=True)]


def controls_of(told: Sequence[dict[str, Any]], sources: Sequence[controls.Sources],
                own: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What made each head: the recipe's controls where it is the recipe's head, and the sliders set on top."""
    return [{**person.get("controls", {}), **set_now} if source.head_numbers else set_now
            for person, source, set_now in zip(told, sources, own, strict=True)]


def compare(told: Sequence[dict[str, Any]], pipe: Pipeline, seen: Sequence[controls.Seen],
            crowd: Sequence[argparse.Namespace]) -> None:
    """Warn of what keeps the portrait from being the same again."""
    recipe = recipe_of(crowd[0].recipe)
    for person, one, flags in zip(told, seen, crowd, strict=True):
        if person.get("photo_sha256") != one.subject.source.get("photo_sha256"):
            warnings.warn(f"{flags.photo} is not the photo that {flags.recipe} was made from: the portrait will differ",
                          stacklevel=2)
    if recipe.get("bundle_sha256") != pipe.bundle.digest:
        warnings.warn(f"{crowd[0].recipe} was made with bundle {str(recipe.get('bundle'))[:64]!r}, of another sha256 "
                      "than this one: the portrait will differ", stacklevel=2)


def _frame(args: argparse.Namespace, person: dict[str, Any]) -> None:
    face, fit = person.get("face"), person.get("fit")
    if args.face is None and type(face) is int and 1 <= face <= 1000:
        args.face = face
    if args.fit == controls.CONTROLS["fit"] and fit in FITS:
        args.fit = fit
