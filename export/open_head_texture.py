"""The open head's unwrapping and its painted albedo: a mean face and one mask and colour a component.

Nothing here is learnt from faces: lips, brows and lids are outlined by the head's own landmarks, the rest are
gradients on the unwrapped head. The unwrapping looks at the head from inside: u is the angle around it, v the
elevation, both stretched towards the face; eyes, teeth, tongue and the insides have patches of their own below.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from PIL import Image, ImageDraw, ImageFilter

from caphuman_edge.export.makehuman import MakeHuman
from caphuman_edge.export.open_head_shapes import PARTS, HeadCut

SIZE = 256  # texels
SUPERSAMPLING = 4
EYE_OF_THE_UNWRAPPING = np.array([0.0, 0.0, 0.01])  # metres
STRETCH = 1.6  # texels a degree at the face over the average
ELEVATIONS = (-75.0, 90.0)  # degrees
PATCH_ROW = 0.2  # the lowest fifth of the texture
PATCHES = ("helper-l-eye", "helper-r-eye", "teeth", "helper-tongue", "inside")
MARGIN = 0.01

# Landmarks of the 478-point face model; left and right as seen.
LEFT_EYE = (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246)
RIGHT_EYE = (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466)
LEFT_BROW = (70, 63, 105, 66, 107, 55, 65, 52, 53, 46)
RIGHT_BROW = (300, 293, 334, 296, 336, 285, 295, 282, 283, 276)
LEFT_CHEEK, RIGHT_CHEEK, NOSE_TIP, CHIN, NOSE_FOOT, GLABELLA, MOUTH_CORNER = 50, 280, 4, 152, 2, 9, 61
EAR_AND_JAW = (93, 132, 58, 172, 136, 150, 149, 176, 148, 152)

SKIN, LIP, BROW, LASH = (0.80, 0.62, 0.54), (0.70, 0.42, 0.40), (0.28, 0.20, 0.16), (0.20, 0.13, 0.11)
SCLERA, IRIS, PUPIL = (0.74, 0.70, 0.68), (0.33, 0.21, 0.13), (0.04, 0.03, 0.03)
TEETH, TONGUE, INSIDE = (0.78, 0.73, 0.65), (0.46, 0.21, 0.20), (0.26, 0.10, 0.09)
LIP_RINGS = 6  # rows of MakeHuman's quads between the mouth's opening and the rim of the red
IRIS_RADIUS, PUPIL_RADIUS = 0.43, 0.17  # of the eyeball's

Mask = Float64[np.ndarray, "t t"]
Landmarks = Float64[np.ndarray, "478 2"]


@dataclass(frozen=True)
class Painting:
    """The albedo as stored: mean + sum of coefficient * mask * colour."""

    mean: Float64[np.ndarray, "t t 3"]
    names: tuple[str, ...]
    masks: Float64[np.ndarray, "k t t"]
    colours: Float64[np.ndarray, "k 3"]


def unwrap(source: MakeHuman, cut: HeadCut, mean: Float64[np.ndarray, "v 3"]) -> Float64[np.ndarray, "f 3 2"]:
    """Texture coordinates of each face's corners, u right, v up, 0..1."""
    patch = patch_of_face(source, cut)
    skin = _around_the_head(mean)[cut.faces]
    behind = np.ptp(skin[..., 0], axis=1) > 0.5  # faces across the seam: pull their corners to one side
    far_side = behind[:, None] & (skin[..., 0] < 0.5)
    skin[far_side, 0] = 1 - MARGIN
    flat = np.stack([_flat(mean, cut, patch == i)[cut.faces] for i in range(len(PATCHES))])
    offset = np.stack([np.arange(len(PATCHES)) / len(PATCHES), np.zeros(len(PATCHES))], axis=1)
    patches = flat / len(PATCHES) + offset[:, None, None]
    return np.where(patch[:, None, None] < 0, skin, patches[patch, np.arange(len(patch))])


def lip_faces(source: MakeHuman, cut: HeadCut) -> Int64[np.ndarray, "n"]:
    """The faces of the red of the lips: so many rows of quads around the mouth's opening."""
    patch = patch_of_face(source, cut)
    mouth_side = source.texture_coordinates[cut.face_corners, 0].mean(axis=1) > 0.5  # the eye sockets lie left of it
    inside_mouth = (patch == PATCHES.index("inside")) & mouth_side
    first, second = np.split(cut.faces, 2)  # the two halves of each quad; their shared diagonal is no edge
    edges = np.concatenate([first[:, :2], first[:, 1:], second[:, 1:], second[:, [2, 0]]])
    reached = np.zeros(len(cut.kept), bool)
    reached[cut.faces[inside_mouth]] = True
    for _ in range(LIP_RINGS):
        reached[edges[reached[edges].any(axis=1)]] = True
    return np.flatnonzero(reached[cut.faces].all(axis=1) & (patch < 0))


def paint(lips: Float64[np.ndarray, "n 3 2"], landmarks: Landmarks | None) -> Painting:
    """The albedo, with these triangles for lips; without landmarks it lacks brows, lashes and all components."""
    eyeball, iris, pupil = _eye_masks()
    head = np.zeros((SIZE, SIZE))
    head[: round(SIZE * (1 - PATCH_ROW))] = 1
    mean = np.ones((SIZE, SIZE, 3)) * SKIN
    mean = _over(mean, eyeball, SCLERA)
    mean = _over(_over(mean, iris, IRIS), pupil, PUPIL)
    for patch, colour in (("teeth", TEETH), ("helper-tongue", TONGUE), ("inside", INSIDE)):
        mean = _over(mean, _patch_mask(patch), colour)
    red = _polygon(list(lips), blur=0.8)
    if landmarks is None:
        mean = _over(mean, red, LIP)
        return Painting(mean, (), np.zeros((0, SIZE, SIZE)), np.zeros((0, 3)))
    return _made_up(mean, head, iris * (1 - pupil), red, landmarks)


def _made_up(mean: Float64[np.ndarray, "t t 3"], head: Mask, iris: Mask, lips: Mask,
             points: Landmarks) -> Painting:
    brows = _polygon([points[list(LEFT_BROW)], points[list(RIGHT_BROW)]], blur=1.4)
    lashes = _outline([points[list(LEFT_EYE)], points[list(RIGHT_EYE)]], width=1.2, blur=0.6)
    spread = float(np.linalg.norm(points[RIGHT_CHEEK] - points[LEFT_CHEEK]))
    cheeks = _spot(points[LEFT_CHEEK], 0.22 * spread) + _spot(points[RIGHT_CHEEK], 0.22 * spread)
    nose = _spot(points[NOSE_TIP], 0.14 * spread)
    sockets = sum(_spot(points[list(eye)].mean(axis=0), 0.16 * spread) for eye in (LEFT_EYE, RIGHT_EYE))
    beard = _beard(points, lips, spread)
    forehead = _spot(points[GLABELLA] + [0, 0.35 * spread], 0.4 * spread)
    skin = head * (1 - lips)
    mean = mean + (0.03 * cheeks + 0.03 * nose)[..., None] * [0.6, -0.6, -0.5]
    mean = mean - (0.02 * sockets * head)[..., None] * [0.8, 1, 0.8]
    mean = _over(_over(_over(mean, lips, LIP), 0.7 * brows, BROW), 0.6 * lashes, LASH)
    parts: dict[str, tuple[Mask, Sequence[float]]] = {
        "skin red": (skin, (0.1, 0, 0)), "skin green": (skin, (0, 0.1, 0)), "skin blue": (skin, (0, 0, 0.1)),
        "lips red": (lips, (0.1, 0, 0)), "lips green": (lips, (0, 0.1, 0)), "lips blue": (lips, (0, 0, 0.1)),
        "brows": (brows, (-0.12, -0.11, -0.1)), "lashes": (lashes, (-0.1, -0.1, -0.1)),
        "beard": (beard, (-0.12, -0.11, -0.1)), "cheeks": (cheeks, (0.02, -0.06, -0.05)),
        "nose": (nose, (0.02, -0.06, -0.05)), "eye sockets": (sockets * head, (-0.08, -0.09, -0.07)),
        "forehead": (forehead * head, (0.06, 0.06, 0.06)),
        "iris red": (iris, (0.1, 0, 0)), "iris green": (iris, (0, 0.1, 0)), "iris blue": (iris, (0, 0, 0.1)),
    }
    masks, colours = zip(*parts.values(), strict=True)
    return Painting(mean, tuple(parts), np.stack(masks), np.array(colours))


def patch_of_face(source: MakeHuman, cut: HeadCut) -> Int64[np.ndarray, "f"]:
    """Index into PATCHES, or -1 for the skin; MakeHuman's unwrapping tells skin from insides."""
    patch = np.full(len(cut.faces), -1)
    for i, part in enumerate(PARTS):
        name = "teeth" if part.endswith("teeth") else part
        if part != "body":
            patch[cut.face_parts == i] = PATCHES.index(name)
    u, v = source.texture_coordinates[cut.face_corners].mean(axis=1).T
    in_socket, in_mouth = (u < 0.16) & (v > 0.5), (u > 0.75) & (v < 0.14)
    patch[(cut.face_parts == 0) & (in_socket | in_mouth)] = PATCHES.index("inside")
    return patch


def _around_the_head(mean: Float64[np.ndarray, "v 3"]) -> Float64[np.ndarray, "v 2"]:
    x, y, z = (mean - EYE_OF_THE_UNWRAPPING).T
    around = np.arctan2(x, z) / np.pi
    low, high = np.radians(ELEVATIONS)
    up = (np.arctan2(y, np.hypot(x, z)) - low) / (high - low) * 2 - 1
    u, v = ((STRETCH * t / (1 + (STRETCH - 1) * np.abs(t)) + 1) / 2 for t in (around, np.clip(up, -1, 1)))
    inner = 1 - 2 * MARGIN
    return np.stack([MARGIN + inner * u, PATCH_ROW + MARGIN + (inner - PATCH_ROW) * v], axis=1)


def _flat(mean: Float64[np.ndarray, "v 3"], cut: HeadCut, chosen: Int64[np.ndarray, "f"]) -> Float64[np.ndarray, "v 2"]:
    """The chosen faces as seen from the front, filling 0.1..0.9 of a square."""
    xy = mean[:, :2]
    seen = xy[np.unique(cut.faces[chosen])]
    middle = (seen.min(axis=0) + seen.max(axis=0)) / 2
    return 0.5 + 0.8 * (xy - middle) / np.ptp(seen, axis=0).max()


def _grid() -> tuple[Mask, Mask]:
    """u and v of the texel centres."""
    centres = (np.arange(SIZE) + 0.5) / SIZE
    u, v = np.meshgrid(centres, 1 - centres)
    return u, v


def _patch_mask(name: str) -> Mask:
    u, v = _grid()
    return ((np.floor(u * len(PATCHES)) == PATCHES.index(name)) & (v < PATCH_ROW)).astype(np.float64)


def _eye_masks() -> tuple[Mask, Mask, Mask]:
    """Eyeball patches, and in them discs of the iris and of the pupil."""
    u, v = _grid()
    eyeball = _patch_mask("helper-l-eye") + _patch_mask("helper-r-eye")
    across = (u * len(PATCHES)) % 1 - 0.5
    radius = np.hypot(across, v * len(PATCHES) - 0.5) / 0.4
    soft = 0.04
    iris, pupil = (eyeball * np.clip((edge - radius) / soft + 0.5, 0, 1) for edge in (IRIS_RADIUS, PUPIL_RADIUS))
    return eyeball, iris, pupil


def _polygon(outlines: list[Float64[np.ndarray, "n 2"]], blur: float) -> Mask:
    image = Image.new("L", (SIZE * SUPERSAMPLING,) * 2)
    for outline in outlines:
        ImageDraw.Draw(image).polygon(_pixels(outline), fill=255)
    return _softened(image, blur)


def _outline(outlines: list[Float64[np.ndarray, "n 2"]], width: float, blur: float) -> Mask:
    image = Image.new("L", (SIZE * SUPERSAMPLING,) * 2)
    for outline in outlines:
        closed = _pixels(np.concatenate([outline, outline[:1]]))
        ImageDraw.Draw(image).line(closed, fill=255, width=round(width * SUPERSAMPLING), joint="curve")
    return _softened(image, blur)


def _pixels(outline: Float64[np.ndarray, "n 2"]) -> list[tuple[float, float]]:
    size = SIZE * SUPERSAMPLING
    return [(float(u * size), float((1 - v) * size)) for u, v in outline]


def _softened(image: Image.Image, blur: float) -> Mask:
    """Down to texels; blur is a standard deviation in texels."""
    soft = image.filter(ImageFilter.GaussianBlur(blur * SUPERSAMPLING)).resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(soft, np.float64) / 255


def _spot(centre: Float64[np.ndarray, "2"], radius: float) -> Mask:
    u, v = _grid()
    return np.asarray(np.exp(-((u - centre[0]) ** 2 + (v - centre[1]) ** 2) / (2 * (radius / 1.5) ** 2)))


def _beard(points: Landmarks, lips: Mask, spread: float) -> Mask:
    """Upper lip, chin, jaw and a little throat; the upper rim runs from the ears under the cheeks to the nose."""
    middle = points[CHIN, 0]
    left_rim = [points[EAR_AND_JAW[0]], points[MOUTH_CORNER] + spread * np.array([-0.28, 0.02]),
                points[MOUTH_CORNER] + spread * np.array([-0.1, 0.1]), points[NOSE_FOOT] - [0.14 * spread, 0]]
    left_jaw = points[list(EAR_AND_JAW)] - [0, 0.1 * spread]
    left = np.concatenate([left_jaw[::-1], left_rim])
    right = left[::-1] * [-1, 1] + [2 * middle, 0]
    return np.asarray(_polygon([np.concatenate([left, right])], blur=3.5) * (1 - lips))


def _over(base: Float64[np.ndarray, "t t 3"], mask: Mask, colour: Sequence[float]) -> Float64[np.ndarray, "t t 3"]:
    return np.asarray(base * (1 - mask[..., None]) + mask[..., None] * np.asarray(colour))
