"""What the image encoder reads: the levelled crop of the face's hull on white, or a whole picture as CLIP takes it."""
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from caphuman_edge.runtime.contract import IMAGE_MEAN, IMAGE_STD
from caphuman_edge.runtime.perception.landmarks import FaceLandmarks, levelled_square
from caphuman_edge.runtime.perception.warp import apply, invert, warp

HULL_MARGIN = 1.05  # crop edge over the hull's longer side: no landmark touches the border
CLIP_MEAN, CLIP_STD = np.array(IMAGE_MEAN, np.float32), np.array(IMAGE_STD, np.float32)


def face_crop(image: UInt8[np.ndarray, "h w 3"], landmarks: FaceLandmarks, size: int) -> Float32[np.ndarray, "3 s s"]:
    """The face with level eyes on white, size x size, normalised with CLIP's mean and deviation.

    The square is turned and scaled with the face, so a tilt of the head or of the camera is not in the crop.
    """
    hull = face_hull(landmarks)
    square = levelled_square(hull, landmarks.tilt, HULL_MARGIN, size)
    mask = hull_mask(apply(invert(square), hull), size, size)
    face = np.where(mask[..., None], warp(image, square, size) / 255, 1)
    return _normalised(face)


def clip_pixels(image: UInt8[np.ndarray, "h w 3"], size: int) -> Float32[np.ndarray, "3 s s"]:
    """CLIP's own preprocessing: shortest edge to `size` px (bicubic), the middle square, normalised."""
    height, width = (size * edge // min(image.shape[:2]) for edge in image.shape[:2])
    top, left = (height - size) // 2, (width - size) // 2
    scaled = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return _normalised(scaled[top:top + size, left:left + size] / 255)


def face_hull(landmarks: FaceLandmarks) -> Float[np.ndarray, "n 2"]:
    """The convex hull of the landmarks in image pixels, clockwise as seen (Andrew's monotone chain)."""
    points = sorted(map(tuple, landmarks.points[:, :2].astype(float)))
    return np.array(_half_hull(points) + _half_hull(points[::-1]))


def hull_mask(hull: Float[np.ndarray, "n 2"], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """True where a pixel's centre lies inside the convex hull: in each row, between its leftmost and rightmost edge."""
    y = np.arange(height)[:, None] + 0.5
    start, end = hull, np.roll(hull, -1, axis=0)
    crosses = (start[:, 1] <= y) != (end[:, 1] <= y)  # (rows, edges)
    rise = np.where(start[:, 1] == end[:, 1], 1, end[:, 1] - start[:, 1])  # level edges cross no row
    x = start[:, 0] + (y - start[:, 1]) * (end[:, 0] - start[:, 0]) / rise
    left = np.where(crosses, x, np.inf).min(axis=1, keepdims=True)
    right = np.where(crosses, x, -np.inf).max(axis=1, keepdims=True)
    columns = np.arange(width) + 0.5
    return (left <= columns) & (columns < right)


def _normalised(face: Float32[np.ndarray, "s s 3"]) -> Float32[np.ndarray, "3 s s"]:
    return np.asarray(((face - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1), np.float32, order="C")


def _half_hull(points: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """One side of the hull, without its last point."""
    chain: list[tuple[float, ...]] = []
    for point in points:
        while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
            chain.pop()
        chain.append(point)
    return chain[:-1]


def _turn(a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
