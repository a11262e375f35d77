"""The published weights in the reference networks, on a real photograph: what they see is what is there.

Needs the files that `python -m caphuman_edge.export.official --fetch --out DIR` fetches.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from caphuman_edge.export.assets import FACE_PARSER, FACENET, MTCNN
from caphuman_edge.export.official import MTCNN_FILES, load
from caphuman_edge.runtime.cache import cache_dir

FOLDER = Path(os.environ.get("CAPHUMAN_DOWNLOADS") or cache_dir())
FILES = {source: FOLDER / Path(source.member).name for source in (FACE_PARSER, FACENET, *MTCNN)}
PARSED = 110, 10, 350, 250  # head and shoulders of the astronaut, px
FACE = 176, 60, 274, 192  # about MTCNN's box
CLOTH = 0, 400, 98, 498  # no face
BACKGROUND, SKIN, EYES, NOSE, TEETH, HAIR = (0,), (1,), (4, 5), (10,), (11,), (17,)

pytestmark = pytest.mark.skipif(not all(path.is_file() for path in FILES.values()),
                                reason=f"no published weights in {FOLDER}; set CAPHUMAN_DOWNLOADS")


@pytest.fixture(scope="module")
def astronaut():
    skimage_data = pytest.importorskip("skimage.data")
    return Image.fromarray(skimage_data.astronaut())


def pixels(photo, box, width, height):
    """(1, 3, height, width), RGB 0..255."""
    crop = photo.crop(box).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(crop, np.float32).transpose(2, 0, 1)[None])


def test_parts_of_the_face_lie_where_they_are(astronaut):
    left, top, right, _ = PARSED
    logits = load("parser", FILES[FACE_PARSER])(pixels(astronaut, PARSED, 513, 513) / 255)
    labels, scale = logits[0].argmax(dim=0), 513 / (right - left)
    for (x, y), expected in {(205, 102): EYES, (243, 103): EYES, (224, 125): NOSE, (223, 146): TEETH,
                             (200, 130): SKIN, (170, 60): HAIR, (330, 60): BACKGROUND}.items():
        assert labels[round((y - top) * scale), round((x - left) * scale)] in expected, (x, y)


@pytest.mark.parametrize(("graph", "size"), [("mtcnn_rnet", 24), ("mtcnn_onet", 48)])
def test_a_face_is_told_from_cloth(astronaut, graph, size):
    network = load(graph, FOLDER / MTCNN_FILES[graph])
    face, cloth = (network((pixels(astronaut, box, size, size) - 127.5) / 128)[1][0, 1] for box in (FACE, CLOTH))
    assert face > 0.99 and cloth < 0.1


def test_the_five_points_lie_on_the_features(astronaut):
    network = load("mtcnn_onet", FOLDER / MTCNN_FILES["mtcnn_onet"])
    points = network((pixels(astronaut, FACE, 48, 48) - 127.5) / 128)[2].reshape(2, 5).T.numpy()
    left, top, right, bottom = FACE
    found = points * [right - left, bottom - top] + [left, top]
    wanted = [(205, 102), (243, 103), (224, 128), (205, 144), (241, 144)]
    assert np.hypot(*(found - wanted).T).max() < 6


def test_multiplied_out_weights_answer_as_the_original_file(astronaut):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    original = core.read_model(FILES[FACENET])
    original.reshape([1, 160, 160, 3])
    compiled = core.compile_model(original, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    face = pixels(astronaut, FACE, 160, 160)
    wanted = compiled(((face - 127.5) / 128).permute(0, 2, 3, 1).numpy())[0][0]
    found = load("id_encoder", FILES[FACENET])(face)[0].numpy()
    assert found @ wanted / np.linalg.norm(wanted) > 0.99999
