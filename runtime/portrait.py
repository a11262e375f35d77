"""What a generation gives: a step at a time, and in the end a portrait with its recipe."""
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from .image import save_picture
from .recipe import KEY, MARK

AI_GENERATED = {MARK: "true"}  # in every picture's metadata
Pixels = UInt8[np.ndarray, "_ _ 3"]  # any size: a signature may hold two


@dataclass(frozen=True)
class Portrait:
    """A finished picture and its recipe: settings, heads, bundle. With the same photos they make it again."""

    pixels: UInt8[np.ndarray, "h w 3"]
    recipe: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write a PNG, JPEG or WebP, as the suffix says, with the recipe in its metadata."""
        save_picture(path, self.pixels, {KEY: json.dumps(self.recipe), **AI_GENERATED})


@dataclass(frozen=True, eq=False)
class Step:
    """The state after one denoising step."""

    index: int  # from 0
    count: int
    timestep: int
    clean: Float32[np.ndarray, "1 c h w"]  # the clean latent that this step predicts
    latent: Float32[np.ndarray, "1 c h w"]
    recipe: dict[str, Any] = field(repr=False)
    preview_of: Callable[[np.ndarray], Pixels] = field(repr=False)  # of a latent: the cheap decoder
    picture_of: Callable[[np.ndarray], Pixels] = field(repr=False)  # the real one, with all that follows it

    @property
    def last(self) -> bool:
        """Whether the portrait is finished."""
        return self.index == self.count - 1

    def preview(self) -> UInt8[np.ndarray, "h w 3"]:
        """A cheap, coarse picture of what this step predicts, at full size."""
        return self.preview_of(self.clean)

    @property
    def image(self) -> Portrait:
        """The portrait; before the last step, what it would be if one stopped here."""
        return Portrait(self.picture_of(self.latent if self.last else self.clean), self.recipe)
