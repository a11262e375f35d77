"""MTCNN, BiSeNet and FaceNet with their real weights, as `export.official` writes them, on real photographs.

OFFICIAL_GRAPHS_DIR names the folder with the graphs, FACES_DIR one with the held-out faces or their archives; `make
test-weights` sets both up. The expected boxes are facenet-pytorch 2.6.0's own, on the same pictures.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("benchmarks", reason="runs from a checkout: python -m pytest")
from caphuman_edge.quant.heldout import Pictures
from caphuman_edge.runtime.backends import ort
from caphuman_edge.runtime.contract import FULL, PERCEPTION_GRAPHS
from caphuman_edge.runtime.head import HeadFitter, load_head
from caphuman_edge.runtime.perceive import measure_subject
from caphuman_edge.runtime.perception import Perception
from caphuman_edge.runtime.perception.crop import CLIP_MEAN, CLIP_STD
from caphuman_edge.runtime.perception.mtcnn import mtcnn_faces

EMBEDDED = Path(__file__).parents[2] / "runtime/data/nano"
OFFICIAL = Path(os.environ.get("OFFICIAL_GRAPHS_DIR", ""))
MTCNN = ("mtcnn_pnet", "mtcnn_rnet", "mtcnn_onet")
NEEDED = ("id_encoder", "parser", *MTCNN)
EXPECTED = json.loads((Path(__file__).parent / "mtcnn_expected.json").read_text())

pytestmark = pytest.mark.skipif(not all((OFFICIAL / name / "model.onnx").exists() for name in NEEDED),
                                reason="no official graphs; set OFFICIAL_GRAPHS_DIR")


@pytest.fixture(scope="module")
def see():
    official = {name: load(OFFICIAL, name) for name in NEEDED}
    return Perception(*(load(EMBEDDED, name) for name in PERCEPTION_GRAPHS[:3]), official.pop("id_encoder"),
                      FULL.identity_size, official)


@pytest.fixture(scope="module")
def fitter():
    return HeadFitter(load_head())


def load(folder: Path, name: str):
    return ort.load(folder / name / "model.onnx", threads=1)


def photo(name: str) -> np.ndarray:
    if name == "astronaut.png":
        return pytest.importorskip("skimage.data").astronaut()
    if not os.environ.get("FACES_DIR"):
        pytest.skip(f"{name} is not at hand; set FACES_DIR")
    return Pictures(Path(os.environ["FACES_DIR"])).read(Path(name).stem)


@pytest.mark.parametrize("name", EXPECTED)
def test_boxes_and_points_equal_facenet_pytorchs(see, name):
    faces, expected = mtcnn_faces(photo(name), *(see.official[graph] for graph in MTCNN)), EXPECTED[name]
    np.testing.assert_allclose(faces.boxes, expected["boxes"], atol=0.01)
    np.testing.assert_allclose(faces.points, expected["points"], atol=0.01)
    np.testing.assert_allclose(faces.scores, expected["scores"], atol=1e-5)


@pytest.mark.parametrize("name", ["astronaut.png", "00002.jpg", "00003.jpg"])
def test_the_face_stays_and_all_around_it_is_white(see, fitter, name):
    subject = measure_subject(see, fitter, photo(name), FULL.vision.image_size)
    colours = subject.face_crop.transpose(1, 2, 0) * CLIP_STD + CLIP_MEAN
    white = (colours > 0.999).all(axis=2)
    points = subject.face.points[:, :2] * len(colours) / len(subject.photo)
    within = points.mean(axis=0) + 0.8 * (points - points.mean(axis=0))
    columns, rows = within.astype(int).T
    assert white[rows, columns].mean() < 0.02  # no holes
    assert white[0].all() and white[:, 0].all() and white[:, -1].all()  # no hair, no background
    assert 0.5 < white.mean() < 0.9
    assert np.linalg.norm(subject.identity) == pytest.approx(1, abs=1e-5)


def test_an_identity_survives_another_size_and_another_pose(see, fitter):
    def identity(image):
        return measure_subject(see, fitter, image, FULL.vision.image_size).identity

    astronaut = photo("astronaut.png")
    smaller = np.array(Image.fromarray(astronaut).resize((384, 384)))
    assert identity(astronaut) @ identity(smaller) > 0.9
    person, turned, other = (identity(photo(name)) for name in ("00002.jpg", "00002_a.jpg", "00017.jpg"))
    assert person @ turned > 0.7 > 0.5 > person @ other
