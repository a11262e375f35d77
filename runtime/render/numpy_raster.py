"""The condition maps in numpy: exact, and quick enough to feed a training.

Every (face, pixel) pair whose pixel lies in the face's box is tested, all of a head's at once: no loop over faces.
"""
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from .maps import AREA_EPSILON, DEPTH_OFFSET, SH_FACTORS, Mesh, drawable_faces, harmonics

Indices = Int[np.ndarray, " n"]
Scalars = Float32[np.ndarray, " n"]
Corners = Float32[np.ndarray, "faces 3 3"]  # (face, corner, xyz)
Pixels = Int[np.ndarray, "faces 2"]  # (column, row)
PAIRS_AT_ONCE = 4_000_000  # face and pixel; about 0.5 GB. A head makes a tenth of that, a mesh of spikes any number


@dataclass(frozen=True)
class Fragments:
    """Faces over pixels, one pair a row."""

    pixel: Indices  # row * width + column
    face: Indices
    weights: Float32[np.ndarray, "n 3"]  # barycentric; their sum is area / (area + 1e-8)
    depth: Scalars  # z + 10


@dataclass(frozen=True)
class NumpyRenderer:
    """The renderer that runs everywhere. It holds nothing, so threads and processes may share it."""

    notice: str = ""  # why it stands in for GL, for the user to read
    device: str = "numpy"

    def render_maps(self, mesh: Mesh, height: int, width: int) -> Float32[np.ndarray, "9 height width"]:
        """See `numpy_raster.render_maps`."""
        return render_maps(mesh, height, width)

    def close(self) -> None:
        """Nothing to free."""


def render_maps(mesh: Mesh, height: int, width: int) -> Float32[np.ndarray, "9 height width"]:
    """Normal, albedo and rendered map of a mesh, three channels each; exactly 0 where no face is.

    Normals are interpolated, neither renormalised nor remapped; rendered = albedo * light may leave [0, 1].
    """
    seen = rasterize(mesh, height, width)
    normal = np.einsum("nk,nkc->nc", seen.weights, np.take(mesh.normals, mesh.faces[seen.face], axis=0))
    grid = np.einsum("nk,nkc->nc", seen.weights, np.take(texture_grid(mesh.face_uv), seen.face, axis=0))
    albedo = sample_texture(mesh.texture, grid)
    rendered = albedo * shade(normal, mesh.light)
    maps = np.zeros((9, height * width), np.float32)
    maps[:, seen.pixel] = np.concatenate([normal, albedo, rendered], axis=1).T
    return maps.reshape(9, height, width)


def rasterize(mesh: Mesh, height: int, width: int) -> Fragments:
    """The nearest face at each covered pixel, in no particular order.

    Pixel centres are ((2c+1)/width - 1, (2r+1)/height - 1). A face covers a centre strictly inside it, whichever way
    the face winds. Equal depths go to the lower face index.
    Source: pytorch3d's `rasterize_meshes` with blur 0, one face a pixel, no perspective correction.
    """
    drawn, corners, areas = drawable_faces(mesh)
    first, end = _boxes(corners, height, width)
    pairs = (end - first).prod(axis=1)
    seen: list[Fragments] = []
    for run in np.split(np.arange(len(drawn)), _run_ends(pairs)):
        seen = [_front([*seen, _over_pixels(corners, areas, first, end, run, height, width)], height * width)]
    return Fragments(seen[0].pixel, drawn[seen[0].face], seen[0].weights, seen[0].depth)


def texture_grid(face_uv: Float32[np.ndarray, "faces 3 2"]) -> Float32[np.ndarray, "faces 3 2"]:
    """Texture coordinates as the official sampler takes them: [-1, 1], x right, y down."""
    return (face_uv * 2 - 1) * np.array([1, -1], np.float32)


def sample_texture(
    texture: Float32[np.ndarray, "size size 3"], grid: Float32[np.ndarray, "n 2"]
) -> Float32[np.ndarray, "n 3"]:
    """Bilinear, 0 beyond the texture; -1 and 1 are the outer edges of its outer texels."""
    size = len(texture)
    stride = size + 2
    padded = np.pad(texture, ((1, 1), (1, 1), (0, 0)))  # one ring of zeros is all that bilinear reaches
    texels = padded.reshape(-1, 3)
    position = np.clip(((grid + 1) * size - 1) / 2, -1, size)  # in texels
    texel = np.clip(np.floor(position), -1, size - 1).astype(np.intp)
    right, down = (position - texel).astype(np.float32).T[..., None]
    first = (texel[:, 1] + 1) * stride + texel[:, 0] + 1
    a, b, c, d = (np.take(texels, first + step, axis=0) for step in (0, 1, stride, stride + 1))
    top, bottom = a * (1 - right) + b * right, c * (1 - right) + d * right
    colours: Float32[np.ndarray, "n 3"] = top * (1 - down) + bottom * down
    return colours


def shade(normal: Float32[np.ndarray, "n 3"], light: Float32[np.ndarray, "9 3"]) -> Float32[np.ndarray, "n 3"]:
    """Diffuse light on surfaces of these normals, which need not be of unit length."""
    irradiance: Float32[np.ndarray, "n 3"] = harmonics(normal) @ (SH_FACTORS[:, None] * light)
    return irradiance


def _pixel_centres(count: int) -> Scalars:
    return (2 * np.arange(count, dtype=np.float32) + 1) / np.float32(count) - 1


def _boxes(corners: Corners, height: int, width: int) -> tuple[Pixels, Pixels]:
    """First and end (column, row) of the pixels whose centres may lie in each face's box."""
    frame = np.array([width, height])
    margin = 1e-3  # px; more than float32 rounds off
    a, b, c = (((corners[:, k, :2] + 1) * frame - 1) / 2 for k in range(3))  # in pixels
    first = np.clip(np.ceil(np.minimum(np.minimum(a, b), c) - margin), 0, frame).astype(np.intp)
    end = np.clip(np.floor(np.maximum(np.maximum(a, b), c) + margin) + 1, first, frame).astype(np.intp)
    return first, end


def _run_ends(pairs: Indices) -> Int[np.ndarray, " ends"]:
    """Where to cut the faces so that no run holds many more than PAIRS_AT_ONCE pairs."""
    runs = np.cumsum(pairs) // PAIRS_AT_ONCE
    return np.flatnonzero(np.diff(runs)) + 1


def _over_pixels(corners: Corners, areas: Float32[np.ndarray, " faces"], first: Pixels, end: Pixels,
                 run: Int[np.ndarray, " run"], height: int, width: int) -> Fragments:
    """Every pair of a face of the run and a pixel that it covers."""
    columns, rows = (end - first)[run].T
    count = columns * rows
    face = np.repeat(run, count)
    step = np.arange(len(face)) - np.repeat(np.cumsum(count) - count, count)
    row, column = np.divmod(step, np.repeat(columns, count))
    row, column = row + first[face, 1], column + first[face, 0]
    centre = _pixel_centres(width)[column], _pixel_centres(height)[row]
    inside, weights = _barycentric(corners, areas + AREA_EPSILON, face, *centre)
    face, pixel = face[inside], (row * width + column)[inside]
    depth = np.einsum("nk,nk->n", weights, np.take(corners[..., 2], face, axis=0) + DEPTH_OFFSET)
    return Fragments(pixel, face, weights, depth)


def _front(parts: list[Fragments], pixels: int) -> Fragments:
    """The nearest of all parts at each pixel."""
    pixel, face, weights, depth = (
        arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        for arrays in zip(*((part.pixel, part.face, part.weights, part.depth) for part in parts), strict=True))
    nearest = _nearest(pixel, face, depth, pixels)
    return Fragments(pixel[nearest], face[nearest], weights[nearest], depth[nearest])


def _barycentric(
    corners: Corners, areas: Float32[np.ndarray, " faces"], face: Indices, x: Scalars, y: Scalars
) -> tuple[Int[np.ndarray, " inside"], Float32[np.ndarray, "inside 3"]]:
    """Which pairs' points lie inside, and the weights of those."""
    flat = np.ascontiguousarray(corners[..., :2].transpose(1, 2, 0)).reshape(6, -1)
    ax, ay, bx, by, cx, cy = np.take(flat, face, axis=1)
    area = areas[face]
    u, v, w = (_edge(*ends, x, y) / area for ends in ((bx, by, cx, cy), (cx, cy, ax, ay), (ax, ay, bx, by)))
    inside = np.flatnonzero((u > 0) & (v > 0) & (w > 0))
    return inside, np.stack([u[inside], v[inside], w[inside]], axis=1)


def _edge(x0: Scalars, y0: Scalars, x1: Scalars, y1: Scalars, x: Scalars, y: Scalars) -> Scalars:
    """Twice the signed area that each point x, y spans with an edge."""
    area: Scalars = (x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)
    return area


def _nearest(pixel: Indices, face: Indices, depth: Scalars, pixels: int) -> Int[np.ndarray, " seen"]:
    """Positions of the winning pairs."""
    # Non-negative floats sort as their bits do, so one integer holds the depth and, for ties, the face.
    key = depth.view(np.uint32).astype(np.uint64) << np.uint64(32) | face.astype(np.uint64)
    best = np.full(pixels, np.iinfo(np.uint64).max)
    nearer = in_front = np.flatnonzero(depth >= 0)
    while len(nearer):  # of several pairs at one pixel an assignment keeps any one; as many rounds as layers at most
        best[pixel[nearer]] = key[nearer]
        nearer = nearer[key[nearer] < best[pixel[nearer]]]
    return in_front[key[in_front] == best[pixel[in_front]]]
