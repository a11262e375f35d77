"""MTCNN without its weights: pyramid, area means, suppression, and the three stages with nets that see brightness."""
import numpy as np
import pytest

from caphuman_edge.runtime.perception.mtcnn import area_resize, best_of_overlapping, mtcnn_faces, pyramid, squared

POINTS = np.array([0.2, 0.8, 0.5, 0.3, 0.7, 0.3, 0.3, 0.5, 0.8, 0.8], np.float32)  # five x, five y, of the box
BRIGHT = 0.6  # of the range -1..1


def pnet(feed):
    """Sees a face in the cells whose 12 px window is bright from edge to edge."""
    bright = feed["image"][0].mean(axis=0) > BRIGHT
    windows = np.lib.stride_tricks.sliding_window_view(bright, (12, 12))[::2, ::2]
    probability = windows.mean(axis=(2, 3), dtype=np.float32) * np.float32(0.99)
    return {"probability": np.stack([1 - probability, probability])[None],
            "regression": np.zeros((1, 4, *probability.shape), np.float32)}


def stage(feed):
    """Sees a face in a patch that is bright all over; moves no box."""
    probability = (feed["image"] > BRIGHT).mean(axis=(1, 2, 3), dtype=np.float32)
    return {"probability": np.stack([1 - probability, probability], axis=1),
            "regression": np.zeros((len(probability), 4), np.float32), "points": np.tile(POINTS, (len(probability), 1))}


def picture(*squares: tuple[int, int, int]) -> np.ndarray:
    """White squares (left, top, edge) on black."""
    image = np.zeros((200, 300, 3), np.uint8)
    for left, top, edge in squares:
        image[top:top + edge, left:left + edge] = 255
    return image


def rows(*boxes: tuple[float, float, float, float, float]) -> np.ndarray:
    return np.array(boxes, np.float32)


def test_the_pyramid_begins_where_20_px_fill_the_first_network_and_ends_with_the_shorter_edge():
    scales = pyramid(100, 200)
    assert scales[0] == 0.6 and np.allclose(np.divide(scales[1:], scales[:-1]), 0.709)
    assert 100 * scales[-1] >= 12 > 100 * scales[-1] * 0.709


def test_levels_of_more_than_two_megapixels_are_left_out():
    height, width = 4000, 6000
    scales = pyramid(height, width)
    assert height * width * scales[0] ** 2 < 2e6 < height * width * (scales[0] / 0.709) ** 2
    assert pyramid(19, 5000) == []


def test_area_means_take_every_pixel_that_is_touched():
    image = np.arange(5, dtype=np.uint8)[None, :, None].repeat(3, 2)
    np.testing.assert_allclose(area_resize(image, 1, 3)[0, :, 0], [0.5, 2, 3.5])  # windows 0-1, 1-3, 3-4
    np.testing.assert_allclose(area_resize(image, 2, 10)[1, :, 0], np.arange(5).repeat(2))


def test_of_overlapping_boxes_the_best_stays():
    boxes = rows((0, 0, 10, 10, 0.7), (1, 0, 11, 10, 0.9), (40, 0, 50, 10, 0.8))
    assert best_of_overlapping(boxes, 0.7).tolist() == [1, 2]
    assert best_of_overlapping(boxes, 0.9).tolist() == [1, 2, 0]
    assert best_of_overlapping(boxes[:0], 0.5).tolist() == []


def test_a_small_box_within_a_large_one_goes_only_by_the_smaller_ones_share():
    boxes = rows((0, 0, 100, 100, 0.9), (20, 20, 40, 40, 0.8))
    assert best_of_overlapping(boxes, 0.7).tolist() == [0, 1]
    assert best_of_overlapping(boxes, 0.7, of_smaller=True).tolist() == [0]


@pytest.mark.parametrize(("of_smaller", "best"), [(False, 0), (True, 1)])
def test_equal_scores_are_ordered_as_the_two_official_functions_do(of_smaller, best):
    boxes = rows((0, 0, 100, 100, 1), (1, 1, 101, 101, 1))
    assert best_of_overlapping(boxes, 0.7, of_smaller).tolist() == [best]


def test_a_box_becomes_a_square_around_its_centre():
    np.testing.assert_array_equal(squared(rows((10, 20, 30, 60, 0.9))), rows((0, 20, 40, 60, 0.9)))


def test_faces_are_found_where_they_are_the_largest_first():
    faces = mtcnn_faces(picture((20, 30, 40), (150, 60, 100)), pnet, stage, stage)
    assert len(faces.boxes) >= 2 and (np.diff(np.prod(faces.boxes[:, 2:] - faces.boxes[:, :2], axis=1)) <= 0).all()
    inside = (faces.boxes[:, :2] >= [148, 58]).all(axis=1) & (faces.boxes[:, 2:] <= [252, 162]).all(axis=1)
    assert inside[0] and not inside.all()  # the other one is elsewhere


def test_points_are_shares_of_the_box_that_the_last_network_saw():
    faces = mtcnn_faces(picture((150, 60, 100)), pnet, stage, stage)
    (left, top, right, bottom), points = faces.boxes[0], faces.points[0]
    np.testing.assert_allclose(points[:, 0], left + POINTS[:5] * (right - left + 1) - 1, rtol=1e-5)
    np.testing.assert_allclose(points[:, 1], top + POINTS[5:] * (bottom - top + 1) - 1, rtol=1e-5)


@pytest.mark.parametrize("image", [picture(), picture()[:10, :10]])
def test_a_picture_without_faces_gives_none(image):
    faces = mtcnn_faces(image, pnet, stage, stage)
    assert faces.boxes.shape == (0, 4) and faces.points.shape == (0, 5, 2) and faces.scores.shape == (0,)


def test_a_box_over_the_border_is_cut_there():
    seen = []

    def shifted(feed):
        """Moves every box half its width to the left."""
        found = stage(feed)
        found["regression"][:, [0, 2]] = -0.5
        return found

    def last(feed):
        seen.append(feed["image"].shape)
        return stage(feed)

    faces = mtcnn_faces(picture((0, 60, 100)), pnet, shifted, last)
    assert seen and seen[0][1:] == (3, 48, 48)
    assert faces.boxes[:, 0].min() < 0
