"""Photos in, portraits out: the only file that decodes or writes pictures."""
import os
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .errors import BadImage, BadInput

MIN_EDGE = 64  # px; a face in less cannot be measured
MAX_PIXELS = 100_000_000  # decoded, that is 300 MB
# Raster formats that a photo may have. Vector formats stay out: Pillow would start Ghostscript for them.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
FILTERS = {"area": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
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


def save_png(path: str | Path, image: UInt8[np.ndarray, "h w 3"], metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG with text metadata, whole or not at all: a killed process leaves no half picture.

    Keys are 1 to 79 Latin-1 characters (PNG specification, tEXt); values may hold any text. Raises BadInput where the
    file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise BadInput(f"portraits are PNG files, not {path.suffix or 'files without a suffix'}: "
                       f"name it {path.with_suffix('.png')}")
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name a file in it, such as {path / 'portrait.png'}")
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        Image.fromarray(image).save(scratch, format="PNG", pnginfo=_text_chunks(metadata or {}))
        os.replace(scratch, path)
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror or error}); choose another place") from error
    finally:
        scratch.unlink(missing_ok=True)


def read_metadata(path: str | Path, key: str) -> str:
    """What `save_png` wrote under this key, or ""; raises BadImage where the file is no picture."""
    with warnings.catch_warnings(action="ignore"), _open(Path(path)) as picture:
        return str(picture.info.get(key, ""))


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


def _text_chunks(metadata: Mapping[str, str]) -> PngInfo:
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_text(key, value.encode("utf-8", "replace").decode())  # argv may hold lone surrogates
    return chunks


def _line(error: BaseException) -> str:
    """An error's first line, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
