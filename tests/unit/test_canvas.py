"""A photo to draw over: what is kept, what is drawn anew, and where the seam runs."""
import dataclasses

import numpy as np
import pytest
from skimage.data import astronaut

from caphuman_edge.runtime import Canvas, Pipeline
from caphuman_edge.runtime.canvas import Known, drawn_cells, head_mask
from caphuman_edge.runtime.errors import BadInput, BundleError
from caphuman_edge.runtime.framing import Region
from caphuman_edge.runtime.schedule import Schedule, ddim_steps

SIZE = 64
HOLE = np.zeros((SIZE, SIZE), np.float32)
HOLE[24:40, 24:40] = 1


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def subject(pipe):
    return pipe.perceive(astronaut())


def test_outside_the_mask_and_its_seam_the_photo_keeps_its_bits(photo):
    region = Region(10.0, 20.0, 64.0, 64.0)
    done = Canvas(photo, region, HOLE).finished(np.full((SIZE, SIZE, 3), 255, np.uint8))
    assert done.shape == photo.shape
    assert (done[20 + 24:20 + 40, 10 + 24:10 + 40] == 255).all()
    changed = (done != photo).any(axis=2)
    changed[20 + 20:20 + 44, 10 + 20:10 + 44] = False  # the seam: twice three hundredths of the frame
    assert not changed.any()


def test_a_frame_that_reaches_beyond_the_photo_is_cut_off(photo):
    everything = np.ones((SIZE, SIZE), np.float32)
    done = Canvas(photo, Region(-32.0, -32.0, 64.0, 64.0), everything).finished(np.zeros((SIZE, SIZE, 3), np.uint8))
    assert not done[:24, :24].any() and done[31, 31].any()  # black, and faded out towards the frame's border
    np.testing.assert_array_equal(done[32:, 32:], photo[32:, 32:])


def test_without_a_mask_the_frame_is_the_picture(photo):
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    assert Canvas(photo, Region(0.0, 0.0, 100.0, 100.0)).finished(pixels) is pixels


def test_the_frame_is_what_the_region_shows(photo):
    shown = Canvas(photo, Region(10.0, 20.0, 64.0, 64.0)).frame(64, 64)
    np.testing.assert_array_equal(shown, photo[20:84, 10:74])


def test_cells_that_the_mask_or_its_seam_touches_are_drawn():
    cells = drawn_cells(HOLE, 8, 8)
    assert cells[3:5, 3:5].all() and not cells[:2].any() and not cells[:, 6:].any()
    assert drawn_cells(None, 8, 8).all()


def test_known_cells_are_as_noisy_as_the_step_leaves_them():
    rng = np.random.default_rng(1)
    clean, noise, latent = rng.normal(size=(3, 1, 4, 8, 8)).astype(np.float32)
    step, drawn = ddim_steps(Schedule(), 5)[1], drawn_cells(HOLE, 8, 8)
    kept = Known(clean, noise, drawn).kept(latent, step)
    np.testing.assert_array_equal(kept[..., drawn], latent[..., drawn])
    expected = np.sqrt(step.alpha_prev) * clean + np.sqrt(1 - step.alpha_prev) * noise
    np.testing.assert_allclose(kept[..., ~drawn], expected[..., ~drawn], atol=1e-6)


def test_the_head_s_mask_covers_both_heads_and_a_margin(pipe, subject):
    turned = subject.head.posed(yaw=40.0).moved(x=0.2)
    both = [pipe.maps(head) for head in (subject.head, turned)]
    mask = head_mask(both)
    covered = np.any([maps.any(axis=0) for maps in both], axis=0)
    assert mask[covered].all() and mask.sum() > 1.2 * covered.sum() and not mask.all()


def test_a_canvas_with_a_mask_is_given_back_whole(pipe, subject):
    photo, mask = astronaut(), head_mask([pipe.maps(subject.head)])
    *_, last = pipe.generate(subject, steps=2, canvas=Canvas(photo, subject.region, mask), denoise=1.0)
    drawn = last.image.pixels
    assert drawn.shape == photo.shape
    changed = (drawn != photo).any(axis=2)
    left, top, width, height = subject.region.pixels
    assert changed[top + height // 2, left + width // 2]
    changed[max(0, top):top + height, max(0, left):left + width] = False
    assert not changed.any()
    assert len(last.recipe["canvas"]["mask_sha256"]) == 64 and last.recipe["denoise"] == 1.0


def test_the_less_is_drawn_anew_the_nearer_the_photo(pipe, subject):
    canvas = Canvas(astronaut(), subject.region)
    frame = canvas.frame(256, 256).astype(float)
    apart = []
    for denoise in (0.2, 0.8):
        *_, last = steps = list(pipe.generate(subject, steps=10, canvas=canvas, denoise=denoise))
        assert len(steps) == 10 * denoise
        apart.append(np.abs(last.image.pixels - frame).mean())
    assert apart[0] < 0.7 * apart[1] and apart[0] < 15


def test_denoise_is_about_a_canvas(pipe, subject):
    assert pipe.settings().denoise == 1 and pipe.settings(canvas=True).denoise == 0.75
    with pytest.raises(BadInput, match="denoise is 0.5, but there is no canvas"):
        pipe.settings(denoise=0.5)


def test_a_bundle_without_the_encoder_cannot_read_a_canvas(pipe):
    parts = {name: part for name, part in pipe.bundle.manifest.components.items() if name != "vae_encoder"}
    manifest = dataclasses.replace(pipe.bundle.manifest, components=parts)
    with pytest.raises(BundleError, match="has no vae_encoder, which this needs; build it with this version"):
        Pipeline(dataclasses.replace(pipe.bundle, manifest=manifest), renderer="numpy").settings(canvas=True)
