"""Head rotation from landmarks, and its angles.

Axes: x right, y up, z to the viewer. +yaw turns the nose towards image right, +pitch up, +roll clockwise as seen;
a rotation is R = Rz Rx Ry, so yaw turns the head first.
"""
from functools import cache
from importlib.resources import files

import numpy as np
from jaxtyping import Float, Float32, Float64

from caphuman_edge.runtime.perception.landmarks import FaceLandmarks

TO_HEAD_AXES = np.array([1, -1, -1])  # image axes are x right, y down, z away


@cache
def canonical_face() -> Float32[np.ndarray, "468 4"]:
    """The landmark model's mean face: x, y, z in centimetres, and the weight of each point in the alignment."""
    with files("caphuman_edge.runtime").joinpath("data/canonical_face.npy").open("rb") as file:
        return np.load(file, allow_pickle=False)


def head_rotation(landmarks: FaceLandmarks) -> Float64[np.ndarray, "3 3"]:
    """The rotation that takes the canonical face to this one (weighted orthogonal Procrustes, Kabsch's solution)."""
    face = canonical_face().astype(np.float64)
    weights = face[:, 3:] / face[:, 3].sum()
    measured = landmarks.points[:len(face)] * TO_HEAD_AXES
    source, target = (points - (weights * points).sum(axis=0) for points in (face[:, :3], measured))
    u, _, vt = np.linalg.svd((weights * target).T @ source)
    u[:, 2] *= np.sign(np.linalg.det(u @ vt))  # a rotation, not a reflection
    return u @ vt


def yaw_pitch_roll(rotation: Float[np.ndarray, "3 3"]) -> tuple[float, float, float]:
    """Degrees: yaw and roll in -180..180, pitch in -90..90."""
    pitch = -np.arcsin(np.clip(rotation[2, 1], -1, 1))
    yaw = np.arctan2(-rotation[2, 0], rotation[2, 2])
    roll = np.arctan2(rotation[0, 1], rotation[1, 1])
    return float(np.degrees(yaw)), float(np.degrees(pitch)), float(np.degrees(roll))


def rotation_from(yaw: float, pitch: float, roll: float) -> Float64[np.ndarray, "3 3"]:
    """The rotation with these angles, in degrees."""
    (sy, cy), (sp, cp), (sr, cr) = ((np.sin(a), np.cos(a)) for a in np.radians([yaw, -pitch, -roll]))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_z @ about_x @ about_y
