"""The head model against the official FLAME module, recorded on a synthetic model of FLAME's layout."""
from dataclasses import replace

import numpy as np
import pytest

from caphuman_edge.runtime.cli import main
from caphuman_edge.runtime.head import HeadCode, HeadModel, load_head, project
from caphuman_edge.runtime.head.library import find_head
from caphuman_edge.runtime.head.model import yaw_bin
from caphuman_edge.runtime.head.skinning import axis_angle, rotation_matrices

TOLERANCE = 1e-5  # metres on a head of about one metre: float32 sums in another order
TEXTURE_TOLERANCE = 1e-6  # of a colour 0..1


@pytest.fixture
def add_head(flame_files, tmp_path, monkeypatch):
    """The recorded FLAME as a user gets it: its files, through `caphuman head add`."""
    monkeypatch.setenv("CAPHUMAN_HEADS", str(tmp_path / "heads"))

    def add(*more: object) -> HeadModel:
        files = flame_files()
        assert main(["head", "add", str(files.model), "--template", str(files.template),
                     "--landmarks", str(files.landmarks), *map(str, more)]) == 0
        return load_head(find_head("flame"))

    return add


@pytest.fixture
def model(add_head):
    return add_head()


def recorded_code(model: HeadModel, shape: np.ndarray, expression: np.ndarray, pose: np.ndarray) -> HeadCode:
    return replace(HeadCode.neutral(model.layout), identity=shape, expression=expression, pose=pose)


def test_vertices_equal_the_official_ones_for_every_recorded_code(golden, model):
    flame = golden("flame.npz")
    for shape, expression, pose, wanted in zip(flame["in/shape"], flame["in/exp"], flame["in/pose"],
                                               flame["out/vertices"], strict=True):
        vertices = model.vertices(recorded_code(model, shape, expression, pose))
        np.testing.assert_allclose(vertices, wanted, atol=TOLERANCE)


def test_neck_and_eye_joints_turn_as_the_official_ones(golden, model):
    flame = golden("flame.npz")
    neck, eyes = flame["in/neck_pose"][0], flame["in/eye_pose"][0].reshape(2, 3)
    last = zip(flame["in/shape"][-4:], flame["in/exp"][-4:], flame["in/pose"][-4:], flame["out/neck_vertices"],
               strict=True)
    for shape, expression, pose, wanted in last:
        joints = np.stack([pose[:3], neck, pose[3:], *eyes])
        shaped = model.shaped(recorded_code(model, shape, expression, pose))
        np.testing.assert_allclose(model.skinned(shaped, joints), wanted, atol=TOLERANCE)


def test_the_outline_slides_with_the_yaw_as_the_official_one(golden):
    flame = golden("flame.npz")
    bins = [yaw_bin(rotation_matrices(pose[None, :3])[0]) for pose in flame["in/pose"]]
    assert bins == flame["out/dyn_index"].tolist()


def test_all_68_landmarks_lie_where_the_official_ones_do(golden, model):
    flame = golden("flame.npz")
    for vertices, pose, wanted in zip(flame["out/vertices"], flame["in/pose"], flame["out/landmarks2d"], strict=True):
        np.testing.assert_allclose(model.landmarks68(vertices, rotation_matrices(pose[None, :3])[0]), wanted,
                                   atol=TOLERANCE)


def test_with_a_turned_neck_its_rotation_counts_first(golden, model):
    flame = golden("flame.npz")
    neck = rotation_matrices(flame["in/neck_pose"])[0]
    for vertices, pose, wanted in zip(flame["out/neck_vertices"], flame["in/pose"][-4:],
                                      flame["out/neck_landmarks2d"], strict=True):
        rotation = rotation_matrices(pose[None, :3])[0] @ neck
        np.testing.assert_allclose(model.landmarks68(vertices, rotation), wanted, atol=TOLERANCE)


def test_the_full_embedding_gives_the_official_landmarks_in_space(golden, model):
    """CapHuman does not use it, so it is not kept: here it stands in for the 51."""
    flame = golden("flame.npz")
    full = replace(model, landmark_corners=model.faces[flame["flame/full_lmk_faces_idx"][0]],
                   landmark_weights=flame["flame/full_lmk_bary_coords"][0])
    for vertices, wanted in zip(flame["out/vertices"], flame["out/landmarks3d"], strict=True):
        np.testing.assert_allclose(full.landmarks(vertices), wanted, atol=TOLERANCE)


def test_the_texture_equals_the_official_one(golden, add_head, tmp_path):
    recorded = golden("flametex.npz")
    mean, basis = recorded_texture()
    np.testing.assert_array_equal(mean[::64, ::64], recorded["in/mean_check"])
    np.savez(tmp_path / "FLAME_texture.npz", mean=mean, tex_dir=basis)
    model = add_head("--texture", tmp_path / "FLAME_texture.npz")
    for coefficients, wanted in zip(recorded["in/texcode"], recorded["out/albedo"], strict=True):
        code = replace(HeadCode.neutral(model.layout), texture=coefficients)
        np.testing.assert_allclose(model.texture(code), wanted.transpose(1, 2, 0), atol=TEXTURE_TOLERANCE)


def recorded_texture() -> tuple[np.ndarray, np.ndarray]:
    """Mean and basis that the recording's formula makes, as FLAME stores them: BGR, 0..255, 512 x 512."""
    y, x, c = np.mgrid[:512, :512, :3]
    fx, fy = np.array([3, 5, 2])[c], np.array([2, 1, 4])[c]
    mean = 128 + 60 * np.cos(2 * np.pi * (fy * y + fx * x) / 512 + c)
    basis = np.empty((512, 512, 3, 52), np.float32)
    for k in range(50):
        wave = np.cos(2 * np.pi * ((k % 7 + 1) * x + (k % 5 + 1) * y) / 512 + 0.3 * k + 0.7 * c)
        basis[..., k] = np.round(10 / (1 + k) * wave * 256) / 256
    basis[..., 50:] = 1e3  # those above are not used
    return np.float32(np.round(mean * 256) / 256), basis


def test_rotation_matrices_equal_the_official_rodrigues(golden):
    flame = golden("flame.npz")
    vectors = np.concatenate([flame["in/pose"][:, :3], flame["in/pose"][:, 3:]])
    np.testing.assert_allclose(rotation_matrices(vectors), flame["out/rodrigues"], atol=1e-6)


def test_axis_angle_inverts_the_recorded_rotations(golden):
    for matrix in golden("flame.npz")["out/rodrigues"]:
        np.testing.assert_allclose(rotation_matrices(axis_angle(matrix)[None])[0], matrix, atol=1e-5)


def test_projection_equals_the_official_camera_and_crop(golden, model):
    """The official crop maps 224 px coordinates to the 512 px frame; here it acts on -1..1."""
    recorded = golden("render.npz")
    to_pixels = np.array([[112, 0, 0], [0, 112, 0], [112, 112, 1]])
    to_frame = np.array([[2 / 512, 0, 0], [0, 2 / 512, 0], [-1, -1, 1]])
    for i, wanted in enumerate(recorded["out/trans_verts"]):
        code = replace(
            recorded_code(model, recorded["in/shape"][i], recorded["in/exp"][i], recorded["in/pose"][i]),
            camera=recorded["in/cam"][i], crop=to_pixels @ recorded["in/tform_decode"][i] @ to_frame)
        np.testing.assert_allclose(project(model.vertices(code), code), wanted, atol=2e-5)
