"""A head model in FLAME's format: the open head, or a user's FLAME, from one .npz."""
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int32

from caphuman_edge.runtime.head.code import HeadCode, HeadLayout
from caphuman_edge.runtime.head.skinning import rotation_matrices, skin

ROOT, NECK, JAW = 0, 1, 2  # FLAME's joint order; the eyes follow


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
        a, b, c = (vertices[self.faces[:, k]] for k in range(3))
        face_normals = np.cross(b - a, c - a)
        sums = np.zeros_like(vertices)
        for axis in range(3):
            sums[:, axis] = sum(np.bincount(self.faces[:, k], face_normals[:, axis], len(vertices)) for k in range(3))
        return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-6), np.float32)

    def texture(self, code: HeadCode) -> Float32[np.ndarray, "t t 3"]:
        """The albedo, first row on top; not clamped."""
        return np.asarray(self.texture_mean + np.tensordot(code.texture, self.texture_basis, axes=1), np.float32)

    def landmarks(self, vertices: Float32[np.ndarray, "v 3"]) -> Float32[np.ndarray, "l 3"]:
        """The landmarks on a posed or projected mesh."""
        return np.asarray(np.einsum("lk,lkc->lc", self.landmark_weights, vertices[self.landmark_corners]))
