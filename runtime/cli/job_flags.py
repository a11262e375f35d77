"""A line of a jobs file as the flags of `caphuman generate`, parsed by its own parser: what that refuses, a job is
refused for in the same words."""
import argparse
import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batch import FileDigests, check_id, digest_of, parse_job
from ..cache import sha256_of
from ..errors import BadInput
from ..pipeline import Pipeline
from . import Parser, frames, generate, people, remake
from .values import picture, png

MACHINE = "machine"  # title of the group whose flags open the pipeline, so that all jobs share them
SHARED_TOO = ("safety_check",)  # a rule of who runs the batch, which no job may bend
OUTPUT = (png, picture)  # types of flags that name a file to write
MAYBE_FILES = ("light-coefficients", "repaint")  # numbers or a file; a word or a file
_NO_FILE = re.compile(rf"{frames.HEAD}|{frames.ALL}|[-+\d.,eE\s]*")
_KEY = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


@dataclass(frozen=True, eq=False)
class Job:
    """A job that generate's parser takes."""

    id: str
    digest: str  # of its content, of the files it reads, and of what draws it
    args: argparse.Namespace  # as `generate.make` takes them

    @property
    def count(self) -> int:
        """How many portraits it makes."""
        return int(self.args.count)

    def one(self, number: int, file: Path) -> argparse.Namespace:
        """The arguments for its portrait of that number, from 1: the same as if all were made at once."""
        args = copy.copy(self.args)
        args.count, args.seed, args.out = 1, self.args.seed + number - 1, file
        return args


class JobReader:
    """Reads lines of one jobs file for one pipeline."""

    def __init__(self, jobs: Path, pipe: Pipeline, machine: argparse.Namespace) -> None:
        self._folder, self._files = jobs.absolute().parent, FileDigests()
        self._parser = Parser(prog="caphuman generate", add_help=False)
        generate.add_flags(self._parser)
        self._flags = {flag.removeprefix("--"): action for action in self._parser._actions
                       for flag in action.option_strings}
        self._shared = {action.dest: vars(machine)[action.dest] for action in shared_actions()}
        self._drawn_by = {"bundle": pipe.bundle.digest, "detector": machine.detector,
                          "safety_check": machine.safety_check,
                          "head": next(iter(sha256_of([pipe.head_file]).values()))}

    def read(self, raw: bytes) -> Job:
        """The job on a line, parsed, and its files read for their hashes. Raises CapHumanError."""
        told = parse_job(raw)
        given, others = told.pop("id", None), told.pop("with", [])
        if not isinstance(others, list) or not all(isinstance(one, dict) for one in others):
            raise BadInput('"with" is not a list of people, such as [{"photo": "you.jpg", "x": 0.5}]')
        everybody = [self._normal(one) for one in (told, *others)]
        name = digest_of(everybody)[:16] if given is None else check_id(given)
        args = self._parsed(everybody)
        content = [{key: self._content(key, value) for key, value in one.items()} for one in everybody]
        return Job(name, digest_of({"id": name, "people": content, **self._drawn_by}), args)

    def _normal(self, told: dict[str, Any]) -> dict[str, Any]:
        """One person's keys as flags are spelt; keys without a value are left out."""
        found: dict[str, Any] = {}
        for written, value in told.items():
            key = written.replace("_", "-")
            if not _KEY.fullmatch(key):
                raise BadInput(f"{written[:40]!r} is no key, expected a long flag of caphuman generate without its "
                               "dashes, such as yaw")
            if key in found:
                raise BadInput(f"{key!r} is given twice; leave one out")
            self._check_key(key)
            if value is not None and (value is not False or not self._is_switch(key)):
                found[key] = value
        return found

    def _check_key(self, key: str) -> None:
        action = self._flags.get(key)
        if action is not None and action.dest in self._shared:
            raise BadInput(f"{key} is not a job's, since all jobs share what draws them; take it out, and give "
                           f"caphuman batch --{key}")
        if key == "json" or (action is not None and action.type in OUTPUT):
            raise BadInput(f"{key} is not a job's: a job writes DIR/ID.png, where ID is its id; take it out")

    def _parsed(self, everybody: list[dict[str, Any]]) -> argparse.Namespace:
        words = self._words(everybody[0])
        for one in everybody[1:]:
            words += [people.WITH, *self._words(one)]
        args, unknown = self._parser.parse_known_args(words)
        if unknown:
            raise BadInput(f"{' '.join(unknown)} is not known; see caphuman generate --help")
        vars(args).update(self._shared)
        return args

    def _words(self, told: dict[str, Any]) -> list[str]:
        """Arguments; a value stands behind "=", so that one that begins with a dash is none."""
        return [word for key, value in told.items() for word in self._flag(key, value)]

    def _flag(self, key: str, value: Any) -> list[str]:
        several = self._takes_several(key)
        if value is True and (self._is_switch(key) or key not in self._flags):
            return [f"--{key}"]
        if isinstance(value, dict) and several:
            return [f"--{key}={name}={_text(key, number)}" for name, number in value.items()]
        if isinstance(value, list):
            parts = [_text(key, part) for part in value]
            return [f"--{key}={part}" for part in parts] if several else [f"--{key}={','.join(parts)}"]
        return [f"--{key}={self._path(key, value) or _text(key, value)}"]

    def _content(self, key: str, value: Any) -> Any:
        """A value, or the hash of the file that it names."""
        path = self._path(key, value)
        return value if path is None else {"sha256": self._files[path]}

    def _path(self, key: str, value: Any) -> Path | None:
        """The file that a value names, if it does; relative ones lie beside the jobs file."""
        action = self._flags.get(key)
        maybe = key in MAYBE_FILES and isinstance(value, str) and not _NO_FILE.fullmatch(value)
        if not maybe and (action is None or action.type is not Path):
            return None
        if not isinstance(value, str) or not value or "\0" in value:
            raise BadInput(f"{key} is {str(value)[:40]!r}, expected the path of a file")
        return self._folder / value

    def _is_switch(self, key: str) -> bool:
        return key in self._flags and self._flags[key].nargs == 0

    def _takes_several(self, key: str) -> bool:
        return key in self._flags and self._flags[key].nargs == "+"


def shared_actions() -> list[argparse.Action]:
    """The flags of generate that are given once for all jobs."""
    parser = Parser(add_help=False)
    generate.add_flags(parser)
    return [action for group in parser._action_groups for action in group._group_actions
            if group.title == MACHINE or action.dest in SHARED_TOO]


def check(pipe: Pipeline, args: argparse.Namespace) -> None:
    """What `generate.make` checks before it looks at a photo, but where the results go. Raises CapHumanError.

    So that a slip in the last of many jobs is told of before the first one is drawn.
    """
    args = copy.copy(args)
    crowd = people.crowd(args)
    if args.recipe:
        if args.count != 1:  # whose seed counts up would have to be told apart from one that is not given
            raise BadInput(f"count is {args.count} with a recipe, expected 1; write a job for each, with a seed")
        remake.fill_in(args, crowd)
    frames.check(args)
    generate.check(pipe, args, crowd)


def _text(key: str, value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadInput(f"{key} is {str(value)[:40]!r}, expected a text or a number; see caphuman generate --help")
    return str(value)
