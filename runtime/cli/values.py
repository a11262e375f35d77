"""How values are written on the command line. Each raises ArgumentTypeError, which says what is expected."""
import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from ..contract import RESIDUALS
from ..image import PICTURES


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


def strengths(text: str) -> float | tuple[float, ...]:
    """One number from 0 to 2, or 13 with commas between."""
    values = tuple(_float(part) for part in text.split(","))
    if len(values) not in (1, RESIDUALS) or not all(0 <= value <= 2 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 to 2 nor {RESIDUALS} of them with "
                                         "commas between")
    return values[0] if len(values) == 1 else values


def size(text: str) -> tuple[int, int]:
    """`WxH` in pixels, or one number for a square: 256 to 1024 in steps of 64."""
    found = re.fullmatch(r"(\d{3,4})(?:x(\d{3,4}))?", text)
    width, height = (int(edge) for edge in (found[1], found[2] or found[1])) if found else (0, 0)
    if not all(256 <= edge <= 1024 and edge % 64 == 0 for edge in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected such as 512x768: 256 to 1024 px in steps of "
                                         "64")
    return width, height


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


def picture(text: str) -> Path:
    """The path of a portrait to write: PNG, JPEG or WebP."""
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} is not named {', '.join(PICTURES)}, which is what is written")
    return Path(text)


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
