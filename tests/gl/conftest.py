"""What the GL tests share: a mesh with seams, overlaps and an outline, and what counts as the same maps."""
from collections.abc import Callable

import numpy as np
import pytest

from caphuman_edge.runtime.render import Mesh

RINGS, SPOKES = 24, 32


@pytest.fixture(scope="session")
def ball() -> Mesh:
    """A closed, dented ball of 1,472 faces, textured with noise, that reaches over the frame's right edge."""
    random = np.random.default_rng(0)
    polar, around = np.meshgrid(np.linspace(0, np.pi, RINGS), np.linspace(0, 2 * np.pi, SPOKES + 1), indexing="ij")
    outward = np.stack([np.sin(polar) * np.cos(around), np.cos(polar), np.sin(polar) * np.sin(around)], axis=-1)
    vertices = outward * (0.6 + 0.1 * np.sin(5 * polar) * np.cos(4 * around))[..., None]
    uv = np.stack([around / (2 * np.pi), 1 - polar / np.pi], axis=-1).reshape(-1, 2)
    faces = _grid_faces()
    return Mesh(
        screen=(vertices * [1, -1, -1] + [0.5, 0.1, 0]).reshape(-1, 3).astype(np.float32),
        normals=outward.reshape(-1, 3).astype(np.float32),
        faces=faces,
        face_uv=uv[faces].astype(np.float32),
        texture=random.random((32, 32, 3), dtype=np.float32),
        light=random.standard_normal((9, 3), dtype=np.float32),
    )


@pytest.fixture(scope="session")
def assert_same_maps() -> Callable[[np.ndarray, np.ndarray], None]:
    """Equal but for a few centres that lie on an edge, of which GL may give each to either face."""

    def compare(actual: np.ndarray, expected: np.ndarray) -> None:
        apart = np.abs(actual - expected).max(axis=0) > 1e-3
        assert expected.any()
        assert apart.mean() <= 5e-4

    return compare


def _grid_faces():
    """Two faces a cell; those that a pole shrinks to a line are left in."""
    corner = np.arange(RINGS * (SPOKES + 1)).reshape(RINGS, SPOKES + 1)
    a, b, c, d = (part.ravel() for part in (corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]))
    return np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)]).astype(np.int32)
