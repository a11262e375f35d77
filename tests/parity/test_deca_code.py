"""DECA's parameters as a head code: every part in its place, projected where the official decoder puts it."""
import json
from dataclasses import replace

import numpy as np
import pytest

from caphuman_edge.runtime.errors import ShapeMismatch
from caphuman_edge.runtime.head import HeadLayout, head_from_arrays, project
from caphuman_edge.runtime.head.deca import deca_code
from caphuman_edge.runtime.perception.official_crop import Square, whole_frame

LAYOUT = HeadLayout(100, tuple(f"expression{i}" for i in range(50)), 50, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def test_every_recorded_parameter_is_in_its_part(golden):
    recorded = golden("deca_encoder.npz")
    names = {"identity": "shape", "expression": "exp", "texture": "tex", "pose": "pose", "camera": "cam",
             "light": "light"}
    for i, parameters in enumerate(recorded["out/parameters"]):
        code = deca_code(parameters, whole_frame(), LAYOUT)
        for ours, official in names.items():
            np.testing.assert_array_equal(getattr(code, ours), recorded[f"out/code_{official}"][i], err_msg=ours)


def test_the_head_lands_where_the_official_decoder_projects_it(golden):
    recorded, flame = golden("render.npz"), golden("flame.npz")
    model = synthetic_head(flame)
    crops = json.loads(str(recorded["config"]))["crops_cx_cy_size"]
    for i, (x, y, side) in enumerate(crops):
        parameters = np.concatenate([
            recorded["in/shape"][i], np.zeros(50), recorded["in/exp"][i], recorded["in/pose"][i], recorded["in/cam"][i],
            recorded["in/light"][i].ravel()]).astype(np.float32)
        code = deca_code(parameters, Square(x - side / 2, y - side / 2, side), model.layout)
        np.testing.assert_allclose(project(model.vertices(code), code), recorded["out/trans_verts"][i], atol=2e-5)


def test_a_head_with_fewer_textures_takes_the_first_of_them():
    parameters = np.arange(236, dtype=np.float32)
    code = deca_code(parameters, whole_frame(), replace(LAYOUT, texture_count=3))
    assert code.texture.tolist() == [100, 101, 102]


def test_a_head_unlike_flame_is_refused():
    open_head = replace(LAYOUT, identity_count=20)
    with pytest.raises(ShapeMismatch, match="20 identity and 50 .* DECA needs FLAME's 100 and 50; add one"):
        deca_code(np.zeros(236, np.float32), whole_frame(), open_head)


def synthetic_head(flame):
    """The recorded file of FLAME's layout."""
    shapedirs = flame["flame/shapedirs"]
    return head_from_arrays({
        **{name: flame[f"flame/{name}"] for name in ("v_template", "posedirs", "J_regressor", "weights",
                                                     "kintree_table", "f")},
        "shapedirs": np.concatenate([shapedirs[..., :100], shapedirs[..., 300:350]], axis=2),
        "identity_count": np.array(100), "expression_names": np.array(LAYOUT.expression_names),
        "vt": flame["flame/uvcoords"], "ft": flame["flame/uvfaces"],
        "lmk_faces_idx": flame["flame/static_lmk_faces_idx"].reshape(-1),
        "lmk_bary_coords": flame["flame/static_lmk_bary_coords"].reshape(-1, 3),
        "texture_mean": np.zeros((4, 4, 3)), "texture_basis": np.zeros((50, 4, 4, 3))})
