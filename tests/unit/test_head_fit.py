"""The fit finds a known head again from its own landmarks and its own picture."""
from dataclasses import replace

import numpy as np
import pytest

from caphuman_edge.runtime.condition import condition_maps
from caphuman_edge.runtime.errors import FaceError, ShapeMismatch
from caphuman_edge.runtime.head import HeadCode, HeadFitter, directional_light, load_head, project
from caphuman_edge.runtime.head.marks import Marks
from caphuman_edge.runtime.head.model import YAW_BINS
from caphuman_edge.runtime.perception import rotation_from
from caphuman_edge.runtime.perception.bias import landmark_bias
from caphuman_edge.runtime.perception.landmarks import BLENDSHAPES
from caphuman_edge.runtime.perception.points68 import SOURCES
from caphuman_edge.runtime.render import NumpyRenderer

SIZE = 256
EYES = [468, 473]


@pytest.fixture(scope="module")
def fitter():
    return HeadFitter(load_head())


@pytest.fixture(scope="module")
def known(fitter):
    """A particular person, turned, smiling, lit from the side."""
    rng = np.random.default_rng(3)
    neutral = HeadCode.neutral(fitter.model.layout)
    person = replace(neutral, identity=rng.normal(0, 0.6, len(neutral.identity)),
                     texture=rng.normal(0, 0.5, len(neutral.texture)))
    smiling = person.expressed({"mouthSmile": 0.7, "jawOpen": 0.2})
    return smiling.posed(yaw=20.0, pitch=-5.0, roll=8.0).moved(x=0.1, y=-0.05).lit(directional_light(40.0, 20.0))


def places(head, code, height=SIZE, width=SIZE):
    """Where the landmarks are, in pixels."""
    screen = head.landmarks(project(head.vertices(code), code))
    half = max(height, width) / 2
    return np.column_stack([(screen[:, 0] + 1) * width / 2, (screen[:, 1] + 1) * height / 2, screen[:, 2] * half])


def measured(head, code, height=SIZE, width=SIZE):
    """What perception would see: points in pixels, its known error included, and the units' scores."""
    strengths = dict(zip(head.expression_names, code.expression, strict=True))
    error = landmark_bias(code.rotation) * [1, -1, -1] * code.camera[0] * max(height, width) / 2
    points = places(head, code, height, width) + error
    return points, np.array([strengths.get(name, 0.0) for name in BLENDSHAPES])


def picture(head, code):
    maps = condition_maps(NumpyRenderer(), head, code, SIZE, SIZE)
    return (np.clip(maps[6:], 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def residual(head, code, points, height=SIZE, width=SIZE):
    """Mean distance of the fitted landmarks, as a share of the distance between the irises."""
    found = measured(head, code, height, width)[0]
    eyes = np.linalg.norm(points[EYES[0], :2] - points[EYES[1], :2])
    return np.linalg.norm(found[:, :2] - points[:, :2], axis=1).mean() / eyes


def test_a_known_head_is_found_again(fitter, known):
    head = fitter.model
    points, scores = measured(head, known)
    start = HeadCode.neutral(head.layout).posed(yaw=14.0).rotation
    found = fitter.fit(points, scores, start, picture(head, known))
    assert residual(head, found, points) < 0.01
    np.testing.assert_allclose(found.angles, known.angles, atol=2)
    np.testing.assert_allclose(found.expressed({}).expression, known.expression, atol=0.25)


def test_it_looks_as_its_picture_does(fitter, known):
    head, image = fitter.model, picture(fitter.model, known)
    found = fitter.fit(*measured(head, known), known.rotation, image)
    both = (image.any(axis=2)) & (picture(head, found).any(axis=2))
    assert np.median(np.abs(picture(head, found).astype(int) - image)[both]) < 8


def test_skin_colour_goes_to_the_texture_and_not_to_the_light(fitter, known):
    head = fitter.model
    dark = replace(known, texture=np.eye(len(known.texture))[:3].sum(axis=0) * -2.5)
    albedos = []
    for code in (known, dark):
        found = fitter.fit(*measured(head, code), code.rotation, picture(head, code))
        albedos.append(head.texture(found)[:200].mean())
    assert albedos[1] < albedos[0] - 0.12


@pytest.mark.parametrize(("height", "width"), [(200, 320), (320, 200)])
def test_a_picture_that_is_not_square_keeps_the_heads_proportions(fitter, known, height, width):
    head, half = fitter.model, max(height, width) / 2
    wide = replace(known, crop=np.diag([2 * half / width, 2 * half / height, 1]))
    points, scores = measured(head, wide, height, width)
    found = fitter.fit(points, scores, wide.rotation, np.full((height, width, 3), 128, np.uint8))
    np.testing.assert_allclose(found.crop, wide.crop, atol=1e-6)
    assert residual(head, found, points, height, width) < 0.01
    np.testing.assert_allclose(found.camera[0], known.camera[0], rtol=0.05)


def test_units_stay_between_rest_and_full_strength(fitter, known):
    points, scores = measured(fitter.model, known)
    found = fitter.fit(points * [1, 1.3, 1], 2 * scores, known.rotation, picture(fitter.model, known))
    assert found.expression.min() >= 0
    assert found.expression.max() <= 1


@pytest.mark.parametrize("points", [np.zeros((478, 3)), np.full((478, 3), np.nan)])
def test_points_that_are_no_face_are_refused(fitter, points):
    with pytest.raises(FaceError):
        fitter.fit(points, np.zeros(52), np.eye(3), np.zeros((SIZE, SIZE, 3), np.uint8))


def test_a_head_without_landmarks_of_either_scheme_cannot_be_fitted():
    head = load_head()
    few = replace(head, landmark_corners=head.landmark_corners[:68], landmark_weights=head.landmark_weights[:68])
    with pytest.raises(ShapeMismatch, match="68 landmarks, expected 478, or 51"):
        HeadFitter(few)


def test_the_network_follows_yaw_but_not_all_of_pitch(fitter):
    """Points near the viewer move most as a head turns; the error is the share of that which they lack."""
    depth, turn = fitter.model.landmarks(fitter.model.template)[:, 2], 20.0
    up, aside = (landmark_bias(rotation_from(*angles)) - landmark_bias(np.eye(3)) for angles in
                 ((0.0, turn, 0.0), (turn, 0.0, 0.0)))
    lacking = [-np.polyfit(depth, shift, 1)[0] / np.radians(turn) for shift in (up[:, 1], aside[:, 0])]
    assert 0.15 < lacking[0] < 0.35
    assert abs(lacking[1]) < 0.08


def test_the_networks_error_turns_with_a_tilted_head():
    level, tilted = (landmark_bias(rotation_from(15.0, -10.0, roll)) for roll in (0.0, 30.0))
    np.testing.assert_allclose(tilted, level @ rotation_from(0.0, 0.0, 30.0).T, atol=1e-9)


@pytest.fixture(scope="module")
def flame_fitter(fitter):
    return HeadFitter(flame_like(fitter.model))


@pytest.mark.parametrize(("angles", "jaw"), [((0.0, 0.0, 0.0), 0.0), ((25.0, -8.0, 5.0), 0.3),
                                             ((-35.0, 12.0, -10.0), 0.15)])
def test_a_known_head_with_flames_landmarks_is_found_again(flame_fitter, fitter, angles, jaw):
    """Its points are read off the 478, its mouth opens by the jaw, its expression has no names that scores know."""
    head, rng = flame_fitter.model, np.random.default_rng(5)
    neutral = HeadCode.neutral(head.layout)
    known = replace(neutral, identity=rng.normal(0, 0.6, len(neutral.identity)),
                    expression=rng.normal(0, 0.3, len(neutral.expression))).posed(*angles)
    known = replace(known, pose=np.concatenate([known.pose[:3], [jaw, 0, 0]]))
    start = rotation_from(*angles) @ rotation_from(4.0, 3.0, 0.0)
    found = flame_fitter.fit(*seen_on(head, fitter.model, known, jaw), start, np.full((SIZE, SIZE, 3), 128, np.uint8))
    np.testing.assert_allclose(found.angles, known.angles, atol=2)
    np.testing.assert_allclose(found.pose[3], jaw, atol=0.05)
    outlines = [head.landmarks(project(head.vertices(code), code))[:, :2] for code in (known, found)]
    eyes = np.linalg.norm(outlines[0][36 - 17] - outlines[0][45 - 17])
    assert np.median(np.linalg.norm(outlines[1] - outlines[0], axis=1)) < 0.015 * eyes


def test_marks_follow_the_posed_head(flame_fitter):
    """Jaw, pose correctives and a joint that moves with the shape: as skinning the whole head would place them."""
    head, rng = flame_fitter.model, np.random.default_rng(2)
    bending = replace(head, pose_basis=rng.normal(0, 0.002, (len(head.template), 3, 9 * 4)).astype(np.float32))
    identity, expression = rng.normal(0, 1, head.layout.identity_count), rng.normal(0, 1, len(head.expression_names))
    jaw = np.array([0.3, 0.05, -0.04])
    pose = np.concatenate([np.zeros(3), jaw])
    code = replace(HeadCode.neutral(head.layout), identity=identity, expression=expression, pose=pose)
    shape = np.concatenate([identity, expression, jaw])
    marks = Marks.of(bending)
    places, moves = marks.places(shape)
    np.testing.assert_allclose(places[17:], bending.landmarks(bending.vertices(code)), atol=3e-4)
    step = np.eye(len(shape))[0] * 0.01
    np.testing.assert_allclose((marks.places(shape + step)[0] - places) / 0.01, moves[..., 0], atol=1e-5)


def flame_like(head):
    """The open head as FLAME comes: 51 landmarks, an outline for each yaw, nameless coefficients, the jaw a joint."""
    corners, weights = nearest_on(head, head.landmarks(head.template)[SOURCES].mean(axis=1))
    units = [i for i, name in enumerate(head.expression_names) if name != "jawOpen"]
    return replace(head, expression_basis=0.35 * head.expression_basis[..., units],
                   expression_names=tuple(f"expression{i}" for i in range(len(units))),
                   landmark_corners=corners[17:], landmark_weights=weights[17:],
                   contour_corners=np.repeat(corners[None, :17], YAW_BINS, axis=0),
                   contour_weights=np.repeat(weights[None, :17], YAW_BINS, axis=0))


def nearest_on(head, points):
    """The triangle with the nearest middle, and the weights of the point's foot on it."""
    triangles = head.template[head.faces].astype(float)
    faces = [int(np.argmin(((triangles.mean(axis=1) - point) ** 2).sum(axis=1))) for point in points]
    weights = [np.linalg.lstsq(np.vstack([triangles[face].T, np.ones(3)]), [*point, 1], rcond=None)[0]
               for face, point in zip(faces, points, strict=True)]
    return head.faces[faces], np.array(weights, np.float32)


def seen_on(head, landmarked, code, jaw):
    """The 478 points of a head of the same vertices, and the score of its open mouth."""
    screen = landmarked.landmarks(project(head.vertices(code), code))
    error = landmark_bias(code.rotation, turned_only=True) * [1, -1, -1] * code.camera[0]
    scores = np.zeros(len(BLENDSHAPES))
    scores[BLENDSHAPES.index("jawOpen")] = min(jaw / 0.4, 1.0)
    return (screen + error + [1, 1, 0]) * SIZE / 2, scores
