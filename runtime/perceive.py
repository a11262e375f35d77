"""A photo as a subject: the face's framing, head code, identity vector and crop."""
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, UInt8

from .head import HeadCode, HeadFitter
from .image import resize
from .perception import FaceLandmarks, Perception, face_crop, head_rotation, select_face

FACE_HEIGHT = 0.676  # of the portrait's edge, forehead to chin: the mean of the training pictures
FACE_CENTRE = (0.5, 0.6)  # of the portrait's edges, right and down

LARGEST_FRAME = 2048  # px; more shows nothing that is measured, and a huge photo's would fill the memory


@dataclass(frozen=True, eq=False)
class Subject:
    """One person as measured in one photo."""

    photo: UInt8[np.ndarray, "h w 3"]  # framed as the head code says
    face: FaceLandmarks  # in pixels of `photo`
    head: HeadCode
    identity: Float32[np.ndarray, "d"]  # unit vector of the face-recognition network
    face_crop: Float32[np.ndarray, "3 s s"]  # input of the image encoder


def measure_subject(see: Perception, fitter: HeadFitter, photo: UInt8[np.ndarray, "h w 3"], crop_size: int,
                    face_number: int | None = None, portrait: bool = True) -> Subject:
    """Find one face and measure it.

    `portrait` frames the photo as a square around the face first, as the embedded bundle was trained; otherwise the
    head keeps its place in the whole photo. Raises FaceError where there is no face, or several and no `face_number`.
    """
    face = see.landmarks(photo, select_face(see.detect(photo), face_number))
    framed, seen = portrait_frame(photo, face) if portrait else (photo, face)
    head = fitter.fit(seen.points, seen.blendshapes, head_rotation(seen), framed)
    return Subject(framed, seen, head, see.identity(photo, face), face_crop(photo, face, crop_size))


def portrait_frame(photo: UInt8[np.ndarray, "h w 3"],
                   face: FaceLandmarks) -> tuple[UInt8[np.ndarray, "e e 3"], FaceLandmarks]:
    """The square around a face in which it has the trained size and place; edges are repeated where it overhangs.

    Photo and points are scaled down together where its edge would be over LARGEST_FRAME.
    """
    edge = _frame_edge(face)
    if edge > LARGEST_FRAME:
        photo, face = _scaled(photo, face, LARGEST_FRAME / edge)
        edge = LARGEST_FRAME
    low, high = face.points[:, :2].min(axis=0), face.points[:, :2].max(axis=0)
    left, top = np.rint((low + high) / 2 - edge * np.array(FACE_CENTRE)).astype(int)
    rows = np.clip(np.arange(top, top + edge), 0, photo.shape[0] - 1)
    columns = np.clip(np.arange(left, left + edge), 0, photo.shape[1] - 1)
    points = face.points - np.array([left, top, 0], np.float32)
    return photo[rows[:, None], columns], replace(face, points=points)


def _frame_edge(face: FaceLandmarks) -> int:
    return max(2, round(float(np.ptp(face.points[:, :2], axis=0).max()) / FACE_HEIGHT))


def _scaled(photo: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks,
            scale: float) -> tuple[UInt8[np.ndarray, "H W 3"], FaceLandmarks]:
    height, width = (max(1, round(length * scale)) for length in photo.shape[:2])
    factors = np.array([width / photo.shape[1], height / photo.shape[0], scale], np.float32)
    return resize(photo, height, width), replace(face, points=face.points * factors)
