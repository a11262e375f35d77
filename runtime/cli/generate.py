"""`caphuman generate`: a portrait of the people in photos, with the heads and the prompt that are asked for."""
import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from ..canvas import Canvas
from ..errors import BadInput
from ..image import save_picture
from ..perceive import Subject
from ..pipeline import Pipeline
from ..portrait import AI_GENERATED, Portrait, Step
from ..request import Person, Settings
from ..safety import Check, load_check, require_safe
from ..sheet import Tile, contact_sheet, map_tiles
from . import controls, frames, people, picture_flags, remake
from .machine_flags import chosen_machine
from .output import check_apart, check_writable, make_folder, portrait_files
from .progress import shown
from .report import add_json_flag, show
from .values import picture, whole

Watch = Callable[[Iterator[Step], str], Iterator[Step]]


@dataclass(frozen=True, eq=False)
class Drawn:
    """All that a portrait is made of but its settings."""

    people: list[Person]
    controls: list[dict[str, Any]]  # of each: what made the head, for the recipe
    canvas: Canvas | None = None
    control: Float32[np.ndarray, "h w 3"] | None = None
    safety: tuple[str, Check] | None = None  # what may turn it down


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("generate", help="make a portrait from a photo, a head and a prompt", description=(
        "Makes a portrait of the people in photos. The picture carries its recipe and says that it is AI-generated."))
    add_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add everything that says what a portrait is, and where it goes."""
    controls.add_flags(parser)
    picture_flags.add_flags(parser.add_argument_group("picture"))
    frames.add_flags(parser)
    _add_output(parser.add_argument_group("output"))
    people.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Make the portraits that the flags describe."""
    made = make(args, lambda: opened(args))
    show({"portraits": made}, args.json, lambda report: "\n".join(portrait["file"] for portrait in report["portraits"]))
    return 0


def opened(args: argparse.Namespace) -> Pipeline:
    """The pipeline that the flags ask for; of few portraits, so that encoders are in the way once they have run."""
    machine = chosen_machine(args)
    if machine.memory == "keep":
        machine = dataclasses.replace(machine, memory="steps")
    return controls.open_pipeline(args.bundle, machine, args.renderer, args.head, args.detector)


def make(args: argparse.Namespace, open_pipe: Callable[[], AbstractContextManager[Pipeline]],
         mark: dict[str, Any] | None = None, watch: Watch = shown) -> list[dict[str, Any]]:
    """Check all that can be checked at once, then look at the photos, then draw; gives each file and its recipe.

    Settings are checked before any photo is measured, so that a slip costs no time. `open_pipe` is called once files
    and folders are known to be good. `mark` is added to every recipe. `watch` passes each portrait's steps on and
    shows how far it is, under its file's name.
    """
    files, crowd = portrait_files(args.out, args.count), people.crowd(args)
    told = remake.fill_in(args, crowd) if args.recipe else None
    results = [*files, *filter(None, (args.sheet, args.preview))]
    frames.check(args)
    safety = _safety(args)
    check_apart(results, [file for one in crowd for file in people.files(one)] + frames.files(args))
    check_writable(results)
    sources, read = [controls.load_sources(one) for one in crowd], frames.load(args)
    sources = remake.with_heads(told, sources, crowd) if told else sources
    with open_pipe() as pipe:
        settings = check(pipe, args, crowd)
        pipe.prepare(settings[0], len(crowd), _has_control(args))
        scene = frames.scene(pipe, read, args)
        seen = [controls.find_heads(pipe, source, one, scene) for source, one in zip(sources, crowd, strict=True)]
        if told:
            remake.compare(told, pipe, seen, crowd)
        drawn = dataclasses.replace(_drawn(pipe, crowd, seen, read, scene, args), safety=safety)
        if told:
            drawn = dataclasses.replace(drawn, controls=remake.controls_of(told, sources, drawn.controls))
        portraits = draw_all(pipe, drawn, dict(zip(files, settings, strict=True)), mark or {}, args, watch)
    return [{"file": str(file), "recipe": portrait.recipe} for file, portrait in zip(files, portraits, strict=True)]


def check(pipe: Pipeline, args: argparse.Namespace, crowd: Sequence[argparse.Namespace]) -> list[Settings]:
    """The settings, one a portrait, once they and everybody's controls are known to be good; looks at no photo."""
    settings = chosen_settings(pipe, args, len(crowd))
    for one in crowd:
        controls.check_controls(pipe, one, args.canvas is not None)
    return settings


def chosen_settings(pipe: Pipeline, args: argparse.Namespace, people: int = 1) -> list[Settings]:
    """One a portrait, with seeds that count up; raises BadInput for any that is out of range."""
    picture_flags.check(pipe, args)
    first = picture_flags.settings_of(args)
    return [pipe.settings(first, people, args.canvas is not None, _has_control(args), seed=first.seed + k)
            for k in range(args.count)]


def _has_control(args: argparse.Namespace) -> bool:
    return args.control is not None or args.control_face


def draw_all(pipe: Pipeline, drawn: Drawn, wanted: dict[Path, Settings], mark: dict[str, Any],
             args: argparse.Namespace, watch: Watch = shown) -> list[Portrait]:
    """Draw and write a portrait for each file, then the sheet if one is asked for."""
    portraits: list[Portrait] = []
    for file, settings in wanted.items():
        portraits.append(draw(pipe, drawn, settings, file.name, mark, args.preview, watch))
        make_folder(file.parent)
        portraits[-1].save(file)
    if args.sheet:
        make_folder(args.sheet.parent)
        save_picture(args.sheet, sheet(pipe, drawn, portraits), AI_GENERATED)
    return portraits


def draw(pipe: Pipeline, drawn: Drawn, settings: Settings, label: str, mark: dict[str, Any],
         preview: Path | None = None, watch: Watch = shown) -> Portrait:
    """One portrait, behind a progress bar; its recipe also tells the controls that made each head.

    Raises Refused where the safety check turns it down.
    """
    steps = pipe.generate(drawn.people, settings=settings, canvas=drawn.canvas, control=drawn.control)
    for last in watch(steps, label):
        if preview:
            make_folder(preview.parent)
            save_picture(preview, last.preview(), AI_GENERATED)
    portrait = last.image
    if drawn.safety:
        require_safe(*drawn.safety, portrait.pixels)
    told = [{**person, "controls": made_by}
            for person, made_by in zip(portrait.recipe["people"], drawn.controls, strict=True)]
    return dataclasses.replace(portrait, recipe={**portrait.recipe, "people": told, **mark})


def _drawn(pipe: Pipeline, crowd: list[argparse.Namespace], seen: list[controls.Seen], read: frames.Frames,
           scene: Subject | None, args: argparse.Namespace) -> Drawn:
    heads = [one.head for one in seen]
    return Drawn([people.person(pipe, one, flags) for one, flags in zip(seen, crowd, strict=True)],
                 [controls.recipe(flags, one.head) for one, flags in zip(seen, crowd, strict=True)],
                 frames.canvas(pipe, read, scene, heads, args), frames.control(pipe, read, heads, args))


def _safety(args: argparse.Namespace) -> tuple[str, Check] | None:
    """The check that is asked for, loaded before a portrait is drawn."""
    if args.safety_check and args.preview:
        raise BadInput(f"--preview shows pictures that --safety-check {args.safety_check} has not seen; leave one out")
    return (args.safety_check, load_check(args.safety_check)) if args.safety_check else None


def sheet(pipe: Pipeline, drawn: Drawn, portraits: list[Portrait]) -> UInt8[np.ndarray, "h w 3"]:
    """Photos, maps and portraits side by side."""
    tiles = []
    for person in drawn.people:
        tiles += [Tile("photo", person.subject.photo), *map_tiles(pipe.maps(person.head or person.subject.head))]
    return contact_sheet([*tiles, *(Tile(f"portrait, seed {portrait.recipe['seed']}", portrait.pixels)
                                    for portrait in portraits)])


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=picture, metavar="FILE", help="PNG, JPEG or WebP to write; overwritten "
                       "if it exists (default: portrait.png, which must not exist)")
    group.add_argument("--count", type=whole(1, 1000), default=1, metavar="N", help="portraits, with seeds that count "
                       "up, in FILE-1.png, FILE-2.png, ..., of which none may exist")
    group.add_argument("--preview", type=picture, metavar="FILE", help="file that shows the picture so far, written "
                       "anew at each step")
    group.add_argument("--recipe", type=Path, metavar="FILE", help="a portrait to make again: settings and heads are "
                       "taken from it, flags go on top; takes the same photos")
    group.add_argument("--safety-check", metavar="NAME", help="an installed check that may turn portraits down (see "
                       "runtime/safety.py); none is shipped")
    group.add_argument("--sheet", type=picture, metavar="FILE", help="also write a contact sheet: photos, maps, "
                       "portraits")
