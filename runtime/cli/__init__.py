"""The command `caphuman`. A user's error is one line on stderr and exit code 2, never a traceback.

Commands are entry points: those of the runtime are named here, other packages register theirs in the group
`caphuman.commands`, under the command's name, as a function `add(subparsers)`. Only the module of the command that is
called is imported, so that `caphuman doctor` runs where the others cannot.
"""
import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, NoReturn, TextIO

from ..errors import BadInput, CapHumanError

GROUP = "caphuman.commands"
BUILT_IN = ("generate", "batch", "preview", "head", "recipe", "inspect", "verify", "doctor")
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # exit codes; the latter two as shells have them: 128 + signal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is without the program's name, None for the process's own. Returns the exit code."""
    return guarded(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def guarded(run: Callable[[], int]) -> int:
    """Run what returns an exit code; errors of the user, warnings and interruptions become one line on stderr."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return run()
        except CapHumanError as error:
            _say(str(error))
            return USER_ERROR
        except KeyboardInterrupt:
            _say("interrupted")
            return INTERRUPTED
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
            return BROKEN_PIPE


class Parser(argparse.ArgumentParser):
    """argparse, with usage errors as one line of ours."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # so that `--light -30,20` is a value, no flag

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise BadInput(f"{message}; see {self.prog} --help")


def _run(arguments: list[str]) -> int:
    try:
        args, unknown = _parser(arguments[:1]).parse_known_args(arguments)
        if unknown:
            raise BadInput(f"{' '.join(unknown)} is not known; see caphuman {args.command} --help")
        code: int = args.run(args)
    except SystemExit as done:  # argparse, after --help and --version
        code = int(done.code or 0)
    sys.stdout.flush()
    return code


def _parser(called: Sequence[str]) -> Parser:
    parser = Parser(prog="caphuman", description="One photo, a head pose and a prompt to a portrait, offline.",
                    epilog="Commands whose packages are missing are left out; 'caphuman doctor' names what is missing.")
    parser.add_argument("--version", action="version", version=f"caphuman-edge {version('caphuman-edge')}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    known = _commands()
    for name in called if called and called[0] in known else known:
        _add(known[name], subparsers, must=name in called)
    return parser


def _commands() -> dict[str, EntryPoint]:
    own: Iterable[EntryPoint] = (EntryPoint(name, f"{__name__}.{name}:add", GROUP) for name in BUILT_IN)
    return {entry.name: entry for entry in (*own, *entry_points(group=GROUP))}


def _add(entry: EntryPoint, subparsers: Any, must: bool) -> None:
    """Add a command; one that cannot be imported is left out, or refused where it `must` be there."""
    try:
        add = entry.load()
    except ImportError as error:
        if must:
            raise BadInput(f"command {entry.name} cannot be loaded ({error}); "
                           "'caphuman doctor' names what is missing and how to install it") from error
    else:
        add(subparsers)


def _say(message: str) -> None:
    print(f"caphuman: {' '.join(message.splitlines())}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    _say(f"warning: {message}")
