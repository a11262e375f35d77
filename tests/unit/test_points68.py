"""The 68 points are where the iBUG scheme says, in its order."""
import numpy as np
import pytest

from caphuman_edge.runtime.perception import canonical_face
from caphuman_edge.runtime.perception.landmarks import FaceLandmarks
from caphuman_edge.runtime.perception.points68 import points68

SCALE = 10.0  # pixels a centimetre


@pytest.fixture(scope="module")
def points():
    """Of the landmark model's mean face, in a picture 200 px wide; the irises are not needed."""
    face = np.zeros((478, 3), np.float32)
    face[:468] = canonical_face()[:, :3] * [SCALE, -SCALE, -SCALE] + [100, 100, 0]
    return points68(FaceLandmarks(face, 1.0, np.zeros(52, np.float32)))


def test_every_run_goes_from_image_left_to_image_right(points):
    for start, end in ((0, 16), (17, 21), (22, 26), (31, 35), (36, 39), (42, 45), (48, 54), (60, 64)):
        assert (np.diff(points[start:end + 1, 0]) > 0).all(), (start, end)


def test_the_way_back_along_lower_lids_and_lips_goes_left(points):
    for start, end in ((40, 41), (46, 47), (54, 59), (64, 67)):
        assert (np.diff(points[start:end + 1, 0]) < 0).all(), (start, end)


def test_features_stand_one_below_the_other(points):
    brows, eyes, nose, lips, chin = (points[rows, 1].mean() for rows in (
        slice(17, 27), slice(36, 48), slice(31, 36), slice(48, 68), slice(8, 9)))
    assert brows < eyes < nose < lips < chin
    assert (np.diff(points[27:31, 1]) > 0).all()


def test_upper_lids_and_lips_are_above_the_lower_ones(points):
    for upper, lower in (((37, 38), (41, 40)), ((43, 44), (47, 46)), ((49, 50, 51, 52, 53), (59, 58, 57, 56, 55)),
                         ((61, 62, 63), (67, 66, 65))):
        assert (points[list(upper), 1] < points[list(lower), 1]).all(), upper
    assert points[50, 1] < points[51, 1] > points[52, 1]  # Cupid's bow


def test_left_and_right_are_mirror_images(points):
    mirrored = [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1),
                45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
                *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1)]
    np.testing.assert_allclose(points[mirrored] * [-1, 1] + [200, 0], points, atol=0.2 * SCALE)


def test_the_outline_is_evenly_spaced(points):
    steps = np.linalg.norm(np.diff(points[:17], axis=0), axis=1)
    assert steps.max() < 1.6 * steps.min()
