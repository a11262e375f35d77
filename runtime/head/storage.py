"""Read and write head models: one .npz in FLAME's names, without pickles."""
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float32

from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.head.model import HeadModel

OPEN_HEAD = Path(__file__).parents[1] / "data" / "open_head.npz"
UNIT = "_unit"  # `x_unit` is what the integers in `x` count


def load_head(path: Path = OPEN_HEAD) -> HeadModel:
    """Open a head model; raises BundleError for a file that is missing, damaged or no head."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return head_from_arrays({name: archive[name] for name in archive.files})
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        raise BundleError(f"{path} is not a head model ({error}); run 'caphuman head list' for those at hand") from error


def head_from_arrays(arrays: Mapping[str, np.ndarray]) -> HeadModel:
    """A head from arrays in FLAME's names.

    v_template (V,3), shapedirs (V,3,I+E) with identity_count I, posedirs (V,3,P), J_regressor (J,V), weights (V,J),
    kintree_table (2,J), f (F,3), vt (T,2), ft (F,3), lmk_faces_idx (L,), lmk_bary_coords (L,3), expression_names (E,),
    texture_mean (t,t,3), and texture_basis (K,t,t,3) or texture_masks (K,t,t) with texture_colours (K,3).
    Integers with a `_unit` beside them count that unit.
    """
    try:
        return _build({name: _scaled(arrays, name) for name in arrays if not name.endswith(UNIT)})
    except KeyError as error:
        raise BundleError(f"the head model lacks {error}; convert it again with 'caphuman head add'") from error


def _build(arrays: dict[str, np.ndarray]) -> HeadModel:
    identity_count = int(arrays["identity_count"])
    faces = arrays["f"].astype(np.int32)
    parents = arrays["kintree_table"][0].astype(np.int64).astype(np.int32)  # FLAME stores the root's -1 as 2**32 - 1
    return HeadModel(
        template=_real(arrays["v_template"]),
        identity_basis=_real(arrays["shapedirs"][..., :identity_count]),
        expression_basis=_real(arrays["shapedirs"][..., identity_count:]),
        pose_basis=_real(arrays["posedirs"]),
        joint_regressor=_real(arrays["J_regressor"]),
        weights=_real(arrays["weights"]),
        parents=parents,
        faces=faces,
        face_uv=_real(arrays["vt"][arrays["ft"]]),
        texture_mean=_real(arrays["texture_mean"]),
        texture_basis=_texture_basis(arrays),
        landmark_corners=faces[arrays["lmk_faces_idx"]],
        landmark_weights=_real(arrays["lmk_bary_coords"]),
        expression_names=tuple(str(name) for name in arrays["expression_names"]),
    )


def _texture_basis(arrays: dict[str, np.ndarray]) -> Float32[np.ndarray, "k t t 3"]:
    if "texture_basis" in arrays:
        return _real(arrays["texture_basis"])
    return _real(arrays["texture_masks"][..., None] * arrays["texture_colours"][:, None, None])


def _scaled(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    unit = arrays.get(name + UNIT)
    return arrays[name] if unit is None else arrays[name] * unit.astype(np.float32)


def _real(array: np.ndarray) -> Float32[np.ndarray, "..."]:
    return np.ascontiguousarray(array, np.float32)
