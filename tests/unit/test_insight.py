"""InsightFace stands in for the detector and scores identity where it is installed, and says what is missing."""
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from caphuman_edge.runtime import Bundle, Pipeline
from caphuman_edge.runtime.errors import BadInput, MissingExtra
from caphuman_edge.runtime.perception.insight import PACK_VARIABLE, InsightFace
from caphuman_edge.runtime.perception.landmarks import FaceLandmarks

IMAGE = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
BOXES = np.array([[10, 20, 30, 60, 0.7], [100, 100, 200, 160, 0.9]], np.float32)
POINTS = np.arange(20, dtype=np.float32).reshape(2, 5, 2)


class Pack:
    """insightface's FaceAnalysis with two known faces, or none."""

    boxes = BOXES

    def __init__(self, folder: str, allowed_modules: list[str], providers: list[str]):
        assert Path(folder).is_dir()
        assert allowed_modules == ["detection", "recognition"]
        self.det_model = SimpleNamespace(detect=self.detect)
        self.models = {"recognition": SimpleNamespace(get=self.embed)}

    def prepare(self) -> None:
        pass

    def detect(self, image: np.ndarray):
        np.testing.assert_array_equal(image, IMAGE[..., ::-1])
        return self.boxes, POINTS[:len(self.boxes)]

    def embed(self, image: np.ndarray, face: SimpleNamespace) -> np.ndarray:
        np.testing.assert_array_equal(image, IMAGE[..., ::-1])
        np.testing.assert_array_equal(face.kps[2], [7, 8])
        return np.array([3.0, 4.0])


@pytest.fixture
def installed(monkeypatch):
    package, app = ModuleType("insightface"), ModuleType("insightface.app")
    app.FaceAnalysis = Pack
    monkeypatch.setitem(sys.modules, "insightface", package)
    monkeypatch.setitem(sys.modules, "insightface.app", app)


@pytest.fixture
def pack(tmp_path) -> Path:
    (tmp_path / "det.onnx").touch()
    return tmp_path


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch, pack):
    monkeypatch.setitem(sys.modules, "insightface", None)
    with pytest.raises(MissingExtra, match=r"non-commercial research only.*pip install 'caphuman-edge\[insightface\]'"):
        InsightFace(pack)


def test_without_a_pack_the_message_names_the_licence_and_the_ways_to_get_one(installed, tmp_path):
    with pytest.raises(BadInput, match=f"non-commercial research only.*fetch one.*{PACK_VARIABLE}"):
        InsightFace(tmp_path)


def test_the_environment_names_the_pack(installed, pack, monkeypatch):
    monkeypatch.setenv(PACK_VARIABLE, str(pack))
    assert len(InsightFace().detect(IMAGE)) == 2


def test_boxes_are_squares_and_the_largest_comes_first(installed, pack):
    large, small = InsightFace(pack).detect(IMAGE)
    assert (large.left, large.top, large.right, large.bottom) == (100, 80, 200, 180)
    assert (small.left, small.top, small.right, small.bottom) == (0, 20, 40, 60)
    np.testing.assert_array_equal(large.keypoints, POINTS[1])
    assert large.score == pytest.approx(0.9)


def test_identity_is_of_unit_length_and_of_the_measured_face(installed, pack):
    points = np.zeros((478, 3), np.float32)
    points[4] = 7, 8, 9  # the nose tip
    face = FaceLandmarks(points, 1.0, np.zeros(52, np.float32))
    np.testing.assert_allclose(InsightFace(pack).identity(IMAGE, face), [0.6, 0.8])


def test_a_picture_without_a_face_has_no_boxes(installed, pack, monkeypatch):
    monkeypatch.setattr(Pack, "boxes", BOXES[:0])
    assert InsightFace(pack).detect(IMAGE) == []


def test_the_real_package_finds_the_astronaut_and_knows_her_mirrored():
    """Runs where the extra is installed and PACK_VARIABLE names a pack."""
    pytest.importorskip("insightface")
    data = pytest.importorskip("skimage.data")
    try:
        faces = InsightFace()
    except BadInput as error:
        pytest.skip(str(error))
    photo = data.astronaut()
    (box,) = faces.detect(photo)
    assert 150 < (box.left + box.right) / 2 < 300
    with Pipeline(Bundle.open(), renderer="numpy") as pipe:
        alike = [faces.identity(picture, pipe.see.landmarks(picture, faces.detect(picture)[0]))
                 for picture in (photo, np.ascontiguousarray(photo[:, ::-1]))]
    assert alike[0] @ alike[1] > 0.6
