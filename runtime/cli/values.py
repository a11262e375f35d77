"""How values are written on the command line. Each raises ArgumentTypeError, which says what is expected."""
import argparse
import math
import re
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
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value, such as mouthSmile=0.7; a photo stands before "
                                         "the flags, or behind --photo")
    if not name or not -5 <= _float(value) <= 5:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value with a value from -5 to 5, "
                                         "such as mouthSmile=0.7")
    return name, float(value)


def direction(text: str) -> tuple[float, float]:
    """`azimuth,elevation` in degrees."""
    angles = [_float(part) for part in text.split(",")]
    if len(angles) != 2 or not abs(angles[0]) <= 180 or not abs(angles[1]) <= 90:
        raise argparse.ArgumentTypeError(f"{text!r} is not azimuth,elevation in degrees, -180 to 180 and -90 to 90, "
                                         "such as 40,20")
    return angles[0], angles[1]


def colour(text: str) -> tuple[float, float, float]:
    """`#rrggbb`, or `red,green,blue` from 0 to 1."""
    if re.fullmatch("#[0-9a-fA-F]{6}", text):
        return int(text[1:3], 16) / 255, int(text[3:5], 16) / 255, int(text[5:], 16) / 255
    parts = [_float(part) for part in text.split(",")]
    if len(parts) != 3 or not all(0 <= part <= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither #rrggbb nor red,green,blue from 0 to 1, "
                                         "such as 1,0.8,0.6")
    return parts[0], parts[1], parts[2]


def png(text: str) -> Path:
    """The path of a PNG file to write."""
    return _named(text, ".png")


def npy(text: str) -> Path:
    """The path of a numpy array to write."""
    return _named(text, ".npy")


def _named(text: str, suffix: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != suffix:
        raise argparse.ArgumentTypeError(f"{text!r} is not named {suffix}, which is what is written")
    return path


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
