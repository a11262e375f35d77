"""Training pictures in other colours: hair, background and clothes, so that prompts can name what no photo shows.

In photos a person's hair goes with the face and backgrounds are brown, green or grey: a model learns to guess both and
has no need to read. Repainted at random, they can be known from the caption alone.
"""
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter

from caphuman_edge.export.attributes import BACKGROUND, CLOTHES, HAIR

COLOURS: Mapping[str, tuple[int, int, int]] = {  # RGB, the middle of what a name means
    "black": (18, 18, 20), "white": (240, 240, 240), "grey": (128, 128, 128), "brown": (104, 72, 46),
    "red": (180, 38, 38), "yellow": (232, 200, 62), "green": (60, 138, 62), "blue": (58, 104, 196),
    "purple": (122, 58, 158)}
HAIR_COLOURS: Mapping[str, tuple[int, int, int]] = {
    "black": (24, 21, 21), "brown": (78, 54, 38), "blond": (202, 168, 112), "red": (150, 66, 30),
    "grey": (158, 158, 160), "blue": (48, 86, 184), "green": (58, 136, 70), "pink": (224, 122, 164)}
JITTER = 14  # standard deviation of a colour's channels
SHARES = {HAIR: 0.6, BACKGROUND: 0.8, CLOTHES: 0.8}  # how often each part is repainted
TEXTURE = {HAIR: (0.6, 1.0), BACKGROUND: (0.0, 0.6), CLOTHES: (0.4, 0.9)}  # how much of its light and shade stays
EDGE = 1.2  # px, the blur of a part's outline


def repainted(image: UInt8[np.ndarray, "h w 3"], parts: UInt8[np.ndarray, "h w"],
              rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with some of its parts in random colours."""
    painted = image.astype(np.float32)
    for part, share in SHARES.items():
        where = parts == part
        if rng.random() < share and where.any():
            painted = _paint(painted, where, _colour(part, rng), rng.uniform(*TEXTURE[part]), rng)
    return painted.round().astype(np.uint8)


def _colour(part: int, rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    colours = list((HAIR_COLOURS if part == HAIR else COLOURS).values())
    return np.clip(colours[rng.integers(len(colours))] + rng.normal(0, JITTER, 3), 4, 251).astype(np.float32)


def _paint(image: Float[np.ndarray, "h w 3"], where: Bool[np.ndarray, "h w"], colour: Float[np.ndarray, "3"],
           texture: float, rng: np.random.Generator) -> Float[np.ndarray, "h w 3"]:
    """One part in one colour, lit by the part's own light and shade and by a soft slope across the picture."""
    luminance = image.mean(axis=2)
    shade = np.clip(luminance / max(float(luminance[where].mean()), 8.0), 0.35, 2.2) ** texture
    rows, columns = (np.linspace(-1, 1, length, dtype=np.float32) for length in where.shape)
    slope = 1 + rng.uniform(-0.18, 0.18) * rows[:, None] + rng.uniform(-0.18, 0.18) * columns
    outline = Image.fromarray(where.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(EDGE))
    alpha = np.asarray(outline, np.float32)[..., None] / 255
    return image * (1 - alpha) + np.clip(colour * (shade * slope)[..., None], 0, 255) * alpha
