"""FLAME's own files become a head, or one error that names the file and what is wrong in it."""
import io
import os
import zipfile

import numpy as np
import pytest
import scipy.sparse

from caphuman_edge.runtime.errors import CheckpointError
from caphuman_edge.runtime.head import flame as flame_module
from caphuman_edge.runtime.head import head_from_arrays
from caphuman_edge.runtime.head.flame import FlameFiles, convert_flame

FULL = (512, 512, 3)


@pytest.fixture
def refused(flame_files):
    """The line that refuses FLAME's files after these changes."""

    def why(**changes):
        with pytest.raises(CheckpointError) as caught:
            convert_flame(flame_files(**changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return why


def texture_file(folder, **arrays):
    np.savez_compressed(folder / "FLAME_texture.npz", **arrays)
    return folder / "FLAME_texture.npz"


def with_texture(files, texture):
    return FlameFiles(files.model, files.template, files.landmarks, texture)


def header(shape, dtype="<f4", fortran=False):
    """An .npy file of which only the header is there."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": fortran, "shape": shape})
    return file.getvalue()


# What is converted.


def test_the_arrays_are_those_of_the_files(flame_files, golden):
    flame, arrays = golden("flame.npz"), convert_flame(flame_files())
    shapedirs = flame["flame/shapedirs"]
    np.testing.assert_array_equal(arrays["shapedirs"][..., :100], shapedirs[..., :100])
    np.testing.assert_array_equal(arrays["shapedirs"][..., 100:], shapedirs[..., 300:350])
    for ours, theirs in {"v_template": "v_template", "posedirs": "posedirs", "J_regressor": "J_regressor",
                         "weights": "weights", "f": "f", "vt": "uvcoords", "ft": "uvfaces",
                         "lmk_faces_idx": "static_lmk_faces_idx", "lmk_bary_coords": "static_lmk_bary_coords",
                         "dynamic_lmk_bary_coords": "dynamic_lmk_bary_coords"}.items():
        np.testing.assert_array_equal(arrays[ours], flame[f"flame/{theirs}"], err_msg=ours)
    assert arrays["kintree_table"][0].tolist() == [-1, 0, 1, 1, 1]


@pytest.mark.parametrize("changes", [
    {"J_regressor": np.asarray}, {"J_regressor": scipy.sparse.csr_matrix}, {"shapedirs": np.asarray},
    {"f": lambda faces: faces.astype(np.uint32)}, {"kintree_table": lambda table: table.astype(np.int64)},
    {"v_template": lambda vertices: vertices.astype(np.float64)},
], ids=lambda changes: next(iter(changes)))
def test_other_editions_give_the_same_head(flame_files, golden, changes):
    flame = golden("flame.npz")
    (name, changed), = changes.items()
    expected = convert_flame(flame_files())
    found = convert_flame(flame_files(**{name: changed(flame[f"flame/{name}"])}))
    for array in expected.keys() - {"sources"}:
        np.testing.assert_array_equal(found[array], expected[array])


def test_licence_and_sources_are_kept(flame_files):
    files = flame_files()
    arrays = convert_flame(files, "CC-BY-4.0")
    assert str(arrays["licence"]) == "CC-BY-4.0"
    assert arrays["sources"][:, 0].tolist() == [files.model.name, files.template.name, files.landmarks.name]
    assert all(len(digest) == 64 for digest in arrays["sources"][:, 1])
    stated = str(convert_flame(files)["licence"])
    for words in ("Max Planck Society", "non-commercial research", "CC-BY-4.0", "may not be shared"):
        assert words in stated


def test_without_a_texture_the_head_is_grey_skinned(flame_files):
    head = head_from_arrays(convert_flame(flame_files()))
    assert head.texture_basis.shape[0] == 0
    np.testing.assert_array_equal(head.texture_mean, np.broadcast_to(np.float32(flame_module.GREY_SKIN), (256, 256, 3)))


@pytest.mark.parametrize("fortran", [False, True])
def test_of_the_texture_even_rows_and_columns_in_rgb_are_kept(flame_files, tmp_path, fortran):
    basis = np.zeros((*FULL, 51), np.int8, order="F" if fortran else "C")
    basis[2, 4, 0, 49], basis[3, 4, 0, 48], basis[2, 5, 0, 47] = 51, 99, 99
    mean = np.zeros(FULL, np.float64)
    mean[510, 0, 2] = 255
    shares: list[float] = []
    files = with_texture(flame_files(), texture_file(tmp_path, mean=mean, tex_dir=basis))
    arrays = convert_flame(files, progress=shares.append)
    found = arrays["texture_basis"]
    assert found.shape == (50, 256, 256, 3) and found.dtype == np.float32
    assert np.argwhere(found).tolist() == [[49, 1, 2, 2]] and found[49, 1, 2, 2] == np.float32(51 / 255)
    assert np.argwhere(arrays["texture_mean"]).tolist() == [[255, 0, 0]]
    assert shares == sorted(shares) and shares[-1] == 1
    assert arrays["sources"][-1, 0] == "FLAME_texture.npz"


# What is refused.


@pytest.mark.parametrize(("name", "value", "words"), [
    ("v_template", np.zeros((5, 3)), "shapedirs has shape (642, 3, 400), expected (5, 3, 400)"),
    ("v_template", np.zeros((642, 2)), "v_template has shape (642, 2), expected ('V', 3)"),
    ("v_template", np.full((642, 3), np.nan), "v_template holds numbers that are not finite"),
    ("v_template", np.full((642, 3), 1e300), "beyond all measure"),
    ("v_template", "a string", "has no array v_template"),
    ("weights", None, "has no array weights"),
    ("shapedirs", np.zeros((642, 3, 300)), "shapedirs has shape (642, 3, 300), expected (642, 3, 400)"),
    ("posedirs", np.zeros((642, 3, 207)), "posedirs"),
    ("J_regressor", np.zeros((24, 642)), "J_regressor"),
    ("kintree_table", np.array([[-1, 0, 3, 1, 1], [0, 1, 2, 3, 4]]), "parent after its child"),
    ("kintree_table", np.zeros((2, 5)), "kintree_table is of type float64"),
    ("static_lmk_faces_idx", None, "has no array static_lmk_faces_idx"),
    ("static_lmk_faces_idx", np.full(51, 1280), "points outside"),
    ("static_lmk_faces_idx", np.full(51, 2**32), "points outside"),
    ("dynamic_lmk_faces_idx", np.full((79, 17), -1), "points outside"),
    ("dynamic_lmk_bary_coords", np.zeros((79, 17, 2)), "dynamic_lmk_bary_coords"),
    ("dynamic_lmk_bary_coords", np.full((79, 17, 3), np.inf), "not finite"),
    ("uvcoords", np.full((664, 2), np.nan), "vt holds numbers that are not finite"),
    ("uvcoords", np.zeros((3, 2)), "points outside its 3 entries"),
])
def test_what_is_wrong_in_a_file_is_named(refused, name, value, words):
    assert words in refused(**{name: value})


def test_faces_outside_the_head_are_refused(refused, golden):
    faces = golden("flame.npz")["flame/f"].copy()
    faces[7, 1] = 642
    assert "has other faces" in refused(f=faces)


def test_a_model_that_runs_code_is_refused_before_it_does(refused, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    assert "mkdir" in refused(v_template=Evil())
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("line", ["f 1/1 2/2", "f 1 2 3", "f 1/1 2/2 3/3 4/4", "f 0/1 2/2 3/3", "f -1/1 -2/2 -3/3",
                                  "f 1/1 2/2 99999999999999999999/3", "vt 0.5", "vt left right", "f a/b c/d e/f"])
def test_a_template_of_anything_but_triangles_is_named_with_its_line(flame_files, line):
    files = flame_files()
    files.template.write_text(f"# head\n\n{line}\n")
    with pytest.raises(CheckpointError, match=r"head_template\.obj, line 3"):
        convert_flame(files)


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 100, b"v 1 2 3\n"])
def test_a_template_of_another_head_is_refused(flame_files, content):
    files = flame_files()
    files.template.write_bytes(content)
    with pytest.raises(CheckpointError, match="has other faces"):
        convert_flame(files)


@pytest.mark.parametrize("name", ["model", "template", "landmarks"])
def test_a_file_that_is_not_there_is_named(flame_files, name):
    files = flame_files()
    getattr(files, name).unlink()
    with pytest.raises(CheckpointError, match=f"{getattr(files, name).name} cannot be read"):
        convert_flame(files)


@pytest.mark.parametrize("name", ["model", "landmarks"])
def test_half_a_file_is_named(flame_files, name):
    files = flame_files()
    path = getattr(files, name)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=f"{path.name} is no pickled dictionary of arrays, or is damaged"):
        convert_flame(files)


@pytest.mark.parametrize(("members", "words"), [
    ({"mean.npy": header(FULL)}, "ends early"),
    ({"mean.npy": header(FULL, "<f8", fortran=True)}, "ends early"),
    ({"mean.npy": header((256, 256, 3))}, "mean has shape"),
    ({"mean.npy": header((*FULL, 10**12))}, "mean has shape"),
    ({"mean.npy": header(FULL, "|O")}, "mean has shape"),
    ({"mean.npy": header(())}, "FLAME texture"),
    ({"tex_dir.npy": header((*FULL, 200))}, "mean.npy"),
    ({"mean.npy": b"no header"}, "FLAME texture"),
    ({"mean.npy": header(FULL, "|u1") + bytes(3 * 512 * 512), "tex_dir.npy": header((*FULL, 20))}, "at least 50"),
])
def test_a_texture_that_is_not_flames_is_refused_unread(flame_files, tmp_path, members, words):
    with zipfile.ZipFile(tmp_path / "FLAME_texture.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"FLAME_texture\.npz is no FLAME texture") as caught:
        convert_flame(with_texture(flame_files(), tmp_path / "FLAME_texture.npz"))
    assert words in str(caught.value)


def test_a_texture_that_is_no_archive_is_refused(flame_files, tmp_path):
    (tmp_path / "FLAME_texture.npz").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="is no FLAME texture"):
        convert_flame(with_texture(flame_files(), tmp_path / "FLAME_texture.npz"))


def test_a_texture_of_no_numbers_is_refused(flame_files, tmp_path):
    path = texture_file(tmp_path, mean=np.full(FULL, np.nan, np.float16), tex_dir=np.zeros((*FULL, 50), np.int8))
    with pytest.raises(CheckpointError, match="texture_mean holds numbers that are not finite"):
        convert_flame(with_texture(flame_files(), path))
