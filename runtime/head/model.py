"""A head model in FLAME's format: the open head, or a user's FLAME, from one .npz."""
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int32

from caphuman_edge.runtime.errors import ShapeMismatch
from caphuman_edge.runtime.head.code import HeadCode, HeadLayout
from caphuman_edge.runtime.head.skinning import rotation_matrices, skin

ROOT, NECK, JAW = 0, 1, 2  # FLAME's joint order; the eyes follow
MOST_YAW = 39  # degrees; the contour has a bin for each degree to this, then for -1 to -MOST_YAW, then one below
YAW_BINS = 2 * MOST_YAW + 1


@dataclass(frozen=True, eq=False)
class HeadModel:
    """Shape, pose and texture bases of one head, ready to draw. Lengths are metres; texture is RGB, mostly 0..1."""

    template: Float32[np.ndarray, "v 3"]
    identity_basis: Float32[np.ndarray, "v 3 i"]
    expression_basis: Float32[np.ndarray, "v 3 e"]
    pose_basis: Float32[np.ndarray, "v 3 p"]  # p = 0 where the model has no pose correctives
    joint_regressor: Float32[np.ndarray, "j v"]
    weights: Float32[np.ndarray, "v j"]
    parents: Int32[np.ndarray, "j"]
    faces: Int32[np.ndarray, "f 3"]
    face_uv: Float32[np.ndarray, "f 3 2"]  # u right, v up, 0..1
    texture_mean: Float32[np.ndarray, "t t 3"]
    texture_basis: Float32[np.ndarray, "k t t 3"]
    landmark_corners: Int32[np.ndarray, "l 3"]  # the vertices of the triangle that holds each landmark
    landmark_weights: Float32[np.ndarray, "l 3"]
    contour_corners: Int32[np.ndarray, "a c 3"]  # c points for each of a = YAW_BINS turns of the head, or a = 0
    contour_weights: Float32[np.ndarray, "a c 3"]
    expression_names: tuple[str, ...]

    @cached_property
    def layout(self) -> HeadLayout:
        """What a HeadCode of this model holds."""
        joints = self.joint_regressor @ self.template
        moves_with_head = self.template[self.weights[:, NECK:].sum(axis=1) > 0.5]
        centre = (moves_with_head.min(axis=0) + moves_with_head.max(axis=0)) / 2
        return HeadLayout(self.identity_basis.shape[2], self.expression_names, len(self.texture_basis),
                          tuple(joints[ROOT].tolist()), tuple(centre.tolist()))

    def vertices(self, code: HeadCode) -> Float32[np.ndarray, "v 3"]:
        """The posed head; neck and eye joints stay at rest, as in the official tool."""
        rotations = np.zeros((len(self.parents), 3), np.float32)
        rotations[ROOT], rotations[JAW] = code.pose[:3], code.pose[3:]
        return self.skinned(self.shaped(code), rotations)

    def shaped(self, code: HeadCode) -> Float32[np.ndarray, "v 3"]:
        """The head with its identity and expression, not posed."""
        return np.asarray(self.template + self.identity_basis @ code.identity + self.expression_basis @ code.expression)

    def skinned(self, shaped: Float32[np.ndarray, "v 3"],
                pose: Float32[np.ndarray, "j 3"]) -> Float32[np.ndarray, "v 3"]:
        """Pose a shaped head; one axis-angle a joint, radians."""
        rotations = rotation_matrices(pose)
        return skin(shaped, rotations, self.pose_basis, self.joint_regressor, self.weights, self.parents)

    def normals(self, vertices: Float32[np.ndarray, "v 3"]) -> Float32[np.ndarray, "v 3"]:
        """Unit normals: the sum of the adjoining faces' normals, each as long as its face is large."""
        a, b, c = (np.take(vertices, self.faces[:, k], axis=0) for k in range(3))
        face_normals = np.cross(b - a, c - a)
        sums = np.zeros_like(vertices)
        for axis in range(3):
            sums[:, axis] = sum(np.bincount(self.faces[:, k], face_normals[:, axis], len(vertices)) for k in range(3))
        return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-6), np.float32)

    def texture(self, code: HeadCode) -> Float32[np.ndarray, "t t 3"]:
        """The albedo, first row on top; not clamped, not to be written to: the last one is kept."""
        key = code.texture.tobytes()
        texture = self._last_texture.get(key)
        if texture is None:
            texture = np.asarray(self.texture_mean + np.tensordot(code.texture, self.texture_basis, axes=1), np.float32)
            texture.flags.writeable = False
            self._last_texture.clear()
            self._last_texture[key] = texture
        return texture

    @cached_property
    def _last_texture(self) -> dict[bytes, np.ndarray]:
        """By its coefficients; a slider that turns a head leaves its skin as it is."""
        return {}

    def landmarks(self, vertices: Float32[np.ndarray, "v 3"]) -> Float32[np.ndarray, "l 3"]:
        """The landmarks on a posed or projected mesh."""
        return np.asarray(np.einsum("lk,lkc->lc", self.landmark_weights, vertices[self.landmark_corners]))

    def landmarks68(self, vertices: Float32[np.ndarray, "v 3"],
                    rotation: Float32[np.ndarray, "3 3"]) -> Float32[np.ndarray, "68 3"]:
        """17 points on the outline as the viewer sees it, then FLAME's 51 on the face, of a posed or projected mesh.

        `rotation` is the head's: the global one, after the neck's where that is turned. Raises ShapeMismatch for a head
        without these points.
        """
        if len(self.contour_corners) != YAW_BINS or self.contour_corners.shape[1] + len(self.landmark_corners) != 68:
            raise ShapeMismatch(f"the head has {len(self.landmark_corners)} landmarks and no outline of 17, expected "
                                "FLAME's 68; add a FLAME head with 'caphuman head add'")
        seen = yaw_bin(rotation)
        corners, weights = self.contour_corners[seen], self.contour_weights[seen]
        outline = np.einsum("lk,lkc->lc", weights, np.take(vertices, corners, axis=0))
        return np.asarray(np.concatenate([outline, self.landmarks(vertices)]))


def yaw_bin(rotation: Float32[np.ndarray, "3 3"]) -> int:
    """Which outline a turned head shows: whole degrees of yaw, halves to even; FLAME's formula, its sign included."""
    yaw = np.degrees(np.arctan2(-rotation[2, 0], np.hypot(rotation[0, 0], rotation[1, 0])))
    degrees = int(np.rint(min(yaw, MOST_YAW)))
    return degrees if degrees >= 0 else min(MOST_YAW - degrees, YAW_BINS - 1)
