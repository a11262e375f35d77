"""The GL renderer draws what numpy draws, again and again, from any thread."""
import dataclasses
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from caphuman_edge.runtime.errors import MissingExtra, RenderError
from caphuman_edge.runtime.render import GlRenderer, open_renderer, render_maps


@pytest.fixture(scope="module")
def renderer() -> Iterator[GlRenderer]:
    try:
        renderer = GlRenderer()
    except (MissingExtra, RenderError) as error:
        pytest.skip(str(error))
    yield renderer
    renderer.close()


def test_auto_chooses_gl_without_a_notice(renderer):
    chosen = open_renderer("auto")
    assert isinstance(chosen, GlRenderer)
    assert chosen.device == renderer.device
    assert chosen.notice == ""
    chosen.close()


@pytest.mark.parametrize("size", [(256, 256), (96, 160), (160, 96)])
def test_gl_draws_what_numpy_draws(renderer, ball, assert_same_maps, size):
    assert_same_maps(renderer.render_maps(ball, *size), render_maps(ball, *size))


def test_a_tiny_face_carries_the_official_weights(renderer, ball):
    """Whose sum is visibly off 1; numpy is exact in that."""
    corners = np.array([[-1, -1, 0], [1, -1, 0], [0, 1, 0]], np.float32) * np.float32(2e-3)
    tiny = dataclasses.replace(
        ball, screen=corners, normals=np.ones((3, 3), np.float32), faces=np.array([[0, 1, 2]], np.int32),
        face_uv=np.zeros((1, 3, 2), np.float32),
    )
    normal = renderer.render_maps(tiny, 101, 101)[:3]
    assert normal.max() > 1.0005
    np.testing.assert_allclose(normal, render_maps(tiny, 101, 101)[:3], rtol=1e-5)


def test_each_draw_forgets_the_one_before(renderer, ball, assert_same_maps):
    first = renderer.render_maps(ball, 128, 128)
    moved = dataclasses.replace(ball, screen=ball.screen - np.float32([0.7, 0, 0]), light=-ball.light)
    few = dataclasses.replace(moved, faces=ball.faces[:300], face_uv=ball.face_uv[:300])
    beyond_the_texture = dataclasses.replace(ball, face_uv=ball.face_uv * 2 - np.float32(0.5))
    for mesh in (moved, few, beyond_the_texture, dataclasses.replace(ball, texture=ball.texture[::2, ::2].copy())):
        assert_same_maps(renderer.render_maps(mesh, 128, 128), render_maps(mesh, 128, 128))
    np.testing.assert_array_equal(renderer.render_maps(ball, 128, 128), first)


@pytest.mark.parametrize("shift", [(-1, 0), (-0.5, -0.5), (0, 0.6), (0.3, 0)])  # the ball's middle is (0.5, 0.1)
def test_a_mesh_over_the_borders_is_drawn_up_to_them(renderer, ball, assert_same_maps, shift):
    moved = dataclasses.replace(ball, screen=ball.screen + np.float32([*shift, 0]))
    assert_same_maps(renderer.render_maps(moved, 96, 128), render_maps(moved, 96, 128))


def test_a_mesh_beyond_the_frame_leaves_the_background(renderer, ball):
    renderer.render_maps(ball, 32, 32)
    beyond = dataclasses.replace(ball, screen=ball.screen + np.float32([0, 3, 0]))
    assert not renderer.render_maps(beyond, 32, 32).any()


def test_a_mesh_without_faces_leaves_the_background(renderer, ball):
    renderer.render_maps(ball, 32, 32)
    nothing = dataclasses.replace(ball, faces=ball.faces[:0], face_uv=ball.face_uv[:0])
    assert not renderer.render_maps(nothing, 32, 32).any()


def test_any_thread_may_draw(renderer, ball):
    expected = renderer.render_maps(ball, 64, 64)
    with ThreadPoolExecutor(4) as pool:
        for maps in pool.map(lambda _: renderer.render_maps(ball, 64, 64), range(12)):
            np.testing.assert_array_equal(maps, expected)


def test_two_renderers_do_not_disturb_each_other(renderer, ball):
    other = GlRenderer()
    expected = other.render_maps(ball, 64, 64)
    np.testing.assert_array_equal(renderer.render_maps(ball, 64, 64), expected)
    other.close()
    np.testing.assert_array_equal(renderer.render_maps(ball, 64, 64), expected)


def test_a_forked_child_is_told_to_open_its_own(renderer, ball, monkeypatch):
    child = os.getpid() + 1
    monkeypatch.setattr("os.getpid", lambda: child)
    with pytest.raises(RenderError, match="open one in each worker"):
        renderer.render_maps(ball, 8, 8)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="EGL is how Linux opens a context")
def test_a_library_that_is_not_there_is_an_error_and_no_crash(monkeypatch):
    pytest.importorskip("moderngl")
    monkeypatch.setenv("GLCONTEXT_LINUX_LIBEGL", "libnowhere.so")
    with pytest.raises(RenderError, match=r"libnowhere\.so.*apt-get install"):
        open_renderer("gl")


def test_a_closed_renderer_closes_again_and_says_why_it_draws_no_more(renderer, ball):
    other = GlRenderer()
    other.close()
    other.close()
    with pytest.raises(RenderError, match="is closed; open another one"):
        other.render_maps(ball, 64, 64)
