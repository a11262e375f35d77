"""A bundle that is not square and has a second ControlNet: everything that steers a portrait, at once."""
import dataclasses

import numpy as np
import pytest

from caphuman_edge.export.assemble import perception_in
from caphuman_edge.export.builder import Options, Sources, build
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.runtime import Bundle, Canvas, Person, Pipeline
from caphuman_edge.runtime.bundle import EMBEDDED
from caphuman_edge.runtime.framing import Region
from caphuman_edge.runtime.schedule import Schedule

HEIGHT, WIDTH = 64, 128


@pytest.fixture(scope="module")
def pipe(micro, tmp_path_factory):
    """The micro model at 128 x 64 px, as ONNX."""
    model = CapHuman(dataclasses.replace(micro.config, height=HEIGHT, width=WIDTH), pose_net=True)
    model.load_state_dict(micro.model.state_dict())
    model.control_model.mask_predict[0].weight.data *= 0.01
    model.control_model.mask_predict[0].bias.data.fill_(2.0)  # all gates open: tokens act on the coarsest levels alone
    out = tmp_path_factory.mktemp("wide") / "wide"
    sources = Sources(perception_in(EMBEDDED), "wide", Schedule(steps=4), {"weights": "random"}, {}, "tests only")
    build(model.requires_grad_(False), micro.preview, sources, out, Options(split=False, control=True))
    return Pipeline(Bundle.open(out), renderer="numpy", threads=1)


@pytest.fixture(scope="module")
def crowd(pipe, stranger):
    """Two people, each kept to a half of the frame."""
    one = stranger(pipe)
    other = dataclasses.replace(one, identity=-one.identity, face_crop=-one.face_crop)
    left = np.zeros((HEIGHT, WIDTH), np.float32)
    left[:, :WIDTH // 2] = 1
    return [Person(one, one.head.moved(x=-0.4, scale=0.8), left), Person(other, other.head.moved(x=0.4), 1 - left)]


@pytest.fixture(scope="module")
def canvas():
    photo = np.random.default_rng(3).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    mask[16:48, 32:96] = 1
    return Canvas(photo, Region(20.0, 10.0, float(WIDTH), float(HEIGHT)), mask)


@pytest.fixture(scope="module")
def draw(pipe, crowd, canvas):
    """Draws with every control set, but for the changes."""
    picture = np.random.default_rng(4).random((HEIGHT, WIDTH, 3), np.float32)

    def run(people=crowd, canvas=canvas, control=picture, **changes):
        settings = {"prompt": "a (smiling:1.3) crowd, " * 20, "negative": "blur", "guidance": 3.0, "eta": 0.5,
                    "identity_guidance": 2.0, "enhancement": 0.5, "tau": 400, "strength": tuple(np.full(13, 0.9)),
                    "control_strength": 0.7, "seed": 3, **changes}
        *_, last = pipe.generate(people, canvas=canvas, control=control, **settings)
        return last
    return run


def test_everything_at_once_makes_the_same_picture_twice(pipe, draw, canvas):
    first, again = draw(), draw()
    np.testing.assert_array_equal(first.latent, again.latent)
    assert np.isfinite(first.latent).all() and first.latent.shape == (1, 4, HEIGHT // 8, WIDTH // 8)
    assert first.image.pixels.shape == canvas.photo.shape and first.preview().shape == (HEIGHT, WIDTH, 3)
    assert {"canvas", "control_sha256"} <= first.recipe.keys() and len(first.recipe["people"]) == 2


@pytest.mark.parametrize("changes", [
    {"prompt": "somebody"}, {"negative": ""}, {"guidance": 4.0}, {"eta": 0.0}, {"identity_guidance": 1.0},
    {"enhancement": 0.0}, {"tau": 0}, {"strength": 1.0}, {"control_strength": 0.0}, {"seed": 4}, {"steps": 5},
    {"denoise": 0.5}, {"control": None}, {"canvas": None}], ids=str)
def test_each_control_reaches_the_picture_beside_all_others(draw, changes):
    apart = draw(**changes).latent - draw().latent
    assert np.abs(apart).max() > 1e-5


def test_each_person_reaches_the_picture_beside_the_other(draw, crowd):
    both = draw(canvas=None).latent
    for one in crowd:
        assert np.abs(draw(people=[one], canvas=None).latent - both).max() > 1e-4


def test_the_second_control_reads_its_picture(pipe, draw, crowd):
    """As bytes of any size or as numbers of the frame's; and the landmarks that the pose map shows."""
    marks = pipe.landmarks(crowd[0].subject.head)
    assert marks.shape == (HEIGHT, WIDTH, 3) and marks.max() > 50
    drawn, other = (draw(control=picture).latent for picture in (marks, np.zeros_like(marks)))
    assert np.abs(drawn - other).max() > 1e-5
    np.testing.assert_array_equal(draw(control=marks.astype(np.float32) / 255).latent, drawn)


def test_the_second_control_differs_from_text_to_text(pipe, draw):
    """It reads the text, unlike CapFace: its residuals are no one-for-all."""
    rng, spec = np.random.default_rng(5), {tensor.name: tensor for tensor in pipe.graph("controlnet").inputs}
    texts = rng.normal(size=(2, 77, spec["text_tokens"].shape[2])).astype(np.float32)
    hint = rng.normal(size=spec["hint"].shape).astype(np.float32)
    latent = rng.normal(size=spec["latent"].shape).astype(np.float32)
    residuals = pipe.graph("controlnet")({"latent": latent, "timestep": np.array([500.0], np.float32),
                                          "text_tokens": texts, "hint": hint})
    assert max(np.abs(array[0] - array[1]).max() for array in residuals.values()) > 1e-4


def test_the_reference_agrees_on_a_latent_that_is_not_square(pipe):
    """The bundle was checked at this size: its record tells."""
    parity = {name: part.forms["onnx"].parity["psnr_db"] for name, part in pipe.bundle.manifest.components.items()
              if "onnx" in part.forms and part.forms["onnx"].parity}
    assert min(parity.values()) > 60 and {"controlnet", "control_encoder", "vae_encoder", "unet"} <= parity.keys()
