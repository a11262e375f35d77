"""Both renderers draw the official condition maps."""
from collections.abc import Iterator

import numpy as np
import pytest

from caphuman_edge.runtime.errors import MissingExtra, RenderError
from caphuman_edge.runtime.render import Mesh, Renderer, numpy_raster, open_renderer
from caphuman_edge.runtime.render.maps import SH_FACTORS

MAPS = ("normal", "albedo", "rendered")


@pytest.fixture(scope="module", params=["numpy", "gl"])
def renderer(request) -> Iterator[Renderer]:
    try:
        renderer = open_renderer(request.param)
    except (MissingExtra, RenderError) as error:
        pytest.skip(str(error))
    yield renderer
    renderer.close()


def test_rasteriser_equals_pytorch3d_pixel_for_pixel(golden):
    suite = golden("render.npz")
    seen = numpy_raster.rasterize(_small_mesh(suite), 128, 128)
    faces, weights, depth = np.full(128 * 128, -1), np.full((128 * 128, 3), -1.0), np.full(128 * 128, -1.0)
    faces[seen.pixel], weights[seen.pixel], depth[seen.pixel] = seen.face, seen.weights, seen.depth
    np.testing.assert_array_equal(faces, suite["out/small128_c1/pix_to_face"].ravel())
    np.testing.assert_allclose(weights, suite["out/small128_c1/bary"].reshape(-1, 3), atol=1e-6)
    np.testing.assert_allclose(depth, suite["out/small128_c1/zbuf"].ravel(), atol=2e-6)


def test_numpy_maps_equal_the_float32_case(golden):
    suite = golden("render.npz")
    maps = numpy_raster.render_maps(_small_mesh(suite), 128, 128)
    np.testing.assert_allclose(maps, _official_maps(suite, "small128_c1"), atol=1e-5)


def test_light_factors_are_the_recorded_ones(golden):
    np.testing.assert_allclose(SH_FACTORS, golden("render.npz")["in/constant_factor"], rtol=1e-7)


@pytest.mark.parametrize("case", range(4))
def test_full_size_maps_match_the_official_ones(golden, renderer, case):
    suite = golden("render.npz")
    maps, official = renderer.render_maps(_mesh(suite, case), 512, 512), _official_maps(suite, f"c{case}")
    covered, expected = maps.any(axis=0), suite[f"out/c{case}/alpha_images"][0, 0] > 0
    difference = covered != expected
    assert difference.mean() <= 5e-4
    assert not (difference & ~_silhouette(expected)).any()
    both = covered & expected
    noise = [_psnr(maps[k:k + 3, both], official[k:k + 3, both]) for k in (0, 3, 6)]
    assert noise[0] >= 70 and noise[1] >= 70 and noise[2] >= 70, dict(zip(MAPS, noise, strict=True))


@pytest.mark.parametrize("case", range(4))
def test_background_is_exactly_zero(golden, renderer, case):
    suite = golden("render.npz")
    outside = suite[f"out/c{case}/alpha_images"][0, 0] == 0
    outside &= ~_silhouette(~outside)
    assert outside.any()
    assert not renderer.render_maps(_mesh(suite, case), 512, 512)[:, outside].any()


def _small_mesh(suite) -> Mesh:
    screen, normals = (suite[f"out/small128_c1/{name}"][0] for name in ("trans_verts", "vertex_normals"))
    return Mesh(screen, normals, *_surface(suite), suite["in/light"][1])


def _mesh(suite, case: int) -> Mesh:
    faces = suite["in/faces"][0]
    normals = _vertex_normals(suite["out/verts"][case], faces)
    return Mesh(suite["out/trans_verts"][case], normals, *_surface(suite), suite["in/light"][case])


def _surface(suite):
    face_uv = suite["in/uvcoords_raw"][0][suite["in/uvfaces"][0]]
    return suite["in/faces"][0], face_uv, suite["in/albedo"][0].transpose(1, 2, 0)


def _vertex_normals(vertices, faces):
    """Area-weighted; the float32 case's recorded normals are these to 1e-7."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    sums = np.zeros_like(vertices)
    for corner in faces.T:
        np.add.at(sums, corner, np.cross(b - a, c - a))
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def _official_maps(suite, case: str):
    return np.concatenate([suite[f"out/{case}/{name}_images"][0] for name in MAPS]).astype(np.float32)


def _silhouette(covered):
    """Pixels of which some neighbour is covered otherwise."""
    padded = np.pad(covered, 1, mode="edge")
    rows, columns = covered.shape
    around = [padded[r:r + rows, c:c + columns] for r in range(3) for c in range(3)]
    return np.any(around, axis=0) & ~np.all(around, axis=0)


def _psnr(actual, expected) -> float:
    """Decibels against a peak of 1. The recorded maps are float16, which by itself leaves 76 to 80."""
    return float(-10 * np.log10(np.mean((actual - expected) ** 2)))
