"""The points of a head that a fit compares with a photo's landmarks, and how the head's shape moves them."""
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int

from caphuman_edge.runtime.errors import ShapeMismatch
from caphuman_edge.runtime.head.model import JAW, HeadModel
from caphuman_edge.runtime.head.skinning import rotation_matrices
from caphuman_edge.runtime.perception.points68 import SOURCES

Points = Float64[np.ndarray, "n 3"]
ALL = 478
FACING = 0  # the outline of a head that faces the viewer: like the landmark network's, it stays on the skin


@dataclass(frozen=True, eq=False)
class Marks:
    """n points: all of the landmark network's 478, or FLAME's 68. Metres, unposed."""

    sources: Int[np.ndarray, "n 2"]  # the two landmarks whose middle each point is
    template: Points
    basis: Float64[np.ndarray, "n 3 s"]  # identity, then expression
    jaw_share: Float64[np.ndarray, "n"]  # how much of the jaw's turn a point follows
    jaw_bend: Float64[np.ndarray, "n 3 9"]  # the jaw's pose correctives
    jaw: Float64[np.ndarray, "3"]  # the joint, on the mean head
    jaw_basis: Float64[np.ndarray, "3 s"]

    @classmethod
    def of(cls, model: HeadModel) -> "Marks":
        """Raises ShapeMismatch for a head with neither of the two schemes."""
        sources, corners, weights = _scheme(model)

        def at_points(values: Float[np.ndarray, "v ..."]) -> Float64[np.ndarray, "n ..."]:
            return np.einsum("lk,lk...->l...", weights, values[corners]).astype(np.float64)

        basis = np.concatenate([model.identity_basis, model.expression_basis], axis=2)
        bend = model.pose_basis[..., 9 * (JAW - 1):9 * JAW] if model.pose_basis.size else np.zeros((len(basis), 3, 9))
        joint = model.joint_regressor[JAW].astype(np.float64)
        return cls(sources, at_points(model.template), at_points(basis), at_points(model.weights[:, JAW]),
                   at_points(bend), joint @ model.template, np.tensordot(joint, basis, axes=1))

    def among(self, values: Float64[np.ndarray, "478 c"]) -> Float64[np.ndarray, "n c"]:
        """What is known of the 478 landmarks, at these points."""
        return np.asarray(values[self.sources].mean(axis=1))

    def places(self, shape: Float64[np.ndarray, "p"]) -> tuple[Points, Float64[np.ndarray, "n 3 p"]]:
        """The points of a head of this identity, expression and jaw (axis-angle), and how each number moves them."""
        closed, jaw = self.template + self.basis @ shape[:-3], self.jaw + self.jaw_basis @ shape[:-3]
        turn = rotation_matrices(shape[None, -3:])[0] - np.eye(3)
        follow = np.eye(3) + self.jaw_share[:, None, None] * turn  # (n, 3, 3)
        opened = np.einsum("nab,nb->na", follow, closed + self.jaw_bend @ turn.ravel() - jaw)
        swing = self.jaw_share[:, None, None] * turning(opened)
        shaping = follow @ self.basis + (np.eye(3) - follow) @ self.jaw_basis
        return opened + jaw, np.concatenate([shaping, swing], axis=2)


def turning(points: Points) -> Float64[np.ndarray, "n 3 3"]:
    """How each point moves per radian about x, y and z: columns are axis x point."""
    x, y, z = points.T
    zero = np.zeros_like(x)
    return np.stack([np.stack([zero, -z, y], 1), np.stack([z, zero, -x], 1), np.stack([-y, x, zero], 1)], axis=2)


def _scheme(model: HeadModel) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, "n 3"], Float32[np.ndarray, "n 3"]]:
    """Where the points come from: among the 478, and on the head."""
    corners, weights = model.landmark_corners, model.landmark_weights
    if len(corners) == ALL:
        return np.repeat(np.arange(ALL)[:, None], 2, axis=1), corners, weights
    if len(model.contour_corners) and model.contour_corners.shape[1] + len(corners) == len(SOURCES):
        return (SOURCES, np.concatenate([model.contour_corners[FACING], corners]),
                np.concatenate([model.contour_weights[FACING], weights]))
    raise ShapeMismatch(f"the head has {len(corners)} landmarks, expected {ALL}, or 51 and an outline of 17: a head "
                        "without them cannot be fitted to a photo")
