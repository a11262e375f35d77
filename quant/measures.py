"""What is measured of one picture: its head, its expression, its light, and what a prompt could say of it.

The runtime's own perception measures heads, the face parser (`judges.open_parser`) hair, background and clothes.
"""
from collections.abc import Mapping

import numpy as np

from caphuman_edge.export.attributes import head_attributes, part_attributes, parts_of
from caphuman_edge.quant.tasks import DEALT
from caphuman_edge.runtime.backends import Graph
from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.framing import Fit
from caphuman_edge.runtime.head import HeadCode, HeadModel, project
from caphuman_edge.runtime.perceive import Subject
from caphuman_edge.runtime.perception import BLENDSHAPES, FaceLandmarks
from caphuman_edge.runtime.perception.points68 import SOURCES
from caphuman_edge.runtime.pipeline import Pipeline

ANGLES = ("yaw", "pitch", "roll")
UNITS: Mapping[str, tuple[str, ...]] = {  # expression units, as the mean of these blendshape scores
    "jawOpen": ("jawOpen",), "mouthSmile": ("mouthSmileLeft", "mouthSmileRight"),
    "eyeBlink": ("eyeBlinkLeft", "eyeBlinkRight")}
OUTER_EYE_CORNERS = {478: (33, 263), 68: (36, 45)}  # by how many landmarks a head has


class Measurer:
    """Measures pictures with one pipeline; without a parser hair, background and the like stay unmeasured."""

    def __init__(self, pipe: Pipeline, parser: Graph | None):
        self.pipe, self.parser = pipe, parser

    def see(self, picture: np.ndarray, fit: Fit = "squash") -> Subject | None:
        """The largest face of an (h, w, 3) uint8 picture, or None; a portrait is measured whole, as it is."""
        try:
            return self.pipe.perceive(picture, face=1, fit=fit)
        except FaceError:
            return None

    def head_figures(self, seen: Subject, head: HeadCode) -> dict[str, object]:
        """Angles and expression units as they are, landmarks against those of the head that was asked for."""
        return {"angles": dict(zip(ANGLES, seen.head.angles, strict=True)), "units": expression_units(seen.face),
                "landmarks": landmark_distance(self.pipe.head_model, head, seen.face, seen.photo.shape)}

    def attributes(self, seen: Subject) -> dict[str, str]:
        """All that can be told of a picture."""
        return self.part_attributes(seen) | told_by_head(seen)

    def part_attributes(self, seen: Subject) -> dict[str, str]:
        """What the parser can tell."""
        if self.parser is None:
            return {}
        found = part_attributes(seen.photo, parts_of(seen.photo, self.parser))
        return {name: value for name, value in found.items() if name in DEALT}


def expression_units(face: FaceLandmarks) -> dict[str, float]:
    """The strength of each of UNITS, 0..1."""
    return {name: float(np.mean([face.blendshapes[BLENDSHAPES.index(part)] for part in parts]))
            for name, parts in UNITS.items()}


def told_by_head(seen: Subject) -> dict[str, str]:
    """Light, smile and mouth."""
    return head_attributes(seen.photo, seen.face, seen.head.light)


def landmark_distance(model: HeadModel, head: HeadCode, face: FaceLandmarks, shape: tuple[int, ...]) -> float:
    """Mean distance of the measured landmarks from the head's, in percent of that between the outer eye corners.

    `shape` is the picture's: rows, columns. The eye distance is taken in space, so that turning away does not shrink
    it. Of a FLAME head 68 landmarks are compared.
    """
    height, width = shape[:2]
    points, vertices = face.points[:, :2], project(model.vertices(head), head)
    if len(model.landmark_corners) == len(points):
        wanted = model.landmarks(vertices)
    else:
        wanted, points = model.landmarks68(vertices, head.rotation), points[SOURCES].mean(axis=1)
    wanted = wanted * (width / 2, height / 2, width / 2)
    left, right = wanted[list(OUTER_EYE_CORNERS[len(wanted)])]
    apart = points - wanted[:, :2] - (width / 2, height / 2)
    return float(100 * np.linalg.norm(apart, axis=1).mean() / np.linalg.norm(left - right))
