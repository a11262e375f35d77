"""A photo to draw over: all of its frame (img2img), or what a mask says (inpainting), such as the head.

Known parts are put back at each step, noisy as the step is (Avrahami et al. 2022, "Blended Diffusion for Text-driven
Editing of Natural Images"), and once more as pixels, so that what lies outside the mask stays bit by bit.
"""
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image, ImageFilter

from .framing import Region, cut_out
from .image import resize
from .schedule import SamplerStep

MARGIN = 0.1  # of the frame's height: hair and shadow around a head that is drawn bald
FEATHER = 0.03  # of the frame's height: the seam's width
TWO_SIGMA = 0.023  # what a blurred half-plane keeps two standard deviations beyond its edge


@dataclass(frozen=True, eq=False)
class Canvas:
    """A photo, the part of it that fills the frame, and what of that is drawn anew."""

    photo: UInt8[np.ndarray, "h w 3"]
    region: Region  # in the photo's pixels
    mask: Float32[np.ndarray, "H W"] | None = None  # of the frame: 1 is drawn anew, 0 stays; None draws all of it

    def frame(self, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
        """What the frame shows of the photo."""
        return resize(cut_out(self.photo, self.region), height, width, "bicubic")

    def finished(self, pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
        """The whole photo with the masked part of the frame in its place; without a mask the frame alone."""
        if self.mask is None:
            return pixels
        left, top, width, height = self.region.pixels
        rows = slice(max(0, top), min(len(self.photo), top + height))
        columns = slice(max(0, left), min(self.photo.shape[1], left + width))
        inside = np.s_[rows.start - top:rows.stop - top, columns.start - left:columns.stop - left]
        drawn = resize(pixels, height, width, "bicubic")[inside].astype(np.float32)
        share = _stretched(_soft(self.mask), height, width)[inside][..., None]
        whole = self.photo.copy()
        old = whole[rows, columns]
        whole[rows, columns] = np.where(share > 0, np.rint(old + share * (drawn - old)), old).astype(np.uint8)
        return whole


@dataclass(frozen=True, eq=False)
class Known:
    """What a canvas fixes of the latent."""

    clean: Float32[np.ndarray, "1 c h w"]  # the photo's latent
    noise: Float32[np.ndarray, "1 c h w"]
    drawn: Bool[np.ndarray, "h w"]  # cells that are drawn anew

    def noisy(self, alpha: np.float32) -> Float32[np.ndarray, "1 c h w"]:
        """The photo's latent, as noisy as a step leaves one."""
        return np.asarray(np.sqrt(alpha) * self.clean + np.sqrt(1 - alpha) * self.noise)

    def kept(self, latent: Float32[np.ndarray, "1 c h w"], step: SamplerStep) -> Float32[np.ndarray, "1 c h w"]:
        """The latent after a step, with the known cells put back."""
        return latent if self.drawn.all() else np.where(self.drawn, latent, self.noisy(step.alpha_prev))


def head_mask(silhouettes: Iterable[Float32[np.ndarray, "9 h w"]]) -> Float32[np.ndarray, "h w"]:
    """Where any of these heads' maps show something, and a margin around: 0 or 1."""
    covered = np.any([maps.any(axis=0) for maps in silhouettes], axis=0)
    blur = ImageFilter.GaussianBlur(MARGIN * len(covered) / 2)
    near = np.asarray(Image.fromarray(_bytes(covered.astype(np.float32))).filter(blur)) > 255 * TWO_SIGMA
    return (covered | near).astype(np.float32)


def drawn_cells(mask: Float32[np.ndarray, "h w"] | None, rows: int, columns: int) -> Bool[np.ndarray, "rows columns"]:
    """The latent's cells of which any part, seam included, is drawn anew."""
    if mask is None:
        return np.ones((rows, columns), bool)
    height, width = mask.shape
    return _soft(mask).reshape(rows, height // rows, columns, width // columns).max(axis=(1, 3)) > 0


def _soft(mask: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """The mask with a seam outside of it, exactly 0 beyond; towards the frame's border, where it ends, it fades."""
    reach = max(1, round(FEATHER * len(mask)))
    grown = Image.fromarray(_bytes(mask)).filter(ImageFilter.MaxFilter(2 * reach + 1))
    blurred = np.asarray(grown.filter(ImageFilter.BoxBlur(reach)), np.float32) / 255
    inwards = [np.minimum(np.arange(edge), np.arange(edge)[::-1]) / (2 * reach) for edge in mask.shape]
    return np.minimum(np.maximum(blurred, mask), np.minimum(inwards[0][:, None], inwards[1])).astype(np.float32)


def _stretched(mask: Float32[np.ndarray, "h w"], height: int, width: int) -> Float32[np.ndarray, "height width"]:
    return np.asarray(Image.fromarray(_bytes(mask)).resize((width, height), Image.Resampling.BILINEAR),
                      np.float32) / 255


def _bytes(mask: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    return np.rint(255 * np.clip(mask, 0, 1)).astype(np.uint8)
