"""A head code as the nine condition maps that CapFace reads, and landmarks as the pose map of another control."""
import numpy as np
from jaxtyping import Float, Float32, UInt8

from .head.code import HeadCode, project
from .head.marks import ALL
from .head.model import HeadModel
from .image import resize
from .perception.points68 import SOURCES
from .render import Mesh, Renderer
from .render.maps import DEPTH_OFFSET

DISC_RADIUS = 3  # px
LARGEST_DEPTH = 0.99 * float(DEPTH_OFFSET)


def condition_maps(
    renderer: Renderer, model: HeadModel, code: HeadCode, height: int, width: int,
) -> Float32[np.ndarray, "9 height width"]:
    """Normal, albedo and rendered maps of the posed, lit head; background exactly 0."""
    return renderer.render_maps(head_mesh(model, code), height, width)


def head_mesh(model: HeadModel, code: HeadCode) -> Mesh:
    """The head as the renderers take it: projected, textured, lit."""
    vertices = model.vertices(code)
    screen = project(vertices, code)
    # renderers draw nothing nearer than DEPTH_OFFSET: of a head scaled up so far, one would see the inside
    screen[:, 2] *= min(1.0, LARGEST_DEPTH / max(1e-6, float(np.abs(screen[:, 2]).max())))
    return Mesh(screen, model.normals(vertices), model.faces, model.face_uv, model.texture(code),
                code.light)


def landmark_picture(model: HeadModel, code: HeadCode, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """A head's 68 landmarks as `landmark_map` draws them, at 512 px stretched to the frame.

    FLAME's own where the head has them, else those that the landmark network's 478 stand for.
    """
    screen = project(model.vertices(code), code)
    marks = model.landmarks(screen)
    points = marks[SOURCES].mean(axis=1) if len(marks) == ALL else model.landmarks68(screen, code.rotation)
    return resize(landmark_map(points[:, :2]), height, width, "bilinear")


def landmark_map(points: Float[np.ndarray, "n 2"], size: int = 512) -> UInt8[np.ndarray, "size size 3"]:
    """The official pose map: a white disc of radius 3 px around every landmark, on black.

    points: -1..1 in the frame, x right, y down. A point within 0.01 px of the left or upper border, or beyond it, is
    left out; one beyond the others shows the part of its disc that reaches in.
    """
    pixels = (1 + points) / 2 * size
    centres = pixels[(pixels > 0.01).all(axis=1)].astype(int)
    columns, rows = np.meshgrid(*[np.arange(-DISC_RADIUS, DISC_RADIUS + 1)] * 2)
    disc = np.stack([columns, rows], axis=-1)[columns**2 + rows**2 <= DISC_RADIUS**2]
    covered = (centres[:, None] + disc).reshape(-1, 2)
    x, y = covered[((covered >= 0) & (covered < size)).all(axis=1)].T
    drawn = np.zeros((size, size, 3), np.uint8)
    drawn[y, x] = 255
    return drawn
