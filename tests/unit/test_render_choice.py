"""Which renderer one gets, and what one is told when it is not the GPU."""
import sys
from types import SimpleNamespace

import pytest

from caphuman_edge.runtime.errors import BadInput, MissingExtra, RenderError
from caphuman_edge.runtime.render import NumpyRenderer, open_renderer


@pytest.fixture
def without_moderngl(monkeypatch):
    monkeypatch.setitem(sys.modules, "moderngl", None)  # makes the import fail


@pytest.fixture
def without_gl(monkeypatch):
    def fail(**settings):
        raise Exception("libEGL.so.1 not loaded")  # as glcontext does

    monkeypatch.setitem(sys.modules, "moderngl", SimpleNamespace(create_standalone_context=fail))


def test_numpy_is_given_without_a_notice_when_asked_for():
    assert open_renderer("numpy") == NumpyRenderer(notice="")


def test_gl_without_moderngl_names_the_extra(without_moderngl):
    with pytest.raises(MissingExtra, match=r"pip install 'caphuman-edge\[gl\]'"):
        open_renderer("gl")


def test_gl_without_a_driver_names_the_packages(without_gl):
    with pytest.raises(RenderError, match=r"libEGL.so.1 not loaded.*apt-get install libegl1 libgl1-mesa-dri"):
        open_renderer("gl")


def test_auto_announces_its_fallback_when_moderngl_is_missing(without_moderngl):
    renderer = open_renderer("auto")
    assert renderer.device == "numpy"
    assert "pip install 'caphuman-edge[gl]'" in renderer.notice


def test_auto_announces_its_fallback_when_there_is_no_driver(without_gl):
    renderer = open_renderer("auto")
    assert renderer.device == "numpy"
    assert "libegl1" in renderer.notice


def test_an_unknown_renderer_is_refused():
    with pytest.raises(BadInput, match='"vulkan", expected auto, gl or numpy'):
        open_renderer("vulkan")
