"""Find faces: the 128 px short-range detector on the whole picture, then on windows where that finds nothing.

Anchors, box coding and non-maximum suppression follow the published BlazeFace short-range model (arXiv 1907.05047).
"""
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.perception.graph import Graph

INPUT_SIZE = 128  # px
ANCHOR_GRIDS = ((16, 2), (8, 6))  # (cells along an edge, anchors in a cell)
SAME_FACE_IOU = 0.3  # boxes that overlap more are averaged into one
INSIDE = 0.6  # a box that lies this much inside a better one is part of that face
WHOLE_SCORE = 0.5
WINDOW_SCORE = 0.7  # windows give the detector many more chances to be wrong
SMALLEST_WINDOW = 128  # px; a face in a smaller one is too small to measure
FINEST_SEARCH = 16  # of the longer edge; finer windows of a huge photo would be thousands
BESIDE_SCORE = 0.8  # of 300 portraits, hair and walls had 0.71 to 0.77 in four
BESIDE_SEARCH = 4  # of the longer edge: a face of a fortieth of it is still found
COMPARABLE = 0.6  # faces of this share of the largest one's area could equally be meant


@dataclass(frozen=True, eq=False)
class FaceBox:
    """A face in image pixels. Keypoints: eye at image left, eye at image right, then the detector's others."""

    left: float
    top: float
    right: float
    bottom: float
    keypoints: Float32[np.ndarray, "k 2"]
    score: float  # 0..1

    @property
    def area(self) -> float:
        """Square pixels."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Window:
    """A square of the picture, in pixels; it may reach beyond the border."""

    left: float
    top: float
    side: float


def detect_faces(image: UInt8[np.ndarray, "h w 3"], face_detector: Graph, every: bool = False) -> list[FaceBox]:
    """The faces of the photo, the largest first; an empty list where there is none.

    The detector sees faces between about a tenth and the whole of its 128 px input. Where the whole picture shows it
    none, the face is either larger than the picture, so a margin is added, or small, so ever smaller windows are tried.
    `every` searches such windows also where faces were found, and lists the smaller ones that stand beside them last:
    the others keep their numbers.
    """
    picture, whole = Image.fromarray(image), max(image.shape[:2])
    faces = np.zeros((0, 17), np.float32)
    for windows, score in _searches(*picture.size):
        beside = len(faces) > 0
        if beside and not (every and whole / BESIDE_SEARCH <= windows[0].side < whole):
            continue
        least = BESIDE_SCORE if beside else score
        found = merge_overlapping(np.concatenate([_faces_in(picture, part, face_detector, least) for part in windows]))
        faces = np.concatenate([faces, _largest_first(_apart(found, faces))])
    return [_face_box(row) for row in faces]


def select_face(boxes: list[FaceBox], number: int | None = None) -> FaceBox:
    """The face that is meant: `number` counts from 1, the largest, which is also what None means.

    Warns where there is no number and several faces are of comparable size. Raises FaceError where there is no face,
    or none of that number.
    """
    if not boxes:
        raise FaceError("no face found in the photo: use one where the face is at least 64 pixels wide, well lit and "
                        "turned towards the camera")
    if number is not None and not 1 <= number <= len(boxes):
        others = f" to {len(boxes)}" if len(boxes) > 1 else ""
        raise FaceError(f"--face {number}, but the photo shows {len(boxes)}: use 1 (the largest){others}")
    comparable = comparable_faces(boxes)
    if number is None and comparable > 1:
        warnings.warn(f"{comparable} faces of similar size in the photo, the largest is taken: choose with --face N, "
                      "as 'caphuman preview' numbers them", stacklevel=2)
    return boxes[(number or 1) - 1]


def comparable_faces(boxes: list[FaceBox]) -> int:
    """How many faces could be the one that is meant: the largest, and those nearly as large."""
    return sum(box.area >= COMPARABLE * boxes[0].area for box in boxes)


@cache
def anchors() -> Float32[np.ndarray, "896 2"]:
    """Anchor centres in units of the input's edge, in the detector's order."""
    return np.concatenate([_grid(cells, repeats) for cells, repeats in ANCHOR_GRIDS])


def decode(regressors: Float32[np.ndarray, "896 16"]) -> Float32[np.ndarray, "896 16"]:
    """Detector output to left, top, right, bottom and six keypoints (x, y), in units of the input's edge."""
    points = regressors.reshape(-1, 8, 2) / INPUT_SIZE
    size = points[:, 1:2]
    points = points + anchors()[:, None]  # centre, size, six keypoints
    centre = points[:, :1]
    return np.concatenate([centre - size / 2, centre + size / 2, points[:, 2:]], axis=1).reshape(-1, 16)


def merge_overlapping(rows: Float32[np.ndarray, "n 17"]) -> Float32[np.ndarray, "m 17"]:
    """One row a face: the score-weighted mean of the boxes around each best one.

    A row is a decoded box (16 numbers) and its score.
    """
    merged = []
    rows = rows[np.argsort(-rows[:, 16], kind="stable")]
    while len(rows):
        iou, inside = _overlaps(rows[0], rows)
        same = rows[iou > SAME_FACE_IOU]
        mean = np.average(same[:, :16], axis=0, weights=same[:, 16])
        merged.append([*mean, rows[0, 16]])
        rows = rows[(iou <= SAME_FACE_IOU) & (inside <= INSIDE)]
    return np.array(merged, np.float32).reshape(-1, 17)


def _searches(width: int, height: int) -> Iterator[tuple[list[Window], float]]:
    """Ever finer sets of windows, and the score that a face needs in them."""
    whole = float(max(width, height))
    for side in (whole, 2 * whole):
        yield [Window((width - side) / 2, (height - side) / 2, side)], WHOLE_SCORE
    side = whole / 2
    while side >= max(SMALLEST_WINDOW, whole / FINEST_SEARCH):
        yield [Window(x, y, side) for y in _starts(height, side) for x in _starts(width, side)], WINDOW_SCORE
        side /= 2


def _starts(length: int, side: float) -> list[float]:
    """Where windows begin along an edge, overlapping by half, so that no face of half a window is cut by all."""
    count = max(1, int(np.ceil(2 * length / side)) - 1)
    return [float(start) for start in np.linspace(0, length - side, count)] if count > 1 else [(length - side) / 2]


def _faces_in(picture: Image.Image, window: Window, face_detector: Graph, score: float) -> Float32[np.ndarray, "n 17"]:
    outputs = face_detector({"image": _detector_input(picture, window)})
    scores = outputs["scores"][0]
    keep = scores[:, 0] >= score
    boxes = decode(outputs["regressors"][0])[keep] * np.float32(window.side)
    boxes = boxes + np.tile(np.array([window.left, window.top], np.float32), 8)
    return np.concatenate([boxes, scores[keep]], axis=1)


def _detector_input(picture: Image.Image, window: Window) -> Float32[np.ndarray, "1 128 128 3"]:
    """The window as the detector wants it: -1..1, black beyond the border."""
    left, top = max(window.left, 0), max(window.top, 0)
    right, bottom = (min(start + window.side, end)
                     for start, end in zip((window.left, window.top), picture.size, strict=True))
    scale = INPUT_SIZE / window.side
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    part = picture.resize(size, Image.Resampling.BILINEAR, box=(left, top, right, bottom), reducing_gap=2.0)
    canvas = Image.new("RGB", (INPUT_SIZE, INPUT_SIZE))
    canvas.paste(part, (round((left - window.left) * scale), round((top - window.top) * scale)))
    return (np.asarray(canvas, np.float32) / 127.5 - 1)[None]


def _grid(cells: int, repeats: int) -> Float32[np.ndarray, "n 2"]:
    rows, columns = np.divmod(np.arange(cells * cells), cells)
    return np.repeat(np.stack([columns, rows], axis=1) + 0.5, repeats, axis=0).astype(np.float32) / cells


def _overlaps(
    best: Float32[np.ndarray, "17"], rows: Float32[np.ndarray, "n 17"],
) -> tuple[Float32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """Intersection over union with the best box, and intersection over the smaller of the two."""
    low, high = np.maximum(best[:2], rows[:, :2]), np.minimum(best[2:4], rows[:, 2:4])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    areas, area = np.prod(rows[:, 2:4] - rows[:, :2], axis=1), np.prod(best[2:4] - best[:2])
    return shared / (areas + area - shared), shared / np.minimum(areas, area)


def _apart(found: Float32[np.ndarray, "n 17"], faces: Float32[np.ndarray, "m 17"]) -> Float32[np.ndarray, "k 17"]:
    """The found boxes that are no part of a face known already."""
    overlaps = [_overlaps(box, faces) for box in found]
    new = [bool((iou <= SAME_FACE_IOU).all() and (inside <= INSIDE).all()) for iou, inside in overlaps]
    return found[np.array(new, bool)]


def _largest_first(rows: Float32[np.ndarray, "n 17"]) -> Float32[np.ndarray, "n 17"]:
    return rows[np.argsort(-np.prod(rows[:, 2:4] - rows[:, :2], axis=1), kind="stable")]


def _face_box(row: Float32[np.ndarray, "17"]) -> FaceBox:
    left, top, right, bottom = (float(value) for value in row[:4])
    return FaceBox(left, top, right, bottom, row[4:16].reshape(6, 2), float(row[16]))
