"""`caphuman preview`: what is seen in a photo, and the maps that would steer the portrait. Draws no portrait."""
import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from ..errors import BadInput
from ..head import HeadCode
from ..image import save_png
from ..perceive import Subject
from ..perception import FaceBox
from ..pipeline import Pipeline
from ..sheet import Tile, contact_sheet, landmarks_tile, map_pictures, numbered_faces, overlay_tile
from . import controls
from .machine_flags import chosen_machine
from .output import check_apart, check_writable, make_folder
from .report import add_json_flag, show
from .values import npy

MAPS = ("normal.png", "albedo.png", "rendered.png")
SHEET, FACES, POSE_FACES = "contact_sheet.png", "faces.png", "pose_faces.png"
FACES_EDGE = 512, 1280  # px of a picture with numbered faces, at least and at most


@dataclass(frozen=True, eq=False)
class Look:
    """One photo and what is seen in it."""

    title: str  # "photo" or "pose photo"
    photo: UInt8[np.ndarray, "h w 3"]
    subject: Subject
    number: int  # of the subject among the faces, from 1
    boxes: list[FaceBox]

    def faces(self) -> UInt8[np.ndarray, "h w 3"]:
        """The photo with all faces numbered, large enough to read."""
        edge = int(np.clip(max(self.photo.shape[:2]), *FACES_EDGE))
        return numbered_faces(self.photo, self.boxes, self.number, edge)

    def tiles(self, pipe: Pipeline, fit: str) -> Iterator[Tile]:
        """Photo, frame and fitted head: a row of the sheet."""
        subject, maps = self.subject, pipe.maps(self.subject.head)
        yield Tile(f"{self.title}: face {self.number} of {len(self.boxes)}",
                   numbered_faces(self.photo, self.boxes, self.number))
        yield landmarks_tile(f"frame (fit {fit}), 478 points", subject.photo, subject.face,
                             maps.shape[2] / maps.shape[1])
        yield overlay_tile(f"its head: {_angles(subject.head)}", subject.photo, maps)


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("preview", help="draw a head's maps and what is seen in the photo", description=(
        "Looks at a photo and draws the head that would steer a portrait. Writes to a folder, over older files of the "
        f"same names: {SHEET} (look at this first), {FACES} (every face with its number), with --pose also "
        f"{POSE_FACES}, and {', '.join(MAPS)}."))
    controls.add_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out-dir", type=Path, default=Path("preview"), metavar="DIR",
                       help="folder to write to, made if missing (default: preview)")
    group.add_argument("--raw", type=npy, metavar="FILE", help="also write the maps as the network reads them: a numpy "
                       "array (9, height, width), float32: normals -1 to 1, albedo, rendered")
    add_json_flag(group)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look at the photos, draw the maps, write them."""
    names = [FACES, *([POSE_FACES] if args.pose else []), *MAPS, SHEET]
    shown = [args.out_dir / name for name in names]
    files = [*shown, *([args.raw] if args.raw else [])]
    check_apart(files, controls.photo_files(args))
    check_writable(files)
    sources = controls.load_sources(args)
    with controls.open_pipeline(args.bundle, chosen_machine(args), args.renderer, args.head, args.detector) as pipe:
        controls.check_controls(pipe, args)
        seen = controls.find_heads(pipe, sources, args)
        looks, maps = _looks(pipe, sources, seen, args), pipe.maps(seen.head)
        tiles = [tile for look in looks for tile in look.tiles(pipe, args.fit)]
    pictures = map_pictures(maps)
    labels = ("normal", "albedo", f"rendered: {_angles(seen.head)}")
    tiles += [Tile(label, picture) for label, picture in zip(labels, pictures.values(), strict=True)]
    written = [*(look.faces() for look in looks), *pictures.values(), contact_sheet(tiles, columns=3)]
    make_folder(args.out_dir)
    for file, pixels in zip(shown, written, strict=True):
        save_png(file, pixels)
    if args.raw:
        _save_array(args.raw, maps)
    show(_report(files, looks, seen.head, args), args.json, _text)
    return 0


def _looks(pipe: Pipeline, sources: controls.Sources, seen: controls.Seen, args: argparse.Namespace) -> list[Look]:
    """The photo, and the pose photo where there is one."""
    looks = [Look("photo", sources.photo, seen.subject, args.face or 1, pipe.see.detect(sources.photo, every=True))]
    if sources.pose is not None and seen.pose is not None:
        boxes = pipe.see.detect(sources.pose, every=True)
        looks.append(Look("pose photo", sources.pose, seen.pose, args.pose_face or 1, boxes))
    return looks


def _save_array(file: Path, maps: Float32[np.ndarray, "9 h w"]) -> None:
    make_folder(file.parent)
    try:
        with file.open("wb") as stream:  # given a name, numpy adds .npy to one that ends in .NPY
            np.save(stream, maps)
    except OSError as error:
        raise BadInput(f"cannot write {file} ({error.strerror or error}); choose another place") from error


def _report(files: list[Path], looks: list[Look], head: HeadCode, args: argparse.Namespace) -> dict[str, Any]:
    """`head` is what --pose-code and HeadCode.from_numbers read."""
    faces = [[_box(box) for box in look.boxes] for look in looks]
    return {"files": [str(file) for file in files], **dict(zip(("faces", "pose_faces"), faces, strict=False)),
            "controls": controls.recipe(args, head), "head": head.numbers()}


def _box(box: FaceBox) -> dict[str, int | float]:
    """A found face in pixels of the photo; the list's order is what --face counts."""
    return {"left": round(box.left), "top": round(box.top), "right": round(box.right), "bottom": round(box.bottom),
            "score": round(box.score, 3)}


def _angles(head: HeadCode) -> str:
    return "yaw {:z.0f}, pitch {:z.0f}, roll {:z.0f}".format(*head.angles)


def _text(report: dict[str, Any]) -> str:
    yaw, pitch, roll = report["controls"]["angles"]
    count = len(report["faces"])
    faces = "1 face" if count == 1 else f"{count} faces"
    return "\n".join([*report["files"], f"{faces}; yaw {yaw}, pitch {pitch}, roll {roll} degrees"])
