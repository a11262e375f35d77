"""The person and the head, as `generate` and `preview` take them: flags, and what they stand for."""
import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

from ..bundle import Bundle
from ..errors import BadInput, FaceError
from ..framing import FITS
from ..head import DEFAULT_MODES, MODES, OPEN_HEAD, HeadCode, directional_light, mix
from ..head.library import find_head
from ..image import load_photo
from ..machine import Machine
from ..perceive import Subject
from ..pipeline import Pipeline
from .machine_flags import add_machine_flags
from .number_files import head_numbers, light_coefficients
from .values import colour, direction, number, strength, whole

Photo = UInt8[np.ndarray, "_ _ 3"]  # any size: a signature may hold two
CONTROLS: dict[str, Any] = {
    "fit": "face", "yaw": None, "pitch": None, "roll": None, "x": 0.0, "y": 0.0, "scale": 1.0, "expression": [],
    "jaw": None, "light": None, "light_colour": None, "light_strength": None, "ambient": None,
    "light_coefficients": None, "light_turn": 0.0, "light_gain": 1.0}  # as they are when not set
LAMP = {"light_colour": "colour", "light_strength": "strength", "ambient": "ambient"}  # of `directional_light`
LAMP_PLACE = (0.0, 30.0)  # azimuth and elevation where only its colour or strength is given


@dataclass(frozen=True, eq=False)
class Sources:
    """What is read for one person: photos, and the numbers of heads."""

    photo: Photo
    pose: Photo | None
    light: Photo | None
    pose_numbers: object | None
    head_numbers: object | None = None  # of a recipe: the whole head, as it was drawn


@dataclass(frozen=True, eq=False)
class Seen:
    """What is drawn, and whom it was taken from."""

    subject: Subject
    pose: Subject | None
    head: HeadCode


class StoreGiven(argparse.Action):
    """Stores a positional only where there is one: argparse would put None over what the flag has set."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        if values is not None:
            setattr(namespace, self.dest, values)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for photo, head, light, bundle and renderer."""
    parser.usage = "%(prog)s PHOTO [options]"
    add_person_flags(parser)
    group = parser.add_argument_group("machine")
    group.add_argument("--bundle", type=Path, metavar="DIR", help="folder of a bundle (default: the embedded one)")
    add_machine_flags(group)
    group.add_argument("--head", metavar="NAME|FILE", help="head model, as 'caphuman head list' names them (default: "
                       "the bundle's)")
    group.add_argument("--renderer", choices=("auto", "gl", "numpy"), default="auto",
                       help="what draws the head (default: auto, which is gl where that runs)")
    group.add_argument("--detector", choices=("landmarker", "insight"), default="landmarker", help="what finds faces: "
                       "insight is InsightFace's SCRFD, of a model pack of yours (default: landmarker)")


def add_person_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for one person's photo, head and light."""
    _add_photo_flags(parser.add_argument_group("photo"))
    _add_pose_flags(parser.add_argument_group("head of another photo", "What to take from it replaces the photo's."))
    _add_head_flags(parser.add_argument_group("head", "Sliders, applied last. Left and right in names are the "
                                              "person's."))
    _add_light_flags(parser.add_argument_group("light", "The photo's own, unless a lamp, another photo's or "
                                               "coefficients replace it."))
    parser.set_defaults(**CONTROLS)


def open_pipeline(bundle: Path | None = None, machine: Machine | None = None,
                  renderer: Literal["auto", "gl", "numpy"] = "auto", head: str | None = None,
                  detector: Literal["landmarker", "insight"] = "landmarker") -> Pipeline:
    """The pipeline; says on stderr where a fallback draws, or a head that the bundle was not trained with."""
    file, machine = None if head is None else find_head(head), machine or Machine()
    pipe = Pipeline(Bundle.open(bundle), machine.backend, machine.threads, renderer, file, detector, machine.device,
                    machine.precision, machine.memory)
    if pipe.renderer.notice:
        print(f"caphuman: {pipe.renderer.notice}", file=sys.stderr)
    if file not in (None, OPEN_HEAD) and "head" in pipe.bundle:
        print(f"caphuman: {pipe.bundle.manifest.name} was trained with the head it brings along; its portraits follow "
              f"{head} less well", file=sys.stderr)
    return pipe


def check_controls(pipe: Pipeline, args: argparse.Namespace, scene: bool = False) -> None:
    """Try the controls on the mean head: a misspelt name should not cost the reading of the photos.

    `scene`: whether there is a photo to draw over, whose head is taken.
    """
    if args.modes is not None and not (args.pose or args.pose_code or scene):
        raise BadInput(f"--modes {args.modes} says what to take from another head; add --pose or --pose-code, or leave "
                       "it out")
    for flag, face, source, photo in (("--pose-face", args.pose_face, "--pose", args.pose),
                                      ("--light-face", args.light_face, "--light-from", args.light_from)):
        if face is not None and photo is None:
            raise BadInput(f"{flag} {face} chooses a face in the photo of {source}; add that, or leave it out")
    if sum([_lamp(args) is not None, args.light_coefficients is not None, args.light_from is not None]) > 1:
        raise BadInput("a lamp (--light, its colour, strength and ambient), --light-coefficients and --light-from each "
                       "replace the light; give one of them")
    mean = HeadCode.neutral(pipe.head_model.layout)
    slide(mix(mean, mean, _modes(args)), args)


def photo_files(args: argparse.Namespace) -> list[Path]:
    """The files that are read, which no result may replace."""
    return [file for file in (args.photo, args.pose, args.pose_code, args.light_from) if file]


def load_sources(args: argparse.Namespace) -> Sources:
    """Everything that is read; a user learns of a wrong path before anything is computed."""
    return Sources(load_photo(args.photo), load_photo(args.pose) if args.pose else None,
                   load_photo(args.light_from) if args.light_from else None,
                   head_numbers(args.pose_code) if args.pose_code else None)


def find_heads(pipe: Pipeline, sources: Sources, args: argparse.Namespace, scene: Subject | None = None) -> Seen:
    """The person in the photo, and the head to draw; it follows `scene`'s unless another is named."""
    target = pose = None
    if sources.pose_numbers is not None:
        target = _code_of(pipe, sources.pose_numbers, args.pose_code)
    with naming(args.photo, "--face"):
        subject = pipe.perceive(sources.photo, args.face, args.fit)
    if sources.pose is not None:
        with naming(args.pose, "--pose-face"):
            pose = pipe.perceive(sources.pose, args.pose_face, args.fit)
        target = pose.head
    if sources.head_numbers is not None:
        head = _code_of(pipe, sources.head_numbers, args.recipe)
    elif target is None and scene is not None:
        head = mix(subject.head, scene.head, args.modes or "all")
    else:
        head = subject.head if target is None else mix(subject.head, target, _modes(args))
    if sources.light is not None:
        with naming(args.light_from, "--light-face"):
            head = mix(head, pipe.perceive(sources.light, args.light_face, args.fit).head, "lighting")
    return Seen(subject, pose, slide(head, args))


def slide(head: HeadCode, args: argparse.Namespace) -> HeadCode:
    """The head with the sliders' changes; what has no slider set stays bit by bit as it is."""
    if (args.yaw, args.pitch, args.roll) != (None, None, None):
        head = head.posed(args.yaw, args.pitch, args.roll)
    if (args.x, args.y, args.scale) != (0, 0, 1):
        head = head.moved(args.x, args.y, args.scale)
    if args.jaw is not None:
        head = head.opened(args.jaw)
    lamp = _lamp(args)
    if lamp is not None:
        head = head.lit(lamp)
    if args.light_coefficients is not None:
        head = head.lit(np.reshape(args.light_coefficients, (9, 3)))
    if (args.light_turn, args.light_gain) != (0, 1):
        head = head.relit(args.light_turn, args.light_gain)
    return head.expressed(dict(args.expression))


def recipe(args: argparse.Namespace, head: HeadCode) -> dict[str, Any]:
    """What made the head, for the picture's metadata: the controls that were set, and the angles that came out."""
    controls = {name: vars(args)[name] for name, unset in CONTROLS.items() if vars(args)[name] != unset}
    if args.expression:
        controls["expression"] = dict(args.expression)
    if args.pose or args.pose_code:
        controls["modes"] = _modes(args)
    return {**controls, "angles": [round(angle, 1) + 0.0 for angle in head.angles]}  # + 0.0: no -0.0


def _add_photo_flags(group: argparse._ArgumentGroup) -> None:
    photo = group.add_mutually_exclusive_group(required=True)
    photo.add_argument("photo", nargs="?", action=StoreGiven, type=Path, help="photo of the person")
    photo.add_argument("--photo", type=Path, metavar="FILE", help="the same, as a flag")
    group.add_argument("--face", type=whole(1, 1000), metavar="N",
                       help="which face, as 'caphuman preview' numbers them (default: 1, the largest)")
    group.add_argument("--fit", choices=FITS, help="what of this and any other photo fills the frame: face: the "
                       "square around it, for which the embedded bundle is made (default); crop: the largest part that "
                       "has the frame's proportions; pad: all, with drawn-out edges; squash: all, stretched, as the "
                       "official tool does")


def _add_pose_flags(group: argparse._ArgumentGroup) -> None:
    pose = group.add_mutually_exclusive_group()
    pose.add_argument("--pose", type=Path, metavar="FILE", help="photo whose head is followed")
    pose.add_argument("--pose-code", type=Path, metavar="FILE", help="the same from numbers: a portrait made by "
                      "'caphuman generate', or the output of 'caphuman preview --json'")
    group.add_argument("--pose-face", type=whole(1, 1000), metavar="N", help="which face in the photo (default: 1)")
    group.add_argument("--modes", metavar="LIST", help=f"what to take: {','.join(MODES)} or all (default: "
                       f"{DEFAULT_MODES}; of --canvas all)")


def _add_head_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--yaw", type=number(-180.0, 180.0), metavar="DEG",
                       help="turn to this angle, 0 is frontal, + to image right")
    group.add_argument("--pitch", type=number(-90.0, 90.0), metavar="DEG", help="nod to this angle, + up")
    group.add_argument("--roll", type=number(-180.0, 180.0), metavar="DEG", help="tilt to this angle, + clockwise")
    group.add_argument("--x", type=number(-2.0, 2.0), metavar="F", help="shift right, in half frames")
    group.add_argument("--y", type=number(-2.0, 2.0), metavar="F", help="shift up, in half frames")
    group.add_argument("--scale", type=number(0.1, 10.0), metavar="F", help="times the size, 0.1 to 10")
    group.add_argument("--expression", type=strength, nargs="+", action="extend", metavar="NAME=VALUE",
                       help="expression units, 0 neutral to 1 full: smile=0.7 eyeBlinkLeft=1; an unknown name is "
                       "answered with all known ones")
    group.add_argument("--jaw", type=number(-10.0, 45.0), metavar="DEG", help="open the jaw to this angle, 25 is wide")


def _add_light_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--light", type=direction, metavar="AZIMUTH,ELEVATION",
                       help="a lamp from there, degrees: + image right, + above (0,30 where only its colour, strength "
                       "or ambient is given)")
    group.add_argument("--light-from", type=Path, metavar="FILE", help="the light of another photo")
    group.add_argument("--light-face", type=whole(1, 1000), metavar="N", help="which face in that photo (default: 1)")
    group.add_argument("--light-coefficients", type=light_coefficients, metavar="NUMBERS|FILE",
                       help="27 spherical-harmonic coefficients, as DECA's: red,green,blue of 1,x,y,z,xy,xz,yz,x2-y2,"
                       "3z2-1; or a JSON file of them")
    group.add_argument("--light-colour", type=colour, metavar="COLOUR", help="of lamp and ambient: #rrggbb or "
                       "red,green,blue from 0 to 1 (default: white)")
    group.add_argument("--light-strength", type=number(0.0, 10.0), metavar="F", help="of the lamp (default: 0.6)")
    group.add_argument("--ambient", type=number(0.0, 10.0), metavar="F", help="even light around it (default: 0.55)")
    group.add_argument("--light-turn", type=number(-180.0, 180.0), metavar="DEG",
                       help="turn the light, whichever it is, + to image right")
    group.add_argument("--light-gain", type=number(0.0, 10.0), metavar="F", help="times the brightness")


def _lamp(args: argparse.Namespace) -> Float[np.ndarray, "9 3"] | None:
    given = {name: vars(args)[flag] for flag, name in LAMP.items() if vars(args)[flag] is not None}
    return directional_light(*(args.light or LAMP_PLACE), **given) if args.light or given else None


def _modes(args: argparse.Namespace) -> str:
    return DEFAULT_MODES if args.modes is None else args.modes


def _code_of(pipe: Pipeline, numbers: object, file: Path) -> HeadCode:
    try:
        return HeadCode.from_numbers(pipe.head_model.layout, numbers)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error


@contextmanager
def naming(photo: Path, flag: str) -> Iterator[None]:
    """Add to errors and notices about faces which photo they are about, and which flag chooses a face in it."""
    def named(message: object) -> str:
        return f"{photo}: {str(message).replace('--face', flag)}"

    try:
        with warnings.catch_warnings(record=True) as heard:
            yield
    except FaceError as error:
        raise FaceError(named(error)) from error
    for notice in heard:
        warnings.warn(named(notice.message), notice.category, stacklevel=2)
