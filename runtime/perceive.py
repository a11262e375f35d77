"""A photo as a subject: the face's framing, head code, identity vector and crop."""
import hashlib
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, UInt8

from .framing import Fit, Region, frame_photo, frame_region
from .head import DecaEncoder, HeadCode, HeadFitter
from .perception import (
    FaceLandmarks,
    Perception,
    clip_pixels,
    face_crop,
    head_rotation,
    select_face,
)
from .perception.parse import TRAINED_EDGE, face_on_white


@dataclass(frozen=True, eq=False)
class Subject:
    """One person as measured in one photo."""

    photo: UInt8[np.ndarray, "h w 3"]  # framed as the head code says
    face: FaceLandmarks  # in pixels of `photo`
    head: HeadCode
    identity: Float32[np.ndarray, "d"]  # unit vector of the face-recognition network
    face_crop: Float32[np.ndarray, "3 s s"]  # input of the image encoder
    region: Region | None = None  # of the photo as it was given: what `photo` shows
    source: dict[str, object] = field(default_factory=dict)  # sha256 of the photo's pixels, face and fit, for recipes


def measure_subject(see: Perception, heads: HeadFitter | DecaEncoder, photo: UInt8[np.ndarray, "h w 3"],
                    crop_size: int, face_number: int | None = None, fit: Fit = "face", aspect: float = 1.0) -> Subject:
    """Find one face, the largest unless `face_number` says another, and measure it.

    `fit` and `aspect` say which part of the photo fills the frame, as in `framing.frame_photo`: the embedded bundle was
    trained on "face", the official tool does "squash". Raises FaceError where no such face is found.

    A parser reads what fills the frame: a whole photo's central square, which is what CLIP sees, might hold no face.
    """
    boxes = see.detect(photo, every=face_number not in (None, 1))
    face = see.landmarks(photo, select_face(boxes, face_number))
    framed, seen = frame_photo(photo, face, fit, aspect)
    if isinstance(heads, DecaEncoder):
        head = heads.measure(framed, seen)
    else:
        head = heads.fit(seen.points, seen.blendshapes, head_rotation(seen), framed)
    if parser := see.official.get("parser"):
        edge = None if fit == "squash" else TRAINED_EDGE
        picture = clip_pixels(face_on_white(framed, parser, edge), crop_size)
    else:
        picture = face_crop(photo, face, crop_size)
    source = {"photo_sha256": array_sha256(photo), "face": face_number or 1, "fit": fit}
    region = frame_region(photo, face, fit, aspect)
    return Subject(framed, seen, head, see.identity(photo, face), picture, region, source)


def array_sha256(array: np.ndarray) -> str:
    """Of a picture's pixels, the same for copies whose files differ in metadata alone; or of a mask's numbers."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
