"""What DECA sees of a photo: squashed to a square, then cropped around the face, as the official tool does.

The scaling equals skimage.transform.resize with anti-aliasing bit by bit, the crop skimage's bilinear warp.
Pixel (column i, row j) has its centre at (i, j).
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, UInt8

FRAME_SIZE = 512  # px, edge of the squashed photo
CROP_SIZE = 224  # px
CROP_MARGIN = 1.25  # crop edge over the face's size
UNIT = 1 / 255  # multiplied, never divided by: truncation shows the last bit


@dataclass(frozen=True)
class Square:
    """The part of the 512 px frame that is cropped, in its pixels; it may reach beyond the border."""

    left: float
    top: float
    side: int

    @property
    def to_crop(self) -> Float64[np.ndarray, "3 3"]:
        """Frame to crop pixels, for column vectors: the official `tform`."""
        scale = (CROP_SIZE - 1) / self.side
        return np.array([[scale, 0, -scale * self.left], [0, scale, -scale * self.top], [0, 0, 1]])

    @property
    def to_frame(self) -> Float64[np.ndarray, "3 3"]:
        """Crop to frame pixels, for row vectors: what the official decoder takes."""
        scale = self.side / (CROP_SIZE - 1)
        return np.array([[scale, 0, 0], [0, scale, 0], [self.left, self.top, 1]])


def squash(photo: UInt8[np.ndarray, "h w 3"], size: int = FRAME_SIZE) -> UInt8[np.ndarray, "size size 3"]:
    """The photo as a square, whatever its aspect ratio; values are truncated, as the official tool's are.

    Blurred where it shrinks, then bilinear. The terms are added in skimage's order, or exact sums such as a flat area's
    would land on the other side of the truncation.
    """
    (rows, below), (columns, right) = (_neighbours(length, size) for length in photo.shape[:2])
    strips = np.array_split(photo, -(-photo.shape[1] // size), axis=1)  # a huge photo's sums would fill the memory
    lines = np.hstack([_blurred(strip, rows, UNIT) for strip in strips])  # (2 size, w, 3): before and after each sample
    cells = _blurred(lines.swapaxes(0, 1), columns).swapaxes(0, 1)  # (2 size, 2 size, 3)
    down, across = np.stack([1 - below, below])[..., None, None], np.stack([1 - right, right])[..., None]
    scaled = np.zeros((size, size, 3))
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        scaled += cells[i::2, j::2] * down[i] * across[j]
    return (scaled.clip(photo.min() * UNIT, photo.max() * UNIT) * 255).astype(np.uint8)


def square_around(box: Float[np.ndarray, "4"], kind: Literal["kpt68", "bbox"] = "kpt68") -> Square:
    """The square to crop for a face's box: left, top, right, bottom in frame pixels.

    The box holds the 68 points ("kpt68") or is a detector's ("bbox"), which the official tool reads as lying too high.
    """
    left, top, right, bottom = (float(edge) for edge in box)
    size, lower = (right - left + bottom - top) / 2, 0.0
    if kind == "kpt68":
        size *= 1.1
    else:
        lower = 0.12 * size
    side = int(size * CROP_MARGIN)
    return Square((left + right) / 2 - side / 2, (top + bottom) / 2 + lower - side / 2, side)


def square_of_points(points: Float[np.ndarray, "68 2"]) -> Square:
    """The square to crop for a face's 68 points in frame pixels."""
    return square_around(np.concatenate([points.min(axis=0), points.max(axis=0)]))


def whole_frame() -> Square:
    """The square to crop where no face was found."""
    return square_around(np.array([0.0, 0.0, FRAME_SIZE - 1, FRAME_SIZE - 1]))


def crop_square(frame: UInt8[np.ndarray, "512 512 3"], square: Square) -> Float32[np.ndarray, "3 224 224"]:
    """DECA's input: bilinear samples of the square, 0..1, zero beyond the border."""
    steps = np.arange(CROP_SIZE) * square.to_frame[0, 0]
    rows, columns = _sampling(square.top + steps), _sampling(square.left + steps)
    return np.ascontiguousarray(rows @ (frame * UNIT).transpose(2, 0, 1) @ columns.T, np.float32)


def _neighbours(length: int, size: int) -> tuple[Int[np.ndarray, "n"], Float64[np.ndarray, "size"]]:
    """For `size` even samples of a line: the pixels before and after each, in turn, and how far it is past the first.

    Beyond the ends the line is mirrored about its last pixel's centre.
    """
    position = np.abs(length / size * (np.arange(size) + 0.5) - 0.5)
    before = np.floor(position).astype(int)
    after = np.where(before < length - 1, before + 1, length - 2)
    return np.stack([before, after], axis=1).ravel(), position - before


def _blurred(image: np.ndarray, lines: Int[np.ndarray, "n"], unit: float = 1.0) -> Float64[np.ndarray, "n w 3"]:
    """These lines of the picture times `unit`, after a blur along the first axis that hides what half as many lose.

    A Gaussian of deviation (shrink - 1) / 2 pixels, cut at four deviations; the picture is mirrored at its ends.
    """
    period = 2 * (len(image) - 1)
    sigma = max(0.0, (2 * len(image) / len(lines) - 1) / 2)
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 / max(sigma * sigma, 1e-9) * np.arange(-reach, reach + 1) ** 2)
    weights /= weights.sum()
    blurred = image[lines] * unit * weights[reach]
    for offset, weight in zip(range(reach, 0, -1), weights, strict=False):  # from the outside in, as scipy adds
        above, below = (lines - offset) % period, (lines + offset) % period
        pair = image[np.minimum(above, period - above)] * unit + image[np.minimum(below, period - below)] * unit
        blurred += pair * weight
    return blurred


def _sampling(positions: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n 512"]:
    """The matrix that samples a line of the frame at these positions, linearly, with zeros beyond its ends."""
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(FRAME_SIZE)))
