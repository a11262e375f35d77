"""DECA's renderer in PyTorch: a posed head to the nine condition maps, as the official tool draws them for CapFace.

A plain rasteriser of pytorch3d's semantics, tile by tile and without a compiled extension: every pixel of a tile is
tested against every face whose box meets the tile. It is the measure for the runtime's renderers, so clear before fast.
Frame: x right, y down, -1..1; pixel centres at ((2c+1)/width - 1, (2r+1)/height - 1); smaller z is nearer.
Sources: Feng et al. 2021 (DECA, arXiv 2012.04012); Ravi et al. 2020 (pytorch3d, arXiv 2007.08501);
Ramamoorthi and Hanrahan 2001, "An Efficient Representation for Irradiance Environment Maps".
"""
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CROP = 224  # px: what DECA's camera projects into, and crop transforms start from
DEPTH_OFFSET = 10  # added to z, so that no head lies behind the viewer
AREA_EPSILON = 1e-8  # faces of no larger area are skipped; it also enters the barycentric denominators
TILE = 16  # px
# Spherical harmonics' constants times the cosine lobe's. The first lacks its factor pi, as DECA's does.
PI = torch.pi
SH_FACTORS = torch.tensor([
    (1 / (4 * PI)) ** 0.5,
    *3 * [2 * PI / 3 * (3 / (4 * PI)) ** 0.5],
    *3 * [PI / 4 * (15 / (4 * PI)) ** 0.5],
    PI / 4 * (15 / (16 * PI)) ** 0.5,
    PI / 4 * (5 / (16 * PI)) ** 0.5,
])


class Fragments(NamedTuple):
    """The nearest face at each pixel; -1 everywhere where there is none."""

    pix_to_face: Int[Tensor, "b h w"]  # counts from 0 in every mesh
    zbuf: Float[Tensor, "b h w"]
    bary: Float[Tensor, "b h w 3"]


class Maps(NamedTuple):
    """Condition maps and what they were made from; 0 where no face is, but for `shading`."""

    normal: Float[Tensor, "b 3 h w"]  # world space, neither renormalised nor remapped
    albedo: Float[Tensor, "b 3 h w"]
    rendered: Float[Tensor, "b 3 h w"]  # may leave 0..1
    shading: Float[Tensor, "b 3 h w"]
    alpha: Float[Tensor, "b 1 h w"]
    grid: Float[Tensor, "b h w 2"]  # where the texture is read: -1..1, x right, y down
    fragments: Fragments

    @property
    def hint(self) -> Float[Tensor, "b 9 h w"]:
        """What CapFace reads."""
        return torch.cat([self.normal, self.albedo, self.rendered], dim=1)


def project(points: Float[Tensor, "b n 3"], camera: Float[Tensor, "b 3"]) -> Float[Tensor, "b n 3"]:
    """Orthographic camera (scale, shift right, shift up): posed points, y up, to the crop's frame, y down."""
    scale, shift = camera[:, None, :1], camera[:, None, 1:]
    moved = torch.cat([points[..., :2] + shift, points[..., 2:]], dim=2)
    return scale * moved * torch.tensor([1, -1, -1], device=points.device)


def to_frame(points: Float[Tensor, "b n 3"], tform: Float[Tensor, "b 3 3"],
             size: tuple[int, int]) -> Float[Tensor, "b n 3"]:
    """From the crop's frame to the picture's; z stays.

    `tform` takes crop pixels to picture pixels, as row vectors; size is (height, width). Neither end has half-pixel
    terms, and the crop that tform was made for is 223 px wide: the official misalignment of less than a pixel.
    """
    pixels = F.pad((points[..., :2] * 0.5 + 0.5) * CROP, (0, 1), value=1) @ tform
    extent = torch.tensor(size[::-1], device=points.device)
    return torch.cat([pixels[..., :2] / extent * 2 - 1, points[..., 2:]], dim=2)


def render(vertices: Float[Tensor, "b v 3"], screen: Float[Tensor, "b v 3"], faces: Int[Tensor, "f 3"],
           face_uv: Float[Tensor, "f 3 2"], albedo: Float[Tensor, "b 3 t t"], light: Float[Tensor, "b 9 3"],
           size: tuple[int, int]) -> Maps:
    """Draw posed heads: `vertices` give the normals, `screen` (projected) the places, face_uv (u right, v up) the skin.

    light: coefficients in the order 1, x, y, z, xy, xz, yz, x2-y2, 3z2-1, RGB. size: (height, width).
    """
    behind = torch.tensor([0, 0, DEPTH_OFFSET], device=screen.device)
    fragments = rasterize((screen + behind)[:, faces], *size)
    alpha = (fragments.pix_to_face >= 0)[:, None].to(vertices.dtype)
    flipped = (face_uv * 2 - 1) * torch.tensor([1, -1], device=face_uv.device)
    grid = interpolate(flipped.expand(len(vertices), -1, -1, -1), fragments)
    normal = interpolate(vertex_normals(vertices, faces)[:, faces], fragments).permute(0, 3, 1, 2)
    colour = F.grid_sample(albedo, grid, mode="bilinear", padding_mode="zeros", align_corners=False) * alpha
    shading = shade(normal, light)
    return Maps(normal, colour, colour * shading, shading, alpha, grid, fragments)


def rasterize(corners: Float[Tensor, "b f 3 3"], height: int, width: int) -> Fragments:
    """The nearest face whose inside, without its edges, holds each pixel's centre; of equal depths the first face.

    corners: (x, y, z) of every face's corners. No culling, no perspective, one face a pixel.
    """
    return Fragments(*map(torch.stack, zip(*(_rasterize_mesh(mesh, height, width) for mesh in corners), strict=True)))


def _rasterize_mesh(corners: Float[Tensor, "f 3 3"], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Faces, depths and weights of one mesh."""
    nearest = torch.full((height, width), -1, device=corners.device)
    depth, weights = corners.new_full((height, width), -1), corners.new_full((height, width, 3), -1)
    low, high = corners[..., :2].amin(dim=1), corners[..., :2].amax(dim=1)
    a, b, c = corners[..., :2].unbind(dim=1)
    drawn = _edge(c, a, b).abs() > AREA_EPSILON
    x, y = _pixel_centres(width, corners), _pixel_centres(height, corners)
    for top, left in product(range(0, height, TILE), range(0, width, TILE)):
        rows, columns = slice(top, top + TILE), slice(left, left + TILE)
        centres = torch.stack(torch.meshgrid(x[columns], y[rows], indexing="xy"), dim=-1)
        meets = drawn & (high >= centres[0, 0]).all(dim=1) & (low <= centres[-1, -1]).all(dim=1)
        if meets.any():
            faces = meets.nonzero()[:, 0]
            seen, depth[rows, columns], weights[rows, columns] = _nearest(centres, corners[faces])
            nearest[rows, columns] = torch.where(seen >= 0, faces[seen], -1)
    return nearest, depth, weights


def _nearest(centres: Float[Tensor, "h w 2"], corners: Float[Tensor, "f 3 3"]) -> tuple[Tensor, Tensor, Tensor]:
    """Position of the nearest face at each centre, its depth and its weights; -1 where none is."""
    bary = barycentric(centres[:, :, None], corners[..., :2])  # (h, w, f, 3)
    depth = (bary * corners[..., 2]).sum(dim=-1)
    hit = (bary > 0).all(dim=-1) & (depth >= 0)
    zbuf, seen = depth.masked_fill(~hit, torch.inf).min(dim=2)
    weights = bary.gather(2, seen[..., None, None].expand(-1, -1, 1, 3))[:, :, 0]
    nothing = zbuf.isinf()
    return (seen.masked_fill(nothing, -1), zbuf.masked_fill(nothing, -1), weights.masked_fill(nothing[..., None], -1))


def barycentric(points: Float[Tensor, "*#n 2"], corners: Float[Tensor, "f 3 2"]) -> Float[Tensor, "*n 3"]:
    """Weights of each face's corners at points. They fall short of a sum of 1 by the epsilon in the denominator."""
    a, b, c = corners.unbind(dim=-2)
    area = _edge(c, a, b) + AREA_EPSILON
    return torch.stack([_edge(points, b, c), _edge(points, c, a), _edge(points, a, b)], dim=-1) / area[..., None]


def interpolate(corners: Float[Tensor, "b f 3 d"], fragments: Fragments) -> Float[Tensor, "b h w d"]:
    """Values of the faces' corners at every pixel, 0 where no face is."""
    mesh = torch.arange(len(corners), device=corners.device)[:, None, None]
    values = (corners[mesh, fragments.pix_to_face.clamp(min=0)] * fragments.bary[..., None]).sum(dim=3)
    return values.masked_fill((fragments.pix_to_face < 0)[..., None], 0)


def vertex_normals(vertices: Float[Tensor, "b v 3"], faces: Int[Tensor, "f 3"]) -> Float[Tensor, "b v 3"]:
    """Unit normals: the sum of the adjoining faces' normals, each as long as its face is large."""
    a, b, c = vertices[:, faces].unbind(dim=2)
    face_normals = torch.linalg.cross(b - a, c - a)
    sums = torch.zeros_like(vertices)
    for corner in faces.unbind(dim=1):
        sums.index_add_(1, corner, face_normals)
    return F.normalize(sums, eps=1e-6, dim=2)


def shade(normal: Float[Tensor, "b 3 h w"], light: Float[Tensor, "b 9 3"]) -> Float[Tensor, "b 3 h w"]:
    """Diffuse light by nine spherical harmonics of a normal, which need not be of unit length."""
    x, y, z = normal.unbind(dim=1)
    harmonics = torch.stack([torch.ones_like(x), x, y, z, x * y, x * z, y * z, x**2 - y**2, 3 * z**2 - 1], dim=1)
    return torch.einsum("bkhw,k,bkc->bchw", harmonics, SH_FACTORS.to(normal.device), light)


def _edge(point: Float[Tensor, "*#n 2"], start: Float[Tensor, "*#n 2"],
          end: Float[Tensor, "*#n 2"]) -> Float[Tensor, "*n"]:
    """Twice the signed area of a point and an edge, in pytorch3d's sign."""
    away, along = point - start, end - start
    return away[..., 0] * along[..., 1] - away[..., 1] * along[..., 0]


def _pixel_centres(count: int, like: Tensor) -> Float[Tensor, "n"]:
    return (2 * torch.arange(count, dtype=like.dtype, device=like.device) + 1) / count - 1
