"""Light and texture of a fitted head, from the photo's skin pixels.

Colour = albedo * shading is linear in the light for known texture and the other way round: ridge regression alternates
between them. Light is one grey part and a little colour, so that the skin's colour goes to the texture.
"""
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from caphuman_edge.runtime.head.code import HeadCode, project
from caphuman_edge.runtime.head.light import directional_light, shading_basis
from caphuman_edge.runtime.head.model import HeadModel
from caphuman_edge.runtime.perception.landmarks import FACE_OVAL
from caphuman_edge.runtime.render.maps import Mesh
from caphuman_edge.runtime.render.numpy_raster import rasterize, sample_texture, texture_grid

Samples = Float32[np.ndarray, "n 3"]
ROUNDS = 4
NOISE = 0.6  # of a pixel's colour; large, as neighbours err together
OUTLIER = 0.1  # a pixel that is off by this counts half: hair, glasses, cast shadows
GREY_SIGMA, TINT_SIGMA, TEXTURE_SIGMA = 0.3, 0.05, 2.0
LEAST_FACING = 0.15  # cosine to the line of sight below which a sample is not used
SEEN_FROM_THE_FRONT = 256  # px
JAW_AND_BROWS = [*range(17), *range(26, 16, -1)]  # of the 68 points


class Appearance:
    """Fits light and texture of one head model; samples are the centres of its face's triangles."""

    def __init__(self, model: HeadModel):
        self.model = model
        self.faces = _faces_of_the_face(model)
        grid = texture_grid(model.face_uv[self.faces]).mean(axis=1)
        self.albedo = sample_texture(model.texture_mean, grid)
        parts = [sample_texture(part, grid) for part in model.texture_basis]
        self.albedo_basis = np.array(parts, np.float32).reshape(len(parts), *self.albedo.shape).transpose(1, 2, 0)

    def fit(self, code: HeadCode, image: UInt8[np.ndarray, "h w 3"]) -> HeadCode:
        """The code with the light and the texture of the photo it was fitted to."""
        vertices = self.model.vertices(code)
        normals = self.model.normals(vertices)[self.model.faces[self.faces]].mean(axis=1)
        places = project(vertices, code)[self.model.faces[self.faces], :2].mean(axis=1)
        inside = (np.abs(places) < 1).all(axis=1) & (normals[:, 2] > LEAST_FACING)
        colours = _pixels(image, places[inside])
        shading, albedo, basis = shading_basis(normals[inside]), self.albedo[inside], self.albedo_basis[inside]
        light = directional_light(0.0, 30.0)
        weight = np.ones(len(colours), np.float32)
        for _ in range(ROUNDS):
            lit = shading @ light
            texture = _ridge(basis * lit[..., None], colours - albedo * lit, weight, TEXTURE_SIGMA)
            painted = albedo + basis @ texture
            light = _light(colours, painted, shading, weight)
            weight = _weights(colours - painted * (shading @ light))
        return replace(code, light=light, texture=texture)


def _faces_of_the_face(model: HeadModel) -> Int32[np.ndarray, "n"]:
    """Triangles inside the landmarks' outline that are seen on the mean head from the front."""
    code = HeadCode.neutral(model.layout)
    vertices = model.vertices(code)
    screen = project(vertices, code)
    mesh = Mesh(screen, model.normals(vertices), model.faces, model.face_uv, model.texture_mean, code.light)
    seen = np.unique(rasterize(mesh, SEEN_FROM_THE_FRONT, SEEN_FROM_THE_FRONT).face)
    outline = _outline(model, screen)
    return np.asarray(seen[_inside(screen[model.faces[seen], :2].mean(axis=1), outline)], np.int32)


def _outline(model: HeadModel, screen: Float32[np.ndarray, "v 3"]) -> Float32[np.ndarray, "m 2"]:
    """Around the face; on a FLAME head, along jaw and brows."""
    if len(model.contour_corners):
        return np.asarray(model.landmarks68(screen, np.eye(3, dtype=np.float32))[JAW_AND_BROWS, :2])
    return np.asarray(model.landmarks(screen)[FACE_OVAL, :2])


def _inside(points: Float32[np.ndarray, "n 2"], outline: Float32[np.ndarray, "m 2"]) -> np.ndarray:
    """Even-odd rule: a ray to the right crosses the outline an odd number of times."""
    (x, y), ends = points.T[..., None], np.roll(outline, -1, axis=0)
    (x0, y0), (x1, y1) = outline.T, ends.T
    crosses = (y0 > y) != (y1 > y)
    at = x0 + (y - y0) / np.where(y1 == y0, 1, y1 - y0) * (x1 - x0)
    return np.asarray((crosses & (x < at)).sum(axis=1) % 2 == 1)


def _pixels(image: UInt8[np.ndarray, "h w 3"], places: Float32[np.ndarray, "n 2"]) -> Samples:
    """Colours 0..1 at frame coordinates."""
    height, width = image.shape[:2]
    column, row = np.minimum((places + 1) / 2 * [width, height], [width - 1, height - 1]).astype(int).T  # 1 rounds up
    return np.asarray(image[row, column], np.float32) / 255


def _light(colours: Samples, albedo: Samples, shading: Float32[np.ndarray, "n 9"],
           weight: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "9 3"]:
    """Grey light near the default plus a small coloured rest."""
    expected = directional_light(0.0, 30.0)
    rest = colours - albedo * (shading @ expected)
    grey_design = albedo[..., None] * shading[:, None]  # (n, RGB, 9)
    tints = np.zeros((*grey_design.shape[:2], 3, 9), np.float32)
    for channel in range(3):
        tints[:, channel, channel] = grey_design[:, channel]
    sigma = np.repeat([GREY_SIGMA, TINT_SIGMA], [9, 27])
    design = np.concatenate([grey_design, tints.reshape(len(tints), 3, 27)], axis=2)
    change = _ridge(design, rest, weight, sigma)
    return np.asarray(expected + change[:9, None] + change[9:].reshape(3, 9).T, np.float32)


def _ridge(design: Float32[np.ndarray, "n 3 p"], target: Samples, weight: Float32[np.ndarray, "n"],
           sigma: float | np.ndarray) -> Float32[np.ndarray, "p"]:
    """Weighted least squares with every coefficient drawn to 0 by its standard deviation."""
    count = design.shape[2]
    root = np.sqrt(weight)[:, None]
    flat = (design * root[..., None]).reshape(3 * len(design), count) / NOISE
    precision = np.diag(np.broadcast_to(1 / np.square(sigma), count))
    return np.asarray(np.linalg.solve(flat.T @ flat + precision, flat.T @ (target * root).ravel() / NOISE), np.float32)


def _weights(misses: Samples) -> Float32[np.ndarray, "n"]:
    """Cauchy weights."""
    return np.asarray(1 / (1 + (misses**2).sum(axis=1) / OUTLIER**2), np.float32)
