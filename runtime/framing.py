"""The part of a photo that fills the frame of the portrait: four ways to fit one into the other."""
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from .image import resize
from .perception import FaceLandmarks

Fit = Literal["face", "crop", "pad", "squash"]
FITS: tuple[Fit, ...] = ("face", "crop", "pad", "squash")

FACE_HEIGHT = 0.676  # of the portrait's edge, forehead to chin: the mean of the training pictures
FACE_CENTRE = (0.5, 0.6)  # of the portrait's edges, right and down

LARGEST_FRAME = 2048  # px; more shows nothing that is measured, and a huge photo's would fill the memory


@dataclass(frozen=True)
class Region:
    """A rectangle in photo pixels; it may reach beyond the border."""

    left: float
    top: float
    width: float
    height: float

    @property
    def pixels(self) -> tuple[int, int, int, int]:
        """Left, top, width and height in whole pixels."""
        left, top, width, height = (round(side) for side in (self.left, self.top, self.width, self.height))
        return left, top, max(1, width), max(1, height)


def frame_photo(photo: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks, fit: Fit = "face",
                aspect: float = 1.0) -> tuple[UInt8[np.ndarray, "H W 3"], FaceLandmarks]:
    """The photo as the frame shows it, and the face in its pixels; `aspect` is the frame's width over its height.

    face: the square around the face in which it has the size and the place of the miniature's training pictures, grown
    to the frame's proportions. crop: the largest part of the photo with these proportions, the face as central as can
    be. pad: the whole photo in the middle of such a rectangle. squash: the whole photo, to be stretched over the frame
    by whoever draws it, as the official tool does; here it keeps its proportions, and so does the fitted head, which
    HeadCode.crop then stretches in the same way. Beyond the border the photo's edge pixels repeat. Photo and points are
    scaled down together where an edge would be over LARGEST_FRAME.
    """
    if fit == "squash":
        return photo, face
    region = frame_region(photo, face, fit, aspect)
    scale = min(1.0, LARGEST_FRAME / max(region.width, region.height))
    if scale < 1:
        photo, face = _scaled(photo, face, scale)
        region = Region(*(scale * side for side in (region.left, region.top, region.width, region.height)))
    points = face.points - np.array([*region.pixels[:2], 0], np.float32)
    return cut_out(photo, region), replace(face, points=points)


def frame_region(photo: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks, fit: Fit = "face",
                 aspect: float = 1.0) -> Region:
    """The part of the photo that `frame_photo` shows."""
    height, width = photo.shape[:2]
    regions = {"face": _around_face, "crop": _largest_within, "pad": _smallest_around}
    if fit == "squash":
        return Region(0.0, 0.0, float(width), float(height))
    return regions[fit](width, height, face, aspect)


def cut_out(photo: UInt8[np.ndarray, "h w 3"], region: Region) -> UInt8[np.ndarray, "H W 3"]:
    """A part of the photo; beyond the border its edge pixels repeat."""
    left, top, width, height = region.pixels
    rows = np.clip(np.arange(top, top + height), 0, photo.shape[0] - 1)
    columns = np.clip(np.arange(left, left + width), 0, photo.shape[1] - 1)
    return photo[rows[:, None], columns]


def _around_face(width: int, height: int, face: FaceLandmarks, aspect: float) -> Region:
    edge = max(2, round(float(np.ptp(face.points[:, :2], axis=0).max()) / FACE_HEIGHT))
    left, top = _middle(face) - edge * np.array(FACE_CENTRE)
    wide, high = edge * max(1.0, aspect), edge * max(1.0, 1 / aspect)
    return Region(float(left) - (wide - edge) / 2, float(top) - (high - edge) / 2, wide, high)


def _largest_within(width: int, height: int, face: FaceLandmarks, aspect: float) -> Region:
    high = min(height, width / aspect)
    size = np.array([high * aspect, high])
    left, top = np.clip(_middle(face) - size / 2, 0, [width, height] - size)
    return Region(float(left), float(top), float(size[0]), float(high))


def _smallest_around(width: int, height: int, face: FaceLandmarks, aspect: float) -> Region:
    high = max(height, width / aspect)
    return Region((width - high * aspect) / 2, (height - high) / 2, high * aspect, float(high))


def _middle(face: FaceLandmarks) -> np.ndarray:
    """Of the box around the points, in pixels right and down."""
    return (face.points[:, :2].min(axis=0) + face.points[:, :2].max(axis=0)) / 2


def _scaled(photo: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks,
            scale: float) -> tuple[UInt8[np.ndarray, "H W 3"], FaceLandmarks]:
    height, width = (max(1, round(length * scale)) for length in photo.shape[:2])
    factors = np.array([width / photo.shape[1], height / photo.shape[0], scale], np.float32)
    return resize(photo, height, width), replace(face, points=face.points * factors)
