"""Fixtures shared by every suite."""
import functools
import io
import os
import pickle
import struct
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

OURS = Path(__file__).parent / "golden"
GOLDEN = Path(os.environ.get("GOLDEN_DIR") or OURS)


@pytest.fixture
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
    """`golden("unet.npz")`: one recorded suite of arrays by key; skips where the file is not at hand.

    An array is decompressed each time it is asked for: keep it in a variable.
    """

    def load(name: str) -> Mapping[str, np.ndarray]:
        for folder in (GOLDEN, OURS):
            if (folder / name).exists():
                return _archive(folder / name)
        pytest.skip(f"{name} is not in {GOLDEN}; set GOLDEN_DIR to a folder that has it")

    return load


@functools.cache
def _archive(path: Path) -> Mapping[str, np.ndarray]:
    return np.load(path, allow_pickle=False)


@pytest.fixture(scope="session")
def stranger() -> Callable[[Any], Any]:
    """`stranger(pipe)` is somebody who was never photographed: the mean head, with features drawn at random."""
    from caphuman_edge.runtime.head import HeadCode  # not before the tests' import hook is in place
    from caphuman_edge.runtime.perceive import Subject
    from caphuman_edge.runtime.perception import FaceLandmarks

    def make(pipe: Any) -> Any:
        rng, size = np.random.default_rng(0), pipe.bundle.config.vision.image_size
        face = FaceLandmarks(np.zeros((478, 3), np.float32), 1.0, np.zeros(52, np.float32))
        identity = rng.normal(size=pipe.bundle.config.identity_width).astype(np.float32)
        return Subject(np.zeros((64, 64, 3), np.uint8), face, HeadCode.neutral(pipe.head_model.layout),
                       identity / np.linalg.norm(identity), rng.normal(size=(3, size, size)).astype(np.float32))

    return make


@pytest.fixture
def flame_files(golden, tmp_path, chumpy) -> Callable[..., Any]:
    """`flame_files(v_template=...)` writes FLAME 2020's and DECA's files as they come, from the recorded model.

    Changes are arrays by their names in the files; None leaves one out. Gives the paths as FlameFiles.
    """
    from caphuman_edge.runtime.head.flame import FlameFiles  # not before the tests' import hook is in place

    flame = golden("flame.npz")
    names = [name.removeprefix("flame/") for name in flame if name.startswith("flame/")]

    def write(**changes: object) -> Any:
        parts = {name: flame[f"flame/{name}"] for name in names}
        parts |= {"J_regressor": scipy.sparse.csc_matrix(parts["J_regressor"].astype(np.float64)),
                  "shapedirs": chumpy.ch.Ch(parts["shapedirs"].astype(np.float64)), "bs_style": "lbs", **changes}
        landmarks = {name: parts.pop(name) for name in names if "lmk" in name}
        folder = tmp_path / "flame"
        folder.mkdir(exist_ok=True)
        _write_template(folder / "head_template.obj", *(parts.pop(name) for name in ("uvcoords", "uvfaces")),
                        flame["flame/v_template"], flame["flame/f"])
        (folder / "generic_model.pkl").write_bytes(
            python2_pickle({name: part for name, part in parts.items() if part is not None}))
        _write_landmarks(folder / "landmark_embedding.npy", landmarks)
        return FlameFiles(*(folder / name for name in ("generic_model.pkl", "head_template.obj",
                                                       "landmark_embedding.npy")))

    return write


@pytest.fixture
def chumpy(monkeypatch) -> types.ModuleType:
    """A stand-in for chumpy, which current Python cannot install: classes that are pickled alike."""
    package = types.ModuleType("chumpy")
    for name, classes in {"ch": ("Ch",), "reordering": ("Select", "transpose")}.items():
        module = types.ModuleType(f"chumpy.{name}")
        for kind in classes:
            setattr(module, kind, type(kind, (_Expression,), {"__module__": module.__name__}))
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "chumpy", package)
    return package


class _Expression:
    def __init__(self, x: np.ndarray | None = None, **terms: object):
        self.__dict__ = {"_dirty_vars": {"x"}, "_itr": None, **({} if x is None else {"x": x}), **terms}


def python2_pickle(value: object) -> bytes:
    """A pickle as Python 2 wrote it, when numpy and scipy had their modules elsewhere."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core", b"numpy.core").replace(b"sparse._csc", b"sparse.csc")


class _Python2Pickler(pickle._Pickler):
    """Strings and bytes alike are byte strings."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin-1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def _write_template(path: Path, uv: np.ndarray, uv_faces: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> None:
    lines = [f"v {x} {y} {z}" for x, y, z in vertices.tolist()] + [f"vt {u} {v}" for u, v in uv.tolist()]
    for corners, places in zip((faces + 1).tolist(), (uv_faces + 1).tolist(), strict=True):
        lines.append("f " + " ".join(f"{corner}/{place}" for corner, place in zip(corners, places, strict=True)))
    path.write_text("# head\n" + "\n".join(lines))


def _write_landmarks(path: Path, landmarks: Mapping[str, object]) -> None:
    """As DECA has them: those that slide are tensors."""
    import torch

    held = {name: torch.from_numpy(part) if name.startswith("dynamic") else part
            for name, part in landmarks.items() if part is not None}
    np.save(path, held, allow_pickle=True)
