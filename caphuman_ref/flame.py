"""FLAME in PyTorch: a head's vertices, its 68 landmarks in two readings, and its texture space.

Buffers carry the official module's names. Axes: x right, y up, z to the viewer; lengths in metres, angles in radians.
Sources: Li et al. 2017, "Learning a model of facial shape and expression from 4D scans"; the landmark embedding is
RingNet's (Sanyal et al. 2019).
"""
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

ROOT, NECK, JOINTS = 0, 1, 5  # root, neck, jaw, left eye, right eye
SHAPE, EXPRESSION, FIRST_EXPRESSION = 100, 50, 300  # what DECA uses of the file's 300 shape and 100 expression columns
TEXTURE = 50  # of the texture basis' 200 components
LARGEST_YAW = 39  # degrees; the contour's table has one row a degree: 0..39, then -1..-39


class Head(NamedTuple):
    """What FLAME returns."""

    vertices: Float[Tensor, "b v 3"]
    landmarks2d: Float[Tensor, "b 68 3"]  # 17 that slide along the contour as the head turns, then 51 of the face
    landmarks3d: Float[Tensor, "b 68 3"]  # all fixed to the skin


class FLAME(nn.Module):
    """One head model, without weights to train.

    `arrays`: the model file's, with the landmark embedding's `static_`, `dynamic_` and `full_` arrays beside them.
    `shape_columns`: where in shapedirs the shape's and the expression's components stand.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], shape_columns: tuple[slice, slice] = (
            slice(SHAPE), slice(FIRST_EXPRESSION, FIRST_EXPRESSION + EXPRESSION))):
        super().__init__()
        bases = [arrays["shapedirs"][..., columns] for columns in shape_columns]
        parents = arrays["kintree_table"][0].astype(np.int64)
        parents[ROOT] = -1  # stored as 2**32 - 1
        for name, array in {
            "v_template": arrays["v_template"], "shapedirs": np.concatenate(bases, axis=2),
            "posedirs": arrays["posedirs"].reshape(arrays["v_template"].size, -1).T,
            "J_regressor": arrays["J_regressor"], "lbs_weights": arrays["weights"], "faces_tensor": arrays["f"],
            "parents": parents, "neck_kin_chain": np.array([NECK, ROOT]),
            "neck_pose": np.zeros((1, 3)), "eye_pose": np.zeros((1, 6)),
            "lmk_faces_idx": arrays["static_lmk_faces_idx"], "lmk_bary_coords": arrays["static_lmk_bary_coords"],
            **{name: arrays[name] for name in ("dynamic_lmk_faces_idx", "dynamic_lmk_bary_coords",
                                               "full_lmk_faces_idx", "full_lmk_bary_coords")},
        }.items():
            whole = array.dtype.kind in "iu"
            self.register_buffer(name, torch.tensor(array, dtype=torch.int64 if whole else torch.float32))

    def forward(self, shape: Float[Tensor, "b s"], expression: Float[Tensor, "b e"], pose: Float[Tensor, "b 6"],
                neck_pose: Float[Tensor, "#b 3"] | None = None, eye_pose: Float[Tensor, "#b 6"] | None = None) -> Head:
        """The head and its landmarks; pose is the axis-angles of the whole head and of the jaw."""
        rotations = self.rotations(pose, neck_pose, eye_pose)
        vertices = self.vertices(shape, expression, rotations)
        count = len(vertices)
        row = contour_row(rotations[:, ROOT] @ rotations[:, NECK])
        contour = self._points(vertices, self.dynamic_lmk_faces_idx[row], self.dynamic_lmk_bary_coords[row])
        face = self._points(vertices, self.lmk_faces_idx.expand(count, -1), self.lmk_bary_coords.expand(count, -1, -1))
        full = self._points(vertices, self.full_lmk_faces_idx.expand(count, -1),
                            self.full_lmk_bary_coords.expand(count, -1, -1))
        return Head(vertices, torch.cat([contour, face], dim=1), full)

    def rotations(self, pose: Float[Tensor, "b 6"], neck_pose: Float[Tensor, "#b 3"] | None = None,
                  eye_pose: Float[Tensor, "#b 6"] | None = None) -> Float[Tensor, "b 5 3 3"]:
        """Every joint's own rotation; neck and eyes are at rest where they are None."""
        neck = (self.neck_pose if neck_pose is None else neck_pose).expand(len(pose), -1)
        eyes = (self.eye_pose if eye_pose is None else eye_pose).expand(len(pose), -1)
        angles = torch.cat([pose[:, :3], neck, pose[:, 3:], eyes], dim=1)
        return rodrigues(angles.reshape(-1, 3)).reshape(-1, JOINTS, 3, 3)

    def vertices(self, shape: Float[Tensor, "b s"], expression: Float[Tensor, "b e"],
                 rotations: Float[Tensor, "b 5 3 3"]) -> Float[Tensor, "b v 3"]:
        """Linear blend skinning. Joints are regressed before the pose's correctives are added."""
        coefficients = torch.cat([shape, expression], dim=1)
        shaped = self.v_template + torch.einsum("bk,vck->bvc", coefficients, self.shapedirs)
        turns, shifts = self._motions(torch.einsum("jv,bvc->bjc", self.J_regressor, shaped), rotations)
        bend = (rotations[:, 1:] - torch.eye(3, device=rotations.device)).flatten(1)
        corrected = shaped + (bend @ self.posedirs).reshape(shaped.shape)
        turned = torch.einsum("vj,bjac,bvc->bva", self.lbs_weights, turns, corrected)
        return turned + self.lbs_weights @ shifts

    def _motions(self, joints: Float[Tensor, "b 5 3"],
                 rotations: Float[Tensor, "b 5 3 3"]) -> tuple[Float[Tensor, "b 5 3 3"], Float[Tensor, "b 5 3"]]:
        """Each joint's motion from rest as a rotation and a shift, down the chain from the root."""
        turns, places = [rotations[:, ROOT]], [joints[:, ROOT]]
        for joint, parent in enumerate(self.parents[1:].tolist(), start=1):
            bone = joints[:, joint] - joints[:, parent]
            places.append(places[parent] + _turned(turns[parent], bone))
            turns.append(turns[parent] @ rotations[:, joint])
        turn = torch.stack(turns, dim=1)
        return turn, torch.stack(places, dim=1) - _turned(turn, joints)

    def _points(self, vertices: Float[Tensor, "b v 3"], faces: Int[Tensor, "b l"],
                weights: Float[Tensor, "b l 3"]) -> Float[Tensor, "b l 3"]:
        """Points on faces, by the weights of each face's corners."""
        mesh = torch.arange(len(vertices), device=vertices.device)[:, None, None]
        return (vertices[mesh, self.faces_tensor[faces]] * weights[..., None]).sum(dim=2)


class FlameTexture(nn.Module):
    """FLAME's texture space as DECA reads it: 50 components, RGB, 256 px, 0..1 and not clamped.

    `arrays`: FLAME_texture.npz, `mean` and `tex_dir`, BGR of 512 px in 0..255. Halving is nearest, so that only even
    rows and columns are ever seen.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        super().__init__()
        mean = arrays["mean"].reshape(512, 512, 3)[::2, ::2, ::-1]
        basis = arrays["tex_dir"].reshape(512, 512, 3, -1)[::2, ::2, ::-1, :TEXTURE]
        self.register_buffer("texture_mean", torch.tensor(mean.transpose(2, 0, 1) / 255, dtype=torch.float32))
        self.register_buffer("texture_basis", torch.tensor(basis.transpose(3, 2, 0, 1) / 255, dtype=torch.float32))

    def forward(self, coefficients: Float[Tensor, "b k"]) -> Float[Tensor, "b 3 256 256"]:
        return self.texture_mean + torch.tensordot(coefficients, self.texture_basis, dims=1)


def rodrigues(axis_angles: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 3"]:
    """Rotation matrices. The 1e-8 is FLAME's: it enters the angle alone, so that no rotation divides by zero."""
    angle = (axis_angles + 1e-8).norm(dim=1)[:, None, None]
    x, y, z = (axis_angles / angle[:, 0]).unbind(dim=1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).reshape(-1, 3, 3)
    return torch.eye(3, device=cross.device) + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)


def contour_row(head: Float[Tensor, "b 3 3"]) -> Int[Tensor, "b"]:
    """The row of the contour's table for heads turned like this: 0..39 for yaw >= 0, else 40..78.

    The sign is the official one, and that of the sibling helper in `lbs.py`, which is never called, is not.
    """
    yaw = torch.atan2(-head[:, 2, 0], (head[:, 0, 0] ** 2 + head[:, 1, 0] ** 2).sqrt())
    degrees = (yaw * 180 / torch.pi).clamp(max=LARGEST_YAW).round().long()  # half to even
    return torch.where(degrees < 0, LARGEST_YAW - degrees.clamp(min=-LARGEST_YAW), degrees)


def _turned(rotations: Float[Tensor, "*n 3 3"], vectors: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
    return (rotations @ vectors[..., None])[..., 0]
