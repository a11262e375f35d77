"""A portrait in one command, `make demo`: the astronaut's photo turned to two head poses by the embedded bundle.

    python -m caphuman_edge.runtime.demo --photo PHOTO [--out DIR]

Writes portrait.png, portrait-2.png and contact_sheet.png, which shows photo, maps and portrait of each. PHOTO may also
be a wheel of scikit-image, out of which the astronaut (NASA, public domain) is taken: the package itself is not needed.
"""
import argparse
import hashlib
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from .cli import Parser, guarded
from .cli.controls import open_pipeline
from .cli.generate import Drawn, draw
from .cli.output import check_apart, check_writable, make_folder
from .errors import BadImage, BadInput
from .image import save_png
from .perceive import Subject
from .pipeline import Pipeline
from .request import Person, Settings
from .sheet import Tile, contact_sheet, map_tiles

YAWS = {"portrait.png": -30.0, "portrait-2.png": 25.0}  # degrees
SHEET = "contact_sheet.png"
PROMPT = "a portrait, brown hair, smiling, blue background, white shirt"
ASTRONAUT = "skimage/data/astronaut.png"  # within the wheel
ASTRONAUT_SHA256 = "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return guarded(lambda: _run(argv))


def astronaut(wheel: Path) -> Path:
    """The astronaut's photo out of a wheel of scikit-image, written beside it."""
    photo = _unpacked(wheel)
    if hashlib.sha256(photo).hexdigest() != ASTRONAUT_SHA256:
        raise BadImage(f"{ASTRONAUT} in {wheel} is another picture; use the wheel of scikit-image 0.26.0")
    path = wheel.with_name("astronaut.png")
    try:
        path.write_bytes(photo)
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror or error}); copy the wheel to another folder") from error
    return path


def _unpacked(wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(ASTRONAUT)
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise BadImage(f"{wheel} holds no good {ASTRONAUT} ({error}); download scikit-image's wheel again") from error


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    files = [args.out / name for name in (*YAWS, SHEET)]
    check_apart(files, [args.photo])
    check_writable(files)
    photo = astronaut(args.photo) if args.photo.suffix == ".whl" else args.photo
    with open_pipeline() as pipe:
        settings = pipe.settings(prompt=PROMPT, steps=args.steps)
        pipe.prepare(settings)
        subject = pipe.perceive(photo)
        make_folder(args.out)
        tiles = [tile for name, yaw in YAWS.items() for tile in _turned(pipe, subject, settings, args.out / name, yaw)]
    save_png(args.out / SHEET, contact_sheet(tiles))
    print(*files, sep="\n")
    return 0


def _turned(pipe: Pipeline, subject: Subject, settings: Settings, file: Path, yaw: float) -> list[Tile]:
    """Draw and write one portrait; gives its row of the sheet."""
    head = subject.head.posed(yaw=yaw)
    portrait = draw(pipe, Drawn([Person(subject, head)], [{"yaw": yaw}]), settings, file.name, {})
    portrait.save(file)
    return [Tile("photo", subject.photo), *map_tiles(pipe.maps(head)), Tile(f"yaw {yaw:g}", portrait.pixels)]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m caphuman_edge.runtime.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photo", type=Path, required=True, help="a photo of a face, or a wheel of scikit-image")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder to write to (default: here)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the bundle's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
