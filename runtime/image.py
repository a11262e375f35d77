"""Photos in, portraits out: the only file that decodes or writes pictures."""
import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .errors import BadImage, BadInput

MIN_EDGE = 64  # px; a face in less cannot be measured
MAX_PIXELS = 100_000_000  # decoded, that is 300 MB
# Raster formats that a photo may have. Vector formats stay out: Pillow would start Ghostscript for them.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # what a portrait may be, by suffix
FILTERS = {"area": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
LARGEST_METADATA = 1_000_000  # characters; a recipe has a few thousand
JPEG_SEGMENT = 65_533  # bytes: a segment's length has 16 bits and counts itself
EXIF_IFD, USER_COMMENT, ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"  # EXIF 2.32: tags, and UserComment's character code
# XMP specification part 1, 7.3.2: a packet, read-only. The marks around it let scanners find it in any file.
GENERATED = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    '</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>')
# What Pillow's decoders were seen to raise on truncated or altered files: they share no base class.
DECODE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError,
                 RuntimeError, MemoryError, struct.error, zlib.error)


def load_photo(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a photo to upright RGB, 8 bits a channel.

    EXIF orientation is applied. Greyscale is repeated, CMYK and palettes are converted, 16 bits are scaled to 8.
    Alpha is dropped, not blended, as the official tool does: what lies under transparent pixels shows. Of an animation
    the first frame counts. Colour profiles are not applied. Raises BadImage for what is no photo, is damaged, has an
    edge under 64 px or more than 100 megapixels; the size is read from the header, before anything is decoded.
    """
    path = Path(path)
    with warnings.catch_warnings(action="ignore"), _open(path) as photo:  # Pillow remarks on odd headers
        _check_size(path, *photo.size)
        try:
            return np.array(_rgb(path, ImageOps.exif_transpose(photo)))
        except DECODE_ERRORS as error:
            raise BadImage(f"photo {path} is damaged or cut short ({_line(error)}); fetch it again") from error


def save_picture(
    path: str | Path, pixels: UInt8[np.ndarray, "h w 3"], metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a portrait as PNG, JPEG or WebP, as its suffix says, with text metadata, whole or not at all.

    JPEG and WebP have quality 95, JPEG its colours at full resolution. `read_metadata` finds the texts in each: PNG
    holds them as text chunks, the others as JSON in EXIF's UserComment. An XMP packet says that the picture is
    AI-generated, in IPTC's terms (Photo Metadata Standard, Digital Source Type). Raises BadInput for another suffix, a
    place that cannot be written, and for more metadata than a JPEG holds, which is 64 kB.
    """
    path = Path(path)
    kind = PICTURES.get(path.suffix.lower())
    _check_place(path, f"portraits are {', '.join(PICTURES)} files", kind is not None)
    if kind == "PNG":
        chunks = _text_chunks(metadata or {})
        chunks.add_itxt("XML:com.adobe.xmp", GENERATED)  # uncompressed, as XMP's part 3 wants it
        data = _encoded(pixels, "PNG", pnginfo=chunks)
    elif kind == "WEBP":
        data = _encoded(pixels, "WEBP", quality=95, exif=_exif(metadata or {}), xmp=GENERATED.encode())
    else:
        exif = _exif(metadata or {})
        if len(exif) > JPEG_SEGMENT:
            raise BadInput(f"{path} cannot hold its {len(exif)} bytes of metadata, of a JPEG at most {JPEG_SEGMENT}; "
                           "name it .png or .webp")
        data = _with_xmp(_encoded(pixels, "JPEG", quality=95, subsampling=0, exif=exif), GENERATED.encode())
    _write_whole(path, data)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a former one stays until then. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def save_png(path: str | Path, image: UInt8[np.ndarray, "h w 3"], metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG with text metadata, whole or not at all: a killed process leaves no half picture.

    Keys are 1 to 79 Latin-1 characters (PNG specification, tEXt); values may hold any text. Raises BadInput where the
    file cannot be written.
    """
    path = Path(path)
    _check_place(path, "what is written here is a PNG file", path.suffix.lower() == ".png")
    _write_whole(path, _encoded(image, "PNG", pnginfo=_text_chunks(metadata or {})))


def read_metadata(path: str | Path, key: str) -> str:
    """What `save_picture` or `save_png` wrote under this key, or ""; raises BadImage where the file is no picture.

    The file may be a stranger's: what is there under the key may be any text of at most a million characters.
    """
    with warnings.catch_warnings(action="ignore"), _open(Path(path)) as picture:
        text = picture.info.get(key)
        if not isinstance(text, str):
            text = _user_comment(picture.info.get("exif")).get(key)
    if isinstance(text, str) and len(text) > LARGEST_METADATA:
        raise BadImage(f"{path} holds {len(text)} characters under {key!r}, expected at most {LARGEST_METADATA}; its "
                       "metadata was altered")
    return text if isinstance(text, str) else ""


def resize(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int, how: Literal["area", "bilinear", "bicubic"] = "area",
) -> UInt8[np.ndarray, "H W 3"]:
    """Scale to height x width px with Pillow, whose filters widen when they shrink, so nothing aliases."""
    return np.array(Image.fromarray(image).resize((width, height), FILTERS[how]))


def _open(path: Path) -> Image.Image:
    if not os.path.exists(path):  # Path.exists raises where the name is too long, or the folder closed
        raise BadImage(f"photo {path} does not exist; check the path")
    if not path.is_file():
        raise BadImage(f"photo {path} is not a file; name a picture in it")
    Image.init()
    try:
        return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise _too_large(path, "more than 178") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"{path} is not a picture this can read; save it as JPEG or PNG") from error
    except DECODE_ERRORS as error:
        raise BadImage(f"photo {path} cannot be opened ({_line(error)}); save it again as JPEG or PNG") from error


def _check_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < MIN_EDGE:
        raise BadImage(f"photo {path} is {width}x{height} px; use one of at least {MIN_EDGE} px an edge")
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height} px, {width * height // 1_000_000}")


def _too_large(path: Path, size: str) -> BadImage:
    return BadImage(f"photo {path} has {size} megapixels; at most {MAX_PIXELS // 1_000_000} are read, scale it down")


def _rgb(path: Path, photo: Image.Image) -> Image.Image:
    if photo.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray((np.asarray(photo).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if photo.mode == "F":
        raise BadImage(f"photo {path} holds floating-point values of unknown range; save it as 8-bit PNG or JPEG")
    return photo.convert("RGBA").convert("RGB") if photo.mode in ("P", "PA", "LA") else photo.convert("RGB")


def _check_place(path: Path, kinds: str, fits: bool) -> None:
    if os.path.isdir(path):
        raise BadInput(f"{path} is a folder; name a file in it, such as {path / 'portrait.png'}")
    if not fits:
        raise BadInput(f"{kinds}, not {path.suffix or 'files without a suffix'}: name it {path.with_suffix('.png')}")


def _write_whole(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data)
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror or error}); choose another place") from error


def _encoded(pixels: UInt8[np.ndarray, "h w 3"], kind: str, **settings: Any) -> bytes:
    Image.init()
    if kind not in Image.SAVE:
        raise BadInput(f"the Pillow that is installed here writes no {kind}; name the picture .png")
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind, **settings)
    return stream.getvalue()


def _text_chunks(metadata: Mapping[str, str]) -> PngInfo:
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_text(key, _encodable(value))
    return chunks


def _exif(metadata: Mapping[str, str]) -> bytes:
    """The texts as one JSON object in UserComment; its escapes make it ASCII, which has no byte order to guess."""
    texts = json.dumps({key: _encodable(value) for key, value in metadata.items()})
    exif = Image.Exif()
    exif[EXIF_IFD] = {USER_COMMENT: ASCII + texts.encode("ascii")}
    return exif.tobytes()


def _user_comment(exif: object) -> dict[str, Any]:
    """What `_exif` wrote; nothing where a camera or a stranger wrote something else."""
    if not isinstance(exif, bytes):
        return {}
    try:
        block = Image.Exif()
        block.load(exif)
        comment = block.get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
        texts = json.loads(comment[len(ASCII):]) if comment[:len(ASCII)] == ASCII else None
    except DECODE_ERRORS:
        return {}
    return texts if isinstance(texts, dict) else {}


def _with_xmp(jpeg: bytes, packet: bytes) -> bytes:
    """A JPEG with an XMP segment behind JFIF's and EXIF's (XMP specification, part 3). Pillow can do it from 11 on."""
    place = 2  # behind the start-of-image marker
    while jpeg[place:place + 2] in (b"\xff\xe0", b"\xff\xe1"):
        place += 2 + int.from_bytes(jpeg[place + 2:place + 4], "big")
    content = b"http://ns.adobe.com/xap/1.0/\0" + packet
    segment = b"\xff\xe1" + (2 + len(content)).to_bytes(2, "big") + content
    return jpeg[:place] + segment + jpeg[place:]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # argv may hold lone surrogates


def _line(error: BaseException) -> str:
    """An error's first line, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
