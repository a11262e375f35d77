"""Everything that is measured on a photo, behind one object that holds the networks."""
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, UInt8

from caphuman_edge.runtime.perception.detect import FaceBox, detect_faces
from caphuman_edge.runtime.perception.graph import Graph
from caphuman_edge.runtime.perception.identity import (
    FACENET_SIZE,
    SFACE_SIZE,
    facenet_box,
    facenet_vector,
    identity_vector,
)
from caphuman_edge.runtime.perception.insight import InsightFace
from caphuman_edge.runtime.perception.landmarks import FaceLandmarks, measure_landmarks
from caphuman_edge.runtime.perception.mtcnn import mtcnn_faces

MTCNN = ("mtcnn_pnet", "mtcnn_rnet", "mtcnn_onet")


@dataclass(frozen=True)
class Perception:
    """The contract's perception graphs as callables; images are RGB.

    `official` holds the parser and MTCNN's three by name, where they are at hand; `insight` finds the faces in place
    of `face_detector`.
    """

    face_detector: Graph
    face_landmarks: Graph
    face_blendshapes: Graph
    id_encoder: Graph
    identity_size: int = SFACE_SIZE  # px, edge of the face that id_encoder takes
    official: Mapping[str, Graph] = field(default_factory=dict)
    insight: InsightFace | None = None

    def detect(self, image: UInt8[np.ndarray, "h w 3"], every: bool = False) -> list[FaceBox]:
        """The faces found, the largest first; `every` looks for small ones beside them too."""
        return self.insight.detect(image) if self.insight else detect_faces(image, self.face_detector, every)

    def landmarks(self, image: UInt8[np.ndarray, "h w 3"], box: FaceBox) -> FaceLandmarks:
        """478 points and 52 blendshape scores; raises FaceError where the box holds no face."""
        return measure_landmarks(image, box, self.face_landmarks, self.face_blendshapes)

    def identity(self, image: UInt8[np.ndarray, "h w 3"], landmarks: FaceLandmarks) -> Float32[np.ndarray, "d"]:
        """The identity vector, of unit length: FaceNet's of MTCNN's box where the encoder takes 160 px, or SFace's."""
        if self.identity_size != FACENET_SIZE:
            return identity_vector(image, landmarks, self.id_encoder)
        has_mtcnn = all(name in self.official for name in MTCNN)
        found = mtcnn_faces(image, *(self.official[name] for name in MTCNN)).boxes if has_mtcnn else None
        return facenet_vector(image, facenet_box(landmarks, found), self.id_encoder)
