"""Linear blend skinning as FLAME does it (Li et al., "Learning a model of facial shape and expression", 2017)."""
import numpy as np
from jaxtyping import Float, Float32, Int

ROOT = -1  # the parent of the first joint


def rotation_matrices(axis_angles: Float[np.ndarray, "j 3"]) -> Float32[np.ndarray, "j 3 3"]:
    """Rodrigues' formula; angles in radians.

    The 1e-8 is FLAME's: it enters the angle only, so that zero rotations do not divide by zero.
    """
    vectors = np.asarray(axis_angles, np.float32)
    angles = np.linalg.norm(vectors + np.float32(1e-8), axis=1)[:, None, None]
    x, y, z = (vectors / angles[:, 0]).T
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
    turned = np.eye(3, dtype=np.float32) + np.sin(angles) * cross + (1 - np.cos(angles)) * (cross @ cross)
    return np.asarray(turned, np.float32)


def axis_angle(rotation: Float[np.ndarray, "3 3"]) -> Float32[np.ndarray, "3"]:
    """The inverse of `rotation_matrices`, radians; for a half turn, where it is not unique, one of the two.

    By way of the unit quaternion, whose largest component is never near zero (Shepperd 1978).
    """
    m = np.asarray(rotation, np.float64)
    squares = 1 + np.array([m.trace(), *(2 * np.diag(m) - m.trace())])  # 4 w^2, 4 x^2, 4 y^2, 4 z^2
    products = np.array([  # 4 times the products of w, x, y, z with each other
        [squares[0], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
        [m[2, 1] - m[1, 2], squares[1], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
        [m[0, 2] - m[2, 0], m[0, 1] + m[1, 0], squares[2], m[1, 2] + m[2, 1]],
        [m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], squares[3]],
    ])
    w, *xyz = products[np.argmax(squares)]
    half_turn = np.array(xyz) * (1 if w >= 0 else -1)
    length = np.linalg.norm(half_turn)
    if length == 0:
        return np.zeros(3, np.float32)
    return np.asarray(half_turn / length * 2 * np.arctan2(length, abs(w)), np.float32)


def skin(
    shaped: Float32[np.ndarray, "v 3"],
    rotations: Float32[np.ndarray, "j 3 3"],
    pose_basis: Float32[np.ndarray, "v 3 p"],
    joint_regressor: Float32[np.ndarray, "j v"],
    weights: Float32[np.ndarray, "v j"],
    parents: Int[np.ndarray, "j"],
) -> Float32[np.ndarray, "v 3"]:
    """Pose a shaped mesh, metres.

    Joints are regressed from the shaped mesh, before the pose correctives; a model without correctives has p = 0.
    """
    joints = joint_regressor @ shaped
    corrected = shaped
    if pose_basis.shape[2]:
        bend = (rotations[1:] - np.eye(3, dtype=np.float32)).ravel()
        corrected = shaped + pose_basis @ bend
    turns, shifts = _joint_transforms(joints, rotations, parents)
    blended = (weights @ turns.reshape(-1, 9)).reshape(-1, 3, 3)  # each vertex's own mix of the joints' rotations
    return np.asarray(np.einsum("vab,vb->va", blended, corrected) + weights @ shifts, np.float32)


def _joint_transforms(
    joints: Float32[np.ndarray, "j 3"], rotations: Float32[np.ndarray, "j 3 3"], parents: Int[np.ndarray, "j"],
) -> tuple[Float32[np.ndarray, "j 3 3"], Float32[np.ndarray, "j 3"]]:
    """Each joint's motion as rotation and shift, down the chain from the root."""
    turns, places = [], []
    for joint, parent in enumerate(parents):
        if parent == ROOT:
            turns.append(rotations[joint])
            places.append(joints[joint])
        else:
            turns.append(turns[parent] @ rotations[joint])
            places.append(places[parent] + turns[parent] @ (joints[joint] - joints[parent]))
    rotated = np.stack(turns)
    return rotated, np.stack(places) - np.einsum("jab,jb->ja", rotated, joints)
