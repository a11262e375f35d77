"""The open head as it ships, and what is refused in its place."""
import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from caphuman_edge.runtime.errors import BundleError, ShapeMismatch
from caphuman_edge.runtime.head import OPEN_HEAD, HeadCode, head_from_arrays, load_head
from caphuman_edge.runtime.perception.landmarks import BLENDSHAPES

NOSE_TIP, CHIN, FOREHEAD, LEFT_IRIS = 4, 152, 10, 468
UPPER_LIP, LOWER_LIP = 13, 14


@pytest.fixture(scope="module")
def head():
    return load_head()


def landmarks(head, **expression):
    code = HeadCode.neutral(head.layout).expressed(expression)
    return head.landmarks(head.vertices(code))


def test_it_ships_in_at_most_three_megabytes_under_cc0():
    assert OPEN_HEAD.stat().st_size <= 3_000_000
    with np.load(OPEN_HEAD, allow_pickle=False) as archive:
        assert str(archive["license"]).startswith("CC0-1.0")


def test_it_is_as_large_as_a_head_and_looks_at_the_viewer(head):
    points = landmarks(head)
    assert 0.2 < np.ptp(head.template[:, 1]) < 0.3
    assert points[FOREHEAD, 1] > points[NOSE_TIP, 1] > points[CHIN, 1]
    assert points[NOSE_TIP, 2] > points[:, 2].max() - 0.005


def test_every_measured_blendshape_has_its_unit(head):
    assert set(BLENDSHAPES) - {"_neutral"} <= set(head.expression_names)


def test_every_vertex_follows_joints_by_shares_that_sum_to_one(head):
    np.testing.assert_allclose(head.weights.sum(axis=1), 1, atol=2e-3)
    np.testing.assert_allclose(head.joint_regressor.sum(axis=1), 1, atol=1e-4)


def test_landmarks_are_symmetrical_on_the_mean_head(head):
    canonical_twins = {33: 263, 61: 291, 234: 454, 468: 473}
    points = landmarks(head)
    for left, right in canonical_twins.items():
        np.testing.assert_allclose(points[left] * [-1, 1, 1], points[right], atol=1e-3)


def test_jaw_unit_and_jaw_joint_both_open_the_mouth(head):
    closed, by_unit = landmarks(head), landmarks(head, jawOpen=1.0)
    turned = replace(HeadCode.neutral(head.layout), pose=np.array([0, 0, 0, 0.3, 0, 0]))
    by_joint = head.landmarks(head.vertices(turned))
    for opened in (by_unit, by_joint):
        assert opened[UPPER_LIP, 1] - opened[LOWER_LIP, 1] > 0.01
        assert opened[CHIN, 1] < closed[CHIN, 1] - 0.005


def test_eye_joints_turn_the_eyeballs_alone(head):
    pose = np.zeros((5, 3), np.float32)
    pose[3:, 1] = 0.3
    moved = head.skinned(head.template, pose) - head.template
    assert head.landmarks(moved)[LEFT_IRIS, 0] > 0.002
    assert np.abs(head.landmarks(moved)[[NOSE_TIP, CHIN, FOREHEAD]]).max() < 1e-5


def test_normals_have_unit_length_and_face_outwards(head):
    normals = head.normals(head.template)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert head.landmarks(normals)[NOSE_TIP, 2] > 0.7


def test_the_neck_is_closed_from_below(head):
    """Every edge below the chin has a face on either side; the rim's vertices are there twice, for its sharp edge."""
    place = np.unique(head.template, axis=0, return_inverse=True)[1].reshape(-1)[head.faces]
    edges = np.sort(np.concatenate([place[:, :2], place[:, 1:], place[:, [2, 0]]]), axis=1)
    below_the_chin = (head.template[head.faces, 1] < -0.09).all(axis=1)
    edges, adjoining = np.unique(edges, axis=0, return_counts=True)
    of_the_neck = np.isin(edges, place[below_the_chin]).all(axis=1)
    assert of_the_neck.sum() > 300
    assert (adjoining[of_the_neck] == 2).all()


def test_mean_texture_is_a_colour_and_coefficients_change_it(head):
    mean = head.texture(HeadCode.neutral(head.layout))
    assert 0 <= mean.min() < mean.max() <= 1
    code = replace(HeadCode.neutral(head.layout), texture=np.eye(len(head.texture_basis))[0])
    np.testing.assert_allclose(head.texture(code) - mean, head.texture_basis[0], atol=1e-6)


def test_a_texture_is_made_anew_only_for_other_coefficients(head):
    neutral = HeadCode.neutral(head.layout)
    first = head.texture(neutral)
    assert head.texture(neutral.posed(yaw=30.0)) is first
    assert not first.flags.writeable
    other = head.texture(replace(neutral, texture=np.ones(len(head.texture_basis))))
    assert not np.array_equal(other, first)
    np.testing.assert_array_equal(head.texture(neutral), first)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 truncated"])
def test_a_damaged_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "head.npz"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"head\.npz is no head model"):
        load_head(path)


def test_a_pickle_is_refused_unread(tmp_path):
    path = tmp_path / "head.npz"
    np.savez(path, v_template=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(BundleError, match="no head model"):
        load_head(path)


def open_head_arrays():
    with np.load(OPEN_HEAD, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.mark.parametrize("name", ["v_template", "shapedirs", "kintree_table", "lmk_faces_idx", "texture_masks"])
def test_a_missing_array_is_named(name):
    arrays = open_head_arrays()
    del arrays[name]
    with pytest.raises(BundleError, match=name):
        head_from_arrays(arrays)


@pytest.mark.parametrize(("name", "value"), [
    ("weights", np.zeros((7, 5), np.float16)),
    ("J_regressor", np.zeros((4, 7), np.float32)),
    ("shapedirs", np.zeros((7, 3, 132), np.int16)),
    ("f", np.full((9, 3), 60000, np.uint16)),
    ("ft", np.zeros((9, 3), np.uint16)),
    ("v_template", np.full((3, 3), np.nan, np.float32)),
    ("identity_count", np.array(500)),
    ("identity_count", np.array(-2)),
    ("identity_count", np.array(80.0)),
    ("lmk_faces_idx", np.full(478, 60000, np.uint16)),
    ("lmk_faces_idx", np.zeros(478)),
    ("v_template", np.full((4917, 3), 1e300)),
    ("v_template", np.full((4917, 3), 1j)),
    ("v_template", np.full((4917, 3), "1")),
    ("shapedirs_unit", np.full(10**4, 4e-6)),
    ("shapedirs_unit", np.array("4e-6")),
    ("texture_mean", np.zeros((256, 128, 3))),
    ("texture_mean", np.zeros((0, 0, 3))),
    ("f", np.zeros((0, 3), np.int32)),
    ("kintree_table", np.zeros((2, 5), np.int32)),
    ("dynamic_lmk_faces_idx", np.zeros((79, 17), np.int32)),
])
def test_arrays_that_do_not_fit_together_are_refused(name, value):
    with pytest.raises(BundleError):
        head_from_arrays(open_head_arrays() | {name: value})


@pytest.mark.parametrize(("name", "value", "words"), [
    ("v_template", -2**63, "v_template holds numbers that are not finite or beyond"),
    ("vt", 2**40, "vt holds numbers that are not finite or beyond"),
    ("weights", 0, "weights leave every vertex to its root"),
    ("expression_names", "\x1b[2J", "cannot be printed"),
])
def test_numbers_and_names_of_no_head_are_refused(name, value, words):
    arrays = open_head_arrays()
    with pytest.raises(BundleError, match=words):
        head_from_arrays(arrays | {name: np.full(arrays[name].shape, value)})


def test_outlines_that_do_not_fit_are_refused():
    places, weights = np.zeros((79, 17), np.int32), np.zeros((79, 17, 3))
    head = head_from_arrays(open_head_arrays() | {"dynamic_lmk_faces_idx": places, "dynamic_lmk_bary_coords": weights})
    assert head.contour_corners.shape == (79, 17, 3)
    for wrong in (places[:5], places + 60000, places[:, :5]):
        changed = {"dynamic_lmk_faces_idx": wrong, "dynamic_lmk_bary_coords": weights[:len(wrong)]}
        with pytest.raises(BundleError, match="outlines|outside|dynamic_lmk_bary_coords"):
            head_from_arrays(open_head_arrays() | changed)


def test_a_head_without_outlines_has_no_68_landmarks(head):
    with pytest.raises(ShapeMismatch, match="478 landmarks and no outline of 17"):
        head.landmarks68(head.template, np.eye(3, dtype=np.float32))


@pytest.mark.parametrize(("shape", "dtype"), [((10**7, 3), "<f8"), ((10**12, 3, 0), "<f4"), ((4,), "<U90000000")])
def test_an_archive_that_unpacks_to_gigabytes_is_refused_unread(tmp_path, monkeypatch, shape, dtype):
    """Zeros pack to a thousandth: the header alone says what is coming."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "head.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("f.npy", header.getvalue())
        archive.writestr("v_template.npy", header.getvalue() + bytes(100_000))
        archive.writestr("shapedirs.npy", header.getvalue())
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("an array was unpacked"))
    with pytest.raises(BundleError, match=r"head\.npz is no head model, or is damaged \(it claims to hold"):
        load_head(tmp_path / "head.npz")


def npy(shape, version=(1, 0)):
    header = io.BytesIO()
    write = np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0
    write(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


@pytest.mark.parametrize(("files", "packing", "words"), [
    ({"J_regressor": npy((2**14, 2**16)), "v_template": npy((-2**30, 1))}, zipfile.ZIP_DEFLATED, "lengths of -1073741"),
    ({"v_template": npy((4, 3), (2, 0))}, zipfile.ZIP_DEFLATED, "version"),
    ({"v_template": npy((4, 3))}, zipfile.ZIP_BZIP2, "packed in a way"),
    ({"v_template": npy((4, 3))}, zipfile.ZIP_LZMA, "packed in a way"),
])
def test_headers_and_packings_that_hide_gigabytes_are_refused_unread(tmp_path, monkeypatch, files, packing, words):
    """Lengths below 0 make the sum small; long headers and bzip2 are unpacked before anything is compared."""
    with zipfile.ZipFile(tmp_path / "head.npz", "w", packing) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.npy", content + bytes(100_000))
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("an array was unpacked"))
    with pytest.raises(BundleError, match=words):
        load_head(tmp_path / "head.npz")


def test_what_a_head_file_holds_besides_is_left_alone(tmp_path):
    path = tmp_path / "head.npz"
    np.savez(path, **open_head_arrays(), surprise=np.array([{"an": "object"}], dtype=object))
    assert len(load_head(path).template) == 4917
