"""What part of a photo fills the frame: where it lies, how large it is, what it shows beyond the border."""
import numpy as np
import pytest

from caphuman_edge.runtime.framing import FACE_CENTRE, FACE_HEIGHT, FITS, LARGEST_FRAME, frame_photo
from caphuman_edge.runtime.head import HeadCode, HeadFitter, directional_light, load_head, project
from caphuman_edge.runtime.perception import FaceLandmarks, head_rotation


def face(left: float, top: float, height: float) -> FaceLandmarks:
    """478 points on the diagonal of a box, as wide as it is high."""
    diagonal = np.linspace(0, height, 478)
    points = np.stack([left + diagonal, top + diagonal, diagonal], axis=1).astype(np.float32)
    return FaceLandmarks(points, 1.0, np.zeros(52, np.float32))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def middle(seen: FaceLandmarks) -> np.ndarray:
    return (seen.points[:, :2].min(axis=0) + seen.points[:, :2].max(axis=0)) / 2


def test_a_face_gets_its_size_and_place_and_is_cut_out_pixel_by_pixel():
    photo = noise(300, 400)
    framed, seen = frame_photo(photo, face(150, 120, 67.6))
    assert framed.shape == (100, 100, 3)
    np.testing.assert_allclose(middle(seen), 100 * np.array(FACE_CENTRE), atol=0.5)
    left, top = np.rint([150, 120] - seen.points[0, :2]).astype(int)
    np.testing.assert_array_equal(framed, photo[top:top + 100, left:left + 100])


def test_beyond_the_border_the_edge_repeats():
    photo = noise(80, 80)
    framed, seen = frame_photo(photo, face(0, 0, 67.6))
    assert framed.shape == (100, 100, 3)
    left, top = np.rint(seen.points[0, :2]).astype(int)  # where the photo's corner lies
    assert left > 0 and top > 0
    np.testing.assert_array_equal(framed[:top, left:left + 80], np.broadcast_to(photo[:1], (top, 80, 3)))
    np.testing.assert_array_equal(framed[top:, :left], np.broadcast_to(photo[:100 - top, :1], (100 - top, left, 3)))


def test_in_a_frame_that_is_not_square_the_face_keeps_its_square_and_more_is_seen_around_it():
    photo = noise(300, 400)
    square, _ = frame_photo(photo, face(150, 120, 67.6))
    wide, _ = frame_photo(photo, face(150, 120, 67.6), aspect=1.5)
    high, _ = frame_photo(photo, face(150, 120, 67.6), aspect=0.5)
    assert (wide.shape, high.shape) == ((100, 150, 3), (200, 100, 3))
    np.testing.assert_array_equal(wide[:, 25:125], square)
    np.testing.assert_array_equal(high[50:150], square)


@pytest.mark.parametrize("fit", ["face", "pad"])
def test_a_huge_frame_is_scaled_down_with_its_points(fit):
    photo = np.full((3000, 3000, 3), 50, np.uint8)
    photo[1000:1400, 2000:2400] = 200
    measured = face(700, 800, 2400)
    measured.points[7] = 2200, 1200, 900
    framed, seen = frame_photo(photo, measured, fit)
    scale = LARGEST_FRAME / (2400 / FACE_HEIGHT if fit == "face" else 3000)
    assert framed.shape == (LARGEST_FRAME, LARGEST_FRAME, 3)
    x, y, z = seen.points[7]
    assert (framed[int(y), int(x)] == 200).all()
    assert z == pytest.approx(900 * scale, rel=1e-3)
    assert np.ptp(seen.points[:, 1]) == pytest.approx(2400 * scale, abs=1)


@pytest.mark.parametrize(("left", "start"), [(250, 150), (10, 0), (500, 300)])
def test_crop_keeps_the_face_as_central_as_the_photo_allows(left, start):
    photo = noise(300, 600)
    framed, seen = frame_photo(photo, face(left, 100, 100), "crop")
    np.testing.assert_array_equal(framed, photo[:, start:start + 300])
    np.testing.assert_allclose(seen.points[0, :2], [left - start, 100])


def test_crop_is_the_largest_part_with_the_frames_proportions():
    assert frame_photo(noise(300, 600), face(50, 50, 100), "crop", 1.5)[0].shape == (300, 450, 3)
    assert frame_photo(noise(600, 300), face(50, 50, 100), "crop", 1.5)[0].shape == (200, 300, 3)


def test_pad_shows_the_whole_photo_in_the_middle():
    photo = noise(300, 500)
    framed, seen = frame_photo(photo, face(50, 60, 100), "pad")
    assert framed.shape == (500, 500, 3)
    np.testing.assert_array_equal(framed[100:400], photo)
    np.testing.assert_array_equal(framed[:100], np.broadcast_to(photo[:1], (100, 500, 3)))
    np.testing.assert_allclose(seen.points[0, :2], [50, 160])


def test_squash_leaves_the_photo_and_its_proportions():
    photo, measured = noise(300, 500), face(50, 60, 100)
    framed, seen = frame_photo(photo, measured, "squash")
    assert framed is photo and seen is measured


@pytest.fixture(scope="module")
def fitter() -> HeadFitter:
    return HeadFitter(load_head())


@pytest.mark.parametrize("aspect", [1.0, 1.5])
@pytest.mark.parametrize("fit", FITS)
def test_the_fitted_head_covers_the_framed_face(fitter, fit, aspect):
    """A head drawn into a wide photo, left of its middle: its projection meets the face's points in the frame."""
    model = fitter.model
    code = HeadCode.neutral(model.layout).posed(yaw=20.0).lit(directional_light(0.0, 30.0))
    screen = model.landmarks(project(model.vertices(code), code))
    points = np.asarray(screen * [100, 100, 100] + [220, 180, 0], np.float32)
    photo, measured = noise(320, 700), FaceLandmarks(points, 1.0, np.zeros(52, np.float32))
    framed, seen = frame_photo(photo, measured, fit, aspect)
    head = fitter.fit(seen.points, seen.blendshapes, head_rotation(seen), framed)
    height, width = framed.shape[:2]
    drawn = (model.landmarks(project(model.vertices(head), head))[:, :2] + 1) / 2 * [width, height]
    eyes = np.linalg.norm(seen.points[33] - seen.points[263])
    assert np.median(np.linalg.norm(drawn - seen.points[:, :2], axis=1)) < 0.03 * eyes
