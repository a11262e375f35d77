"""A progress bar on stderr: none where nobody watches."""
import sys
import time
from collections.abc import Iterator

from ..portrait import Step

WIDTH = 30  # characters


def shown(steps: Iterator[Step], label: str) -> Iterator[Step]:
    """The same steps, with a bar of how many are done and how long the rest takes."""
    watched, start = sys.stderr.isatty(), time.monotonic()
    try:
        for step in steps:
            if watched:
                _draw(label, step.index + 1, step.count, time.monotonic() - start)
            yield step
    finally:  # whatever ended it, what is printed next deserves a line of its own
        if watched:
            print(file=sys.stderr)


def _draw(label: str, done: int, count: int, seconds: float) -> None:
    bar = "#" * (WIDTH * done // count)
    left = seconds / done * (count - done)
    print(f"\r{label} [{bar:{WIDTH}}] {done}/{count} steps, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
