"""Read head models: one .npz in FLAME's names, without pickles."""
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from caphuman_edge.runtime.errors import BundleError, CapHumanError, ShapeMismatch
from caphuman_edge.runtime.head import npz
from caphuman_edge.runtime.head.model import JAW, NECK, YAW_BINS, HeadModel

OPEN_HEAD = Path(__file__).parents[1] / "data" / "open_head.npz"
UNIT = "_unit"  # `x_unit` is what the integers in `x` count
AXES: dict[str, tuple[str | int, ...]] = {  # a letter is a length that recurs
    "v_template": ("V", 3), "shapedirs": ("V", 3, "S"), "posedirs": ("V", 3, "P"), "J_regressor": ("J", "V"),
    "weights": ("V", "J"), "kintree_table": (2, "J"), "f": ("F", 3), "vt": ("T", 2), "ft": ("F", 3),
    "lmk_faces_idx": ("L",), "lmk_bary_coords": ("L", 3), "identity_count": (), "expression_names": ("E",),
    "texture_mean": ("t", "t", 3), "texture_basis": ("K", "t", "t", 3), "texture_masks": ("K", "t", "t"),
    "texture_colours": ("K", 3), "dynamic_lmk_faces_idx": ("A", "C"), "dynamic_lmk_bary_coords": ("A", "C", 3),
}
TEXTURES = {"texture_basis", "texture_masks", "texture_colours"}  # the first, or the two others
CONTOUR = {"dynamic_lmk_faces_idx", "dynamic_lmk_bary_coords"}  # both or none
OPTIONAL = TEXTURES | CONTOUR
INDICES = {"f": "V", "ft": "T", "lmk_faces_idx": "F", "dynamic_lmk_faces_idx": "F"}  # what each counts
WHOLE = {*INDICES, "kintree_table", "identity_count"}
LARGEST = 1e6  # metres, weights and colours stay far below; also tells NaN
ROOT = -1  # FLAME stores it as 2**32 - 1


def load_head(path: Path = OPEN_HEAD) -> HeadModel:
    """Open a head model; raises BundleError for a file that is missing, damaged or no head.

    Sizes are read from the headers before anything is unpacked.
    """
    with npz.opened(path, BundleError, "head model") as archive:
        wanted = npz.names(archive) & {name + ending for name in AXES for ending in ("", UNIT)}
        return head_from_arrays(npz.read_arrays(archive, sorted(wanted)))


def head_from_arrays(arrays: Mapping[str, np.ndarray]) -> HeadModel:
    """A head from arrays in FLAME's names, as AXES lists them; other arrays are ignored.

    shapedirs holds identity_count identity components, then one component for each of expression_names. The texture is
    texture_mean plus either texture_basis or texture_masks times texture_colours. Integers with a `_unit` beside them
    count that unit. Raises BundleError, or its ShapeMismatch, for what does not make a head.
    """
    missing = [name for name in AXES if name not in arrays and name not in OPTIONAL]
    if missing or not ({"texture_basis"} <= set(arrays) or {"texture_masks", "texture_colours"} <= set(arrays)):
        raise BundleError(f"the head model lacks {', '.join(missing or sorted(TEXTURES))}; convert it again "
                          "with all of them")
    if len(CONTOUR & set(arrays)) == 1:
        raise BundleError(f"the head model has but one of {', '.join(sorted(CONTOUR))}; convert it again with both")
    scaled = {name: _scaled(arrays, name) for name in AXES if name in arrays}
    _check(scaled, check_arrays(scaled, AXES, "the head model", ShapeMismatch))
    return _build(scaled)


def check_arrays(arrays: Mapping[str, np.ndarray], axes: Mapping[str, tuple[str | int, ...]], source: str,
                 kind: type[CapHumanError]) -> dict[str, int]:
    """The length of each letter in `axes`; raises `kind` for arrays of other shapes or types, or not finite."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        wanted = tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in axes[name])
        found = dict(zip(axes[name], array.shape, strict=False)) | sizes
        if array.shape != tuple(found.get(axis) if isinstance(axis, str) else axis for axis in axes[name]):
            raise kind(f"{source}: {name} has shape {array.shape}, expected {wanted}; fetch or convert it again")
        sizes = {letter: length for letter, length in found.items() if isinstance(letter, str)}
        if array.dtype.kind not in ("U" if name == "expression_names" else "iu" if name in WHOLE else "iuf"):
            raise kind(f"{source}: {name} is of type {array.dtype}, which does not fit; fetch or convert it again")
        real = array.size and array.dtype.kind in "iuf" and name not in WHOLE
        if real and not -LARGEST < float(array.min()) <= float(array.max()) < LARGEST:
            raise kind(f"{source}: {name} holds numbers that are not finite or beyond all measure; "
                       "fetch or convert it again")
    return sizes


def _scaled(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    unit = arrays.get(name + UNIT)
    if unit is None:
        return arrays[name]
    if unit.shape or unit.dtype.kind not in "iuf" or arrays[name].dtype.kind not in "iuf":
        raise BundleError(f"the head model's {name}{UNIT} is no number that scales {name}; convert the head again")
    return arrays[name] * unit.astype(np.float32)


def _check(arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> None:
    """What shapes alone do not tell."""
    if not 0 <= int(arrays["identity_count"]) == sizes["S"] - sizes["E"]:
        raise ShapeMismatch(f"the head has {sizes['S']} shape components, expected {int(arrays['identity_count'])} of "
                            f"identity and {sizes['E']} of expression")
    if sizes["P"] not in (0, 9 * (sizes["J"] - 1)):
        raise ShapeMismatch(f"the head has {sizes['P']} pose correctives, expected 0 or {9 * (sizes['J'] - 1)}")
    if sizes["J"] <= JAW or not all(sizes[letter] for letter in "VFTt") or sizes.get("A", YAW_BINS) != YAW_BINS:
        raise ShapeMismatch(f"the head has {sizes}, expected more than {JAW} joints (J), some vertices, faces and "
                            f"texture (V, F, T, t), and {YAW_BINS} outlines (A) if any; convert the head again")
    for name, counted in INDICES.items():
        if name in arrays and arrays[name].size and not 0 <= arrays[name].min() <= arrays[name].max() < sizes[counted]:
            raise BundleError(f"the head's {name} points outside its {sizes[counted]} entries; convert the head again")
    if not (_real(arrays["weights"])[:, NECK:].sum(axis=1) > 0.5).any():  # HeadModel.layout looks for these
        raise BundleError("the head's weights leave every vertex to its root; convert the head again")
    if not all(str(name).isprintable() for name in arrays["expression_names"]):
        raise BundleError("the head's expression_names hold letters that cannot be printed; convert the head again")
    if any(parent not in range(ROOT, joint) for joint, parent in enumerate(_parents(arrays))):
        raise BundleError("the head's kintree_table names a parent after its child; convert the head again")


def _build(arrays: Mapping[str, np.ndarray]) -> HeadModel:
    identity_count = int(arrays["identity_count"])
    faces = arrays["f"].astype(np.int32)
    sliding = arrays.get("dynamic_lmk_faces_idx", np.zeros((0, 0), np.int32))
    return HeadModel(
        template=_real(arrays["v_template"]),
        identity_basis=_real(arrays["shapedirs"][..., :identity_count]),
        expression_basis=_real(arrays["shapedirs"][..., identity_count:]),
        pose_basis=_real(arrays["posedirs"]),
        joint_regressor=_real(arrays["J_regressor"]),
        weights=_real(arrays["weights"]),
        parents=_parents(arrays),
        faces=faces,
        face_uv=_real(arrays["vt"][arrays["ft"]]),
        texture_mean=_real(arrays["texture_mean"]),
        texture_basis=_texture_basis(arrays),
        landmark_corners=faces[arrays["lmk_faces_idx"]],
        landmark_weights=_real(arrays["lmk_bary_coords"]),
        contour_corners=faces[sliding],
        contour_weights=_real(arrays.get("dynamic_lmk_bary_coords", np.zeros((0, 0, 3)))),
        expression_names=tuple(str(name) for name in arrays["expression_names"]),
    )


def _parents(arrays: Mapping[str, np.ndarray]) -> Int32[np.ndarray, "j"]:
    return arrays["kintree_table"][0].astype(np.int64).astype(np.int32)


def _texture_basis(arrays: Mapping[str, np.ndarray]) -> Float32[np.ndarray, "k t t 3"]:
    if "texture_basis" in arrays:
        return _real(arrays["texture_basis"])
    return _real(arrays["texture_masks"][..., None] * arrays["texture_colours"][:, None, None])


def _real(array: np.ndarray) -> Float32[np.ndarray, "..."]:
    return np.ascontiguousarray(array, np.float32)
