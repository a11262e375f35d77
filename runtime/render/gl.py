"""The condition maps on a GPU, or on Mesa's software driver: headless through EGL on Linux, natively elsewhere.

The only file that imports moderngl, and it does so when a renderer is opened.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float32

from caphuman_edge import shaders

from ..errors import MissingExtra, RenderError
from .maps import AREA_EPSILON, Mesh, drawable_faces

CORNER_LAYOUT = "3f 3f 2f 1f", "screen", "normal", "uv", "weight_sum"
CORNER_BYTES = 9 * 4
Box = tuple[int, int, int, int]  # left, top, width, height in pixels
REMEDY = "on Debian and Ubuntu: apt-get install libegl1 libgl1-mesa-dri; elsewhere update the graphics driver"


class GlRenderer:
    """Draws with OpenGL 3.3. Every thread of the process that opened it may call it.

    A GL context belongs to one thread, callers come on many (a slider UI has a pool of them). So the context lives on
    a thread of its own, which also keeps it clear of whatever GL the caller uses.
    """

    notice = ""  # as the numpy renderer has; nothing stands in here

    def __init__(self) -> None:
        """Open a context and compile the shaders; raises MissingExtra or RenderError where that cannot be done."""
        self._process, self._closed = os.getpid(), False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="caphuman-gl")
        try:
            self._pass = self._thread.submit(open_pass).result()
        except Exception:
            self._thread.shutdown()
            raise
        self.device = self._pass.device

    def render_maps(self, mesh: Mesh, height: int, width: int) -> Float32[np.ndarray, "9 height width"]:
        """See `numpy_raster.render_maps`. A forked child's copy raises RenderError: threads do not survive a fork."""
        if self._closed:
            raise RenderError("this GL renderer is closed; open another one")
        if os.getpid() != self._process:
            raise RenderError("this GL renderer belongs to the parent process; open one in each worker, or use numpy")
        return self._thread.submit(self._pass.draw, mesh, height, width).result()

    def close(self) -> None:
        """Free the context and end its thread; closing again does nothing."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self._pass.context.release)
            self._thread.shutdown()


class MapPass:
    """The GL objects of the one pass; texture and frame are kept until one of another size is asked for."""

    def __init__(self, context: Any, dialect: shaders.Dialect) -> None:
        """Compile for a moderngl context, which may be of OpenGL 3.3 or of ES 3.0 with EXT_color_buffer_float."""
        self.context = context
        self.device: str = context.info["GL_RENDERER"]
        context.enable_only(context.DEPTH_TEST)
        program = context.program(shaders.load("maps.vert", dialect), shaders.load("maps.frag", dialect))
        self._light = program["light"]
        self._corners = context.buffer(reserve=CORNER_BYTES, dynamic=True)
        self._vertices = context.vertex_array(program, [(self._corners, *CORNER_LAYOUT)])
        self._texture = context.texture((1, 1), 3, dtype="f4")
        self._frame = _new_frame(context, (1, 1))

    def draw(self, mesh: Mesh, height: int, width: int) -> Float32[np.ndarray, "9 height width"]:
        """Upload a mesh, draw it and read its maps back; pixels around the mesh are neither cleared nor read."""
        maps = np.zeros((9, height, width), np.float32)
        corners = pack_corners(mesh)
        box = covered_box(corners, height, width)
        if box[2] and box[3]:
            self.upload(mesh, corners)
            self.paint(len(corners), box, (width, height))
            self.read(box, maps)
        return maps

    def upload(self, mesh: Mesh, corners: Float32[np.ndarray, "corners 9"]) -> None:
        """Bring a mesh, packed already, and its texture to the GPU."""
        self._corners.orphan(corners.nbytes)
        self._corners.write(corners)
        self._light.write(np.ascontiguousarray(mesh.light))
        self._fit_texture(mesh.texture.shape[:2])
        self._texture.write(np.ascontiguousarray(mesh.texture))
        self._texture.use()

    def paint(self, count: int, box: Box, size: tuple[int, int]) -> None:
        """Draw the first `count` corners into a frame of (width, height)."""
        self._fit_frame(size)
        self._frame.use()
        self._frame.clear(viewport=box)
        self._vertices.render(vertices=count)

    def read(self, box: Box, maps: Float32[np.ndarray, "9 height width"]) -> None:
        """Copy the box of what was drawn into the maps."""
        left, top, width, height = box
        pixels = np.empty((height, width, 4), np.float32)  # ES reads float pixels in fours only
        for k in range(3):
            self._frame.read_into(pixels, viewport=box, components=4, attachment=k, dtype="f4")
            maps[3 * k:3 * k + 3, top:top + height, left:left + width] = pixels[..., :3].transpose(2, 0, 1)

    def _fit_texture(self, size: tuple[int, int]) -> None:
        if self._texture.size != size:
            self._texture.release()
            self._texture = self.context.texture(size, 3, dtype="f4")

    def _fit_frame(self, size: tuple[int, int]) -> None:
        if self._frame.size != size:
            for part in (*self._frame.color_attachments, self._frame.depth_attachment, self._frame):
                part.release()
            self._frame = _new_frame(self.context, size)


def open_pass() -> MapPass:
    """A pass in a context of its own, for this thread alone; raises MissingExtra or RenderError."""
    try:
        import moderngl
    except ImportError:
        raise MissingExtra("moderngl", "gl", "the GL renderer") from None
    backend: dict[str, Any] = {"backend": "egl"} if sys.platform.startswith("linux") else {}
    try:
        return MapPass(moderngl.create_standalone_context(require=330, **backend), "gl")
    except Exception as error:  # moderngl raises nothing narrower
        raise RenderError(f"OpenGL 3.3 cannot run here ({error}); {REMEDY}") from error


def _new_frame(context: Any, size: tuple[int, int]) -> Any:
    targets = [context.renderbuffer(size, 4, dtype="f4") for _ in ("normal", "albedo", "rendered")]
    return context.framebuffer(targets, context.depth_renderbuffer(size))


def pack_corners(mesh: Mesh) -> Float32[np.ndarray, "corners 9"]:
    """What the vertex stage reads, interleaved, three rows a face.

    The faces that a head turns to the viewer come first, so that the depth test spares what they hide its shading.
    """
    drawn, screen, areas = drawable_faces(mesh)
    order = np.argsort(areas < 0, kind="stable")
    corners = np.empty((len(drawn), 3, 9), np.float32)
    corners[..., :3] = np.take(screen, order, axis=0)
    corners[..., 3:6] = np.take(mesh.normals, mesh.faces[drawn[order]], axis=0)
    corners[..., 6:8] = np.take(mesh.face_uv, drawn[order], axis=0)
    corners[..., 8] = (areas / (areas + AREA_EPSILON))[order, None]
    return corners.reshape(-1, 9)


def covered_box(corners: Float32[np.ndarray, "corners 9"], height: int, width: int) -> Box:
    """The part of the frame that faces may cover; its width or height is 0 where they cover nothing."""
    if not len(corners):
        return 0, 0, 0, 0
    left, right = _pixel_range(corners[:, 0], width)
    top, bottom = _pixel_range(corners[:, 1], height)
    return left, top, right - left, bottom - top


def _pixel_range(places: Float32[np.ndarray, "corners"], count: int) -> tuple[int, int]:
    """First and end of the pixels that places in -1..1 span; one axis a time, as numpy reduces two slowly."""
    low, high = (float(place + 1) / 2 * count for place in (places.min(), places.max()))
    return int(np.clip(np.floor(low), 0, count)), int(np.clip(np.ceil(high), 0, count))
