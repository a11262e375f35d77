"""The identity vector: SFace (Zhong et al. 2021, arXiv 2205.12010) on the standard five-point alignment."""
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from caphuman_edge.runtime.perception.graph import Graph
from caphuman_edge.runtime.perception.landmarks import FaceLandmarks
from caphuman_edge.runtime.perception.warp import fit_similarity, warp

CROP_SIZE = 112  # px
TEMPLATE = np.array([  # eye centres, nose tip, mouth corners in the crop; image left before image right
    [38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041],
])
EYES = ((33, 133), (362, 263))  # their corners: an iris moves with the gaze, a corner does not
NOSE_TIP, MOUTH_CORNERS = 4, (61, 291)


def identity_vector(image: UInt8[np.ndarray, "h w 3"], landmarks: FaceLandmarks,
                    id_encoder: Graph) -> Float32[np.ndarray, "d"]:
    """The face's identity, of unit length; same-person pairs have a cosine above about 0.36."""
    crop = warp(image, fit_similarity(TEMPLATE, five_points(landmarks)), CROP_SIZE)
    face = np.ascontiguousarray(crop.transpose(2, 0, 1)[None])  # RGB, 0..255: the graph normalises
    identity = id_encoder({"face": face})["identity"][0]
    return identity / np.linalg.norm(identity)


def five_points(landmarks: FaceLandmarks) -> Float64[np.ndarray, "5 2"]:
    """Eye centres, nose tip and mouth corners in image pixels."""
    points = landmarks.points[:, :2].astype(np.float64)
    eyes = [points[list(corners)].mean(axis=0) for corners in EYES]
    return np.stack([*eyes, points[NOSE_TIP], *points[list(MOUTH_CORNERS)]])
