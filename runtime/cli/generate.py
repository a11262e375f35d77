"""`caphuman generate`: a portrait of the person in a photo, with the head and the prompt that are asked for."""
import argparse
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ..errors import BadInput
from ..head import HeadCode
from ..image import save_png
from ..perceive import Subject
from ..pipeline import Pipeline, Portrait, Settings
from ..schedule import SCHEDULES
from ..sheet import Tile, contact_sheet, map_tiles
from . import controls
from .machine_flags import chosen_machine
from .output import check_apart, check_writable, make_folder, portrait_files
from .progress import shown
from .report import add_json_flag, show
from .values import png, whole


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("generate", help="make a portrait from a photo, a head and a prompt", description=(
        "Makes a portrait of the person in a photo. The PNG carries its recipe and says that it is AI-generated."))
    add_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add everything that says what a portrait is, and where it goes."""
    controls.add_flags(parser)
    _add_settings(parser.add_argument_group("picture"))
    _add_output(parser.add_argument_group("output"))


def run(args: argparse.Namespace) -> int:
    """Make the portraits that the flags describe."""
    made = make(args, lambda: opened(args))
    show({"portraits": made}, args.json, lambda report: "\n".join(portrait["file"] for portrait in report["portraits"]))
    return 0


def opened(args: argparse.Namespace) -> Pipeline:
    """The pipeline that the flags ask for."""
    return controls.open_pipeline(args.bundle, chosen_machine(args), args.renderer, args.head, args.detector)


def make(args: argparse.Namespace, open_pipe: Callable[[], AbstractContextManager[Pipeline]]) -> list[dict[str, Any]]:
    """Check all that can be checked at once, then look at the photos, then draw; gives each file and its recipe.

    Settings are checked before any photo is measured, so that a slip costs no time. `open_pipe` is called once files
    and folders are known to be good.
    """
    files = portrait_files(args.out, args.count)
    results = [*files, args.sheet] if args.sheet else files
    check_apart(results, controls.photo_files(args))
    check_writable(results)
    sources = controls.load_sources(args)
    with open_pipe() as pipe:
        seeds = chosen_settings(pipe, args)
        controls.check_controls(pipe, args)
        seen = controls.find_heads(pipe, sources, args)
        portraits = draw_all(pipe, seen.subject, seen.head, dict(zip(files, seeds, strict=True)), args)
    return [{"file": str(file), "recipe": portrait.recipe} for file, portrait in zip(files, portraits, strict=True)]


def chosen_settings(pipe: Pipeline, args: argparse.Namespace) -> list[Settings]:
    """One a portrait, with seeds that count up; raises BadInput for any that is out of range."""
    kind = pipe.bundle.schedule.kind
    if args.schedule not in (None, kind):
        raise BadInput(f"--schedule {args.schedule}, but the bundle was made for {kind}; leave --schedule out")
    first = Settings(**{field.name: vars(args)[field.name] for field in dataclasses.fields(Settings)})
    return [pipe.settings(first, seed=first.seed + k) for k in range(args.count)]


def draw_all(pipe: Pipeline, subject: Subject, head: HeadCode, wanted: dict[Path, Settings],
             args: argparse.Namespace) -> list[Portrait]:
    """Draw and write a portrait for each file, then the sheet if one is asked for."""
    portraits = []
    for file, settings in wanted.items():
        portraits.append(draw(pipe, subject, head, settings, file.name, controls.recipe(args, head)))
        make_folder(file.parent)
        portraits[-1].save(file)
    if args.sheet:
        make_folder(args.sheet.parent)
        save_png(args.sheet, sheet(pipe, subject, head, portraits))
    return portraits


def draw(pipe: Pipeline, subject: Subject, head: HeadCode, settings: Settings, label: str,
         made_by: dict[str, Any]) -> Portrait:
    """One portrait, behind a progress bar; its recipe also tells the controls that made the head."""
    *_, last = shown(pipe.generate(subject, head, settings), label)
    return dataclasses.replace(last.image, recipe={**last.recipe, "controls": made_by})


def sheet(pipe: Pipeline, subject: Subject, head: HeadCode, portraits: list[Portrait]) -> UInt8[np.ndarray, "h w 3"]:
    """Photo, maps and portraits side by side."""
    made = [Tile(f"portrait, seed {portrait.recipe['seed']}", portrait.pixels) for portrait in portraits]
    return contact_sheet([Tile("photo", subject.photo), *map_tiles(pipe.maps(head)), *made])


def _add_settings(group: argparse._ArgumentGroup) -> None:
    unset = Settings()
    group.add_argument("--prompt", default=unset.prompt, metavar="TEXT", help="what the portrait should show")
    group.add_argument("--negative", default=unset.negative, metavar="TEXT", help="what it should not show")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the bundle's)")
    group.add_argument("--schedule", choices=SCHEDULES, help="sampler (default: the bundle's)")
    group.add_argument("--guidance", type=float, metavar="G",
                       help="pull of the prompt, 1 is off (default: the bundle's)")
    group.add_argument("--strength", type=float, default=unset.strength, metavar="S",
                       help="pull of the person and the head, 0 to 2 (default: %(default)g)")
    group.add_argument("--tau", type=int, default=unset.tau, metavar="T",
                       help="leave the person out at timesteps above it; 0 never does (default)")
    group.add_argument("--eta", type=float, default=unset.eta, metavar="E", help="fresh noise a step, 0 (default) to 1")
    group.add_argument("--seed", type=int, default=unset.seed, metavar="N", help="of the noise (default: %(default)d)")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=png, metavar="FILE", help="PNG to write; overwritten if it exists "
                       "(default: portrait.png, which must not exist)")
    group.add_argument("--count", type=whole(1, 1000), default=1, metavar="N", help="portraits, with seeds that count "
                       "up, in FILE-1.png, FILE-2.png, ..., of which none may exist")
    group.add_argument("--sheet", type=png, metavar="FILE", help="also write a contact sheet: photo, maps, portraits")
