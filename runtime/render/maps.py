"""What both renderers share: the mesh they take, and the numbers behind the nine channels they draw.

Semantics follow the official condition maps (DECA's renderer over pytorch3d's rasteriser), so that maps drawn here
can be fed to a CapFace that was trained on those.
"""
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

DEPTH_OFFSET = np.float32(10)  # added to z before the depth test; what is then still negative is not drawn
AREA_EPSILON = np.float32(1e-8)  # in the barycentric denominators; faces of no larger area are skipped

# Real spherical harmonics' constants times the cosine lobe's A_l of Ramamoorthi and Hanrahan, "An Efficient
# Representation for Irradiance Environment Maps" (2001), eq. 8: A_1 = 2 pi / 3, A_2 = pi / 4. The first lacks its
# A_0 = pi, as DECA's does, and light codes are fitted to that. Stated again in shaders/maps.frag.glsl.
SH_FACTORS = np.array(
    [
        np.sqrt(1 / (4 * np.pi)),
        *3 * [2 * np.pi / 3 * np.sqrt(3 / (4 * np.pi))],
        *3 * [np.pi / 4 * np.sqrt(15 / (4 * np.pi))],
        np.pi / 4 * np.sqrt(15 / (16 * np.pi)),
        np.pi / 4 * np.sqrt(5 / (16 * np.pi)),
    ],
    dtype=np.float32,
)


@dataclass(frozen=True)
class Mesh:
    """A posed, textured, lit head.

    `screen`: projected vertices, x right, y down, both [-1, 1] over the frame; z in (-10, 10), smaller is nearer.
    `normals`: vertex normals of the un-projected mesh, x right, y up, z to the viewer.
    `face_uv`: texture coordinates of each face's corners, [0, 1], u right, v up.
    `texture`: RGB, first row on top; values outside [0, 1] are kept.
    `light`: nine spherical-harmonic coefficients per colour, order 1, x, y, z, xy, xz, yz, x2-y2, 3z2-1.
    """

    screen: Float32[np.ndarray, "vertices 3"]
    normals: Float32[np.ndarray, "vertices 3"]
    faces: Int32[np.ndarray, "faces 3"]
    face_uv: Float32[np.ndarray, "faces 3 2"]
    texture: Float32[np.ndarray, "size size 3"]
    light: Float32[np.ndarray, "9 3"]


def harmonics(normals: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 9"]:
    """The nine spherical harmonics without their factors: 1, x, y, z, xy, xz, yz, x2-y2, 3z2-1."""
    x, y, z = normals.T
    return np.stack([np.ones_like(x), x, y, z, x * y, x * z, y * z, x * x - y * y, 3 * z * z - 1], axis=1)


def drawable_faces(
    mesh: Mesh,
) -> tuple[Int[np.ndarray, " drawn"], Float32[np.ndarray, "drawn 3 3"], Float32[np.ndarray, " drawn"]]:
    """Indices, projected corners (face, corner, xyz) and areas of the faces that are neither slivers nor broken.

    The area is twice the signed one in the frame, in NDC units and pytorch3d's sign.
    """
    corners = np.take(mesh.screen, mesh.faces, axis=0)  # three times as fast as an index
    (ax, ay, _), (bx, by, _), (cx, cy, _) = corners.transpose(1, 2, 0)
    areas = (cx - ax) * (by - ay) - (cy - ay) * (bx - ax)
    drawn = np.flatnonzero(np.abs(areas) > AREA_EPSILON)  # false for NaN
    return drawn, corners[drawn], areas[drawn]
