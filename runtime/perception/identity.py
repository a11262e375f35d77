"""The identity vector: SFace (Zhong et al. 2021, arXiv 2205.12010) on the standard five-point alignment, or FaceNet
(Schroff et al. 2015, arXiv 1503.03832) on a box, as the official tool uses it."""
import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8
from PIL import Image

from caphuman_edge.runtime.perception.graph import Graph
from caphuman_edge.runtime.perception.landmarks import FaceLandmarks
from caphuman_edge.runtime.perception.warp import fit_similarity, warp

SFACE_SIZE, FACENET_SIZE = 112, 160  # px
TEMPLATE = np.array([  # eye centres, nose tip, mouth corners in the crop; image left before image right
    [38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041],
])
EYES = ((33, 133), (362, 263))  # their corners: an iris moves with the gaze, a corner does not
NOSE_TIP, MOUTH_CORNERS = 4, (61, 291)
ABOVE_LANDMARKS = 0.14  # of their height: so far up MTCNN's box reaches (mean of 121 faces, deviation 0.03)
LEAST_OVERLAP = 0.3  # intersection over union; two boxes of one face share more


def identity_vector(image: UInt8[np.ndarray, "h w 3"], landmarks: FaceLandmarks,
                    id_encoder: Graph) -> Float32[np.ndarray, "d"]:
    """The face's identity by SFace, of unit length; same-person pairs have a cosine above about 0.36."""
    crop = warp(image, fit_similarity(TEMPLATE, five_points(landmarks)), SFACE_SIZE)
    return _encoded(crop, id_encoder)


def facenet_vector(image: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"],
                   id_encoder: Graph) -> Float32[np.ndarray, "d"]:
    """The identity by FaceNet of the face in a box, of unit length."""
    return _encoded(facenet_face(image, box), id_encoder)


def facenet_face(image: UInt8[np.ndarray, "h w 3"],
                 box: Float[np.ndarray, "4"] | None) -> Float32[np.ndarray, "160 160 3"]:
    """The box (left, top, right, bottom in pixels) as FaceNet sees it, 0..255; its graph standardises.

    Without a box it is the whole picture, so scaled that its standardised values are 0..1: what the official tool
    feeds where MTCNN finds no face, though FaceNet was trained on -1..1.
    """
    picture, size = Image.fromarray(image), (FACENET_SIZE, FACENET_SIZE)
    if box is None:
        return 127.5 + 128 / 255 * np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.float32)
    low, high = np.maximum(box[:2], 0).astype(int), np.minimum(box[2:], picture.size).astype(int)
    face = picture.crop((*low.tolist(), *high.tolist()))
    return np.asarray(face.resize(size, Image.Resampling.BILINEAR), np.float32)


def facenet_box(landmarks: FaceLandmarks, found: Float32[np.ndarray, "n 4"] | None) -> Float32[np.ndarray, "4"]:
    """Of MTCNN's boxes the measured face's; where there is none, one like it around the landmarks."""
    low, high = landmarks.points[:, :2].min(axis=0), landmarks.points[:, :2].max(axis=0)
    low[1] -= ABOVE_LANDMARKS * (high - low)[1]
    around = np.concatenate([low, high])
    if found is None or not len(found):
        return around
    sides = np.minimum(high, found[:, 2:]) - np.maximum(low, found[:, :2])
    shared = np.prod(np.maximum(sides, 0), axis=1)
    overlap = shared / (np.prod(high - low) + np.prod(found[:, 2:] - found[:, :2], axis=1) - shared)
    return found[overlap.argmax()] if overlap.max() > LEAST_OVERLAP else around


def five_points(landmarks: FaceLandmarks) -> Float64[np.ndarray, "5 2"]:
    """Eye centres, nose tip and mouth corners in image pixels."""
    points = landmarks.points[:, :2].astype(np.float64)
    eyes = [points[list(corners)].mean(axis=0) for corners in EYES]
    return np.stack([*eyes, points[NOSE_TIP], *points[list(MOUTH_CORNERS)]])


def _encoded(face: Float32[np.ndarray, "s s 3"], id_encoder: Graph) -> Float32[np.ndarray, "d"]:
    batch = np.ascontiguousarray(face.transpose(2, 0, 1)[None])  # RGB, 0..255: the graph normalises
    identity = id_encoder({"face": batch})["identity"][0]
    return identity / np.linalg.norm(identity)
