"""What the landmark network misplaces is measured from pictures of heads whose points are known."""
import numpy as np
import pytest

from caphuman_edge.export.landmark_bias import fit_bias
from caphuman_edge.export.open_head_landmarks import MIRROR, mirror_twins
from caphuman_edge.runtime.head import load_head
from caphuman_edge.runtime.perception import rotation_from
from caphuman_edge.runtime.perception.bias import LARGEST_PITCH, LARGEST_YAW, bias_terms, landmark_bias, measured_bias


@pytest.fixture(scope="module")
def twins():
    return mirror_twins(load_head())


def test_twins_are_each_others_twins(twins):
    np.testing.assert_array_equal(twins[twins], np.arange(478))
    assert [twins[i] for i in (33, 61, 1, 468)] == [263, 291, 1, 473]


def test_a_known_error_is_found_among_noise_and_outliers():
    rng = np.random.default_rng(0)
    angles = np.stack([rng.uniform(-limit, limit, 120) for limit in (LARGEST_YAW, LARGEST_PITCH, 10)], axis=1)
    terms = np.array([bias_terms(yaw, pitch) for yaw, pitch, _ in angles])
    offsets = np.einsum("nk,lck->nlc", terms, measured_bias()) + rng.normal(0, 0.0005, (len(angles), 478, 3))
    offsets[rng.random(offsets.shape[:2]) < 0.05] += 0.05
    found = np.einsum("nk,lck->nlc", terms, fit_bias(angles, offsets))
    truth = np.einsum("nk,lck->nlc", terms, measured_bias())
    assert np.abs(found - truth).max() < 0.002
    assert np.abs(truth).max() > 0.01


def test_the_error_is_the_same_on_both_sides_of_a_face(twins):
    left, right = (landmark_bias(rotation_from(yaw, 7.0, 0.0)) for yaw in (-30.0, 30.0))
    np.testing.assert_allclose(right, (left * MIRROR)[twins], atol=1e-4)


def test_beyond_the_measured_angles_it_does_not_grow():
    np.testing.assert_array_equal(bias_terms(80.0, -45.0), bias_terms(LARGEST_YAW, -LARGEST_PITCH))
