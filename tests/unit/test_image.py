"""Photos of every kind come in as upright RGB or are refused in one line; portraits go out whole or not at all."""
import io
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caphuman_edge.runtime.errors import BadImage, BadInput
from caphuman_edge.runtime.image import (
    JPEG_SEGMENT,
    LARGEST_METADATA,
    PICTURES,
    load_photo,
    read_metadata,
    resize,
    save_picture,
    save_png,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)
TEXTS = {"caphuman": '{"prompt": "a caf\u00e9 \u2603 \U0001f600", "seed": 7}', "AI-generated": "true"}
SUFFIXES = sorted(PICTURES)


def two_colours(mode: str = "RGB") -> Image.Image:
    """96 x 64 px, left half red, right half blue."""
    image = Image.new("RGB", (96, 64), RED)
    image.paste(BLUE, (48, 0, 96, 64))
    return image.convert(mode)


def refusal(path) -> str:
    with pytest.raises(BadImage) as caught:
        load_photo(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "webp", "jpg", "ppm"])
def test_formats_decode_to_the_same_picture(tmp_path, suffix):
    two_colours().save(tmp_path / f"photo.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    photo = load_photo(tmp_path / f"photo.{suffix}")
    assert photo.shape == (64, 96, 3) and photo.dtype == np.uint8
    np.testing.assert_allclose(photo[32, 10], RED, atol=3)
    np.testing.assert_allclose(photo[32, 80], BLUE, atol=3)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    two_colours().save(tmp_path / "photo.png", exif=exif)
    photo = load_photo(tmp_path / "photo.png")
    assert photo.shape == (96, 64, 3)
    np.testing.assert_array_equal(photo[10, 32], RED)


def test_grey_is_repeated(tmp_path):
    Image.new("L", (64, 64), 77).save(tmp_path / "photo.png")
    np.testing.assert_array_equal(load_photo(tmp_path / "photo.png"), 77)


def test_cmyk_is_converted(tmp_path):
    two_colours("CMYK").save(tmp_path / "photo.tiff")
    np.testing.assert_array_equal(load_photo(tmp_path / "photo.tiff")[32, 10], RED)


def test_a_palette_with_transparency_keeps_its_colours(tmp_path):
    two_colours("P").save(tmp_path / "photo.png", transparency=0)
    np.testing.assert_allclose(load_photo(tmp_path / "photo.png")[32, 10], RED, atol=1)


def test_alpha_is_dropped_not_blended(tmp_path):
    image = two_colours("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "photo.png")
    np.testing.assert_array_equal(load_photo(tmp_path / "photo.png")[32, 10], RED)


@pytest.mark.parametrize(("value", "want"), [(0, 0), (32768, 127), (65535, 255)])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, value, want):
    Image.fromarray(np.full((64, 64), value, np.uint16)).save(tmp_path / "photo.png")
    np.testing.assert_array_equal(load_photo(tmp_path / "photo.png"), want)


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "photo.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_photo(tmp_path / "photo.gif")[0, 0], RED)


def test_a_missing_file_a_folder_and_an_empty_file_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nobody.jpg")
    assert "not a file" in refusal(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "save it as JPEG or PNG" in refusal(tmp_path / "empty.png")


def test_what_is_no_picture_is_refused_whatever_its_name(tmp_path):
    (tmp_path / "notes.jpg").write_text("dear diary")
    assert "not a picture" in refusal(tmp_path / "notes.jpg")
    (tmp_path / "page.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n")
    assert "not a picture" in refusal(tmp_path / "page.png")


@pytest.mark.parametrize("size", [(1, 1), (63, 500), (500, 63)])
def test_too_small_a_photo_is_refused_with_its_size(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "photo.png")
    assert f"{size[0]}x{size[1]} px" in refusal(tmp_path / "photo.png")


@pytest.mark.parametrize("size", [(10_001, 10_000), (16_000, 16_000), (60_000, 60_000)])
def test_too_large_a_photo_is_refused_from_its_header_alone(tmp_path, size):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT")
    assert "at most 100 are read" in refusal(tmp_path / "photo.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff"])
def test_a_truncated_photo_is_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"photo.{suffix}")
    whole = (tmp_path / f"photo.{suffix}").read_bytes()
    (tmp_path / f"photo.{suffix}").write_bytes(whole[:len(whole) // 2])
    refusal(tmp_path / f"photo.{suffix}")


@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp", "gif", "tiff", "bmp"])
def test_an_altered_photo_is_read_or_refused_never_a_traceback(tmp_path, suffix):
    stream, rng = io.BytesIO(), np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 3
    two_colours().save(stream, format=suffix, **({} if suffix in ("gif", "bmp") else {"exif": exif}))
    for _ in range(100):
        data = bytearray(stream.getvalue())
        for position in rng.integers(0, min(len(data), 400), 3):
            data[position] = rng.integers(0, 256)
        (tmp_path / "photo").write_bytes(data)
        try:
            assert load_photo(tmp_path / "photo").ndim == 3
        except BadImage as error:
            assert "\n" not in str(error)


def test_a_portrait_comes_back_with_its_metadata(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    recipe = {"prompt": "a café ☃ portrait", "seed": "7", "Software": "caphuman"}
    save_png(tmp_path / "out.png", image, recipe)
    np.testing.assert_array_equal(load_photo(tmp_path / "out.png"), image)
    with Image.open(tmp_path / "out.png") as written:
        assert written.text == recipe


def test_a_lone_surrogate_in_a_prompt_does_not_lose_the_portrait(tmp_path):
    save_png(tmp_path / "out.png", np.zeros((64, 64, 3), np.uint8), {"prompt": "bad \udcff byte"})
    with Image.open(tmp_path / "out.png") as written:
        assert written.text == {"prompt": "bad ? byte"}


def test_saving_replaces_an_older_portrait_and_leaves_no_scratch(tmp_path):
    for value in (1, 2):
        save_png(tmp_path / "out.png", np.full((64, 64, 3), value, np.uint8))
    np.testing.assert_array_equal(load_photo(tmp_path / "out.png"), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_failed_save_keeps_the_older_portrait(tmp_path, monkeypatch):
    save_png(tmp_path / "out.png", np.full((64, 64, 3), 1, np.uint8))

    def full_disk(self, data):
        with self.open("wb") as file:
            file.write(data[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(BadInput, match="No space left on device"):
        patched.setattr(Path, "write_bytes", full_disk)
        save_png(tmp_path / "out.png", np.full((64, 64, 3), 2, np.uint8))
    np.testing.assert_array_equal(load_photo(tmp_path / "out.png"), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize(("name", "match"), [
    ("there.png", "is a folder"), ("out.jpg", "name it .*out.png"), ("out", "name it .*out.png"),
    ("missing/out.png", "cannot write .*No such file"),
])
def test_a_place_that_cannot_hold_a_portrait_is_refused(tmp_path, name, match):
    (tmp_path / "there.png").mkdir()
    with pytest.raises(BadInput, match=match):
        save_png(tmp_path / name, np.zeros((64, 64, 3), np.uint8))


def smooth() -> np.ndarray:
    """64 x 80 px, a ramp in each channel: what lossy formats keep well."""
    rows, columns = np.mgrid[:64, :80]
    return np.stack([3 * rows, 3 * columns, 255 - 2 * rows], axis=2).astype(np.uint8)


def xmp_of(path: Path) -> str:
    """The XMP packet as other programs find it: by Pillow in PNG and WebP, in a JPEG by its segment."""
    if path.suffix in (".jpg", ".jpeg"):
        data, place = path.read_bytes(), 2
        while data[place:place + 2] != b"\xff\xda":
            length = int.from_bytes(data[place + 2:place + 4], "big")
            name, _, packet = data[place + 4:place + 2 + length].partition(b"\0")
            if name == b"http://ns.adobe.com/xap/1.0/":
                return packet.decode()
            place += 2 + length
        return ""
    with Image.open(path) as picture:
        packet = picture.info["XML:com.adobe.xmp" if path.suffix == ".png" else "xmp"]
        return packet if isinstance(packet, str) else packet.decode()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_portrait_comes_back_from_every_format_with_its_texts(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    save_picture(path, smooth(), TEXTS)
    np.testing.assert_allclose(load_photo(path).astype(int), smooth(), atol=0 if suffix == ".png" else 9)
    assert {key: read_metadata(path, key) for key in TEXTS} == TEXTS
    assert read_metadata(path, "other") == ""
    with Image.open(path) as picture:
        assert picture.format == PICTURES[suffix]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_portrait_says_in_iptcs_terms_that_it_is_ai_generated(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    save_picture(path, smooth())
    packet = xmp_of(path)
    assert packet.startswith("<?xpacket begin=") and packet.endswith('<?xpacket end="r"?>')
    told = ElementTree.fromstring(packet).find(".//{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert told.text == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def test_pictures_that_are_no_portraits_say_nothing_of_ai(tmp_path):
    save_png(tmp_path / "maps.png", smooth())
    assert b"trainedAlgorithmicMedia" not in (tmp_path / "maps.png").read_bytes()


def test_a_jpeg_keeps_its_colours_at_full_resolution(tmp_path):
    save_picture(tmp_path / "out.jpg", smooth())
    with Image.open(tmp_path / "out.jpg") as picture:
        assert [part[1:3] for part in picture.layer] == [(1, 1)] * 3


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_capital_suffixes_and_lone_surrogates_do_not_lose_a_portrait(tmp_path, suffix):
    path = tmp_path / f"OUT{suffix.upper()}"
    save_picture(path, smooth(), {"prompt": "bad \udcff byte"})
    assert read_metadata(path, "prompt") == "bad ? byte"


def test_a_jpeg_refuses_more_metadata_than_a_segment_holds(tmp_path):
    save_picture(tmp_path / "out.jpg", smooth(), {"caphuman": "x" * (JPEG_SEGMENT - 200)})
    assert len(read_metadata(tmp_path / "out.jpg", "caphuman")) == JPEG_SEGMENT - 200
    with pytest.raises(BadInput, match="of a JPEG at most 65533; name it .png or .webp"):
        save_picture(tmp_path / "more.jpg", smooth(), {"caphuman": "x" * JPEG_SEGMENT})
    assert not (tmp_path / "more.jpg").exists()
    save_picture(tmp_path / "more.webp", smooth(), {"caphuman": "x" * JPEG_SEGMENT})
    assert len(read_metadata(tmp_path / "more.webp", "caphuman")) == JPEG_SEGMENT


@pytest.mark.parametrize("name", ["out.gif", "out", "out.txt"])
def test_a_portrait_of_another_kind_is_refused_with_the_kinds_that_there_are(tmp_path, name):
    with pytest.raises(BadInput, match=r"are .png, .jpg, .jpeg, .webp files, not .*: name it .*out.png"):
        save_picture(tmp_path / name, smooth())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_too_long_a_text_of_a_strangers_is_refused(tmp_path, suffix, monkeypatch):
    save_picture(tmp_path / f"out{suffix}", smooth(), {"caphuman": "x" * 500})
    monkeypatch.setattr("caphuman_edge.runtime.image.LARGEST_METADATA", 499)
    with pytest.raises(BadImage, match="holds 500 characters under 'caphuman', expected at most 499"):
        read_metadata(tmp_path / f"out{suffix}", "caphuman")
    assert LARGEST_METADATA > 100 * 5_000  # a hundred people's heads


@pytest.mark.parametrize("comment", [
    b"ASCII\0\0\0Canon", b"ASCII\0\0\0[1, 2]", b"ASCII\0\0\0" + b"[" * 50_000, b"UNICODE\0{", b"", b"\0" * 8,
    b'ASCII\0\0\0{"caphuman": 1}', b'{"caphuman": "x"}', b'ASCII\0\0\0{"caphuman": ["x"]}',
])
def test_comments_of_cameras_and_strangers_are_no_metadata_of_ours(tmp_path, comment):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    two_colours().save(tmp_path / "photo.jpg", exif=exif)
    assert read_metadata(tmp_path / "photo.jpg", "caphuman") == ""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_of_an_altered_file_are_read_or_refused_never_a_traceback(tmp_path, suffix):
    rng, seen = np.random.default_rng(0), set[str]()
    save_picture(tmp_path / f"out{suffix}", smooth(), TEXTS)
    whole = (tmp_path / f"out{suffix}").read_bytes()
    start = 0 if suffix != ".webp" else len(whole) - 1400  # where a WebP has its metadata
    for _ in range(300):
        data = bytearray(whole)
        for position in rng.integers(start, min(len(data), start + 1400), 3):
            data[position] = rng.integers(0, 256)
        (tmp_path / "altered").write_bytes(data)
        try:
            seen.add(read_metadata(tmp_path / "altered", "caphuman"))
        except BadImage as error:
            assert "\n" not in str(error)
            seen.add(str(error))
    assert len(seen) > 2  # what was altered are the metadata


def test_resize_averages_what_it_merges():
    checks = np.tile(np.array([[0, 200], [200, 0]], np.uint8), (32, 32))[..., None].repeat(3, 2)
    np.testing.assert_array_equal(resize(checks, 32, 32), 100)
    assert resize(checks, 20, 30, "bicubic").shape == (20, 30, 3)
