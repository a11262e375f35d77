"""InsightFace's detector (SCRFD) and face recognition (ArcFace), run by the insightface package where it is installed.

Its code is MIT, its models are for non-commercial research only. None is shipped or fetched here: whoever wants them
puts a pack into place, knowing that.
"""
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from caphuman_edge.runtime.errors import BadInput, FaceError, MissingExtra
from caphuman_edge.runtime.perception.detect import FaceBox

PACK = Path("~/.insightface/models/buffalo_l")
PACK_VARIABLE = "CAPHUMAN_INSIGHTFACE_PACK"  # names another pack's folder
LICENCE = "InsightFace's models are for non-commercial research only"
DETECTION, RECOGNITION = "detection", "recognition"


class InsightFace:
    """SCRFD and ArcFace of one model pack."""

    def __init__(self, pack: Path | None = None):
        """Load a pack's folder of .onnx files: `pack`, or what PACK_VARIABLE names, or PACK.

        Raises MissingExtra without the package, BadInput without a pack; nothing is downloaded.
        """
        folder = (pack or Path(os.environ.get(PACK_VARIABLE) or PACK)).expanduser()
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise MissingExtra("insightface", "insightface", "detection and scores by InsightFace") from error
        if not any(folder.glob("*.onnx")):
            raise BadInput(f"{folder} holds no InsightFace model pack. {LICENCE}: if yours is, python -c "
                           "'import insightface.app as app; app.FaceAnalysis()' fetches one, or name the folder of "
                           f"yours with {PACK_VARIABLE}")
        self._faces = FaceAnalysis(str(folder), allowed_modules=[DETECTION, RECOGNITION],
                                   providers=["CPUExecutionProvider"])
        self._faces.prepare()

    def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Every face in an RGB image, the largest first; a box is the square about SCRFD's."""
        boxes, points = self._faces.det_model.detect(_bgr(image))
        faces = [_square(box, corners) for box, corners in zip(boxes, points, strict=True)]
        return sorted(faces, key=lambda face: -face.area)

    def identity(self, image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "d"]:
        """ArcFace's unit vector of the largest face in an RGB image; raises FaceError where there is none."""
        found = self._faces.get(_bgr(image))
        if not found:
            raise FaceError("InsightFace finds no face to compare: use a picture that shows one")
        largest = max(found, key=lambda face: np.prod(face.bbox[2:] - face.bbox[:2]))
        return np.asarray(largest.normed_embedding, np.float32)


def _square(box: Float32[np.ndarray, "5"], points: Float32[np.ndarray, "5 2"]) -> FaceBox:
    """SCRFD's box, grown to a square; its keypoints already begin with the eyes, image left first."""
    left, top, right, bottom, score = map(float, box)
    across, down, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2
    return FaceBox(across - half, down - half, across + half, down + half, np.asarray(points, np.float32), score)


def _bgr(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.ascontiguousarray(image[..., ::-1])
