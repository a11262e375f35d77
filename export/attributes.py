"""What a caption can say of a portrait, measured from its pixels and landmarks; and the captions that say it.

Measured, not recognised: hair is the colour just above the face, background that of the upper corners, light the
fitted spherical harmonics. The same functions score whether a generated portrait obeyed its prompt.
"""
import colorsys
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Float32, UInt8

from caphuman_edge.runtime.perception.landmarks import BLENDSHAPES, FaceLandmarks

FOREHEAD, CHIN = 10, 152  # landmark indices: topmost and lowest point of the face oval
FOREHEAD_ARC = (54, 103, 67, 109, 10, 338, 297, 332, 284)
HAIR_HEIGHTS = (0.10, 0.14, 0.18)  # above the forehead, in face heights
CORNER = 0.12  # edge of the background patches, in frame widths
PHRASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "hair": {"black": ("black hair", "dark hair"), "brown": ("brown hair",), "blond": ("blond hair", "blonde hair"),
             "red": ("red hair", "auburn hair"), "grey": ("grey hair", "gray hair")},
    "background": {"dark": ("dark background", "black background"), "bright": ("bright background", "white background"),
                   "grey": ("grey background", "plain background"), "blue": ("blue background", "in front of the sky"),
                   "green": ("green background", "outdoors, in front of trees"), "warm": ("brown background", "warm background")},
    "light": {"left": ("lit from the left", "light from the left"), "right": ("lit from the right", "light from the right"),
              "front": ("soft light", "lit from the front")},
    "smile": {"yes": ("smiling", "with a smile", "happy"), "no": ("serious", "not smiling", "neutral face")},
    "mouth": {"open": ("open mouth", "showing teeth"), "closed": ("closed mouth",)},
}
OPENINGS = ("a photo of a person", "a portrait", "portrait photo of a person", "a person", "photo")


def measure_attributes(image: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks,
                       light: Float32[np.ndarray, "9 3"]) -> dict[str, str]:
    """The values of PHRASES that hold in this picture; what lies between two classes is left out."""
    found = {"hair": hair_colour(_above_forehead(image, face)), "background": background_colour(_corners(image)),
             "light": light_side(light), "smile": _smile(face), "mouth": _mouth(face)}
    return {name: value for name, value in found.items() if value}


def captions(attributes: Mapping[str, str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions, each an opening and some of the attributes in random order and wording."""
    return [_caption(attributes, rng) for _ in range(count)]


def hair_colour(pixels: Float[np.ndarray, "n 3"]) -> str | None:
    """black, brown, blond, red or grey by the median colour (RGB 0..1)."""
    hue, saturation, value = colorsys.rgb_to_hsv(*np.median(pixels, axis=0))
    if value < 0.22:
        return "black"
    if saturation < 0.16:
        return "grey" if value > 0.35 else None
    if hue < 0.055 and saturation > 0.5 and value > 0.28:
        return "red"
    if value < 0.46:
        return "brown"
    return "blond" if value > 0.54 and 0.04 < hue < 0.17 else None


def background_colour(pixels: Float[np.ndarray, "n 3"]) -> str | None:
    """dark, bright, grey, blue, green or warm by the median colour (RGB 0..1)."""
    hue, saturation, value = colorsys.rgb_to_hsv(*np.median(pixels, axis=0))
    if value < 0.2:
        return "dark"
    if saturation < 0.16:
        return "bright" if value > 0.75 else "grey" if value < 0.65 else None
    if saturation < 0.22:
        return None
    if hue < 0.12 or hue > 0.95:
        return "warm"
    if 0.17 < hue < 0.45:
        return "green"
    return "blue" if 0.48 < hue < 0.72 else None


def light_side(light: Float32[np.ndarray, "9 3"]) -> str | None:
    """Which side is brighter, by the x term of the light against its constant term."""
    slope = float(light[1].mean() / max(abs(light[0].mean()), 1e-6))
    if abs(slope) < 0.1:
        return "front"
    return ("right" if slope > 0 else "left") if abs(slope) > 0.2 else None


def _smile(face: FaceLandmarks) -> str | None:
    strength = (_score(face, "mouthSmileLeft") + _score(face, "mouthSmileRight")) / 2
    return "yes" if strength > 0.55 else "no" if strength < 0.2 else None


def _mouth(face: FaceLandmarks) -> str | None:
    gap = np.linalg.norm(face.points[13, :2] - face.points[14, :2])  # inner lips
    share = float(gap / np.linalg.norm(face.points[FOREHEAD, :2] - face.points[CHIN, :2]))
    return "open" if share > 0.045 else "closed" if share < 0.015 else None


def _score(face: FaceLandmarks, unit: str) -> float:
    return float(face.blendshapes[BLENDSHAPES.index(unit)])


def _above_forehead(image: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks) -> Float[np.ndarray, "n 3"]:
    """Pixels just above the forehead's arc, RGB 0..1."""
    up = face.points[FOREHEAD, :2] - face.points[CHIN, :2]
    arc = face.points[list(FOREHEAD_ARC), :2]
    points = np.concatenate([arc + height * up for height in HAIR_HEIGHTS]).round().astype(int)
    height, width = image.shape[:2]
    inside = (points >= 0).all(axis=1) & (points < [width, height]).all(axis=1)
    columns, rows = points[inside].T if inside.any() else np.zeros((2, 1), int)
    return image[rows, columns] / 255


def _corners(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "n 3"]:
    """Pixels of both upper corners, RGB 0..1."""
    edge = max(1, round(CORNER * image.shape[1]))
    corners = np.concatenate([image[:edge, :edge], image[:edge, -edge:]])
    return corners.reshape(-1, 3) / 255


def _caption(attributes: Mapping[str, str], rng: np.random.Generator) -> str:
    kept = [name for name in attributes if rng.random() < 0.8]
    rng.shuffle(kept)
    phrases = [str(rng.choice(PHRASES[name][attributes[name]])) for name in kept]
    return ", ".join([str(rng.choice(OPENINGS)), *phrases])
