"""What official graphs change in the measuring of a photo, and what they leave as it is; the graphs are stand-ins."""
import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

from caphuman_edge.runtime import Bundle, Pipeline
from caphuman_edge.runtime.head import DecaEncoder, HeadFitter, HeadLayout, load_head
from caphuman_edge.runtime.head.deca import frame_transform
from caphuman_edge.runtime.perceive import measure_subject
from caphuman_edge.runtime.perception import FaceBox, FaceLandmarks, Perception, canonical_face, face_crop
from caphuman_edge.runtime.perception.crop import CLIP_MEAN, CLIP_STD
from caphuman_edge.runtime.perception.identity import facenet_box, facenet_face
from caphuman_edge.runtime.perception.official_crop import FRAME_SIZE, crop_square, square_of_points, squash
from caphuman_edge.runtime.perception.points68 import points68

FLAME = HeadLayout(100, tuple(f"expression{i}" for i in range(50)), 50, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
MTCNN_BOX = np.array([[10, 10, 30, 30], [90, 60, 190, 210]], np.float32)
CROP = 96


@dataclass(frozen=True)
class Seen(Perception):
    """Perception that knows the face already."""

    face: FaceLandmarks | None = None

    def detect(self, image, every=False):
        return [FaceBox(0.0, 0.0, 1.0, 1.0, np.zeros((6, 2), np.float32), 1.0)]

    def landmarks(self, image, box):
        return self.face


@pytest.fixture(scope="module")
def fitter():
    return HeadFitter(load_head())


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 255, (300, 280, 3), np.uint8)


@pytest.fixture
def face():
    """The canonical face, 9 px a centimetre, in the middle of the photo."""
    points = canonical_face()[:, :3] * 9 * [1, -1, -1] + [140, 150, 0]
    return FaceLandmarks(np.concatenate([points, points[:10]]).astype(np.float32), 1.0, np.zeros(52, np.float32))


@pytest.fixture
def see(face):
    """`see(size, graph=...)`: perception with these official graphs, and the faces that the id encoder was given."""
    faces = []

    def encoder(feed):
        faces.append(feed["face"][0].transpose(1, 2, 0))
        return {"identity": np.array([[3, 4]], np.float32)}

    def build(size, **official):
        return Seen(None, None, None, encoder, size, official, face=face), faces

    return build


def parser(sizes):
    """Takes the left half for skin; notes the sizes that it was asked for."""
    def parse(feed):
        sizes.append(feed["image"].shape[2:])
        logits = np.zeros((1, 19, *feed["image"].shape[2:]), np.float32)
        logits[:, 1, :, :logits.shape[3] // 2] = 1
        return {"logits": logits}
    return parse


def unused(feed):
    raise AssertionError("this graph is not needed")


def test_without_official_graphs_nothing_changes(see, fitter, photo, face):
    seen, faces = see(112)
    subject = measure_subject(seen, fitter, photo, CROP)
    np.testing.assert_array_equal(subject.face_crop, face_crop(photo, face, CROP))
    assert faces[0].shape == (112, 112, 3)
    np.testing.assert_allclose(subject.identity, [0.6, 0.8])


def test_sface_keeps_its_alignment_beside_mtcnn(see, fitter, photo):
    seen, faces = see(112, mtcnn_pnet=unused, mtcnn_rnet=unused, mtcnn_onet=unused)
    measure_subject(seen, fitter, photo, CROP)
    assert faces[0].shape == (112, 112, 3)


def test_facenet_without_mtcnn_sees_a_box_around_the_landmarks(see, fitter, photo, face):
    seen, faces = see(160)
    measure_subject(seen, fitter, photo, CROP)
    np.testing.assert_array_equal(faces[0], facenet_face(photo, facenet_box(face, None)))


def test_mtcnns_box_of_the_measured_face_is_taken_even_beside_others(face):
    np.testing.assert_array_equal(facenet_box(face, MTCNN_BOX), MTCNN_BOX[1])


@pytest.mark.parametrize("found", [None, MTCNN_BOX[:0], MTCNN_BOX[:1]])
def test_where_mtcnn_does_not_see_the_face_the_box_reaches_above_its_landmarks(face, found):
    left, top, right, bottom = facenet_box(face, found)
    low, high = face.points[:, :2].min(axis=0), face.points[:, :2].max(axis=0)
    assert (left, right, bottom) == (low[0], high[0], high[1])
    assert low[1] - top == pytest.approx(0.14 * (high[1] - low[1]), rel=1e-3)


@pytest.mark.parametrize(("fit", "parsed"), [("squash", (300, 280)), ("crop", (512, 512))])
def test_the_parsed_frame_replaces_the_hull(see, fitter, photo, fit, parsed):
    sizes = []
    seen, _ = see(112, parser=parser(sizes))
    picture = measure_subject(seen, fitter, photo, CROP, fit=fit).face_crop
    colours = picture.transpose(1, 2, 0) * CLIP_STD + CLIP_MEAN
    assert sizes == [parsed]  # its own pixels where the official tool is followed to the letter
    np.testing.assert_allclose(colours[:, CROP // 2 + 4:], 1, atol=1e-5)
    assert colours[:, :CROP // 2 - 4].mean() < 0.6


def test_deca_reads_the_crop_of_the_framed_photo(see, photo):
    given = []

    def head_encoder(feed):
        given.append(feed["image"])
        return {"parameters": np.arange(236, dtype=np.float32)[None]}

    seen, _ = see(112)
    subject = measure_subject(seen, DecaEncoder(head_encoder, FLAME), photo, CROP)
    points = points68(subject.face) * FRAME_SIZE / np.array(subject.photo.shape[1::-1]) - 0.5
    square = square_of_points(points)
    np.testing.assert_allclose(given[0][0], crop_square(squash(subject.photo), square), atol=1e-6)
    np.testing.assert_array_equal(subject.head.identity, np.arange(100))
    np.testing.assert_allclose(subject.head.crop, frame_transform(square), rtol=1e-5)


def test_a_pipeline_reads_flame_heads_with_deca_and_others_by_fit(monkeypatch):
    pipe = Pipeline(Bundle.open(), renderer="numpy")
    assert isinstance(pipe.heads, HeadFitter) and not pipe.see.official
    flame = Pipeline(holding(pipe.bundle, "head_encoder"), renderer="numpy")
    deca = flame._graphs["head_encoder"] = dataclasses.replace(pipe.graph("id_encoder"), run=unused)
    monkeypatch.setitem(vars(flame.head_model), "layout", FLAME)
    assert isinstance(flame.heads, DecaEncoder) and flame.heads.head_encoder is deca


def test_a_pipeline_perceives_with_the_official_graphs_that_its_bundle_holds():
    pipe = Pipeline(holding(Bundle.open(), "head_encoder", "parser"), renderer="numpy")
    parse = pipe._graphs["parser"] = dataclasses.replace(pipe.graph("id_encoder"), run=unused)
    assert pipe.see.official == {"parser": parse}  # DECA is not loaded for the open head
    assert pipe.see.identity_size == 112


def holding(bundle: Bundle, *graphs: str) -> Bundle:
    """The bundle, as if it held these graphs too."""
    components = {**bundle.manifest.components, **dict.fromkeys(graphs)}
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, components=components))
