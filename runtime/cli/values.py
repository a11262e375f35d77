"""How values are written on the command line. Each raises ArgumentTypeError, which says what is expected."""
import argparse
import math
from collections.abc import Callable
from pathlib import Path


def number(low: float, high: float) -> Callable[[str], float]:
    """A number in a range; NaN is in none."""
    def convert(text: str) -> float:
        value = _float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value
    return convert


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in a range."""
    def convert(text: str) -> int:
        value = _float(text)
        if not (low <= value <= high and value.is_integer()):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(value)
    return convert


def strength(text: str) -> tuple[str, float]:
    """`name=value`: an expression unit and how strong it is."""
    name, _, value = text.partition("=")
    if not name or not -2 <= _float(value) <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value with a value from -2 to 2, "
                                         "such as mouthSmile=0.7")
    return name, float(value)


def direction(text: str) -> tuple[float, float]:
    """`azimuth,elevation` in degrees."""
    angles = [_float(part) for part in text.split(",")]
    if len(angles) != 2 or not abs(angles[0]) <= 180 or not abs(angles[1]) <= 90:
        raise argparse.ArgumentTypeError(f"{text!r} is not azimuth,elevation in degrees, -180 to 180 and -90 to 90, "
                                         "such as 40,20")
    return angles[0], angles[1]


def png(text: str) -> Path:
    """The path of a PNG file."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} is not named .png, which is what is written")
    return path


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
