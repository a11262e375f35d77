"""Perception without networks: geometry, box decoding and the choice of a face."""
import warnings

import numpy as np
import pytest

from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.perception import (
    BLENDSHAPES,
    FaceBox,
    FaceLandmarks,
    canonical_face,
    face_crop,
    face_hull,
    head_rotation,
    hull_mask,
    rotation_from,
    select_face,
    yaw_pitch_roll,
)
from caphuman_edge.runtime.perception.crop import CLIP_MEAN, CLIP_STD
from caphuman_edge.runtime.perception.detect import anchors, decode, detect_faces, merge_overlapping
from caphuman_edge.runtime.perception.warp import apply, fit_similarity, invert, square_to_image, warp

BLUE = np.array([0, 0, 200], np.uint8)


def landmarks_of(rotation: np.ndarray, scale: float = 10.0, centre: tuple[float, float] = (128, 128)) -> FaceLandmarks:
    """The canonical face, turned, as the landmark network would measure it: image pixels, z into the picture."""
    face = canonical_face()[:, :3] @ rotation.T * scale * [1, -1, -1] + [*centre, 0]
    points = np.concatenate([face, face[:10]]).astype(np.float32)  # ten iris points: anything
    return FaceLandmarks(points, 1.0, np.zeros(52, np.float32))


def turned(yaw: float, pitch: float, roll: float) -> np.ndarray:
    return rotation_from(float(yaw), float(pitch), float(roll))


def box(left: float, size: float, score: float = 0.9) -> FaceBox:
    return FaceBox(float(left), 0.0, float(left + size), float(size), np.zeros((6, 2), np.float32), score)


def detector_answer(*faces: tuple[int, float]):
    """A detector that reports, whatever it sees, faces of half the window's size at the given anchors and scores."""
    regressors, scores = np.zeros((1, 896, 16), np.float32), np.zeros((1, 896, 1), np.float32)
    regressors[..., 2:4] = 64
    for anchor, score in faces:
        scores[0, anchor] = score
    return lambda feed: {"regressors": regressors, "scores": scores}


def test_anchors_are_two_a_cell_at_16_and_six_a_cell_at_8():
    assert anchors().shape == (896, 2)
    np.testing.assert_allclose(anchors()[[0, 1, 2]], [[1 / 32, 1 / 32], [1 / 32, 1 / 32], [3 / 32, 1 / 32]])
    np.testing.assert_allclose(anchors()[[512, 517, 895]], [[1 / 16, 1 / 16], [1 / 16, 1 / 16], [15 / 16, 15 / 16]])


def test_a_box_is_coded_around_its_anchor_in_input_pixels():
    regressors = np.zeros((896, 16), np.float32)
    regressors[0] = [12.8, 0, 64, 32, *[6.4] * 12]  # shift x, size, keypoints
    corners = np.array([1 / 32 + 0.1 - 0.25, 1 / 32 - 0.125, 1 / 32 + 0.1 + 0.25, 1 / 32 + 0.125])
    np.testing.assert_allclose(decode(regressors)[0], [*corners, *[1 / 32 + 0.05] * 12], rtol=1e-5)


def test_overlapping_boxes_become_their_score_weighted_mean():
    rows = np.zeros((3, 17), np.float32)
    rows[:, :4] = [[0, 0, 10, 10], [2, 0, 12, 10], [50, 50, 60, 60]]
    rows[:, 16] = [0.9, 0.45, 0.8]
    merged = merge_overlapping(rows)
    np.testing.assert_allclose(merged[:, 0], [2 / 3, 50], rtol=1e-5)
    np.testing.assert_allclose(merged[:, 16], [0.9, 0.8])


def test_a_small_box_inside_a_better_one_is_no_second_face():
    rows = np.zeros((2, 17), np.float32)
    rows[:, :4] = [[0, 0, 100, 100], [10, 10, 30, 30]]
    rows[:, 16] = [0.9, 0.8]
    assert len(merge_overlapping(rows)) == 1


def test_whole_picture_boxes_are_mapped_through_the_letterbox():
    image = np.zeros((100, 200, 3), np.uint8)  # black bars of 50 px above and below make the 200 px square
    (face,) = detect_faces(image, detector_answer((int(np.argmin(np.abs(anchors() - 0.5).sum(axis=1))), 0.9)))
    assert face.right - face.left == pytest.approx(100) and face.bottom - face.top == pytest.approx(100)
    centre = (face.left + face.right) / 2, (face.top + face.bottom) / 2
    assert centre == pytest.approx((100, 50), abs=200 / 16)


def test_windows_are_tried_only_when_the_whole_picture_shows_no_face():
    calls = []

    def blind(feed):
        calls.append(feed["image"])
        return detector_answer()(feed)

    assert detect_faces(np.zeros((512, 512, 3), np.uint8), blind) == []
    assert len(calls) == 1 + 1 + 9 + 49  # whole, with a margin, halves and quarters that overlap by half
    assert all(call.shape == (1, 128, 128, 3) and call.min() == -1 for call in calls)


def test_small_faces_beside_a_large_one_are_looked_for_only_when_asked():
    image = np.zeros((512, 512, 3), np.uint8)
    image[384:, 384:] = 255
    centre = int(np.argmin(np.abs(anchors() - 0.5).sum(axis=1)))

    def detector(feed):
        """Sees a face in the whole picture, of which the white corner is a 16th, and in the white corner alone."""
        white = (feed["image"] > 0).mean()
        return detector_answer(*[(centre, 0.9)] if white == 1 or 0.05 < white < 0.07 else [])(feed)

    (large,) = detect_faces(image, detector)
    first, small = detect_faces(image, detector, every=True)
    assert (first.left, first.right) == (large.left, large.right) and large.right - large.left == pytest.approx(256)
    assert small.right - small.left == pytest.approx(64) and small.left > 384 and small.top > 384


def test_the_largest_face_is_selected_when_it_stands_out():
    boxes = [box(0, 100), box(200, 50)]
    assert select_face(boxes) is boxes[0]
    assert select_face(boxes, 2) is boxes[1]


def test_of_several_comparable_faces_the_largest_is_taken_with_a_notice():
    boxes = [box(0, 100), box(200, 80)]
    with pytest.warns(UserWarning, match="2 faces .* --face N"):
        assert select_face(boxes) is boxes[0]


@pytest.mark.parametrize(("boxes", "number"), [([100, 50], None), ([100, 80], 1), ([100, 80], 2)])
def test_a_clear_choice_needs_no_notice(boxes, number):
    with warnings.catch_warnings(action="error"):
        select_face([box(200 * k, edge) for k, edge in enumerate(boxes)], number)


def test_a_face_number_out_of_range_is_named():
    with pytest.raises(FaceError, match="--face 3, but the photo shows 2"):
        select_face([box(0, 100), box(200, 50)], 3)


def test_no_face_tells_what_photo_to_use():
    with pytest.raises(FaceError, match="no face found in the photo: use one"):
        select_face([])


def test_inverse_transform_returns_every_point():
    transform = square_to_image(np.array([40.0, 70.0]), 90.0, 0.7, 64)
    points = np.random.default_rng(0).uniform(0, 64, (20, 2))
    np.testing.assert_allclose(apply(invert(transform), apply(transform, points)), points, atol=1e-9)


def test_square_is_centred_and_turned_clockwise():
    transform = square_to_image(np.array([40.0, 70.0]), 90.0, np.pi / 2, 60)
    moved = apply(transform, np.array([[30.0, 30.0], [60.0, 30.0]]))
    np.testing.assert_allclose(moved, [[40, 70], [40, 115]], atol=1e-9)


def test_fitted_similarity_is_the_one_that_moved_the_points():
    points = np.random.default_rng(0).normal(size=(5, 2))
    transform = square_to_image(np.array([3.0, -2.0]), 5.0, -0.4, 7)
    np.testing.assert_allclose(fit_similarity(points, apply(transform, points)), transform, atol=1e-9)


def test_identity_warp_copies_the_picture():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    copy = warp(image, square_to_image(np.array([16.0, 16.0]), 32.0, 0.0, 32), 32)
    np.testing.assert_allclose(copy, image, atol=1e-4)


def test_quarter_turn_warp_is_numpys_rotation():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    turned = warp(image, square_to_image(np.array([16.0, 16.0]), 32.0, np.pi / 2, 32), 32)
    np.testing.assert_allclose(turned, np.rot90(image), atol=1e-3)


def test_shrinking_warp_averages_instead_of_aliasing():
    checks = np.kron([[0, 255] * 32, [255, 0] * 32] * 32, np.ones((1, 1)))[..., None].repeat(3, 2).astype(np.uint8)
    shrunk = warp(checks, square_to_image(np.array([32.0, 32.0]), 64.0, 0.0, 16), 16)
    assert np.abs(shrunk - 127.5).max() < 1


def test_beyond_the_border_the_edge_repeats():
    image = np.full((8, 8, 3), 77, np.uint8)
    assert np.all(warp(image, square_to_image(np.array([0.0, 0.0]), 100.0, 0.3, 16), 16) == 77)


@pytest.mark.parametrize("angles", [(30, 0, 0), (0, 20, 0), (0, 0, 15), (-40, 15, -25), (70, -30, 5)])
def test_angles_survive_the_rotation_matrix(angles):
    rotation = turned(*angles)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert yaw_pitch_roll(rotation) == pytest.approx(angles)


@pytest.mark.parametrize(("angles", "axis", "towards"), [
    ((30, 0, 0), [0, 0, 1], [0.5, 0, None]),  # +yaw: the nose goes to image right
    ((0, 30, 0), [0, 0, 1], [0, 0.5, None]),  # +pitch: the nose goes up
    ((0, 0, 30), [0, 1, 0], [0.5, None, 0]),  # +roll: the crown goes to image right, clockwise as seen
])
def test_signs_of_the_angles(angles, axis, towards):
    moved = turned(*angles) @ axis
    for found, wanted in zip(moved, towards, strict=True):
        assert wanted is None or found == pytest.approx(wanted)


@pytest.mark.parametrize("angles", [(0, 0, 0), (35, -10, 20), (-60, 25, -5)])
def test_procrustes_recovers_a_known_rotation(angles):
    landmarks = landmarks_of(turned(*angles), scale=7.3, centre=(90, 200))
    assert yaw_pitch_roll(head_rotation(landmarks)) == pytest.approx(angles, abs=1e-3)


def test_canonical_face_looks_at_the_viewer():
    face = canonical_face()
    assert face.shape == (468, 4) and np.count_nonzero(face[:, 3]) == 33
    assert face[:, 2].argmax() == 4  # the nose tip is nearest
    assert face[33, 0] < 0 < face[263, 0] and face[10, 1] > face[152, 1]  # eye corners; crown above chin


def test_blendshape_names_are_the_52_of_arkit_with_neutral_first():
    assert len(set(BLENDSHAPES)) == 52
    assert BLENDSHAPES[0] == "_neutral" and BLENDSHAPES[25] == "jawOpen" and BLENDSHAPES[51] == "noseSneerRight"


def test_hull_holds_every_landmark_and_is_convex():
    landmarks = landmarks_of(turned(30, 10, 5))
    hull = face_hull(landmarks)
    edges = np.roll(hull, -1, axis=0) - hull
    to_points = landmarks.points[None, :, :2] - hull[:, None]
    assert np.all(edges[:, None, 0] * to_points[..., 1] - edges[:, None, 1] * to_points[..., 0] > -1e-3)


def test_hull_mask_is_true_inside_only():
    mask = hull_mask(np.array([[10.0, 20.0], [30.0, 20.0], [30.0, 50.0], [10.0, 50.0]]), 64, 48)
    expected = np.zeros((64, 48), bool)
    expected[20:50, 10:30] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("roll", [0, 40])
def test_face_crop_is_white_outside_and_the_picture_inside(roll):
    image = np.broadcast_to(BLUE, (256, 256, 3)).copy()
    crop = face_crop(image, landmarks_of(turned(0, 0, roll)), 96)
    colours = crop.transpose(1, 2, 0) * CLIP_STD + CLIP_MEAN
    assert crop.shape == (3, 96, 96) and crop.flags.c_contiguous
    np.testing.assert_allclose(colours[[0, 0, -1, -1], [0, -1, 0, -1]], 1, atol=1e-6)
    np.testing.assert_allclose(colours[48, 48], BLUE / 255, atol=1e-6)


def test_face_crop_does_not_change_when_the_head_is_tilted():
    upright, tilted = (face_crop(np.zeros((256, 256, 3), np.uint8), landmarks_of(turned(20, 0, roll)), 64)
                       for roll in (0, 30))
    assert np.mean(np.abs(upright - tilted) > 0.1) < 0.01  # the same outline, but for its rim
