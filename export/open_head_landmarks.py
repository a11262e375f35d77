"""Where the 478 landmarks lie on the open head: measured on pictures of it, from several sides.

Each picture's points are traced back to the surface; lips are measured on an open mouth, where the upper and the
lower edge are apart. The results are averaged on the mean head and put back onto the nearest visible triangle.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8

from caphuman_edge.runtime.head.code import HeadCode, project
from caphuman_edge.runtime.head.light import directional_light
from caphuman_edge.runtime.head.model import HeadModel
from caphuman_edge.runtime.perception.rotation import canonical_face
from caphuman_edge.runtime.render.maps import Mesh
from caphuman_edge.runtime.render.numpy_raster import rasterize, render_maps

Measure = Callable[[UInt8[np.ndarray, "h w 3"]], Float[np.ndarray, "478 3"]]
VIEW_SIZE = 448  # px
ANGLES = ((0, 0), (-12, 0), (12, 0), (-25, 0), (25, 0), (-38, 0), (38, 0), (0, 12), (0, -12))  # yaw, pitch in degrees
IDENTITIES = 4  # random ones beside the mean head
OPEN_MOUTH = {"jawOpen": 0.35}
IRIS = range(468, 478)
INNER_LIPS = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 95, 88, 178, 87, 14, 317, 402, 318, 324)
NEIGHBOURS = 48  # triangles examined for the nearest point
BACKGROUND = 0.5


@dataclass(frozen=True)
class View:
    """A picture of the head and what lies behind each of its pixels."""

    code: HeadCode
    image: UInt8[np.ndarray, "h w 3"]
    face: Int64[np.ndarray, "h w"]  # -1: background
    weights: Float64[np.ndarray, "h w 3"]
    facing: Float64[np.ndarray, "h w"]  # cosine between the surface's normal and the line of sight


def embed_landmarks(
    model: HeadModel, eyeballs: Bool[np.ndarray, "f"], measure: Measure,
) -> tuple[Int64[np.ndarray, "478"], Float64[np.ndarray, "478 3"]]:
    """For each landmark its triangle and barycentric weights; the model's own landmarks are not used."""
    total, weight, seen = np.zeros((478, 3)), np.full((478, 1), 1e-9), np.zeros(len(model.faces), bool)
    corners = model.template[model.faces]
    for view in _views(model):
        seen[np.unique(view.face[view.face >= 0])] = True
        face, bary, confidence = _trace(measure(view.image)[:, :2], view)
        confidence[list(INNER_LIPS)] *= view.code.expression.any()
        total += confidence[:, None] * np.einsum("lk,lkc->lc", bary, corners[face])
        weight += confidence[:, None]
    points = _symmetrical(total / weight)
    skin_face, skin_bary = _nearest_on(points, corners, np.flatnonzero(seen & ~eyeballs))
    eye_face, eye_bary = _nearest_on(points, corners, np.flatnonzero(seen & eyeballs))
    on_iris = np.isin(np.arange(478), IRIS)
    return np.where(on_iris, eye_face, skin_face), np.where(on_iris[:, None], eye_bary, skin_bary)


def draw(model: HeadModel, code: HeadCode, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The lit head on grey."""
    maps = render_maps(_mesh(model, code), size, size)
    picture = np.where(maps[:3].any(axis=0), maps[6:], BACKGROUND)
    return np.asarray(np.clip(picture * 255, 0, 255).transpose(1, 2, 0), np.uint8)


def _views(model: HeadModel) -> Iterator[View]:
    draws = np.random.default_rng(0).standard_normal((IDENTITIES, model.layout.identity_count)) * 0.7
    neutral = HeadCode.neutral(model.layout).moved(y=-0.1, scale=1.35).lit(directional_light(15, 35))
    for identity in (np.zeros_like(draws[0]), *draws):
        for expression in ({}, OPEN_MOUTH):
            for yaw, pitch in ANGLES:
                yield _view(model, replace(neutral, identity=identity).expressed(expression).posed(yaw, pitch))


def _view(model: HeadModel, code: HeadCode) -> View:
    mesh = _mesh(model, code)
    seen = rasterize(mesh, VIEW_SIZE, VIEW_SIZE)
    face, weights, facing = np.full(VIEW_SIZE**2, -1), np.zeros((VIEW_SIZE**2, 3)), np.zeros(VIEW_SIZE**2)
    face[seen.pixel], weights[seen.pixel] = seen.face, seen.weights
    facing[seen.pixel] = np.einsum("nk,nk->n", seen.weights, mesh.normals[mesh.faces[seen.face], 2])
    square = (VIEW_SIZE, VIEW_SIZE)
    return View(code, draw(model, code, VIEW_SIZE), face.reshape(square), weights.reshape(*square, 3),
                facing.reshape(square))


def _mesh(model: HeadModel, code: HeadCode) -> Mesh:
    vertices = model.vertices(code)
    return Mesh(project(vertices, code), model.normals(vertices), model.faces, model.face_uv, model.texture(code),
                code.light)


def _trace(points: Float[np.ndarray, "l 2"], view: View) -> tuple[
        Int64[np.ndarray, "l"], Float64[np.ndarray, "l 3"], Float64[np.ndarray, "l"]]:
    """Triangle, weights and confidence behind each picture point; confidence is 0 beside the head."""
    column, row = np.clip(points.astype(int), 0, VIEW_SIZE - 1).T
    face = view.face[row, column]
    confidence = np.where(face >= 0, np.clip(view.facing[row, column], 0, 1) ** 2, 0)
    return face, view.weights[row, column], confidence


def _symmetrical(points: Float64[np.ndarray, "478 3"]) -> Float64[np.ndarray, "478 3"]:
    """Average with the mirror image; the landmark model's own mean face tells which points are mirror twins."""
    mirror = np.array([-1.0, 1, 1])
    canonical = canonical_face()[:, :3]
    twins = np.concatenate([_nearest(canonical * mirror, canonical), 468 + _nearest(points[468:] * mirror, points[468:])])
    return np.asarray((points + points[twins] * mirror) / 2)


def _nearest(points: Float[np.ndarray, "n 3"], among: Float[np.ndarray, "m 3"]) -> Int64[np.ndarray, "n"]:
    return np.asarray(np.argmin(((points[:, None] - among) ** 2).sum(axis=2), axis=1))


def _nearest_on(points: Float64[np.ndarray, "l 3"], corners: Float32[np.ndarray, "f 3 3"],
                candidates: Int64[np.ndarray, "c"]) -> tuple[Int64[np.ndarray, "l"], Float64[np.ndarray, "l 3"]]:
    """The nearest triangle of the candidates to each point, and the weights of the nearest spot in it."""
    faces, weights = [], []
    centres = corners[candidates].mean(axis=1)
    for point in points:
        near = candidates[np.argsort(((centres - point) ** 2).sum(axis=1))[:NEIGHBOURS]]
        bary = _barycentric(point, corners[near].astype(np.float64))
        spots = np.einsum("nk,nkc->nc", bary, corners[near])
        best = np.argmin(((spots - point) ** 2).sum(axis=1))
        faces.append(near[best])
        weights.append(bary[best])
    return np.array(faces), np.array(weights)


def _barycentric(point: Float64[np.ndarray, "3"], corners: Float64[np.ndarray, "n 3 3"]) -> Float64[np.ndarray, "n 3"]:
    """Weights of the point's foot on each triangle's plane, pulled into the triangle."""
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    edges = np.stack([b - a, c - a], axis=-1)  # (N, 3, 2)
    inside = np.einsum("nkc,nc->nk", np.linalg.pinv(edges), point - a)
    weights = np.clip(np.column_stack([1 - inside.sum(axis=1), inside]), 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
