"""The map of 68 landmarks equals the official one, drawn with OpenCV."""
import numpy as np

from caphuman_edge.runtime.condition import landmark_map


def test_every_recorded_map_is_drawn_exactly(golden):
    recorded = golden("facepose.npz")
    for points, wanted in zip(recorded["in/landmarks2d"], recorded["out/maps"], strict=True):
        np.testing.assert_array_equal(landmark_map(points), wanted)


def test_points_at_or_beyond_the_left_and_upper_border_are_left_out():
    pixels = np.array([[0.005, 100], [100, 0.005], [-5, 100], [100, -5]])
    assert not landmark_map(pixels / 256 - 1).any()


def test_a_point_beyond_the_other_borders_shows_what_reaches_in():
    drawn = landmark_map(np.array([[514.0, 100.0]]) / 256 - 1)
    assert np.argwhere(drawn[..., 0]).tolist() == [[100, 511]]
