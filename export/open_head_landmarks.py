"""Where the 478 landmarks lie on the open head: measured on pictures of it, from several sides.

Each picture's points are traced back to the surface; lips are measured on an open mouth, where the upper and the
lower edge are apart. The outline of the face is no place on the skin that a picture could show: it is taken from the
landmark model's mean face, laid over the other points by an affine map. The results are averaged on the mean head and
put back onto the nearest visible triangle.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, UInt8

from caphuman_edge.runtime.head.code import HeadCode, project
from caphuman_edge.runtime.head.light import directional_light
from caphuman_edge.runtime.head.model import HeadModel
from caphuman_edge.runtime.perception.landmarks import FACE_OVAL
from caphuman_edge.runtime.perception.rotation import canonical_face
from caphuman_edge.runtime.render.maps import Mesh
from caphuman_edge.runtime.render.numpy_raster import rasterize, render_maps

Measure = Callable[[UInt8[np.ndarray, "h w 3"]], Float[np.ndarray, "478 3"]]
VIEW_SIZE = 448  # px
ANGLES = ((0, 0), (-12, 0), (12, 0), (-25, 0), (25, 0), (-38, 0), (38, 0), (0, 12), (0, -12))  # yaw, pitch in degrees
REACH = 5  # px from a point to the surface it is on
IDENTITIES = 4  # random ones beside the mean head
OPEN_MOUTH = {"jawOpen": 0.35}
FIRST_IRIS = 468
INNER_LIPS = [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 95, 88, 178, 87, 14, 317, 402, 318, 324]
NEIGHBOURS = 48  # triangles examined for the nearest point
BACKGROUND = 0.5
MIRROR = np.array([-1.0, 1, 1])


@dataclass(frozen=True)
class View:
    """A picture of the head and what lies behind each of its pixels."""

    code: HeadCode
    image: UInt8[np.ndarray, "h w 3"]
    face: Int64[np.ndarray, "h w"]  # -1: background
    weights: Float64[np.ndarray, "h w 3"]
    facing: Float64[np.ndarray, "h w"]  # cosine between the surface's normal and the line of sight


def embed_landmarks(
    model: HeadModel, skin: Bool[np.ndarray, "f"], eyeballs: Bool[np.ndarray, "f"], measure: Measure,
) -> tuple[Int64[np.ndarray, "478"], Float64[np.ndarray, "478 3"]]:
    """For each landmark its triangle and barycentric weights; the model's own landmarks are not used."""
    total, weight, seen = np.zeros((478, 3)), np.full((478, 1), 1e-9), np.zeros(len(model.faces), bool)
    corners = model.template[model.faces].astype(np.float64)
    surface = np.where(np.arange(478)[:, None] < FIRST_IRIS, skin, eyeballs)  # (478, F): what each landmark can lie on
    for view in _views(model):
        seen[np.unique(view.face[view.face >= 0])] = True
        face, bary, confidence = _trace(measure(view.image)[:, :2], view, surface)
        if not view.code.expression.any():  # closed: which lip the point between them lies on is chance
            confidence[INNER_LIPS] = 0
        total += confidence[:, None] * np.einsum("lk,lkc->lc", bary, corners[face])
        weight[:, 0] += confidence
    points = total / weight
    points[FACE_OVAL] = _laid_over(points)[FACE_OVAL]
    return _nearest_on(_symmetrical(points), corners, seen & surface)


def draw(model: HeadModel, code: HeadCode, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The lit head on grey."""
    maps = render_maps(_mesh(model, code), size, size)
    picture = np.where(maps[:3].any(axis=0), maps[6:], BACKGROUND)
    return np.asarray(np.clip(picture * 255, 0, 255).transpose(1, 2, 0), np.uint8)


def _views(model: HeadModel) -> Iterator[View]:
    draws = np.random.default_rng(0).standard_normal((IDENTITIES, model.layout.identity_count)) * 0.7
    neutral = HeadCode.neutral(model.layout).moved(y=-0.1, scale=1.35).lit(directional_light(15.0, 35.0))
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


def _trace(points: Float[np.ndarray, "l 2"], view: View, surface: Bool[np.ndarray, "l f"]) -> tuple[
        Int64[np.ndarray, "l"], Float64[np.ndarray, "l 3"], Float64[np.ndarray, "l"]]:
    """What lies nearest to each picture point, of the surface that it can lie on.

    Confidence falls as the surface turns away, and is 0 where nothing suitable is within reach.
    """
    offsets = np.indices((2 * REACH + 1,) * 2).reshape(2, -1).T - REACH
    offsets = offsets[np.argsort((offsets**2).sum(axis=1), kind="stable")]
    near = np.clip(points[:, None, ::-1].astype(int) + offsets, 0, VIEW_SIZE - 1)  # (L, offsets, row and column)
    faces = view.face[near[..., 0], near[..., 1]]
    suitable = np.take_along_axis(surface, np.maximum(faces, 0), axis=1) & (faces >= 0)
    row, column = near[np.arange(len(points)), suitable.argmax(axis=1)].T
    confidence = suitable.any(axis=1) * np.clip(view.facing[row, column], 0, 1) ** 2
    return view.face[row, column], view.weights[row, column], confidence


def _laid_over(points: Float64[np.ndarray, "478 3"]) -> Float64[np.ndarray, "468 3"]:
    """The landmark model's mean face, brought onto the points inside the oval by an affine map."""
    canonical = np.column_stack([canonical_face()[:, :3], np.ones(FIRST_IRIS)]).astype(np.float64)
    inner = np.setdiff1d(np.arange(FIRST_IRIS), FACE_OVAL)
    return np.asarray(canonical @ np.linalg.lstsq(canonical[inner], points[inner], rcond=None)[0])


def _symmetrical(points: Float64[np.ndarray, "478 3"]) -> Float64[np.ndarray, "478 3"]:
    """Average with the mirror image."""
    return np.asarray((points + points[_twins(points[FIRST_IRIS:])] * MIRROR) / 2)


def mirror_twins(model: HeadModel) -> Int64[np.ndarray, "478"]:
    """The landmark on the other side of the face for each landmark."""
    return _twins(model.landmarks(model.template)[FIRST_IRIS:])


def _twins(irises: Float[np.ndarray, "10 3"]) -> Int64[np.ndarray, "478"]:
    """The landmark model's own mean face tells which points are mirror twins; the irises are not in it."""
    canonical = canonical_face()[:, :3]
    return np.concatenate([_nearest(canonical * MIRROR, canonical), FIRST_IRIS + _nearest(irises * MIRROR, irises)])


def _nearest(points: Float[np.ndarray, "n 3"], among: Float[np.ndarray, "m 3"]) -> Int64[np.ndarray, "n"]:
    return np.asarray(np.argmin(((points[:, None] - among) ** 2).sum(axis=2), axis=1))


def _nearest_on(points: Float64[np.ndarray, "l 3"], corners: Float64[np.ndarray, "f 3 3"],
                surface: Bool[np.ndarray, "l f"]) -> tuple[Int64[np.ndarray, "l"], Float64[np.ndarray, "l 3"]]:
    """The nearest triangle of each point's surface, and the weights of the nearest spot in it."""
    faces, weights = [], []
    centres = corners.mean(axis=1)
    for point, candidates in zip(points, map(np.flatnonzero, surface), strict=True):
        distance = ((centres[candidates] - point) ** 2).sum(axis=1)
        near = candidates[np.argpartition(distance, NEIGHBOURS)[:NEIGHBOURS]]
        bary = _barycentric(point, corners[near])
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
