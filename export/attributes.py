"""What a caption can say of a portrait, measured from its pixels and landmarks; and the captions that say it.

Measured, not recognised: hair is the colour above the face that is not skin's, background what most of the upper
corners show, light the brighter cheek. Thresholds were set by eye on contact sheets of 420 pictures. The same
functions score whether a generated portrait obeyed its prompt.
"""
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Float32, UInt8

from caphuman_edge.runtime.perception.landmarks import BLENDSHAPES, FaceLandmarks

FOREHEAD, CHIN = 10, 152  # landmark indices: topmost and lowest point of the face oval
FOREHEAD_ARC = (54, 103, 67, 109, 10, 338, 297, 332, 284)
SKIN = (50, 280, 101, 330, 205, 425, 151, 9, 195, 108, 337)  # cheeks, forehead, nose
LEFT_CHEEK = (50, 101, 205, 117, 187, 118, 36, 123)  # at image left when the head faces the viewer
RIGHT_CHEEK = (280, 330, 425, 346, 411, 347, 266, 352)
HAIR_HEIGHTS = np.linspace(0.06, 0.26, 11)  # above the forehead, in face heights
LEAST_HAIR = 0.4  # share of the pixels above the forehead that are not skin; less is a bald or hidden head
CORNER = 0.12  # width of the background patches in frame widths; they are twice as high
LEAST_AGREEING = 0.5  # share of the background that must be of one class
RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # sRGB
WHITE = np.array([0.9505, 1.0, 1.089])  # D65
PHRASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "hair": {"black": ("black hair", "dark hair"), "brown": ("brown hair",), "blond": ("blond hair", "blonde hair"),
             "red": ("red hair", "auburn hair")},
    "background": {"dark": ("dark background", "black background"), "bright": ("bright background", "white background"),
                   "grey": ("grey background", "plain background"), "blue": ("blue background", "in front of the sky"),
                   "green": ("green background", "outdoors, in front of trees"),
                   "warm": ("brown background", "warm background")},
    "light": {"left": ("lit from the left", "light from the left"),
              "right": ("lit from the right", "light from the right"), "front": ("soft light", "lit from the front")},
    "smile": {"yes": ("smiling", "with a smile", "happy"), "no": ("serious", "not smiling", "neutral face")},
    "mouth": {"open": ("open mouth", "showing teeth"), "closed": ("closed mouth",)},
}
OPENINGS = ("a photo of a person", "a portrait", "portrait photo of a person", "a person", "photo")


def measure_attributes(image: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks,
                       light: Float32[np.ndarray, "9 3"]) -> dict[str, str]:
    """The values of PHRASES that hold in this picture; what lies between two classes is left out."""
    skin, left, right = (_pixels(image, face.points[list(where), :2]) for where in (SKIN, LEFT_CHEEK, RIGHT_CHEEK))
    found = {"hair": hair_colour(_pixels(image, _above_forehead(face)), skin),
             "background": background_colour(_corners(image)), "light": light_side(left, right, light),
             "smile": _smile(face), "mouth": _mouth(face)}
    return {name: value for name, value in found.items() if value}


def captions(attributes: Mapping[str, str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions, each an opening and some of the attributes in random order and wording."""
    return [_caption(attributes, rng) for _ in range(count)]


def hair_colour(pixels: Float[np.ndarray, "n 3"], skin: Float[np.ndarray, "m 3"]) -> str | None:
    """black, brown, blond or red, of pixels above the forehead that may be skin, too (RGB 0..1).

    In CIELAB: L lightness, chroma, hue in degrees. Skin is nearly as light as the face and of its hue; blond hair is
    yellower. Grey hair is left out: shine on brown hair and pale pictures could not be told from it.
    """
    lightness, chroma, hue = _lightness_chroma_hue(pixels)
    skin_lightness, _, skin_hue = (np.median(values) for values in _lightness_chroma_hue(skin))
    hair = (lightness < skin_lightness - 20) | (np.abs(_turn(hue - skin_hue)) > 13)
    if hair.mean() < LEAST_HAIR:
        return None
    dark, vivid, tone = (float(values) for values in _lightness_chroma_hue(np.median(pixels[hair], axis=0)))
    if vivid > 12 and not 10 < tone < 85:
        return None  # no hair has this colour: a hat, or dye
    if dark < 17 or (dark < 24 and vivid < 7):
        return "black"
    if vivid > 19 and tone < 51 and dark < 45:
        return "red"
    if dark > 36 and vivid > 7 and tone > 45 and dark > skin_lightness - 30:
        return "blond"
    return "brown" if dark < 34 and vivid > 8 else None


def background_colour(pixels: Float[np.ndarray, "n 3"]) -> str | None:
    """dark, bright, grey, blue, green or warm, if most pixels are that (RGB 0..1)."""
    value, least = pixels.max(axis=1), pixels.min(axis=1)
    saturation = (value - least) / np.maximum(value, 1e-6)
    hue = _hue(pixels, value, value - least)
    pale, coloured = (value > 0.72) & (saturation < 0.2), saturation > 0.2
    found = {"dark": value < 0.2, "bright": pale, "grey": (saturation < 0.18) & ~pale,
             "warm": coloured & ((hue < 47) | (hue > 340)), "green": coloured & (hue > 61) & (hue < 162),
             "blue": coloured & (hue > 180) & (hue < 260)}
    shares = {name: float((where & ((name == "dark") | (value > 0.2))).mean()) for name, where in found.items()}
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] > LEAST_AGREEING else None


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


def _smile(face: FaceLandmarks) -> str | None:
    strength = (_score(face, "mouthSmileLeft") + _score(face, "mouthSmileRight")) / 2
    return "yes" if strength > 0.55 else "no" if strength < 0.2 else None


def _mouth(face: FaceLandmarks) -> str | None:
    gap = np.linalg.norm(face.points[13, :2] - face.points[14, :2])  # inner lips
    share = float(gap / np.linalg.norm(face.points[FOREHEAD, :2] - face.points[CHIN, :2]))
    return "open" if share > 0.045 else "closed" if share < 0.015 else None


def _score(face: FaceLandmarks, unit: str) -> float:
    return float(face.blendshapes[BLENDSHAPES.index(unit)])


def _above_forehead(face: FaceLandmarks) -> Float[np.ndarray, "n 2"]:
    """Places in the image, in arcs above the forehead's own."""
    up = face.points[FOREHEAD, :2] - face.points[CHIN, :2]
    arc = face.points[list(FOREHEAD_ARC), :2]
    arc = np.concatenate([arc[:-1] + step * np.diff(arc, axis=0) for step in (0, 1 / 3, 2 / 3)])
    return np.concatenate([arc + height * up for height in HAIR_HEIGHTS])


def _pixels(image: UInt8[np.ndarray, "h w 3"], places: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 3"]:
    """RGB 0..1 at image coordinates (x, y); what lies outside is taken from the border."""
    columns, rows = np.clip(places.astype(int), 0, np.array(image.shape[1::-1]) - 1).T
    return image[rows, columns] / 255


def _corners(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "n 3"]:
    """Pixels of both upper corners, RGB 0..1."""
    edge = max(1, round(CORNER * image.shape[1]))
    corners = np.concatenate([image[:2 * edge, :edge], image[:2 * edge, -edge:]])
    return corners.reshape(-1, 3) / 255


def _lightness_chroma_hue(colours: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "3 *n"]:
    """sRGB 0..1 to CIELAB's L (0..100), chroma and hue (degrees)."""
    linear = np.where(colours > 0.04045, ((colours + 0.055) / 1.055)**2.4, colours / 12.92)
    ratio = linear @ RGB_TO_XYZ.T / WHITE
    x, y, z = np.moveaxis(np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 4 / 29), -1, 0)
    a, b = 500 * (x - y), 200 * (y - z)
    return np.stack([116 * y - 16, np.hypot(a, b), np.degrees(np.arctan2(b, a))])


def _hue(pixels: Float[np.ndarray, "n 3"], value: Float[np.ndarray, "n"],
         spread: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """HSV's hue in degrees, 0..360; value and spread are the channels' maximum and range."""
    red, green, blue = pixels.T
    safe = np.maximum(spread, 1e-6)
    sector = np.where(value == red, (green - blue) / safe, np.where(value == green, 2 + (blue - red) / safe,
                                                                    4 + (red - green) / safe))
    return np.asarray(60 * sector % 360)


def _turn(degrees: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The same angles in -180..180."""
    return np.asarray((degrees + 180) % 360 - 180)


def _caption(attributes: Mapping[str, str], rng: np.random.Generator) -> str:
    kept = [name for name in attributes if rng.random() < 0.8]
    rng.shuffle(kept)
    phrases = [str(rng.choice(PHRASES[name][attributes[name]])) for name in kept]
    return ", ".join([str(rng.choice(OPENINGS)), *phrases])
