"""The head model against the official FLAME module, recorded on a synthetic model of FLAME's layout."""
from dataclasses import replace

import numpy as np
import pytest

from caphuman_edge.runtime.head import HeadCode, HeadModel, head_from_arrays, project
from caphuman_edge.runtime.head.skinning import axis_angle, rotation_matrices

TOLERANCE = 1e-5  # metres on a head of about one metre: float32 sums in another order
SHAPE, EXPRESSION = 100, 50  # coefficients that CapHuman uses, of FLAME's 300 and 100


def flame_head(flame: dict[str, np.ndarray], embedding: str) -> HeadModel:
    """The recorded FLAME file as a HeadModel, with one of its landmark embeddings."""
    shapedirs = flame["flame/shapedirs"]
    return head_from_arrays({
        **{name: flame[f"flame/{name}"] for name in ("v_template", "posedirs", "J_regressor", "weights",
                                                     "kintree_table", "f")},
        "shapedirs": np.concatenate([shapedirs[..., :SHAPE], shapedirs[..., 300:300 + EXPRESSION]], axis=2),
        "identity_count": np.array(SHAPE),
        "expression_names": np.array([f"expression{i}" for i in range(EXPRESSION)]),
        "vt": flame["flame/uvcoords"],
        "ft": flame["flame/uvfaces"],
        "lmk_faces_idx": flame[f"flame/{embedding}_lmk_faces_idx"].reshape(-1),
        "lmk_bary_coords": flame[f"flame/{embedding}_lmk_bary_coords"].reshape(-1, 3),
        "texture_mean": np.zeros((4, 4, 3)),
        "texture_basis": np.zeros((0, 4, 4, 3)),
    })


def recorded_code(model: HeadModel, shape: np.ndarray, expression: np.ndarray, pose: np.ndarray) -> HeadCode:
    return replace(HeadCode.neutral(model.layout), identity=shape, expression=expression, pose=pose)


def test_vertices_equal_the_official_ones_for_every_recorded_code(golden):
    flame = golden("flame.npz")
    model = flame_head(flame, "static")
    for shape, expression, pose, wanted in zip(flame["in/shape"], flame["in/exp"], flame["in/pose"],
                                               flame["out/vertices"], strict=True):
        vertices = model.vertices(recorded_code(model, shape, expression, pose))
        np.testing.assert_allclose(vertices, wanted, atol=TOLERANCE)


def test_neck_and_eye_joints_turn_as_the_official_ones(golden):
    flame = golden("flame.npz")
    model = flame_head(flame, "static")
    neck, eyes = flame["in/neck_pose"][0], flame["in/eye_pose"][0].reshape(2, 3)
    last = zip(flame["in/shape"][-4:], flame["in/exp"][-4:], flame["in/pose"][-4:], flame["out/neck_vertices"],
               strict=True)
    for shape, expression, pose, wanted in last:
        joints = np.stack([pose[:3], neck, pose[3:], *eyes])
        shaped = model.shaped(recorded_code(model, shape, expression, pose))
        np.testing.assert_allclose(model.skinned(shaped, joints), wanted, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("embedding", "recorded", "first"),
    [("static", "landmarks2d", 17), ("full", "landmarks3d", 0)])  # the first 17 of landmarks2d slide along the contour
def test_landmarks_lie_where_the_official_ones_do(golden, embedding, recorded, first):
    flame = golden("flame.npz")
    model = flame_head(flame, embedding)
    for vertices, wanted in zip(flame["out/vertices"], flame[f"out/{recorded}"], strict=True):
        np.testing.assert_allclose(model.landmarks(vertices), wanted[first:], atol=TOLERANCE)


def test_rotation_matrices_equal_the_official_rodrigues(golden):
    flame = golden("flame.npz")
    vectors = np.concatenate([flame["in/pose"][:, :3], flame["in/pose"][:, 3:]])
    np.testing.assert_allclose(rotation_matrices(vectors), flame["out/rodrigues"], atol=1e-6)


def test_axis_angle_inverts_the_recorded_rotations(golden):
    for matrix in golden("flame.npz")["out/rodrigues"]:
        np.testing.assert_allclose(rotation_matrices(axis_angle(matrix)[None])[0], matrix, atol=1e-5)


def test_projection_equals_the_official_camera_and_crop(golden):
    """The official crop maps 224 px coordinates to the 512 px frame; here it acts on -1..1."""
    recorded = golden("render.npz")
    model = flame_head(golden("flame.npz"), "static")
    to_pixels = np.array([[112, 0, 0], [0, 112, 0], [112, 112, 1]])
    to_frame = np.array([[2 / 512, 0, 0], [0, 2 / 512, 0], [-1, -1, 1]])
    for i, wanted in enumerate(recorded["out/trans_verts"]):
        code = replace(
            recorded_code(model, recorded["in/shape"][i], recorded["in/exp"][i], recorded["in/pose"][i]),
            camera=recorded["in/cam"][i], crop=to_pixels @ recorded["in/tform_decode"][i] @ to_frame)
        np.testing.assert_allclose(project(model.vertices(code), code), wanted, atol=2e-5)
