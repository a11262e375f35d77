"""A photo's square around the face: where it lies, how large it is, what it shows beyond the border."""
import numpy as np
import pytest

from caphuman_edge.runtime.perceive import FACE_CENTRE, FACE_HEIGHT, LARGEST_FRAME, portrait_frame
from caphuman_edge.runtime.perception import FaceLandmarks


def face(left: float, top: float, height: float) -> FaceLandmarks:
    """478 points on the diagonal of a box, as wide as it is high."""
    diagonal = np.linspace(0, height, 478)
    points = np.stack([left + diagonal, top + diagonal, diagonal], axis=1).astype(np.float32)
    return FaceLandmarks(points, 1.0, np.zeros(52, np.float32))


def test_a_face_gets_its_size_and_place_and_is_cut_out_pixel_by_pixel():
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    framed, seen = portrait_frame(photo, face(150, 120, 67.6))
    assert framed.shape == (100, 100, 3)
    low, high = seen.points[:, :2].min(axis=0), seen.points[:, :2].max(axis=0)
    np.testing.assert_allclose((low + high) / 2, 100 * np.array(FACE_CENTRE), atol=0.5)
    left, top = np.rint([150, 120] - low).astype(int)
    np.testing.assert_array_equal(framed, photo[top:top + 100, left:left + 100])


def test_beyond_the_border_the_edge_repeats():
    photo = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    framed, seen = portrait_frame(photo, face(0, 0, 67.6))
    assert framed.shape == (100, 100, 3)
    left, top = np.rint(seen.points[0, :2]).astype(int)  # where the photo's corner lies
    assert left > 0 and top > 0
    np.testing.assert_array_equal(framed[:top, left:left + 80], np.broadcast_to(photo[:1], (top, 80, 3)))
    np.testing.assert_array_equal(framed[top:, :left], np.broadcast_to(photo[:100 - top, :1], (100 - top, left, 3)))


def test_a_huge_face_is_scaled_down_with_its_points():
    photo = np.full((3000, 3000, 3), 50, np.uint8)
    photo[1000:1400, 2000:2400] = 200
    measured = face(700, 800, 2400)
    measured.points[7] = 2200, 1200, 900
    framed, seen = portrait_frame(photo, measured)
    assert framed.shape == (LARGEST_FRAME, LARGEST_FRAME, 3)
    x, y, z = seen.points[7]
    assert (framed[int(y), int(x)] == 200).all()
    assert z == pytest.approx(900 * LARGEST_FRAME * FACE_HEIGHT / 2400, rel=1e-3)
    assert np.ptp(seen.points[:, 1]) == pytest.approx(LARGEST_FRAME * FACE_HEIGHT, abs=1)
