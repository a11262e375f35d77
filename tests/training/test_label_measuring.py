"""Labels: what is kept, what is left out, and that a pack is read back as it was written."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from caphuman_edge.export import attributes, labels, repaint
from caphuman_edge.export.labels import CODE_FIELDS, Measured
from caphuman_edge.ref.training.labels import _decode_jpegs, normalise
from caphuman_edge.runtime.contract import NANO
from caphuman_edge.runtime.head import HeadCode, HeadLayout
from caphuman_edge.runtime.perception.crop import CLIP_MEAN, CLIP_STD
from caphuman_edge.runtime.tokenizer import Tokenizer

PARTS = np.zeros((256, 256), np.uint8)  # hair above, a face of skin, clothes below, background beside
PARTS[20:120, 60:200], PARTS[80:200, 80:180], PARTS[220:, 40:220] = attributes.HAIR, 1, attributes.CLOTHES
LAYOUT = HeadLayout(2, ("jawOpen",), 1, (0.0, 0.0, 0.0), (0.0, 0.1, 0.0))


def measured(name, identity, mark=0.0):
    """Labels whose identity coefficients and place in the frame tell where they came from."""
    code = dataclasses.replace(HeadCode.neutral(LAYOUT), identity=np.full(2, mark), camera=np.array([5.0, mark, 0.0]))
    unit = np.asarray(identity, np.float32) / np.linalg.norm(identity)
    grey = np.full((3, NANO.vision.image_size, NANO.vision.image_size), 0.5, np.float32)
    white = (1 - CLIP_MEAN[:, None, None]) / CLIP_STD[:, None, None] + 0 * grey
    return Measured(name, code, unit, labels._jpeg(white), np.eye(32, dtype=bool), {"light": "left"}, PARTS)


def test_a_picture_unlike_its_identity_is_left_out():
    same, also, other = [1, 0, 0], [1, 0.2, 0], [-1, 0, 0.1]
    pictures = [measured("00300", same), measured("00300_a", also), measured("00300_b", same),
                measured("00301", same), measured("00301_a", other), measured("00302", other)]
    kept = {picture.name for picture in labels._alike(pictures)}
    assert kept == {"00300", "00300_a", "00300_b", "00302"}  # nobody can say which of 00301's two is right


def test_a_written_pack_holds_what_was_measured(tmp_path):
    pictures = [measured("00300", [1, 0], mark=0.25), measured("00300_a", [1, 0], mark=0.5)]
    labels._write_labels(tmp_path, pictures)
    with np.load(tmp_path / "labels.npz") as pack, np.load(tmp_path / "parts.npz") as parts:
        assert (parts["parts"] == PARTS).all() and json.loads(str(pack["attributes"][0])) == {"light": "left"}
        assert pack["names"].tolist() == ["00300", "00300_a"]
        assert all(pack[f"code_{field}"].shape[0] == 2 for field in CODE_FIELDS)
        assert pack["code_camera"][1].tolist() == [5.0, 0.5, 0.0]
        assert (np.unpackbits(pack["masks"], axis=-1)[0] == np.eye(32)).all()
        assert pack["empty_caption"].tolist() == [49406, *[49407] * 76]


def test_a_crop_survives_the_pack_as_the_image_encoder_reads_it():
    blob = np.frombuffer(measured("00300", [1, 0]).crop, np.uint8)
    crop = normalise(torch.from_numpy(_decode_jpegs(blob, np.array([len(blob)])))).numpy()
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


@pytest.mark.parametrize(("name", "colour"), repaint.COLOURS.items())
def test_what_is_painted_in_a_colour_is_called_that(name, colour):
    assert attributes.colour_name(np.tile(np.array(colour) / 255, (50, 1))) == name


@pytest.mark.parametrize(("name", "colour"), repaint.HAIR_COLOURS.items())
def test_hair_painted_in_a_colour_is_called_that(name, colour):
    assert attributes.hair_colour(np.tile(np.array(colour) / 255, (50, 1))) == name


def test_a_part_of_many_colours_or_of_no_size_has_no_colour():
    colours = np.repeat(np.array(list(repaint.COLOURS.values())) / 255, 10, axis=0)
    assert attributes.colour_name(colours) is None
    assert "hair" not in attributes.part_attributes(grey_picture(), np.zeros((256, 256), np.uint8))


def test_every_part_is_seen_in_its_own_colour():
    picture = grey_picture()
    for label, colour in ((attributes.HAIR, repaint.HAIR_COLOURS["pink"]), (attributes.CLOTHES, (180, 38, 38)),
                          (attributes.BACKGROUND, (58, 104, 196))):
        picture[label == PARTS] = colour
    found = attributes.part_attributes(picture, PARTS)
    assert found == {"hair": "pink", "length": "short", "background": "blue", "clothes": "red", "glasses": "no"}


def test_long_hair_hangs_below_the_chin_and_a_hat_hides_its_length():
    parts = PARTS.copy()
    parts[120:, 20:80] = parts[120:, 180:240] = attributes.HAIR
    assert attributes.part_attributes(grey_picture(), parts)["length"] == "long"
    parts[:40, 40:220], parts[130:140, 90:170] = attributes.HAT, attributes.GLASSES
    found = attributes.part_attributes(grey_picture(), parts)
    assert (found["hat"], found["glasses"], found.get("length")) == ("yes", "yes", None)


def test_repainting_changes_parts_and_spares_the_face():
    picture, changed = grey_picture(), set()
    for seed in range(12):
        painted = repaint.repainted(picture, PARTS, np.random.default_rng(seed))
        assert np.abs(painted[100:190, 90:170].astype(int) - 128).max() == 0
        changed |= {label for label in repaint.SHARES if np.abs(painted[label == PARTS].astype(int) - 128).mean() > 5}
    assert changed == set(repaint.SHARES)


def test_a_mirrored_picture_is_lit_from_the_other_side():
    assert attributes.mirrored({"light": "left", "hair": "red"}) == {"light": "right", "hair": "red"}


def test_each_variant_is_captioned_from_what_it_shows(tmp_path, monkeypatch):
    Image.fromarray(grey_picture()).save(tmp_path / "00300.jpg")
    monkeypatch.setattr(labels, "_autoencoder", lambda folder: None)
    monkeypatch.setattr(labels, "_means", lambda model, images: images)
    job = (tmp_path / "00300.jpg", {"light": "left"}, PARTS)
    pictures, flips, ids = labels._encoded(tmp_path, 128, 16, job)
    word = {name: int(Tokenizer().encode(name)[0, 1]) for name in (*attributes.COLOURS, "left", "right")}
    assert set(flips) == {True, False} and len({picture.tobytes() for picture in pictures}) > 8
    for picture, flipped, told in zip(pictures, flips, ids, strict=True):
        said = {name for name, number in word.items() if (told == number).any()}
        assert ("right" if flipped else "left") in said and ("left" if flipped else "right") not in said
        assert attributes.colour_name(picture[60:100, :20].reshape(-1, 3) / 255) in said


def test_light_comes_from_the_brighter_side():
    dark, bright, even = np.full((9, 3), 0.3), np.full((9, 3), 0.7), np.zeros((9, 3), np.float32)
    even[0] = 1
    assert [attributes.light_side(*sides, even) for sides in ((bright, dark), (dark, bright), (bright, bright))] == [
        "left", "right", "front"]


def test_captions_say_only_what_was_measured():
    told = " ".join(attributes.captions({"hair": "blond", "smile": "no"}, 30, np.random.default_rng(0)))
    assert "blond" in told and any(word in told for word in attributes.PHRASES["smile"]["no"])
    assert "background" not in told and "brown" not in told


def grey_picture():
    return np.full((256, 256, 3), 128, np.uint8)
