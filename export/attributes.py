"""What a caption can say of a portrait, measured from its pixels, parts and landmarks; and the captions that say it.

Parts come from the face parser (see `parts_of`): hair is the hair's colour and background the background's, not guesses
from where they usually are. The same functions score whether a generated portrait obeyed its prompt. Thresholds were
set by eye on contact sheets of training pictures.
"""
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from caphuman_edge.runtime.perception.graph import Graph
from caphuman_edge.runtime.perception.landmarks import BLENDSHAPES, FaceLandmarks
from caphuman_edge.runtime.perception.parse import part_labels

PARSED_EDGE = 320  # px: the parser leaves holes in faces of 256 px
BACKGROUND, SKIN_PART, GLASSES, CLOTHES, HAIR, HAT = 0, 1, 6, 16, 17, 18  # the parser's labels
LEFT_CHEEK = (50, 101, 205, 117, 187, 118, 36, 123)  # landmarks at image left when the head faces the viewer
RIGHT_CHEEK = (280, 330, 425, 346, 411, 347, 266, 352)
FOREHEAD, CHIN = 10, 152  # landmarks: topmost and lowest point of the face oval
LEAST_PART = 0.015  # share of the picture; less of it has no colour worth naming
LEAST_AGREEING = 0.5  # share of a part's pixels that must be of one colour
LEAST_GLASSES, LEAST_HAT = 0.004, 0.03  # shares of the picture
LONG, SHORT = 0.25, 0.02  # share of the hair below the chin: more is long, less is short
RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # sRGB
WHITE = np.array([0.9505, 1.0, 1.089])  # D65
COLOURS = ("black", "white", "grey", "brown", "red", "yellow", "green", "blue", "purple")
HAIR_COLOURS = ("black", "brown", "blond", "red", "grey", "blue", "green", "pink")
PHRASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "hair": {colour: (f"{colour} hair",) for colour in HAIR_COLOURS},
    "background": {colour: (f"{colour} background",) for colour in COLOURS},
    "clothes": {colour: (f"{colour} shirt", f"{colour} clothes") for colour in COLOURS},
    "length": {"long": ("long hair",), "short": ("short hair",)},
    "glasses": {"yes": ("wearing glasses", "with glasses"), "no": ("without glasses",)},
    "hat": {"yes": ("wearing a hat", "with a hat")},
    "light": {"left": ("lit from the left",), "right": ("lit from the right",), "front": ("lit from the front",)},
    "smile": {"yes": ("smiling", "with a smile"), "no": ("serious", "not smiling")},
    "mouth": {"open": ("open mouth",), "closed": ("closed mouth",)},
}
MIRRORED = {"left": "right", "right": "left"}  # what a mirror makes of a value
OPENINGS = ("a photo of a person", "a portrait")
KEPT = 0.75  # share of a picture's attributes that a caption names


def parts_of(image: UInt8[np.ndarray, "h w 3"], parser: Graph) -> UInt8[np.ndarray, "h w"]:
    """Which part of a portrait each pixel shows, in the parser's labels."""
    height, width = image.shape[:2]
    scale = PARSED_EDGE / min(height, width)
    larger = Image.fromarray(image).resize((round(scale * width), round(scale * height)), Image.Resampling.BICUBIC)
    labels = Image.fromarray(part_labels(np.asarray(larger), parser))
    return np.asarray(labels.resize((width, height), Image.Resampling.NEAREST))


def head_attributes(image: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks,
                    light: Float32[np.ndarray, "9 3"]) -> dict[str, str]:
    """Light, smile and mouth, where they can be told."""
    left, right = (_pixels(image, face.points[list(where), :2]) for where in (LEFT_CHEEK, RIGHT_CHEEK))
    return _told({"light": light_side(left, right, light), "smile": _smile(face), "mouth": _mouth(face)})


def part_attributes(image: UInt8[np.ndarray, "h w 3"], parts: UInt8[np.ndarray, "h w"]) -> dict[str, str]:
    """Hair, its length, background, clothes, glasses and hat, where they can be told."""
    image, parts = image[::2, ::2], parts[::2, ::2]  # colours and shares need no more
    pixels = {name: _part(image, parts == label)
              for name, label in (("hair", HAIR), ("background", BACKGROUND), ("clothes", CLOTHES))}
    hat = (parts == HAT).mean() > LEAST_HAT
    found = {name: colour_name(pixels[name]) for name in ("background", "clothes")}
    return _told({"hair": hair_colour(pixels["hair"]), "length": None if hat else _hair_length(parts), **found,
                  "glasses": "yes" if (parts == GLASSES).mean() > LEAST_GLASSES else "no",
                  "hat": "yes" if hat else None})


def mirrored(attributes: Mapping[str, str]) -> dict[str, str]:
    """The attributes of the mirrored picture."""
    return {name: MIRRORED.get(value, value) for name, value in attributes.items()}


def captions(attributes: Mapping[str, str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions, each an opening and some of the attributes in random order and wording."""
    return [_caption(attributes, rng) for _ in range(count)]


def colour_name(pixels: Float[np.ndarray, "n 3"]) -> str | None:
    """The one of COLOURS that most pixels have (RGB 0..1), or None where none prevails or there are no pixels.

    By CIELAB's lightness, chroma and hue in degrees.
    """
    if not len(pixels):
        return None
    light, chroma, hue = _lightness_chroma_hue(pixels)
    vivid, pale = chroma > 18, chroma < 9
    warm = (hue > 40) & (hue < 90)
    found = {"black": (light < 18) & (chroma < 18), "white": (light > 80) & pale,
             "grey": (light > 28) & (light < 74) & pale, "brown": (light > 18) & (light < 56) & warm & (chroma > 12),
             "red": vivid & ((hue < 40) | (hue > 352)) & (chroma > 28) & (light < 60),
             "yellow": vivid & (hue > 74) & (hue < 108) & (light > 62) & (chroma > 32),
             "green": (hue > 108) & (hue < 190) & (chroma > 12) & (light > 12),
             "blue": (hue > 215) & (hue < 303) & (chroma > 12) & (light > 12),
             "purple": vivid & (hue > 307) & (hue < 345)}
    shares = {name: float(where.mean()) for name, where in found.items()}
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] > LEAST_AGREEING else None


def hair_colour(pixels: Float[np.ndarray, "n 3"]) -> str | None:
    """The one of HAIR_COLOURS that the hair's median has (RGB 0..1); None between two, or without hair."""
    if not len(pixels):
        return None
    light, chroma, hue = (float(value) for value in _lightness_chroma_hue(np.median(pixels, axis=0)))
    if light < 14 or (light < 22 and chroma < 9):
        return "black"
    if chroma < 6:
        return "grey" if light > 38 else None
    if chroma > 12 and 100 < hue < 330:
        return "green" if hue < 190 else "blue" if 215 < hue < 305 else None
    if light > 45 and chroma > 18 and (hue < 25 or hue > 330):
        return "pink"
    if not 20 < hue < 95:
        return None
    if light > 43 and hue > 58 and chroma > 8:
        return "blond"
    if chroma > 24 and hue < 56 and light > 20:
        return "red"
    return "brown" if light < 38 and chroma > 7 else None


def light_side(left: Float[np.ndarray, "n 3"], right: Float[np.ndarray, "n 3"],
               light: Float32[np.ndarray, "9 3"]) -> str | None:
    """Which side of the face is brighter: left or right in the image, or front for neither.

    Cheek pixels (RGB 0..1) change with the head's turn, and so, the other way round, does the fitted light: this sum of
    the two was uncorrelated with yaw.
    """
    cheeks = np.log((np.median(right) + 0.02) / (np.median(left) + 0.02))
    slope = float(cheeks + 1.3 * light[1].mean() / max(abs(light[0].mean()), 1e-6))
    if abs(slope) < 0.15:
        return "front"
    return ("right" if slope > 0 else "left") if abs(slope) > 0.22 else None


def _hair_length(parts: UInt8[np.ndarray, "h w"]) -> str | None:
    """long or short, by how much of the hair hangs below the chin."""
    hair_rows, skin_rows = (np.nonzero(parts == label)[0] for label in (HAIR, SKIN_PART))
    if min(len(hair_rows), len(skin_rows)) < LEAST_PART * parts.size:
        return None
    below = float((hair_rows > np.percentile(skin_rows, 92)).mean())
    return "long" if below > LONG else "short" if below < SHORT else None


def _smile(face: FaceLandmarks) -> str | None:
    strength = (_score(face, "mouthSmileLeft") + _score(face, "mouthSmileRight")) / 2
    return "yes" if strength > 0.55 else "no" if strength < 0.2 else None


def _mouth(face: FaceLandmarks) -> str | None:
    gap = np.linalg.norm(face.points[13, :2] - face.points[14, :2])  # inner lips
    share = float(gap / np.linalg.norm(face.points[FOREHEAD, :2] - face.points[CHIN, :2]))
    return "open" if share > 0.045 else "closed" if share < 0.015 else None


def _score(face: FaceLandmarks, unit: str) -> float:
    return float(face.blendshapes[BLENDSHAPES.index(unit)])


def _part(image: UInt8[np.ndarray, "h w 3"], where: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "n 3"]:
    """A part's pixels, RGB 0..1; none where the part is too small to have a colour."""
    return image[where] / 255 if where.mean() > LEAST_PART else np.empty((0, 3))


def _pixels(image: UInt8[np.ndarray, "h w 3"], places: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 3"]:
    """RGB 0..1 at image coordinates (x, y); what lies outside is taken from the border."""
    columns, rows = np.clip(places.astype(int), 0, np.array(image.shape[1::-1]) - 1).T
    return image[rows, columns] / 255


def _lightness_chroma_hue(colours: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "3 *n"]:
    """sRGB 0..1 to CIELAB's L (0..100), chroma and hue (degrees, 0..360)."""
    linear = np.where(colours > 0.04045, ((colours + 0.055) / 1.055)**2.4, colours / 12.92)
    ratio = linear @ RGB_TO_XYZ.T / WHITE
    x, y, z = np.moveaxis(np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 4 / 29), -1, 0)
    a, b = 500 * (x - y), 200 * (y - z)
    return np.stack([116 * y - 16, np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360])


def _told(found: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in found.items() if value}


def _caption(attributes: Mapping[str, str], rng: np.random.Generator) -> str:
    kept = [name for name in attributes if rng.random() < KEPT]
    rng.shuffle(kept)
    phrases = [str(rng.choice(PHRASES[name][attributes[name]])) for name in kept]
    return ", ".join([str(rng.choice(OPENINGS)), *phrases])
