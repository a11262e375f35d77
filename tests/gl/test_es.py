"""The same shaders run on OpenGL ES 3.0, which is what phones and WebGL 2 have."""
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from ctypes.util import find_library
from importlib.resources import files

import pytest

from caphuman_edge import shaders
from caphuman_edge.runtime.render import render_maps
from caphuman_edge.runtime.render.gl import MapPass

# EGL's numbers
ES_API, MESA_SURFACELESS, ES3_BIT, END = 0x30A0, 0x31DD, 0x40, 0x3038
RENDERABLE_TYPE, SURFACE_TYPE, CLIENT_VERSION = 0x3040, 0x3033, 0x3098


@pytest.mark.parametrize("dialect", ["gl", "es"])
def test_the_reference_compiler_accepts_and_links_them(tmp_path, dialect):
    validator = shutil.which("glslangValidator")
    if not validator:
        pytest.skip("glslangValidator is not installed: apt-get install glslang-tools")
    names = sorted(path.name.removesuffix(".glsl") for path in files(shaders).iterdir() if path.suffix == ".glsl")
    assert names == ["maps.frag", "maps.vert"]  # one program; another would be linked by itself
    for name in names:
        (tmp_path / name).write_text(shaders.load(name, dialect))
    done = subprocess.run([validator, "-l", *names], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout


def test_an_es_context_draws_what_numpy_draws(es_context, ball, assert_same_maps):
    assert "OpenGL ES" in es_context.info["GL_VERSION"]
    assert_same_maps(MapPass(es_context, "es").draw(ball, 160, 128), render_maps(ball, 160, 128))


@pytest.fixture
def es_context() -> Iterator:
    """A moderngl context over an ES 3 one that is made by hand, for moderngl itself only makes desktop ones."""
    moderngl = pytest.importorskip("moderngl")
    if not find_library("EGL"):
        pytest.skip("EGL is not installed: apt-get install libegl1 libgles2 libgl1-mesa-dri")
    egl = EsContext()
    yield moderngl.create_context(require=300, context=egl)
    egl.release()


class EsContext:
    """A headless OpenGL ES 3 context of Mesa, in the form that moderngl takes."""

    def __init__(self) -> None:
        self._egl = ctypes.CDLL(find_library("EGL"))
        self._display = self._call("eglGetPlatformDisplay", MESA_SURFACELESS, None, None)
        self._call("eglInitialize", self._display, None, None)
        self._call("eglBindAPI", ES_API)
        config, count = ctypes.c_void_p(), ctypes.c_int()
        wanted = _integers(RENDERABLE_TYPE, ES3_BIT, SURFACE_TYPE, 0, END)
        self._call("eglChooseConfig", self._display, wanted, ctypes.byref(config), 1, ctypes.byref(count))
        self._context = self._call("eglCreateContext", self._display, config, None, _integers(CLIENT_VERSION, 3, END))
        self._call("eglMakeCurrent", self._display, None, None, self._context)

    def load_opengl_function(self, name: str) -> int:
        """Address of a GL function; 0 where there is none."""
        self._egl.eglGetProcAddress.restype = ctypes.c_void_p
        return self._egl.eglGetProcAddress(name.encode()) or 0

    def release(self) -> None:
        self._call("eglMakeCurrent", self._display, None, None, None)
        self._call("eglDestroyContext", self._display, self._context)

    def _call(self, name: str, *arguments):
        function = getattr(self._egl, name)
        function.restype = ctypes.c_void_p
        result = function(*(ctypes.c_void_p(a) if isinstance(a, int) and a > 2**31 else a for a in arguments))
        if not result:
            pytest.skip(f"{name} failed: no OpenGL ES 3 here")
        return result


def _integers(*values: int):
    return (ctypes.c_int * len(values))(*values)
