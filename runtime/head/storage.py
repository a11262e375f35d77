"""Read and write head models: one .npz in FLAME's names, without pickles."""
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float32, Int32

from caphuman_edge.runtime.errors import BundleError, ShapeMismatch
from caphuman_edge.runtime.head.model import HeadModel

OPEN_HEAD = Path(__file__).parents[1] / "data" / "open_head.npz"
UNIT = "_unit"  # `x_unit` is what the integers in `x` count
AXES: dict[str, tuple[str | int, ...]] = {  # a letter is a length that recurs
    "v_template": ("V", 3), "shapedirs": ("V", 3, "S"), "posedirs": ("V", 3, "P"), "J_regressor": ("J", "V"),
    "weights": ("V", "J"), "kintree_table": (2, "J"), "f": ("F", 3), "vt": ("T", 2), "ft": ("F", 3),
    "lmk_faces_idx": ("L",), "lmk_bary_coords": ("L", 3), "identity_count": (), "expression_names": ("E",),
    "texture_mean": ("t", "t", 3), "texture_basis": ("K", "t", "t", 3), "texture_masks": ("K", "t", "t"),
    "texture_colours": ("K", 3),
}
OPTIONAL = {"texture_basis", "texture_masks", "texture_colours"}  # the first, or the two others
INDICES = {"f": "V", "ft": "T", "lmk_faces_idx": "F"}  # what each counts
ROOT = -1  # FLAME stores it as 2**32 - 1


def load_head(path: Path = OPEN_HEAD) -> HeadModel:
    """Open a head model; raises BundleError for a file that is missing, damaged or no head."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return head_from_arrays({name: archive[name] for name in archive.files})
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        raise BundleError(f"{path} is no head model ({error}); use the head that comes with the package") from error


def head_from_arrays(arrays: Mapping[str, np.ndarray]) -> HeadModel:
    """A head from arrays in FLAME's names, as AXES lists them; other arrays are ignored.

    shapedirs holds identity_count identity components, then one component for each of expression_names. The texture is
    texture_mean plus either texture_basis or texture_masks times texture_colours. Integers with a `_unit` beside them
    count that unit. Raises BundleError, or its ShapeMismatch, for what does not make a head.
    """
    missing = [name for name in AXES if name not in arrays and name not in OPTIONAL]
    if missing or not ({"texture_basis"} <= set(arrays) or {"texture_masks", "texture_colours"} <= set(arrays)):
        raise BundleError(f"the head model lacks {', '.join(missing or sorted(OPTIONAL))}; convert it again "
                          "with all of them")
    scaled = {name: _scaled(arrays, name) for name in AXES if name in arrays}
    _check(scaled, _sizes(scaled))
    return _build(scaled)


def _scaled(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    unit = arrays.get(name + UNIT)
    return arrays[name] if unit is None else arrays[name] * unit.astype(np.float32)


def _sizes(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The length of each letter in AXES."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        axes = AXES[name]
        wanted = tuple(axis if isinstance(axis, int) else sizes.get(axis, "any") for axis in axes)
        agrees = [axis in ("any", length) for axis, length in zip(wanted, array.shape, strict=False)]
        if array.ndim != len(axes) or not all(agrees):
            raise ShapeMismatch(f"the head's {name} is {array.shape}, expected {wanted}; convert the head again")
        sizes |= {axis: length for axis, length in zip(axes, array.shape, strict=True) if isinstance(axis, str)}
    return sizes


def _check(arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> None:
    """What shapes alone do not tell."""
    if int(arrays["identity_count"]) + sizes["E"] != sizes["S"]:
        raise ShapeMismatch(f"the head has {sizes['S']} shape components, expected {int(arrays['identity_count'])} of "
                            f"identity and {sizes['E']} of expression")
    if sizes["P"] not in (0, 9 * (sizes["J"] - 1)):
        raise ShapeMismatch(f"the head has {sizes['P']} pose correctives, expected 0 or {9 * (sizes['J'] - 1)}")
    for name, counted in INDICES.items():
        if arrays[name].size and not 0 <= arrays[name].min() <= arrays[name].max() < sizes[counted]:
            raise BundleError(f"the head's {name} points outside its {sizes[counted]} entries; convert the head again")
    if any(parent not in range(ROOT, joint) for joint, parent in enumerate(_parents(arrays))):
        raise BundleError("the head's kintree_table names a parent after its child; convert the head again")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BundleError(f"the head's {name} holds numbers that are not finite; convert the head again")


def _build(arrays: Mapping[str, np.ndarray]) -> HeadModel:
    identity_count = int(arrays["identity_count"])
    faces = arrays["f"].astype(np.int32)
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
