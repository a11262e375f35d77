"""A head code as the nine condition maps that CapFace reads."""
import numpy as np
from jaxtyping import Float32

from .head.code import HeadCode, project
from .head.model import HeadModel
from .render import Mesh, Renderer


def condition_maps(
    renderer: Renderer, model: HeadModel, code: HeadCode, height: int, width: int,
) -> Float32[np.ndarray, "9 height width"]:
    """Normal, albedo and rendered maps of the posed, lit head; background exactly 0."""
    return renderer.render_maps(head_mesh(model, code), height, width)


def head_mesh(model: HeadModel, code: HeadCode) -> Mesh:
    """The head as the renderers take it: projected, textured, lit."""
    vertices = model.vertices(code)
    return Mesh(project(vertices, code), model.normals(vertices), model.faces, model.face_uv, model.texture(code),
                code.light)
