"""478 points and 52 blendshape scores of one face, from a levelled crop around it."""
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, UInt8

from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.perception.detect import FaceBox
from caphuman_edge.runtime.perception.graph import Graph
from caphuman_edge.runtime.perception.warp import Transform, apply, scale_of, square_to_image, warp

CROP_SIZE = 256  # px
ROI_SCALE = 1.5  # the landmark network was trained on faces that fill two thirds of its crop
LEAST_PRESENCE = 0.5
EYE_CORNERS = (33, 263)  # outer corners: image left, image right

BLENDSHAPES = (
    "_neutral", "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff",
    "cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight",
    "eyeLookInLeft", "eyeLookInRight", "eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight",
    "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight", "jawForward", "jawLeft", "jawOpen", "jawRight",
    "mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight", "mouthFunnel",
    "mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker",
    "mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthSmileLeft",
    "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft", "mouthUpperUpRight",
    "noseSneerLeft", "noseSneerRight",
)  # the network's order; left and right are the person's

FACE_OVAL = [10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176,
             149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109]  # landmarks around the face
BLENDSHAPE_POINTS = np.array([
    0, 1, 4, 5, 6, 7, 8, 10, 13, 14, 17, 21, 33, 37, 39, 40, 46, 52, 53, 54, 55, 58, 61, 63, 65, 66, 67, 70, 78, 80,
    81, 82, 84, 87, 88, 91, 93, 95, 103, 105, 107, 109, 127, 132, 133, 136, 144, 145, 146, 148, 149, 150, 152, 153,
    154, 155, 157, 158, 159, 160, 161, 162, 163, 168, 172, 173, 176, 178, 181, 185, 191, 195, 197, 234, 246, 249, 251,
    263, 267, 269, 270, 276, 282, 283, 284, 285, 288, 291, 293, 295, 296, 297, 300, 308, 310, 311, 312, 314, 317, 318,
    321, 323, 324, 332, 334, 336, 338, 356, 361, 362, 365, 373, 374, 375, 377, 378, 379, 380, 381, 382, 384, 385, 386,
    387, 388, 389, 390, 397, 398, 400, 402, 405, 409, 415, 454, 466, 468, 469, 470, 471, 472, 473, 474, 475, 476, 477,
])  # the 146 of the 478 points that the blendshape network reads


@dataclass(frozen=True, eq=False)
class FaceLandmarks:
    """One measured face. Points are image pixels: x right, y down, z into the picture in the same scale."""

    points: Float32[np.ndarray, "478 3"]
    presence: float  # probability that the crop shows a face
    blendshapes: Float32[np.ndarray, "52"]  # 0..1, in the order of BLENDSHAPES

    @property
    def tilt(self) -> float:
        """Clockwise turn of the eye line in the image, in radians."""
        return _angle(*self.points[list(EYE_CORNERS), :2])


def measure_landmarks(image: UInt8[np.ndarray, "h w 3"], box: FaceBox, face_landmarks: Graph,
                      face_blendshapes: Graph) -> FaceLandmarks:
    """The face in the box; raises FaceError where the landmark network sees none.

    The second pass crops around the first one's points: a crop by the detector's box alone moves the points with every
    wobble of that box (7 % of it: 1.1 % of the distance between the eyes, and 0.4 % after the second pass).
    """
    corners = np.array([[box.left, box.top], [box.right, box.bottom]])
    side = ROI_SCALE * (box.right - box.left)  # the detector's boxes are square
    roi = square_to_image(corners.mean(axis=0), side, _angle(*box.keypoints[:2]), CROP_SIZE)
    crop_points, _ = _points_in(image, roi, face_landmarks)
    roi = roi_around(_to_image(crop_points, roi))
    crop_points, presence = _points_in(image, roi, face_landmarks)
    if presence < LEAST_PRESENCE:
        raise FaceError(f"a face was found but could not be measured (presence {presence:.2f}, expected "
                        f"{LEAST_PRESENCE}): use a photo that shows the whole face")
    # the levelled crop's points, not the image's: the scores then change less when the head is tilted
    scores = face_blendshapes({"landmarks": crop_points[None, BLENDSHAPE_POINTS, :2]})["scores"]
    return FaceLandmarks(_to_image(crop_points, roi), presence, scores)


def roi_around(points: Float32[np.ndarray, "478 3"]) -> Transform:
    """The levelled square crop around known points."""
    return levelled_square(points[:, :2], _angle(*points[list(EYE_CORNERS), :2]), ROI_SCALE, CROP_SIZE)


def levelled_square(points: Float[np.ndarray, "n 2"], tilt: float, margin: float, size: int) -> Transform:
    """From a size x size crop to the square around the points that is turned by `tilt`: level in the crop.

    Its edge is `margin` times the longer side of the points' bounding box, measured in the turned axes.
    """
    level = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    levelled = points @ level
    low, high = levelled.min(axis=0), levelled.max(axis=0)
    return square_to_image(level @ (low + high) / 2, margin * float((high - low).max()), tilt, size)


def _points_in(
    image: UInt8[np.ndarray, "h w 3"], roi: Transform, face_landmarks: Graph,
) -> tuple[Float32[np.ndarray, "478 3"], float]:
    """Points in crop pixels, and the face's presence."""
    found = face_landmarks({"image": warp(image, roi, CROP_SIZE)[None] / 255})
    return found["landmarks"][0], float(found["presence"][0, 0])


def _to_image(crop_points: Float32[np.ndarray, "478 3"], roi: Transform) -> Float32[np.ndarray, "478 3"]:
    depth = crop_points[:, 2:] * scale_of(roi)
    return np.concatenate([apply(roi, crop_points[:, :2]), depth], axis=1, dtype=np.float32)


def _angle(start: Float[np.ndarray, "2"], end: Float[np.ndarray, "2"]) -> float:
    return float(np.arctan2(end[1] - start[1], end[0] - start[0]))
