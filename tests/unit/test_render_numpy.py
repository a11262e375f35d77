"""What the maps mean, on meshes of one or two faces."""
import numpy as np
import pytest

from caphuman_edge.runtime.render import Mesh, numpy_raster, render_maps
from caphuman_edge.runtime.render.numpy_raster import rasterize

GREY = np.full((4, 4, 3), 0.5, np.float32)
UPPER_LEFT = [[-1, -1], [1, -1], [-1, 1]]  # half the frame, corners in x right, y down
LOWER_RIGHT = [[1, -1], [1, 1], [-1, 1]]


def _mesh(*triangles, z=0.0, normal=(0, 0, 1), uv=0.5, texture=GREY, light=None) -> Mesh:
    """Triangles that share no vertices; z is one depth, or one a triangle."""
    xy = np.array(triangles, np.float32).reshape(-1, 3, 2)
    depth = np.broadcast_to(np.asarray(z, np.float32).reshape(-1, 1, 1), (len(xy), 3, 1))
    count = 3 * len(xy)
    return Mesh(
        screen=np.concatenate([xy, depth], axis=2).reshape(-1, 3),
        normals=np.broadcast_to(np.array(normal, np.float32), (count, 3)).copy(),
        faces=np.arange(count, dtype=np.int32).reshape(-1, 3),
        face_uv=np.broadcast_to(np.asarray(uv, np.float32), (len(xy), 3, 2)).copy(),
        texture=texture,
        light=np.zeros((9, 3), np.float32) if light is None else np.array(light, np.float32),
    )


def _faces(mesh: Mesh, height: int, width: int):
    seen = rasterize(mesh, height, width)
    faces = np.full(height * width, -1)
    faces[seen.pixel] = seen.face
    return faces.reshape(height, width)


def test_a_centre_on_an_edge_belongs_to_no_face():
    faces = _faces(_mesh(UPPER_LEFT, LOWER_RIGHT), 3, 3)
    assert faces.tolist() == [[0, 0, -1], [0, -1, 1], [-1, 1, 1]]


def test_winding_does_not_matter():
    mirrored = _mesh(UPPER_LEFT[::-1])
    np.testing.assert_array_equal(_faces(mirrored, 8, 8), _faces(_mesh(UPPER_LEFT), 8, 8))


def test_frame_need_not_be_square():
    faces = _faces(_mesh([[-1, -1], [0, -1], [-1, 3]]), 4, 8)
    assert faces[0].tolist() == [0, 0, 0, 0, -1, -1, -1, -1]
    assert (faces[:, 0] == 0).all()


@pytest.mark.parametrize(("depths", "winner"), [((0.1, 0.2), 0), ((0.2, 0.1), 1), ((0.1, 0.1), 0)])
def test_smaller_z_is_nearer_and_ties_go_to_the_first_face(depths, winner):
    assert _faces(_mesh(UPPER_LEFT, UPPER_LEFT, z=depths), 4, 4)[0, 0] == winner


def test_faces_behind_the_viewer_neither_show_nor_hide():
    assert (_faces(_mesh(UPPER_LEFT, z=-11), 4, 4) == -1).all()
    assert _faces(_mesh(UPPER_LEFT, UPPER_LEFT, z=(-11, 0)), 4, 4)[0, 0] == 1


def test_slivers_and_broken_faces_are_skipped():
    sliver = np.array([[-1, 1], [1, 1], [0, -1]]) * 4e-5  # round the middle pixel's centre, area 6e-9
    broken = [[np.nan, 0], [1, 0], [0, 1]]
    assert set(_faces(_mesh(sliver, broken, UPPER_LEFT), 5, 5).ravel()) == {-1, 2}


def test_faces_are_cut_at_the_frame():
    assert (_faces(_mesh([[-90, -90], [90, -90], [0, 200]]), 6, 6) == 0).all()
    assert (_faces(_mesh([[2, 2], [3, 2], [2, 3]]), 6, 6) == -1).all()


def test_a_mesh_without_faces_leaves_the_background():
    maps = render_maps(_mesh(), 4, 6)
    assert maps.shape == (9, 4, 6)
    assert not maps.any()


@pytest.mark.parametrize(("apex", "area"), [(1, -1.6e-5), (-1, 1.6e-5)])
def test_weights_miss_one_by_the_epsilon_in_the_area(apex, area):
    seen = rasterize(_mesh(np.array([[-1, -apex], [1, -apex], [0, apex]]) * 2e-3), 1, 1)
    np.testing.assert_allclose(seen.weights.sum(), area / (area + 1e-8), rtol=1e-6)


def test_normals_are_interpolated_and_neither_remapped_nor_renormalised():
    mesh = _mesh(UPPER_LEFT)
    mesh.normals[:] = [[-1, 0, 0], [1, 0, 0], [0, 0, 0.5]]
    normal = render_maps(mesh, 4, 4)[:3]
    np.testing.assert_allclose(normal[:, 0, 0], [-0.625, 0, 0.0625], atol=1e-6)  # weights 3/4, 1/8, 1/8


def test_v_points_up_in_the_texture():
    texture = np.zeros((4, 4, 3), np.float32)
    texture[0, :, 0] = 1  # red top row
    texture[3, :, 2] = 1  # blue bottom row
    meshes = [_mesh(UPPER_LEFT, uv=(0.5, v), texture=texture) for v in (7 / 8, 1 / 8)]
    top, bottom = (render_maps(mesh, 2, 2)[3:6, 0, 0] for mesh in meshes)
    np.testing.assert_allclose([top, bottom], [[1, 0, 0], [0, 0, 1]], atol=1e-6)


def test_texture_is_bilinear_between_texel_centres():
    texture = np.zeros((4, 4, 3), np.float32)
    texture[1, 2] = 1
    albedo = render_maps(_mesh(UPPER_LEFT, uv=(2.25 / 4, 1 - 1.25 / 4), texture=texture), 2, 2)[3, 0, 0]
    np.testing.assert_allclose(albedo, 0.75 * 0.75, atol=1e-6)


@pytest.mark.parametrize(("u", "share"), [(1.0, 0.5), (1 + 1 / 8, 0.0), (2.0, 0.0), (-1.0, 0.0), (0.0, 0.5)])
def test_texture_fades_to_zero_beyond_its_edge(u, share):
    albedo = render_maps(_mesh(UPPER_LEFT, uv=(u, 0.5)), 2, 2)[3, 0, 0]
    np.testing.assert_allclose(albedo, share * 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("term", "factor"),
    [(0, 0.2820948), (1, 1.0233267 * 0.5), (2, 1.0233267 * -0.25), (3, 1.0233267 * 2), (4, 0.8580855 * 0.5 * -0.25),
     (5, 0.8580855 * 0.5 * 2), (6, 0.8580855 * -0.25 * 2), (7, 0.42904277 * (0.25 - 0.0625)), (8, 0.24770796 * 11)],
)
def test_each_light_term_shades_by_its_harmonic(term, factor):
    light = np.zeros((9, 3))
    light[term] = 1, 2, 4
    rendered = render_maps(_mesh(UPPER_LEFT, normal=(0.5, -0.25, 2), light=light), 2, 2)[6:, 0, 0]
    np.testing.assert_allclose(rendered, 0.5 * factor * np.array([1, 2, 4]), rtol=1e-5)


def test_a_mesh_of_huge_faces_is_drawn_in_runs(monkeypatch):
    """However many layers cover a pixel, the nearest is seen, and memory holds a few runs of them."""
    depths = np.random.default_rng(0).permutation(40) / 10
    mesh = _mesh(*[[[-1, -1], [3, -1], [-1, 3]]] * 40, z=depths)
    whole = rasterize(mesh, 16, 16)
    monkeypatch.setattr(numpy_raster, "PAIRS_AT_ONCE", 1000)
    in_runs = rasterize(mesh, 16, 16)
    assert set(in_runs.face) == {np.argmin(depths)}
    for part in ("pixel", "face", "weights", "depth"):
        np.testing.assert_array_equal(getattr(in_runs, part), getattr(whole, part))
