"""The person and the head, as `generate` and `preview` take them: flags, and what they stand for."""
import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from ..bundle import Bundle
from ..errors import BadInput, FaceError
from ..head import DEFAULT_MODES, MODES, HeadCode, directional_light, mix
from ..image import load_photo
from ..perceive import Subject
from ..pipeline import Pipeline
from .values import direction, number, strength, whole

Photo = UInt8[np.ndarray, "_ _ 3"]  # any size: a signature may hold two
SLIDERS: dict[str, Any] = {"yaw": None, "pitch": None, "roll": None, "x": 0.0, "y": 0.0, "scale": 1.0, "expression": [],
                           "light": None}  # as they are when not set


class StoreGiven(argparse.Action):
    """Stores a positional only where there is one: argparse would put None over what the flag has set."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        if values is not None:
            setattr(namespace, self.dest, values)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for photo, head, bundle and renderer."""
    photo = parser.add_mutually_exclusive_group(required=True)
    photo.add_argument("photo", nargs="?", action=StoreGiven, type=Path, help="photo of the person")
    photo.add_argument("--photo", type=Path, metavar="FILE", help="the same, as a flag")
    parser.add_argument("--face", type=whole(1, 1000), metavar="N", help="which face in it, 1 is the largest")
    _add_head_flags(parser.add_argument_group("head", "The photo's own, changed by a second photo, then by sliders."))
    parser.set_defaults(**SLIDERS)
    group = parser.add_argument_group("machine")
    group.add_argument("--bundle", type=Path, metavar="DIR", help="folder of a bundle (default: the embedded one)")
    group.add_argument("--backend", default="ort", help="what runs the graphs (default: ort)")
    group.add_argument("--renderer", choices=("auto", "gl", "numpy"), default="auto", help="what draws the head")
    group.add_argument("--threads", type=whole(1, 1024), metavar="N", help="at most so many cores (default: all)")


def open_pipeline(bundle: Path | None = None, backend: str = "ort", threads: int | None = None,
                  renderer: Literal["auto", "gl", "numpy"] = "auto") -> Pipeline:
    """The pipeline; says on stderr where a fallback draws."""
    pipe = Pipeline(Bundle.open(bundle), backend, threads, renderer)
    if pipe.renderer.notice:
        print(f"caphuman: {pipe.renderer.notice}", file=sys.stderr)
    return pipe


def check_controls(pipe: Pipeline, args: argparse.Namespace) -> None:
    """Try the controls on the mean head: a misspelt name should not cost the reading of the photos."""
    if args.modes is not None and not args.pose:
        raise BadInput(f"--modes {args.modes} says what to take from a pose photo; add --pose, or leave it out")
    mean = HeadCode.neutral(pipe.head_model.layout)
    slide(mix(mean, mean, _modes(args)), args)


def photo_files(args: argparse.Namespace) -> list[Path]:
    """The files that are read, which no result may replace."""
    return [args.photo, args.pose] if args.pose else [args.photo]


def load_photos(args: argparse.Namespace) -> tuple[Photo, Photo | None]:
    """The pixels of --photo and of --pose; a user learns of a wrong path before anything is loaded."""
    return load_photo(args.photo), load_photo(args.pose) if args.pose else None


def find_subject(pipe: Pipeline, photo: Photo, pose: Photo | None,
                 args: argparse.Namespace) -> tuple[Subject, HeadCode]:
    """The person in the photo, and the head to draw."""
    with _naming(args.photo, "--face"):
        subject = pipe.perceive(photo, args.face)
    head = subject.head
    if pose is not None:
        with _naming(args.pose, "--pose-face"):
            head = mix(head, pipe.perceive(pose, args.pose_face).head, _modes(args))
    return subject, slide(head, args)


def slide(head: HeadCode, args: argparse.Namespace) -> HeadCode:
    """The head with the sliders' changes; what has no slider set stays bit by bit as it is."""
    if (args.yaw, args.pitch, args.roll) != (None, None, None):
        head = head.posed(args.yaw, args.pitch, args.roll)
    if (args.x, args.y, args.scale) != (0, 0, 1):
        head = head.moved(args.x, args.y, args.scale)
    if args.light:
        head = head.lit(directional_light(*args.light))
    return head.expressed(dict(args.expression))


def recipe(args: argparse.Namespace, head: HeadCode) -> dict[str, Any]:
    """What made the head, for the picture's metadata: the controls that were set, and the angles that came out."""
    controls = {name: vars(args)[name] for name, unset in SLIDERS.items() if vars(args)[name] != unset}
    if args.expression:
        controls["expression"] = dict(args.expression)
    if args.pose:
        controls["modes"] = _modes(args)
    return {**controls, "angles": [round(angle, 1) for angle in head.angles]}


def _add_head_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--pose", type=Path, metavar="FILE", help="photo whose head is followed")
    group.add_argument("--pose-face", type=whole(1, 1000), metavar="N", help="which face in it, 1 is the largest")
    group.add_argument("--modes", metavar="LIST", help=f"what to take from it: {','.join(MODES)} or all "
                       f"(default: {DEFAULT_MODES})")
    group.add_argument("--yaw", type=number(-180.0, 180.0), metavar="DEG", help="turn, + to image right, 0 is frontal")
    group.add_argument("--pitch", type=number(-90.0, 90.0), metavar="DEG", help="nod, + up")
    group.add_argument("--roll", type=number(-180.0, 180.0), metavar="DEG", help="tilt, + clockwise as seen")
    group.add_argument("--x", type=number(-2.0, 2.0), metavar="F", help="shift right, in half frames")
    group.add_argument("--y", type=number(-2.0, 2.0), metavar="F", help="shift up, in half frames")
    group.add_argument("--scale", type=number(0.1, 10.0), metavar="F", help="size, 1 leaves it")
    group.add_argument("--expression", type=strength, nargs="+", action="extend", metavar="NAME=VALUE",
                       help="expression units, 1 is full strength: mouthSmile=0.7 eyeBlinkLeft=1")
    group.add_argument("--light", type=direction, metavar="AZIMUTH,ELEVATION", help="where the light comes from, "
                       "degrees: + from image right, + from above")


def _modes(args: argparse.Namespace) -> str:
    return DEFAULT_MODES if args.modes is None else args.modes


@contextmanager
def _naming(photo: Path, flag: str) -> Iterator[None]:
    """Add to errors about faces which photo they are about, and which flag chooses a face in it."""
    try:
        yield
    except FaceError as error:
        raise FaceError(f"{photo}: {str(error).replace('--face', flag)}") from error
