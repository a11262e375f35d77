"""FLAME and the files that DECA keeps beside it, converted once into our own head format.

FLAME: Li et al., "Learning a model of facial shape and expression from 4D scans", 2017. CapHuman uses 100 of its 300
shape components, 50 of its 100 expression components, and the first 50 of the texture's 200 at half the size.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from jaxtyping import Float32, Int

from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.errors import BundleError, CheckpointError
from caphuman_edge.runtime.head import npz
from caphuman_edge.runtime.head.pickles import read_pickle
from caphuman_edge.runtime.head.storage import AXES, check_arrays, head_from_arrays

IDENTITY, EXPRESSION, TEXTURE = 100, 50, 50  # components that CapHuman uses
FIRST_EXPRESSION = 300  # where the expression components begin
SHAPES: dict[str, tuple[str | int, ...]] = {  # in FLAME's own files
    **AXES, "shapedirs": ("V", 3, 400), "posedirs": ("V", 3, 36), "J_regressor": (5, "V"), "weights": ("V", 5),
    "kintree_table": (2, 5), "lmk_faces_idx": (51,), "lmk_bary_coords": (51, 3), "dynamic_lmk_faces_idx": (79, 17),
    "dynamic_lmk_bary_coords": (79, 17, 3),
}
MODEL = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
LANDMARKS = {"static_lmk_faces_idx": "lmk_faces_idx", "static_lmk_bary_coords": "lmk_bary_coords",
             "dynamic_lmk_faces_idx": "dynamic_lmk_faces_idx", "dynamic_lmk_bary_coords": "dynamic_lmk_bary_coords"}
TEXTURE_EDGE = 512  # texels on disk; every second row and column is used
MOST_COMPONENTS = 1000
MAX_TEMPLATE = 8 << 20  # bytes; 5023 vertices and 9976 faces take about one million
GREY_SKIN = (0.62, 0.52, 0.47)  # RGB, where there is no texture
LICENCE = ("FLAME, Max Planck Society: for non-commercial research only (flame.is.tue.mpg.de), except for the model "
           "FLAME 2023 Open (CC-BY-4.0). This converted file may not be shared.")


@dataclass(frozen=True)
class FlameFiles:
    """The files that make a FLAME head; without a texture it has the colour of grey skin all over."""

    model: Path  # generic_model.pkl
    template: Path  # head_template.obj, for its texture coordinates
    landmarks: Path  # landmark_embedding.npy
    texture: Path | None = None  # FLAME_texture.npz


def convert_flame(files: FlameFiles, licence: str = LICENCE,
                  progress: Callable[[float], None] = lambda _: None) -> dict[str, np.ndarray]:
    """All arrays of the head, as `storage` reads them, with licence and sources (name and sha256 of each file).

    `progress` is told the share of the texture that is read. Raises CheckpointError for a file that is missing,
    damaged, malicious or no part of FLAME.
    """
    model = _read(files.model, {name: name for name in MODEL})
    vt, faces, ft = _read_template(files.template)
    if not np.array_equal(faces, model["f"]):
        raise CheckpointError(f"{files.template} has other faces ({len(faces)}) than {files.model} ({len(model['f'])}),"
                              " expected the same; use the head_template.obj that comes with DECA")
    shape, expression = model.pop("shapedirs"), slice(FIRST_EXPRESSION, FIRST_EXPRESSION + EXPRESSION)
    arrays = {
        **model, **_read(files.landmarks, LANDMARKS), "vt": vt, "ft": ft, **_read_texture(files.texture, progress),
        "shapedirs": np.concatenate([shape[..., :IDENTITY], shape[..., expression]], axis=2),
        "identity_count": np.array(IDENTITY),
        "expression_names": np.array([f"expression{k}" for k in range(EXPRESSION)]),
    }
    arrays = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()}
    try:
        head_from_arrays(arrays)
    except BundleError as error:
        raise CheckpointError(f"{files.model} and the files with it make no head: {error}") from error
    paths = [path for path in (files.model, files.template, files.landmarks, files.texture) if path]
    return {**arrays, "kintree_table": arrays["kintree_table"].astype(np.int64).astype(np.int32),  # 2**32 - 1 is -1
            "licence": np.array(licence),
            "sources": np.array([[path.name, digest] for path, digest in sha256_of(paths).items()])}


def _read(path: Path, names: dict[str, str]) -> dict[str, np.ndarray]:
    """The arrays of a pickle, checked and under our names."""
    found = read_pickle(path, names)
    missing = [name for name in names if not isinstance(found.get(name), np.ndarray)]
    if missing:
        raise CheckpointError(f"{path} has no array {', '.join(missing)}, which FLAME's file of this kind has; "
                              "check which file it is")
    arrays = {ours: found[name] for name, ours in names.items()}
    check_arrays(arrays, SHAPES, str(path), CheckpointError)
    return arrays


def _read_template(
    path: Path,
) -> tuple[Float32[np.ndarray, "t 2"], Int[np.ndarray, "f 3"], Int[np.ndarray, "f 3"]]:
    """Texture coordinates of a Wavefront OBJ file, its faces in vertices, and its faces in texture coordinates."""
    try:
        if path.stat().st_size > MAX_TEMPLATE:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_TEMPLATE}; "
                                  "use the head_template.obj that comes with DECA")
        lines = path.read_text("latin-1").splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path") from error
    places, corners = [], []
    for number, line in enumerate(lines, 1):
        try:
            kind, *words = line.split() or [""]
            if kind == "vt":
                u, v, *_ = words
                places.append((float(u), float(v)))
            elif kind == "f":
                a, b, c = words
                corners.append((_corner(a), _corner(b), _corner(c)))
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number}: {ascii(line[:60])} is no triangle with texture coordinates; "
                                  "use the head_template.obj that comes with DECA") from error
    indices = np.array(corners, np.int64).reshape(-1, 3, 2)
    vt = np.array(places, np.float64).reshape(-1, 2)
    check_arrays({"vt": vt}, AXES, str(path), CheckpointError)
    return vt.astype(np.float32), indices[..., 0], indices[..., 1]


def _corner(word: str) -> tuple[int, int]:
    """`vertex/texture` or `vertex/texture/normal`, from 1, as indices from 0."""
    vertex, place, *_ = word.split("/")
    indices = int(vertex) - 1, int(place) - 1
    if not all(0 <= index < MAX_TEMPLATE for index in indices):
        raise ValueError("an index that counts from elsewhere")
    return indices


def _read_texture(path: Path | None, progress: Callable[[float], None]) -> dict[str, np.ndarray]:
    """Mean and basis of the texture, RGB 0..1, at half the size on disk; whole rows are read and dropped again."""
    if path is None:
        edge = TEXTURE_EDGE // 2
        mean = np.broadcast_to(np.array(GREY_SKIN, np.float32), (edge, edge, 3))
        return {"texture_mean": mean, "texture_basis": np.zeros((0, edge, edge, 3), np.float32)}
    with npz.opened(path, CheckpointError, "FLAME texture") as archive:
        mean = _read_space(archive, "mean", 1, lambda _: None)[..., 0]
        basis = np.moveaxis(_read_space(archive, "tex_dir", TEXTURE, progress), 3, 0)
    arrays = {"texture_mean": mean, "texture_basis": np.ascontiguousarray(basis)}
    check_arrays(arrays, AXES, str(path), CheckpointError)
    return arrays


def _read_space(archive: ZipFile, name: str, wanted: int,
                progress: Callable[[float], None]) -> Float32[np.ndarray, "y x 3 k"]:
    """The first `wanted` components of an array that may not fit into memory."""
    edge = TEXTURE_EDGE
    with archive.open(f"{name}.npy") as file:
        (*size, count), fortran, dtype = npz.read_header(file)
        if (*size, count) == (edge, edge, 3):
            size, count = size + [count], 1
        if size != [edge, edge, 3] or not wanted <= count <= MOST_COMPONENTS or dtype.kind not in "iuf":
            raise ValueError(f"{name} has shape {(*size, count)} of {dtype}, expected {(edge, edge, 3)} "
                             f"and at least {wanted} components")
        space = np.empty((edge // 2, edge // 2, 3, wanted), np.float32)
        steps = wanted if fortran else edge  # the slowest axis: components, or rows
        for step in range(steps):
            if fortran:
                block = _take(file, (3, edge, edge), dtype).transpose(2, 1, 0)
                space[..., step] = block[::2, ::2, ::-1] / 255  # BGR on disk
            elif step % 2 == 0:
                space[step // 2] = _take(file, (edge, 3, count), dtype)[::2, ::-1, :wanted] / 255
            else:
                _take(file, (edge, 3, count), dtype)
            progress((step + 1) / steps)
    return space


def _take(file: npz.Stream, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The next numbers of a stream."""
    size = int(np.prod(shape)) * dtype.itemsize
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends early")
    return np.frombuffer(data, dtype).reshape(shape)
