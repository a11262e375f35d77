"""The 68 points of the iBUG scheme out of the landmark network's 478.

Sagonas et al., "300 Faces in-the-Wild Challenge" (2013): outline, brows, nose, eyes, lips, each from the person's right
to the left, so from image left. Official CapHuman measures them with FAN, whose weights are not to be had.
"""
import numpy as np
from jaxtyping import Float32

from caphuman_edge.runtime.perception.landmarks import FaceLandmarks

# Each point lies in the middle between two landmarks, or on one that is named twice. The outline's points are evenly
# spaced along the mean face's oval, from temple to temple as seen from the front; brows run between their two rims.
SOURCES = np.array([
    (127, 127), (234, 234), (93, 132), (132, 58), (58, 172), (136, 136), (150, 149), (176, 148), (152, 152),
    (400, 377), (379, 378), (365, 365), (397, 288), (288, 361), (323, 361), (454, 454), (356, 356),
    (70, 46), (63, 53), (105, 52), (66, 65), (107, 55), (336, 285), (296, 295), (334, 282), (293, 283), (300, 276),
    (168, 6), (197, 197), (195, 5), (4, 4), (98, 98), (97, 97), (2, 2), (326, 326), (327, 327),
    (33, 33), (160, 160), (158, 158), (133, 133), (153, 153), (144, 144),
    (362, 362), (385, 385), (387, 387), (263, 263), (373, 373), (380, 380),
    (61, 61), (40, 40), (37, 37), (0, 0), (267, 267), (270, 270), (291, 291),
    (321, 321), (405, 314), (17, 17), (181, 84), (91, 91),
    (78, 78), (81, 81), (13, 13), (311, 311), (308, 308), (402, 402), (14, 14), (178, 178),
])


def points68(face: FaceLandmarks) -> Float32[np.ndarray, "68 2"]:
    """Image pixels, x right, y down."""
    return np.asarray(face.points[SOURCES, :2].mean(axis=1), np.float32)
