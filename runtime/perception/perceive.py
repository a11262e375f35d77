"""Everything that is measured on a photo, behind one object that holds the four networks."""
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from caphuman_edge.runtime.perception.detect import FaceBox, detect_faces
from caphuman_edge.runtime.perception.graph import Graph
from caphuman_edge.runtime.perception.identity import identity_vector
from caphuman_edge.runtime.perception.landmarks import FaceLandmarks, measure_landmarks


@dataclass(frozen=True)
class Perception:
    """The contract's perception graphs as callables; images are RGB."""

    face_detector: Graph
    face_landmarks: Graph
    face_blendshapes: Graph
    id_encoder: Graph

    def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Every face found, the largest first."""
        return detect_faces(image, self.face_detector)

    def landmarks(self, image: UInt8[np.ndarray, "h w 3"], box: FaceBox) -> FaceLandmarks:
        """478 points and 52 blendshape scores; raises FaceError where the box holds no face."""
        return measure_landmarks(image, box, self.face_landmarks, self.face_blendshapes)

    def identity(self, image: UInt8[np.ndarray, "h w 3"], landmarks: FaceLandmarks) -> Float32[np.ndarray, "d"]:
        """The identity vector, of unit length."""
        return identity_vector(image, landmarks, self.id_encoder)
