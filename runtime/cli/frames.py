"""Pictures besides photos that `generate` reads: a photo to draw over, masks, the picture of a second control."""
import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from ..canvas import Canvas, head_mask
from ..errors import BadInput
from ..head import HeadCode
from ..image import load_photo, resize
from ..perceive import Subject
from ..pipeline import Pipeline
from . import controls
from .values import strengths, whole

HEAD, ALL = "head", "all"  # of --repaint


@dataclass(frozen=True, eq=False)
class Frames:
    """What is read."""

    canvas: controls.Photo | None
    repaint: controls.Photo | None  # a mask
    control: controls.Photo | None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for a canvas and a second control."""
    group = parser.add_argument_group("photo to draw over", "Its head is replaced: who it is comes from PHOTO, which "
                                      "may be the same file, the rest from this photo, sliders on top.")
    group.add_argument("--canvas", type=Path, metavar="FILE", help="photo to change")
    group.add_argument("--canvas-face", type=whole(1, 1000), metavar="N", help="which face in it (default: 1)")
    group.add_argument("--repaint", metavar=f"{HEAD}|{ALL}|MASK", help="what is drawn anew: the head and a margin, the "
                       "rest of the photo stays as it is (default); all of the frame; or what is white in a picture of "
                       "the frame")
    group.add_argument("--denoise", type=float, metavar="D", help="how far it is drawn anew: 0 hardly, 1 from nothing "
                       "(default: 0.75)")
    group = parser.add_argument_group("second control", "A bundle built with --controlnet follows a picture, too.")
    group.add_argument("--control", type=Path, metavar="FILE", help="picture that it reads, such as an OpenPose "
                       "skeleton of body and hands; stretched over the frame")
    group.add_argument("--control-face", action="store_true", help="the head's 68 landmarks, alone or added to the "
                       "picture, as the official tool draws them")
    group.add_argument("--control-strength", type=strengths, default=1.0, metavar="S", help="its pull, 0 to 2, or 13 "
                       "numbers with commas between (default: 1)")


def check(args: argparse.Namespace) -> None:
    """Raise BadInput for flags that need another one."""
    for flag in ("canvas_face", "repaint", "denoise"):
        if vars(args)[flag] is not None and args.canvas is None:
            raise BadInput(f"--{flag.replace('_', '-')} is about the photo of --canvas; add that, or leave it out")


def files(args: argparse.Namespace) -> list[Path]:
    """What is read."""
    mask = Path(args.repaint) if args.repaint not in (None, HEAD, ALL) else None
    return [file for file in (args.canvas, mask, args.control) if file]


def load(args: argparse.Namespace) -> Frames:
    """Read them all; a user learns of a wrong path before anything is computed."""
    mask = None if args.repaint in (None, HEAD, ALL) else load_photo(args.repaint)
    return Frames(load_photo(args.canvas) if args.canvas else None, mask,
                  load_photo(args.control) if args.control else None)


def scene(pipe: Pipeline, frames: Frames, args: argparse.Namespace) -> Subject | None:
    """Whoever is on the canvas."""
    if frames.canvas is None:
        return None
    with controls.naming(args.canvas, "--canvas-face"):
        return pipe.perceive(frames.canvas, args.canvas_face, args.fit)


def canvas(pipe: Pipeline, frames: Frames, on_it: Subject | None, heads: Sequence[HeadCode],
           args: argparse.Namespace) -> Canvas | None:
    """The photo to draw over, and the mask of what is drawn anew."""
    if frames.canvas is None or on_it is None or on_it.region is None:
        return None
    config, mask = pipe.bundle.config, None
    if frames.repaint is not None:
        mask = load_mask(frames.repaint, config.height, config.width)
    elif args.repaint != ALL:
        mask = head_mask([pipe.maps(head) for head in (on_it.head, *heads)])
    return Canvas(frames.canvas, on_it.region, mask)


def control(pipe: Pipeline, frames: Frames, heads: Sequence[HeadCode],
            args: argparse.Namespace) -> Float32[np.ndarray, "h w 3"] | None:
    """The second control's picture: as the official tool does, parts are added, so that overlaps exceed 1."""
    config = pipe.bundle.config
    parts: list[UInt8[np.ndarray, "_ _ 3"]] = []
    if frames.control is not None:
        parts.append(resize(frames.control, config.height, config.width, "bilinear"))
    if args.control_face:
        parts += [pipe.landmarks(head) for head in heads]
    return np.asarray(sum(part.astype(np.float32) / 255 for part in parts)) if parts else None


def load_mask(picture: UInt8[np.ndarray, "_ _ 3"], height: int, width: int) -> Float32[np.ndarray, "height width"]:
    """A picture as a mask of the frame, stretched over it: white is 1."""
    grey = resize(picture, height, width, "area").mean(axis=2, dtype=np.float32)
    return np.asarray(grey / 255)
