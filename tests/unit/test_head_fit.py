"""The fit finds a known head again from its own landmarks and its own picture."""
from dataclasses import replace

import numpy as np
import pytest

from caphuman_edge.runtime.condition import condition_maps
from caphuman_edge.runtime.errors import FaceError, ShapeMismatch
from caphuman_edge.runtime.head import HeadCode, HeadFitter, directional_light, load_head, project
from caphuman_edge.runtime.perception.landmarks import BLENDSHAPES
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


def measured(head, code, height=SIZE, width=SIZE):
    """What perception would see: points in pixels and the units' scores."""
    screen = head.landmarks(project(head.vertices(code), code))
    half = max(height, width) / 2
    points = np.column_stack([(screen[:, 0] + 1) * width / 2, (screen[:, 1] + 1) * height / 2, screen[:, 2] * half])
    strengths = dict(zip(head.expression_names, code.expression, strict=True))
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


def test_a_head_without_the_478_landmarks_cannot_be_fitted():
    head = load_head()
    few = replace(head, landmark_corners=head.landmark_corners[:68], landmark_weights=head.landmark_weights[:68])
    with pytest.raises(ShapeMismatch, match="68 landmarks, expected 478"):
        HeadFitter(few)
