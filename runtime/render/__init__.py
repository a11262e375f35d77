"""Condition maps of a head: on the GPU where there is one, in numpy everywhere."""
from ..errors import BadInput, MissingExtra, RenderError
from .gl import GlRenderer
from .maps import Mesh
from .numpy_raster import NumpyRenderer, render_maps

__all__ = ["GlRenderer", "Mesh", "NumpyRenderer", "Renderer", "open_renderer", "render_maps"]

Renderer = GlRenderer | NumpyRenderer


def open_renderer(prefer: str = "auto") -> Renderer:
    """The preferred renderer, "auto", "gl" or "numpy"; open it once and draw many maps with it.

    "auto" falls back to numpy where GL cannot run: `notice` then says why and how to change it, for the caller to
    show. "gl" raises MissingExtra or RenderError there instead. Both draw the same maps.
    """
    if prefer == "numpy":
        return NumpyRenderer()
    if prefer == "gl":
        return GlRenderer()
    if prefer == "auto":
        return _gl_or_numpy()
    raise BadInput(f'renderer is "{prefer}", expected auto, gl or numpy')


def _gl_or_numpy() -> Renderer:
    try:
        return GlRenderer()
    except (MissingExtra, RenderError) as error:
        return NumpyRenderer(notice=f"drawing maps with numpy, not the GPU: {error}")
