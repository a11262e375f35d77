"""What commands that report share: --json, or text for a person, on stdout."""
import argparse
import json
from collections.abc import Callable
from typing import Any

from ..errors import BadInput


def add_json_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --json to a command."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def show(report: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    """Print a report."""
    try:
        print(json.dumps(report, indent=1) if as_json else text(report), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BadInput(f"cannot write to the standard output ({error.strerror}); send it elsewhere") from error
