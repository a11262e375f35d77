"""MTCNN (Zhang et al. 2016, arXiv 1604.02878), whose boxes FaceNet's faces are cut by.

Three networks in turn: proposals on a pyramid of the photo, their refinement, and boxes with five points. Sizes and
thresholds are facenet-pytorch's. Pixels are counted from 1 inside, as in the original: a box's pixels are
left .. right, both included.
"""
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8

from caphuman_edge.runtime.perception.graph import Graph

SMALLEST_FACE = 20  # px
PROPOSAL_SIZE, PROPOSAL_STRIDE = 12, 2  # px of the scaled photo that a cell of the first network sees; cell to cell
PYRAMID_FACTOR = 0.709
LARGEST_LEVEL = 2_000_000  # px; finer levels of a huge photo cost gigabytes and show only faces too small to be meant
LEAST_SCORES = (0.6, 0.7, 0.7)
PATCH_SIZES = (24, 48)  # px, inputs of the second and third network
SAME_LEVEL_IOU, SAME_FACE_IOU = 0.5, 0.7

Rows = Float32[np.ndarray, "_ _"]  # left, top, right, bottom, score, and what else is carried along


@dataclass(frozen=True, eq=False)
class MtcnnFaces:
    """Faces in image pixels, the largest first."""

    boxes: Float32[np.ndarray, "n 4"]  # left, top, right, bottom
    scores: Float32[np.ndarray, "n"]  # 0..1
    points: Float32[np.ndarray, "n 5 2"]  # eyes, nose, mouth corners; image left before image right


def mtcnn_faces(image: UInt8[np.ndarray, "h w 3"], pnet: Graph, rnet: Graph, onet: Graph) -> MtcnnFaces:
    """Every face; none is no error."""
    rows = _refine(_propose(image, pnet), image, rnet)
    rows = _locate(rows, image, onet)
    areas = (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1])
    rows = rows[np.argsort(-areas, kind="stable")]
    return MtcnnFaces(rows[:, :4], rows[:, 4], rows[:, 5:].reshape(-1, 2, 5).swapaxes(1, 2))


def pyramid(height: int, width: int) -> list[float]:
    """The scales at which the photo is searched, finest first."""
    scale, scales = PROPOSAL_SIZE / SMALLEST_FACE, []
    while min(height, width) * scale >= PROPOSAL_SIZE:
        if height * width * scale**2 <= LARGEST_LEVEL:
            scales.append(scale)
        scale *= PYRAMID_FACTOR
    return scales


def area_resize(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> Float32[np.ndarray, "height width 3"]:
    """Means of the pixels that each output pixel touches: torch's area interpolation, to either side."""
    sums, rows = _window_sums(image, height)
    sums, columns = _window_sums(sums.swapaxes(0, 1), width)
    return (sums.swapaxes(0, 1) / (rows[:, None, None] * columns[:, None])).astype(np.float32)


def best_of_overlapping(rows: Rows, limit: float, of_smaller: bool = False) -> Int[np.ndarray, "m"]:
    """Which rows stay, best first: those that overlap no better one by more than `limit`.

    The overlap is a share of the union, or of the smaller box. In the second case edges count as pixels of the box, and
    of equal scores, which are common near 1, the last is best instead of the first: two libraries' habits.
    """
    edge = np.float32(of_smaller)
    areas = np.prod(rows[:, 2:4] - rows[:, :2] + edge, axis=1)
    order = np.argsort(rows[:, 4], kind="stable")[::-1] if of_smaller else np.argsort(-rows[:, 4], kind="stable")
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = np.maximum(rows[best, :2], rows[order, :2]), np.minimum(rows[best, 2:4], rows[order, 2:4])
        shared = np.prod(np.maximum(high - low + edge, 0), axis=1)
        whole = np.minimum(areas[best], areas[order]) if of_smaller else areas[best] + areas[order] - shared
        order = order[shared <= limit * whole]
    return np.array(kept, int)


def squared(rows: Rows) -> Rows:
    """The boxes as squares of their longer edge around the same centre."""
    size = rows[:, 2:4] - rows[:, :2]
    edge = size.max(axis=1, keepdims=True)
    corner = rows[:, :2] + (size - edge) / 2
    return np.concatenate([corner, corner + edge, rows[:, 4:]], axis=1)


def _propose(image: UInt8[np.ndarray, "h w 3"], pnet: Graph) -> Rows:
    height, width = image.shape[:2]
    levels = [np.zeros((0, 9), np.float32)]
    for scale in pyramid(height, width):
        scaled = area_resize(image, int(height * scale + 1), int(width * scale + 1))
        level = _cells(pnet({"image": _normalised(scaled[None])}), scale)
        levels.append(level[best_of_overlapping(level, SAME_LEVEL_IOU)])
    rows = np.concatenate(levels)
    rows = rows[best_of_overlapping(rows, SAME_FACE_IOU)]
    return squared(_moved(rows[:, :5], rows[:, 5:], edge=0))


def _cells(outputs: dict[str, np.ndarray], scale: float) -> Rows:
    """Boxes, scores and regressions of the cells in which the first network sees a face."""
    probability = outputs["probability"][0, 1]
    y, x = np.nonzero(probability >= LEAST_SCORES[0])
    first = PROPOSAL_STRIDE * np.stack([x, y], axis=1).astype(np.float32) + 1
    corners = np.floor(np.concatenate([first, first + PROPOSAL_SIZE - 1], axis=1) / np.float32(scale))
    return np.concatenate([corners, probability[y, x, None], outputs["regression"][0][:, y, x].T], axis=1)


def _refine(rows: Rows, image: UInt8[np.ndarray, "h w 3"], rnet: Graph) -> Rows:
    rows, outputs = _scored(rows, image, rnet, PATCH_SIZES[0], LEAST_SCORES[1])
    kept = best_of_overlapping(rows, SAME_FACE_IOU)
    return squared(_moved(rows[kept], outputs["regression"][kept]))


def _locate(rows: Rows, image: UInt8[np.ndarray, "h w 3"], onet: Graph) -> Rows:
    """The final boxes, scores, and points as five x, then five y."""
    rows, outputs = _scored(rows, image, onet, PATCH_SIZES[1], LEAST_SCORES[2])
    size = rows[:, 2:4] - rows[:, :2] + 1
    points = np.repeat(size, 5, axis=1) * outputs["points"] + np.repeat(rows[:, :2], 5, axis=1) - 1
    rows = np.concatenate([_moved(rows, outputs["regression"]), points], axis=1)
    return rows[best_of_overlapping(rows, SAME_FACE_IOU, of_smaller=True)]


def _scored(rows: Rows, image: UInt8[np.ndarray, "h w 3"], graph: Graph, size: int,
            least: float) -> tuple[Rows, dict[str, np.ndarray]]:
    """The rows that a network takes for faces, with its scores, and its other outputs for them."""
    low, high = np.maximum(rows[:, :2].astype(int), 1), np.minimum(rows[:, 2:4].astype(int), image.shape[1::-1])
    inside = np.nonzero((low <= high).all(axis=1))[0]
    patches = [area_resize(image[top - 1:bottom, left - 1:right], size, size)
               for (left, top), (right, bottom) in zip(low[inside], high[inside], strict=True)]
    if not patches:
        return np.zeros((0, 5), np.float32), {"regression": np.zeros((0, 4), np.float32),
                                              "points": np.zeros((0, 10), np.float32)}
    outputs = graph({"image": _normalised(np.stack(patches))})
    score = outputs["probability"][:, 1]
    passed = score > least
    return (np.column_stack([rows[inside[passed], :4], score[passed]]),
            {name: output[passed] for name, output in outputs.items()})


def _moved(rows: Rows, regression: Float32[np.ndarray, "n 4"], edge: int = 1) -> Rows:
    """The boxes with every side moved by a share of the box's size, of which the last pixel is a part if `edge`."""
    size = rows[:, 2:4] - rows[:, :2] + np.float32(edge)
    return np.concatenate([rows[:, :4] + regression * np.tile(size, 2), rows[:, 4:]], axis=1)


def _window_sums(lines: np.ndarray, count: int) -> tuple[Int[np.ndarray, "count w 3"], Float64[np.ndarray, "count"]]:
    """Sums of lines over `count` windows that cover them evenly and overlap where they must; and the windows' sizes."""
    length = len(lines)
    first = np.arange(count) * length // count
    last = -(-np.arange(1, count + 1) * length // count)  # exclusive
    padded = np.concatenate([lines, np.zeros_like(lines[:1])])  # so that the sum may end after the last line
    sums = np.add.reduceat(padded, np.stack([first, last], axis=1).ravel(), axis=0, dtype=np.int32)[::2]
    return sums, (last - first).astype(np.float64)


def _normalised(patches: Float32[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n 3 h w"]:
    return np.ascontiguousarray((patches.transpose(0, 3, 1, 2) - np.float32(127.5)) / np.float32(128))
