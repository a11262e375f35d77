"""Contact sheets: every picture where it belongs, whole, under its label."""
import numpy as np

from caphuman_edge.runtime.perception import FaceBox, FaceLandmarks
from caphuman_edge.runtime.sheet import (
    EDGE,
    GAP,
    LABEL_HEIGHT,
    MARK,
    PAPER,
    Tile,
    boxes_tile,
    contact_sheet,
    landmarks_tile,
    map_pictures,
)


def plain(value: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_tiles_fill_rows_from_the_left():
    sheet = contact_sheet([Tile("a", plain(value)) for value in (10, 60, 110)], columns=2)
    assert sheet.shape == (2 * (EDGE + LABEL_HEIGHT + GAP) + GAP, 2 * (EDGE + GAP) + GAP, 3)
    left, right = GAP + EDGE // 2, GAP + EDGE + GAP + EDGE // 2
    top, below = GAP + LABEL_HEIGHT + EDGE // 2, 2 * (GAP + LABEL_HEIGHT) + EDGE + EDGE // 2
    assert [sheet[y, x, 0] for y, x in ((top, left), (top, right), (below, left), (below, right))] == [
        10, 60, 110, PAPER[0]]


def test_a_tile_stands_under_its_label():
    named, nameless = (contact_sheet([Tile(label, plain(99))]) for label in ("photo", ""))
    assert (named[:GAP + LABEL_HEIGHT] != nameless[:GAP + LABEL_HEIGHT]).any()
    np.testing.assert_array_equal(named[GAP + LABEL_HEIGHT:], nameless[GAP + LABEL_HEIGHT:])


def test_a_wide_picture_is_shown_whole():
    picture = plain(0, 50, 200)
    picture[:, -20:] = 255
    sheet = contact_sheet([Tile("wide", picture)])
    np.testing.assert_array_equal(sheet[GAP + LABEL_HEIGHT + 10, GAP + EDGE - 5], 255)
    np.testing.assert_array_equal(sheet[GAP + LABEL_HEIGHT + EDGE // 4 + 5, GAP + 10], PAPER)


def test_normals_are_shown_around_grey_and_colours_are_clipped():
    maps = np.zeros((9, 2, 2), np.float32)
    maps[:, 0, 0] = -1, 0, 1, 0.2, 0.4, 0.6, -0.5, 0.5, 1.5
    pictures = map_pictures(maps)
    assert list(pictures) == ["normal", "albedo", "rendered"]
    assert [pictures[name][0, 0].tolist() for name in pictures] == [[0, 128, 255], [51, 102, 153], [0, 128, 255]]


def test_boxes_and_landmarks_are_drawn_where_they_are():
    box = FaceBox(100.0, 200.0, 300.0, 400.0, np.zeros((6, 2), np.float32), 1.0)
    tile = boxes_tile(plain(0, 512, 512), [box]).pixels
    np.testing.assert_array_equal(tile[[100, 200], [130, 120]], [MARK, MARK])
    points = np.zeros((478, 3), np.float32)
    points[7] = 300, 200, 9
    tile = landmarks_tile(plain(0, 512, 512), FaceLandmarks(points, 1.0, np.zeros(52, np.float32))).pixels
    assert {tuple(place) for place in np.argwhere(tile[..., 1])} == {(0, 0), (100, 150)}
