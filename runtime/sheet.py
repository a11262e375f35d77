"""Contact sheets: photo, maps and portraits side by side, with labels; and the faces found in a photo, numbered."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .image import resize
from .perception import FaceBox, FaceLandmarks

EDGE = 256  # px of a tile
LABEL_HEIGHT, GAP = 20, 6  # px
PAPER, INK, MARK, CHOSEN = (24, 24, 24), (230, 230, 230), (80, 255, 120), (255, 200, 0)
OVERLAY = 0.6  # of a head drawn over a photo


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


def overlay_tile(label: str, photo: UInt8[np.ndarray, "h w 3"], maps: Float32[np.ndarray, "9 H W"]) -> Tile:
    """A drawn head over the photo it was fitted to, stretched to the maps' size."""
    height, width = maps.shape[1:]
    below, head = resize(photo, height, width, "bicubic").astype(np.float32), map_pictures(maps)["rendered"]
    drawn = np.any(maps[:3], axis=0, keepdims=True).transpose(1, 2, 0)
    return Tile(label, np.where(drawn, below + OVERLAY * (head - below), below).round().astype(np.uint8))


def landmarks_tile(label: str, photo: UInt8[np.ndarray, "h w 3"], face: FaceLandmarks, aspect: float) -> Tile:
    """A photo with the 478 measured points, a pixel each, stretched to a frame of this width over height."""
    width, height = round(EDGE * min(1, aspect)), round(EDGE * min(1, 1 / aspect))
    picture = Image.fromarray(resize(photo, height, width, "bicubic"))
    places = face.points[:, :2] * [width / photo.shape[1], height / photo.shape[0]]
    ImageDraw.Draw(picture).point(places.ravel().tolist(), MARK)
    return Tile(label, np.array(picture))


def numbered_faces(photo: UInt8[np.ndarray, "h w 3"], boxes: Sequence[FaceBox], chosen: int,
                   edge: int = EDGE) -> UInt8[np.ndarray, "H W 3"]:
    """A photo, scaled to `edge`, with the faces found in it, numbered from 1; the chosen one in another colour."""
    picture, scale = _fitted(photo, edge), edge / max(photo.shape[:2])
    pen = ImageDraw.Draw(picture)
    for number in sorted(range(1, len(boxes) + 1), key=lambda number: number == chosen):  # the chosen one on top
        box, colour = boxes[number - 1], CHOSEN if number == chosen else MARK
        left, top, right, bottom = (scale * side for side in (box.left, box.top, box.right, box.bottom))
        pen.rectangle((left, top, right, bottom), outline=colour, width=max(1, edge // 400) + (number == chosen))
        font = ImageFont.load_default(float(np.clip(0.3 * (right - left), 10, edge / 20)))
        height = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 11
        place = left, top - height if top > height else top
        pen.rectangle((*place, place[0] + font.getlength(f" {number} "), place[1] + height), fill=colour)
        pen.text(place, f" {number} ", PAPER, font)
    return np.array(picture)


def _fitted(pixels: UInt8[np.ndarray, "h w 3"], edge: int = EDGE) -> Image.Image:
    return ImageOps.contain(Image.fromarray(pixels), (edge, edge))
