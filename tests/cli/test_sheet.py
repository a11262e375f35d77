"""Contact sheets: every picture where it belongs, whole, under its label."""
import numpy as np

from caphuman_edge.runtime.perception import FaceBox, FaceLandmarks
from caphuman_edge.runtime.sheet import (
    CHOSEN,
    EDGE,
    GAP,
    LABEL_HEIGHT,
    MARK,
    OVERLAY,
    PAPER,
    Tile,
    contact_sheet,
    landmarks_tile,
    map_pictures,
    numbered_faces,
    overlay_tile,
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


def box(left: float, top: float, size: float) -> FaceBox:
    return FaceBox(left, top, left + size, top + size, np.zeros((6, 2), np.float32), 1.0)


def test_faces_are_framed_and_the_chosen_one_in_another_colour():
    picture = numbered_faces(plain(0, 512, 512), [box(20.0, 200.0, 200.0), box(300.0, 260.0, 100.0)], chosen=2)
    assert picture.shape == (EDGE, EDGE, 3)
    np.testing.assert_array_equal(picture[[180, 180], [10, 150]], [MARK, CHOSEN])  # left edges, at half size


def test_numbers_stay_readable_in_small_faces_and_inside_the_picture():
    picture = numbered_faces(plain(0, 512, 512), [box(20.0, 0.0, 8.0), box(200.0, 200.0, 8.0)], chosen=1)
    for rows, columns, colour in ((slice(0, 20), slice(8, 40), CHOSEN), (slice(85, 100), slice(98, 130), MARK)):
        tag = (picture[rows, columns] == colour).all(axis=2)
        assert tag.any(axis=1).sum() >= 9  # px high


def test_landmarks_are_drawn_where_they_are_in_the_frames_proportions():
    points = np.zeros((478, 3), np.float32)
    points[7] = 300, 200, 9
    face = FaceLandmarks(points, 1.0, np.zeros(52, np.float32))
    tile = landmarks_tile("points", plain(0, 512, 512), face, 1.0).pixels
    assert {tuple(place) for place in np.argwhere(tile[..., 1])} == {(0, 0), (100, 150)}
    squashed = landmarks_tile("points", plain(0, 256, 512), face, 1.0).pixels
    assert squashed.shape == (EDGE, EDGE, 3) and squashed[200, 150, 1]
    assert landmarks_tile("points", plain(0, 256, 512), face, 2.0).pixels.shape == (EDGE // 2, EDGE, 3)


def test_a_head_lies_over_its_photo_and_nowhere_else():
    maps = np.zeros((9, 32, 32), np.float32)
    maps[2, :16] = maps[6:, :16] = 1
    tile = overlay_tile("fit", plain(100), maps).pixels
    assert tile.shape == (32, 32, 3)
    np.testing.assert_array_equal(tile[16:], 100)
    np.testing.assert_array_equal(tile[:16], round(100 + OVERLAY * 155))
