"""DECA (Feng et al. 2021, arXiv 2012.04012): a FLAME head's code read off a photo, as the official tool does."""
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, UInt8

from caphuman_edge.runtime.errors import ShapeMismatch
from caphuman_edge.runtime.head.code import HeadCode, HeadLayout
from caphuman_edge.runtime.perception.graph import Graph
from caphuman_edge.runtime.perception.landmarks import FaceLandmarks
from caphuman_edge.runtime.perception.official_crop import (
    CROP_SIZE,
    FRAME_SIZE,
    Square,
    crop_square,
    square_of_points,
    squash,
)
from caphuman_edge.runtime.perception.points68 import points68

SIZES = {"identity": 100, "texture": 50, "expression": 50, "pose": 6, "camera": 3, "light": 27}  # in DECA's order


@dataclass(frozen=True, eq=False)
class DecaEncoder:
    """The head_encoder graph with what comes before and after it."""

    head_encoder: Graph
    layout: HeadLayout  # of a FLAME head

    def measure(self, photo: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks) -> HeadCode:
        """The head in a photo, placed in the whole photo as its frame; `face` is in the photo's pixels."""
        to_frame = FRAME_SIZE / np.array([photo.shape[1], photo.shape[0]])
        square = square_of_points(points68(face) * to_frame - 0.5)  # there, pixels' centres are whole numbers
        image = crop_square(squash(photo), square)
        parameters = self.head_encoder({"image": image[None]})["parameters"][0]
        return deca_code(parameters, square, self.layout)


def is_flame(layout: HeadLayout) -> bool:
    """Whether DECA's numbers mean something in this head."""
    return (layout.identity_count, len(layout.expression_names)) == (SIZES["identity"], SIZES["expression"])


def deca_code(parameters: Float[np.ndarray, "236"], square: Square, layout: HeadLayout) -> HeadCode:
    """The head that DECA saw in a square of the 512 px frame, placed in the whole frame.

    Of the texture, as many coefficients are used as the head has. Raises ShapeMismatch for a head unlike FLAME.
    """
    if not is_flame(layout):
        raise ShapeMismatch(f"the head has {layout.identity_count} identity and {len(layout.expression_names)} "
                            f"expression components, DECA needs FLAME's {SIZES['identity']} and {SIZES['expression']}; "
                            "add one with caphuman head add")
    ends = np.cumsum(list(SIZES.values()))
    parts = dict(zip(SIZES, np.split(parameters, ends[:-1]), strict=True))
    texture, light = parts.pop("texture")[:layout.texture_count], parts.pop("light").reshape(9, 3)
    return HeadCode(layout, **parts, texture=texture, light=light, crop=frame_transform(square))


def frame_transform(square: Square) -> Float32[np.ndarray, "3 3"]:
    """From the crop's -1..1 to the frame's, for row vectors.

    The official tool takes -1..1 as 0..224 px here, though its crop ends at 223: a sub-pixel misalignment, kept.
    """
    half, edge = CROP_SIZE / 2, 2 / FRAME_SIZE
    to_pixels = np.array([[half, 0, 0], [0, half, 0], [half, half, 1]])
    to_unit = np.array([[edge, 0, 0], [0, edge, 0], [-1, -1, 1]])
    return np.asarray(to_pixels @ square.to_frame @ to_unit, np.float32)
