"""`caphuman preview`: what is seen in a photo, and the maps that would steer the portrait. Draws no portrait."""
import argparse
from pathlib import Path
from typing import Any

from ..image import save_png
from ..perception import FaceBox
from ..sheet import boxes_tile, contact_sheet, landmarks_tile, map_pictures, map_tiles
from . import controls
from .output import check_apart, check_writable, make_folder
from .report import add_json_flag, show

FILES = ("normal.png", "albedo.png", "rendered.png", "contact_sheet.png")


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("preview", help="draw a head's maps and what is seen in the photo", description=(
        f"Writes {', '.join(FILES)} to a folder, over older files of these names."))
    controls.add_flags(parser)
    parser.add_argument("--out-dir", type=Path, default=Path("preview"), metavar="DIR",
                        help="folder to write to, made if missing (default: preview)")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look at the photo, draw the maps, write them."""
    files = [args.out_dir / name for name in FILES]
    check_apart(files, controls.photo_files(args))
    check_writable(files)
    photo, pose = controls.load_photos(args)
    with controls.open_pipeline(args.bundle, args.backend, args.threads, args.renderer) as pipe:
        controls.check_controls(pipe, args)
        subject, head = controls.find_subject(pipe, photo, pose, args)
        boxes, maps = pipe.see.detect(photo), pipe.maps(head)
    sheet = contact_sheet([boxes_tile(photo, boxes), landmarks_tile(subject.photo, subject.face), *map_tiles(maps)])
    make_folder(args.out_dir)
    for file, pixels in zip(files, (*map_pictures(maps).values(), sheet), strict=True):
        save_png(file, pixels)
    show({"files": [str(file) for file in files], "faces": [_box(box) for box in boxes],
          "head": controls.recipe(args, head)}, args.json, _text)
    return 0


def _box(box: FaceBox) -> dict[str, int | float]:
    """A found face in pixels of the photo; the list's order is what --face counts."""
    return {"left": round(box.left), "top": round(box.top), "right": round(box.right), "bottom": round(box.bottom),
            "score": round(box.score, 3)}


def _text(report: dict[str, Any]) -> str:
    yaw, pitch, roll = report["head"]["angles"]
    count = len(report["faces"])
    faces = "1 face" if count == 1 else f"{count} faces"
    return "\n".join([*report["files"], f"{faces}; yaw {yaw}, pitch {pitch}, roll {roll} degrees"])
