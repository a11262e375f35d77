"""Similarity transforms of the image plane, and the bilinear warp that follows them.

A transform is a 2 x 3 matrix, in pixels, from crop to image where nothing else is said. The centre of pixel
(column i, row j) is (i + 0.5, j + 0.5).
"""
import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

Transform = Float[np.ndarray, "2 3"]
Points = Float[np.ndarray, "n 2"]


def square_to_image(centre: Float[np.ndarray, "2"], side: float, angle: float, size: int) -> Transform:
    """From a crop of size x size to the square of that side in the image, turned clockwise by `angle` (radians)."""
    scale = side / size
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.column_stack([turn, centre - turn @ np.full(2, size / 2)])


def fit_similarity(source: Points, target: Points) -> Transform:
    """The rotation, scale and shift that take `source` to `target` with the least squared error.

    As complex numbers the map is z -> a z + b, and a is a plain regression coefficient.
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    z_mean, w_mean = z.mean(), w.mean()
    a = np.vdot(z - z_mean, w - w_mean) / np.vdot(z - z_mean, z - z_mean)
    b = w_mean - a * z_mean
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def apply(transform: Transform, points: Points) -> Float[np.ndarray, "n 2"]:
    """The points on the other side of the transform."""
    return points @ transform[:, :2].T + transform[:, 2]


def invert(transform: Transform) -> Transform:
    """The transform back, from image to crop."""
    turn = np.linalg.inv(transform[:, :2])
    return np.column_stack([turn, -turn @ transform[:, 2]])


def scale_of(transform: Transform) -> float:
    """Image pixels per crop pixel."""
    return float(np.hypot(*transform[:, 0]))


def warp(image: UInt8[np.ndarray, "h w 3"], crop_to_image: Transform, size: int) -> Float32[np.ndarray, "size size 3"]:
    """Sample a crop of size x size, values 0..255; beyond the border the edge pixels repeat.

    A crop that shrinks the image samples a box-averaged copy, or it would alias.
    """
    shrink = max(1, int(scale_of(crop_to_image)))
    if shrink > 1:
        image = np.asarray(Image.fromarray(image).reduce(shrink))
    columns, rows = np.meshgrid(*[np.arange(size) + 0.5] * 2)
    points = apply(crop_to_image, np.stack([columns.ravel(), rows.ravel()], axis=1)) / shrink - 0.5
    return _bilinear(image, points.astype(np.float32)).reshape(size, size, 3)


def _bilinear(image: UInt8[np.ndarray, "h w 3"], points: Float32[np.ndarray, "n 2"]) -> Float32[np.ndarray, "n 3"]:
    height, width = image.shape[:2]
    points = np.clip(points, 0, np.array([width - 1, height - 1], np.float32))
    low = np.minimum(points.astype(np.intp), [max(width - 2, 0), max(height - 2, 0)])
    (x, y), (fx, fy) = low.T, (points - low).T[..., None].astype(np.float32)
    pixels, first = image.reshape(-1, 3), y * width + x
    right, below = min(1, width - 1), width * min(1, height - 1)
    top = pixels[first] * (1 - fx) + pixels[first + right] * fx
    bottom = pixels[first + below] * (1 - fx) + pixels[first + below + right] * fx
    return np.asarray(top * (1 - fy) + bottom * fy, np.float32)
