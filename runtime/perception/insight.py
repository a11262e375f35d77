"""InsightFace's detector (SCRFD) and face recognition (ArcFace), run by the insightface package where it is installed.

Its code is MIT, its models are for non-commercial research only. None is shipped or fetched here: whoever wants them
puts a pack into place, knowing that.
"""
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from jaxtyping import Float32, UInt8

from caphuman_edge.runtime.errors import BadInput, MissingExtra
from caphuman_edge.runtime.perception.detect import FaceBox
from caphuman_edge.runtime.perception.identity import five_points
from caphuman_edge.runtime.perception.landmarks import FaceLandmarks

PACK = Path("~/.insightface/models/buffalo_l")
PACK_VARIABLE = "CAPHUMAN_INSIGHTFACE_PACK"  # names another pack's folder
LICENCE = "its models are for non-commercial research only"
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
            raise MissingExtra("insightface", "insightface", f"InsightFace ({LICENCE})") from error
        if not any(folder.glob("*.onnx")):
            raise BadInput(f"{folder} holds no model pack of InsightFace ({LICENCE}): where that is your "
                           "use, fetch one with python -c 'import insightface.app as app; app.FaceAnalysis()', or name "
                           f"another pack's folder with {PACK_VARIABLE}")
        self._faces = FaceAnalysis(str(folder), allowed_modules=[DETECTION, RECOGNITION],
                                   providers=["CPUExecutionProvider"])
        self._faces.prepare()

    def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Every face in an RGB image, the largest first; a box is the square about SCRFD's."""
        boxes, points = self._faces.det_model.detect(_bgr(image))
        faces = [_square(box, corners) for box, corners in zip(boxes, points, strict=True)]
        return sorted(faces, key=lambda face: -face.area)

    def identity(self, image: UInt8[np.ndarray, "h w 3"], landmarks: FaceLandmarks) -> Float32[np.ndarray, "d"]:
        """ArcFace's unit vector of a measured face in an RGB image."""
        aligned = SimpleNamespace(kps=five_points(landmarks).astype(np.float32))
        vector = self._faces.models[RECOGNITION].get(_bgr(image), aligned)
        return np.asarray(vector / np.linalg.norm(vector), np.float32)


def _square(box: Float32[np.ndarray, "5"], points: Float32[np.ndarray, "5 2"]) -> FaceBox:
    """SCRFD's box, grown to a square; its keypoints already begin with the eyes, image left first."""
    left, top, right, bottom, score = map(float, box)
    across, down, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2
    return FaceBox(across - half, down - half, across + half, down + half, np.asarray(points, np.float32), score)


def _bgr(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.ascontiguousarray(image[..., ::-1])
