"""Faces in a photo: where they are, their landmarks, expression, rotation, identity and cut-out."""
from caphuman_edge.runtime.perception.crop import clip_pixels, face_crop, face_hull, hull_mask
from caphuman_edge.runtime.perception.detect import FaceBox, select_face
from caphuman_edge.runtime.perception.insight import InsightFace
from caphuman_edge.runtime.perception.landmarks import BLENDSHAPES, FaceLandmarks
from caphuman_edge.runtime.perception.perceive import Perception
from caphuman_edge.runtime.perception.rotation import (
    canonical_face,
    head_rotation,
    rotation_from,
    yaw_pitch_roll,
)

__all__ = [
    "BLENDSHAPES", "FaceBox", "FaceLandmarks", "InsightFace", "Perception", "canonical_face", "clip_pixels",
    "face_crop", "face_hull", "head_rotation", "hull_mask", "rotation_from", "select_face", "yaw_pitch_roll",
]
