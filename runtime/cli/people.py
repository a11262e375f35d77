"""Several people in one portrait: `--with PHOTO [its flags]`, and a mask for each."""
import argparse
from pathlib import Path

from ..errors import BadInput
from ..image import load_photo
from ..pipeline import Pipeline
from ..request import Person
from . import controls
from .frames import load_mask

WITH = "--with"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --mask for the first person, and --with for all others."""
    group = parser.add_argument_group("people", "Further people stand last, each with flags of their own: --with "
                                      "PHOTO --x 0.5 --yaw -20. Place them with --x, --y and --scale.")
    _add_mask(group)
    group.add_argument(WITH, dest="others", nargs=argparse.REMAINDER, default=[], metavar="PHOTO [flags]",
                       help="one more person; takes the flags for photo, head, light and --mask")


def crowd(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of everybody, the first person's first. Raises BadInput for a flag that is no person's."""
    people = [args]
    for words in _cut(args.others):
        found, unknown = _person_parser().parse_known_args(words)
        if unknown:
            raise BadInput(f"{' '.join(unknown)} behind {WITH} is no flag of a person; flags of the picture stand "
                           f"before the first {WITH}")
        found.recipe = args.recipe
        people.append(found)
    return people


def files(args: argparse.Namespace) -> list[Path]:
    """What is read for one person."""
    return [*controls.photo_files(args), *([args.mask] if args.mask else [])]


def person(pipe: Pipeline, seen: controls.Seen, args: argparse.Namespace) -> Person:
    """One person with its head, and its mask where it has one."""
    config = pipe.bundle.config
    mask = load_mask(load_photo(args.mask), config.height, config.width) if args.mask else None
    return Person(seen.subject, seen.head, mask)


def _person_parser() -> argparse.ArgumentParser:
    from . import Parser  # which imports the commands

    parser = Parser(prog=f"caphuman generate ... {WITH}", usage="PHOTO [flags]", add_help=False)
    controls.add_person_flags(parser)
    _add_mask(parser.add_argument_group("people"))
    return parser


def _add_mask(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--mask", type=Path, metavar="FILE", help="picture of the frame, white where this person may "
                       "appear (default: wherever the head is)")


def _cut(words: list[str]) -> list[list[str]]:
    """The words of each further person."""
    if not words:
        return []
    people: list[list[str]] = [[]]
    for word in words:
        if word == WITH:
            people.append([])
        else:
            people[-1].append(word)
    return people
