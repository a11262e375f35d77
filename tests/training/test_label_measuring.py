"""Labels: what is kept, what is left out, and that a pack is read back as it was written."""
import dataclasses

import numpy as np
import pytest

from caphuman_edge.export import attributes, labels
from caphuman_edge.export.labels import CODE_FIELDS, Measured
from caphuman_edge.ref.training.labels import _decode_jpegs, normalise
from caphuman_edge.runtime.contract import NANO
from caphuman_edge.runtime.head import HeadCode, HeadLayout
from caphuman_edge.runtime.perception.crop import CLIP_MEAN, CLIP_STD

LAYOUT = HeadLayout(2, ("jawOpen",), 1, (0.0, 0.0, 0.0), (0.0, 0.1, 0.0))


def measured(name, identity, mark=0.0):
    """Labels whose identity coefficients and place in the frame tell where they came from."""
    code = dataclasses.replace(HeadCode.neutral(LAYOUT), identity=np.full(2, mark), camera=np.array([5.0, mark, 0.0]))
    unit = np.asarray(identity, np.float32) / np.linalg.norm(identity)
    grey = np.full((3, NANO.vision.image_size, NANO.vision.image_size), 0.5, np.float32)
    white = (1 - CLIP_MEAN[:, None, None]) / CLIP_STD[:, None, None] + 0 * grey
    return Measured(name, code, unit, labels._jpeg(white), np.eye(32, dtype=bool), np.zeros((2, 77), np.uint16))


def test_a_picture_unlike_its_identity_is_left_out():
    same, also, other = [1, 0, 0], [1, 0.2, 0], [-1, 0, 0.1]
    pictures = [measured("00300", same), measured("00300_a", also), measured("00300_b", same),
                measured("00301", same), measured("00301_a", other), measured("00302", other)]
    kept = {picture.name for picture in labels._alike(pictures)}
    assert kept == {"00300", "00300_a", "00300_b", "00302"}  # nobody can say which of 00301's two is right


def test_a_written_pack_holds_what_was_measured(tmp_path):
    pictures = [measured("00300", [1, 0], mark=0.25), measured("00300_a", [1, 0], mark=0.5)]
    labels._write_labels(tmp_path / "labels.npz", pictures)
    with np.load(tmp_path / "labels.npz") as pack:
        assert pack["names"].tolist() == ["00300", "00300_a"]
        assert all(pack[f"code_{field}"].shape[0] == 2 for field in CODE_FIELDS)
        assert pack["code_camera"][1].tolist() == [5.0, 0.5, 0.0]
        assert (np.unpackbits(pack["masks"], axis=-1)[0] == np.eye(32)).all()
        assert pack["empty_caption"].tolist() == [49406, *[49407] * 76]


def test_a_crop_survives_the_pack_as_the_image_encoder_reads_it():
    blob = np.frombuffer(measured("00300", [1, 0]).crop, np.uint8)
    crop = normalise(_decode_jpegs(blob, np.array([len(blob)])))
    white = (1 - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(crop[0].mean(axis=(1, 2)), white, atol=0.02)


def test_maps_show_the_own_pose_on_the_next_pictures_identity():
    names = np.array(["00300", "00300_a", "00301"])
    fields = {field: np.stack([getattr(measured(name, [1, 0], mark).code, field) for name, mark in
                               zip(names, (0.1, 0.2, 0.3), strict=True)]) for field in CODE_FIELDS}
    worn = [labels._worn(names, fields, i) for i in range(3)]
    np.testing.assert_allclose([head["camera"][1] for head in worn], [0.1, 0.2, 0.3])
    np.testing.assert_allclose([head["identity"][0] for head in worn], [0.2, 0.1, 0.3])


def test_a_latent_cell_is_face_if_half_of_it_is():
    mask = np.zeros((16, 16), bool)
    mask[:, :12] = True  # all of the left cells, half of the right ones
    mask[8:, 11:12] = False  # less than half of the lower right one
    assert labels._latent_mask(mask).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(("colour", "name"), [
    ((10, 10, 10), "dark"), ((240, 240, 240), "bright"), ((120, 120, 120), "grey"), ((60, 100, 200), "blue"),
    ((60, 140, 50), "green"), ((140, 80, 40), "warm")])
def test_flat_backgrounds_are_named(colour, name):
    assert attributes.background_colour(np.tile(np.array(colour) / 255, (50, 1))) == name


@pytest.mark.parametrize(("colour", "name"), [
    ((20, 18, 18), "black"), ((80, 55, 35), "brown"), ((190, 160, 100), "blond")])
def test_hair_on_pale_skin_is_named(colour, name):
    skin = np.tile(np.array([225, 180, 160]) / 255, (50, 1))
    assert attributes.hair_colour(np.tile(np.array(colour) / 255, (50, 1)), skin) == name


def test_light_comes_from_the_brighter_side():
    dark, bright, even = np.full((9, 3), 0.3), np.full((9, 3), 0.7), np.zeros((9, 3), np.float32)
    even[0] = 1
    assert [attributes.light_side(*sides, even) for sides in ((bright, dark), (dark, bright), (bright, bright))] == [
        "left", "right", "front"]


def test_captions_say_only_what_was_measured():
    told = " ".join(attributes.captions({"hair": "blond", "smile": "no"}, 30, np.random.default_rng(0)))
    assert "blond" in told and any(word in told for word in attributes.PHRASES["smile"]["no"])
    assert "background" not in told and "brown" not in told
