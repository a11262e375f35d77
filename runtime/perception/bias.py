"""Where the landmark network puts points, off the places of the head that they name.

It was trained on photos and expects faces upright: on a head that looks up or down it moves the points only three
quarters as far as the skin moves, and the face's outline slides as the head turns. `export.landmark_bias` measures
that on pictures of the open head, whose points are known.
"""
from functools import cache
from importlib.resources import files

import numpy as np
from jaxtyping import Float, Float32, Float64

from caphuman_edge.runtime.perception.rotation import rotation_from, yaw_pitch_roll

LARGEST_YAW, LARGEST_PITCH = 60.0, 30.0  # degrees, of the pictures it was measured on
TERMS = 10


@cache
def measured_bias() -> Float32[np.ndarray, "478 3 10"]:
    """Metres across, up and towards the viewer, for each of `bias_terms`; the picture being level with the eyes."""
    with files("caphuman_edge.runtime").joinpath("data/landmark_bias.npy").open("rb") as file:
        return np.asarray(np.load(file, allow_pickle=False), np.float32)


def bias_terms(yaw: float, pitch: float) -> Float64[np.ndarray, "10"]:
    """Every product of the two angles, in radians, up to the third power."""
    y, p = np.radians([np.clip(yaw, -LARGEST_YAW, LARGEST_YAW), np.clip(pitch, -LARGEST_PITCH, LARGEST_PITCH)])
    return np.array([1, y, p, y * y, y * p, p * p, y**3, y * y * p, y * p * p, p**3])


def landmark_bias(rotation: Float[np.ndarray, "3 3"], turned_only: bool = False) -> Float64[np.ndarray, "478 3"]:
    """The points' expected distance from their places on a head of this rotation: x right, y up, z nearer, metres.

    `turned_only` leaves out what a head that faces the viewer shows already: part of that is the open head's own.
    """
    yaw, pitch, roll = yaw_pitch_roll(rotation)
    level = measured_bias() @ (bias_terms(yaw, pitch) - turned_only * np.eye(TERMS)[0])
    return np.asarray(level @ rotation_from(0.0, 0.0, roll).T)
