"""The perception networks themselves, on a real photograph: the astronaut, upright and smiling, looks slightly down."""
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caphuman_edge.runtime.backends import ort
from caphuman_edge.runtime.contract import NANO, PERCEPTION_GRAPHS, graphs
from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.perception import (
    BLENDSHAPES,
    Perception,
    face_crop,
    head_rotation,
    select_face,
    yaw_pitch_roll,
)

EMBEDDED = Path(__file__).parents[2] / "runtime/data/nano"
FOLDER = Path(os.environ.get("CAPHUMAN_PERCEPTION_DIR", EMBEDDED))
GRAPHS = PERCEPTION_GRAPHS
# what the original networks answer to uniform noise; written by caphuman_edge.export.perception
EXPECTED = Path(__file__).parent / "perception_expected.npz"
LEAST_COSINE = {"id_encoder": 0.999}  # int8 weights; the others are exact

pytestmark = pytest.mark.skipif(not all((FOLDER / name / "model.onnx").exists() for name in GRAPHS),
                                reason=f"no perception graphs in {FOLDER}; set CAPHUMAN_PERCEPTION_DIR")


@pytest.fixture(scope="module")
def perception():
    return Perception(*(ort.load(FOLDER / name / "model.onnx", threads=1) for name in GRAPHS))


@pytest.fixture(scope="module")
def astronaut():
    skimage_data = pytest.importorskip("skimage.data")
    return skimage_data.astronaut()


def measure(perception, image):
    image = np.ascontiguousarray(image)
    return perception.landmarks(image, select_face(perception.detect(image)))


def angles(perception, image):
    return np.array(yaw_pitch_roll(head_rotation(measure(perception, image))))


def rotated(image, clockwise_degrees):
    return np.asarray(Image.fromarray(image).rotate(-clockwise_degrees, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_has_the_contracts_tensors(perception, name):
    graph, spec = getattr(perception, name), graphs(NANO)[name]
    assert (graph.inputs, graph.outputs) == (spec.inputs, spec.outputs)


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_answers_as_the_original_network(perception, name):
    spec = graphs(NANO)[name].inputs[0]
    noise = np.random.default_rng(0).random(spec.shape, np.float32) * np.float32(255 if name == "id_encoder" else 1)
    answer = getattr(perception, name)({spec.name: noise})
    with np.load(EXPECTED) as expected:
        for output, found in answer.items():
            wanted = expected[f"{name}/{output}"]
            if name in LEAST_COSINE:
                cosine = np.vdot(found, wanted) / np.linalg.norm(found) / np.linalg.norm(wanted)
                assert cosine > LEAST_COSINE[name]
            else:
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_astronaut_has_one_face_where_it_is(perception, astronaut):
    (face,) = perception.detect(astronaut)
    assert face.left < 200 < 250 < face.right and face.top < 95 < 165 < face.bottom
    assert face.score > 0.8 and face.keypoints[0, 0] < face.keypoints[1, 0]


def test_small_and_overfull_faces_are_found_too(perception, astronaut):
    small = np.zeros((1600, 1600, 3), np.uint8)
    small[900:1412, 300:812] = astronaut
    (face,) = perception.detect(small)
    assert face.left == pytest.approx(477, abs=12) and face.right - face.left == pytest.approx(95, abs=15)
    tight = np.ascontiguousarray(astronaut[85:180, 185:265])
    assert len(perception.detect(tight)) == 1


def test_a_picture_without_a_face_yields_none(perception, astronaut):
    assert perception.detect(np.ascontiguousarray(astronaut[300:, 250:])) == []


def test_a_box_without_a_face_is_refused(perception, astronaut):
    face = select_face(perception.detect(astronaut))
    with pytest.raises(FaceError, match="presence"):
        perception.landmarks(np.zeros_like(astronaut), face)


def test_landmarks_lie_on_the_features(perception, astronaut):
    points = measure(perception, astronaut).points
    for index, where in {33: (197, 102), 263: (255, 105), 4: (223, 128), 61: (202, 141), 291: (242, 141)}.items():
        assert np.hypot(*(points[index, :2] - where)) < 5, index
    assert points[4, 2] < points[33, 2] < points[127, 2]  # the nose tip is nearest, then an eye, then an ear


def test_the_smile_is_seen(perception, astronaut):
    scores = dict(zip(BLENDSHAPES, measure(perception, astronaut).blendshapes, strict=True))
    assert scores["mouthSmileLeft"] > 0.7 and scores["mouthSmileRight"] > 0.7
    assert scores["eyeBlinkLeft"] < 0.3 and scores["jawOpen"] < 0.3


def test_mirroring_negates_yaw_and_roll(perception, astronaut):
    there, back = angles(perception, astronaut), angles(perception, astronaut[:, ::-1])
    np.testing.assert_allclose(back, there * [-1, 1, -1], atol=2.5)


@pytest.mark.parametrize("clockwise", [-30, 25])
def test_turning_the_picture_changes_roll_alone(perception, astronaut, clockwise):
    change = angles(perception, rotated(astronaut, clockwise)) - angles(perception, astronaut)
    np.testing.assert_allclose(change, [0, 0, clockwise], atol=2.5)


def test_a_narrowed_side_turns_the_head_towards_it(perception, astronaut):
    """Squeezing the half at image right is what a turn to image right does to a face: yaw must grow."""
    columns = np.r_[np.arange(0, 224), np.arange(224, 512, 2)]
    assert angles(perception, astronaut[:, columns])[0] > angles(perception, astronaut)[0] + 5


def test_expression_scores_survive_a_tilt(perception, astronaut):
    upright, tilted = (measure(perception, image).blendshapes for image in (astronaut, rotated(astronaut, 20)))
    assert np.abs(tilted - upright).max() < 0.1


def test_identity_is_of_unit_length_and_survives_tilt_and_size(perception, astronaut):
    large = np.asarray(Image.fromarray(astronaut).resize((900, 900), Image.Resampling.BICUBIC))
    pictures = astronaut, rotated(astronaut, 20), large
    same = [perception.identity(picture, measure(perception, picture)) for picture in pictures]
    np.testing.assert_allclose(np.linalg.norm(same, axis=1), 1, rtol=1e-5)
    assert np.dot(same[0], same[1]) > 0.9 and np.dot(same[0], same[2]) > 0.9


def test_face_crop_shows_the_face_on_white(perception, astronaut):
    crop = face_crop(astronaut, measure(perception, astronaut), 96)
    white = np.isclose(crop, crop[:, :1, :1]).all(axis=0)
    assert 0.15 < white.mean() < 0.4 and not white[24:72, 24:72].any()
