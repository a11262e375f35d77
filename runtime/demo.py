"""A portrait in one command, `make demo`: the astronaut's photo turned to two head poses by the embedded bundle.

    python -m caphuman_edge.runtime.demo --photo PHOTO [--out DIR]

Writes portrait.png, portrait-2.png and contact_sheet.png, which shows photo, maps and portrait of each. PHOTO may also
be a wheel of scikit-image, out of which the astronaut (NASA, public domain) is taken: the package itself is not needed.
"""
import argparse
import hashlib
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .cli import Parser, guarded
from .cli.generate import draw
from .cli.head import open_pipeline
from .cli.output import check_writable, make_folder
from .errors import BadImage
from .image import save_png
from .sheet import Tile, contact_sheet, map_tiles

YAWS = {"portrait.png": -30.0, "portrait-2.png": 25.0}  # degrees
SHEET = "contact_sheet.png"
PROMPT = "a photo of a person, brown hair, smiling, soft light, grey background"
ASTRONAUT = "skimage/data/astronaut.png"  # within the wheel
ASTRONAUT_SHA256 = "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return guarded(lambda: _run(argv))


def astronaut(wheel: Path) -> Path:
    """The astronaut's photo out of a wheel of scikit-image, written beside it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            photo = archive.read(ASTRONAUT)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise BadImage(f"{wheel} holds no {ASTRONAUT} ({error}); download scikit-image's wheel again") from error
    if hashlib.sha256(photo).hexdigest() != ASTRONAUT_SHA256:
        raise BadImage(f"{ASTRONAUT} in {wheel} is another picture; use the wheel of scikit-image 0.26.0")
    path = wheel.with_name("astronaut.png")
    path.write_bytes(photo)
    return path


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.out / name for name in (*YAWS, SHEET))
    photo = astronaut(args.photo) if args.photo.suffix == ".whl" else args.photo
    pipe = open_pipeline()
    subject = pipe.perceive(photo)
    settings = pipe.settings(prompt=PROMPT, steps=args.steps)
    make_folder(args.out)
    tiles = []
    for name, yaw in YAWS.items():
        head = subject.head.posed(yaw=yaw)
        portrait = draw(pipe, subject, head, settings, name, {"yaw": yaw})
        portrait.save(args.out / name)
        tiles += [Tile("photo", subject.photo), *map_tiles(pipe.maps(head)), Tile(f"yaw {yaw:g}", portrait.pixels)]
    save_png(args.out / SHEET, contact_sheet(tiles))
    print(*(args.out / name for name in (*YAWS, SHEET)), sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m caphuman_edge.runtime.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photo", type=Path, required=True, help="a photo of a face, or a wheel of scikit-image")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder to write to (default: here)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the bundle's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
