"""Contact sheets: photo, maps and portraits side by side, with labels."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .perception import FaceBox, FaceLandmarks

EDGE = 256  # px of a tile
LABEL_HEIGHT, GAP = 20, 6  # px
PAPER, INK, MARK = (24, 24, 24), (230, 230, 230), (80, 255, 120)


@dataclass(frozen=True, eq=False)
class Tile:
    """One picture of a sheet; any size, shown whole within a square."""

    label: str
    pixels: UInt8[np.ndarray, "h w 3"]


def contact_sheet(tiles: Sequence[Tile], columns: int = 5) -> UInt8[np.ndarray, "h w 3"]:
    """All tiles in rows of `columns`, each under its label."""
    rows = -(-len(tiles) // columns)
    step = np.array([EDGE + GAP, EDGE + LABEL_HEIGHT + GAP])
    sheet = Image.new("RGB", tuple(step * (min(columns, len(tiles)), rows) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        left, top = step * (number % columns, number // columns) + GAP
        pen.text((left, top), tile.label, INK, ImageFont.load_default(14))
        sheet.paste(_fitted(tile.pixels), (left, top + LABEL_HEIGHT))
    return np.array(sheet)


def map_tiles(maps: Float32[np.ndarray, "9 h w"]) -> list[Tile]:
    """The three maps as tiles."""
    return [Tile(name, pixels) for name, pixels in map_pictures(maps).items()]


def map_pictures(maps: Float32[np.ndarray, "9 h w"]) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """The maps to look at: normals from -1..1, so that grey is none; albedo and rendered clipped to 0..1."""
    normal, albedo, rendered = maps.reshape(3, 3, *maps.shape[1:]).transpose(0, 2, 3, 1)
    shades = {"normal": (normal + 1) / 2, "albedo": albedo, "rendered": rendered}
    return {name: (np.clip(shade, 0, 1) * 255).round().astype(np.uint8) for name, shade in shades.items()}


def boxes_tile(photo: UInt8[np.ndarray, "h w 3"], boxes: Sequence[FaceBox]) -> Tile:
    """A photo with the faces found in it, numbered as --face counts them."""
    picture, scale = _fitted(photo), _scale(photo)
    pen = ImageDraw.Draw(picture)
    for number, box in enumerate(boxes, start=1):
        corners = [scale * side for side in (box.left, box.top, box.right, box.bottom)]
        pen.rectangle(corners, outline=MARK)
        pen.text((corners[0] + 3, corners[1] + 1), str(number), MARK, ImageFont.load_default(14))
    return Tile("photo", np.array(picture))


def landmarks_tile(photo: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks) -> Tile:
    """A photo with the 478 measured points, a pixel each."""
    picture = _fitted(photo)
    ImageDraw.Draw(picture).point((face.points[:, :2] * _scale(photo)).ravel().tolist(), MARK)
    return Tile("landmarks", np.array(picture))


def _fitted(pixels: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    return ImageOps.contain(Image.fromarray(pixels), (EDGE, EDGE))


def _scale(pixels: UInt8[np.ndarray, "h w 3"]) -> float:
    """Tile pixels a photo pixel."""
    return EDGE / max(pixels.shape[:2])
