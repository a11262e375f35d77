"""What `export.labels` wrote, as batches: pairs of different pictures of one identity.

A label folder holds `labels.npz` (crops, identities, face masks, names), `latents-EDGE.npz` (latents of pictures of
that size by one autoencoder, each picture as it is and in other colours, with captions) and `maps.npy` (condition maps
of each picture's head, with the identity and texture that another picture of the same person gave).
"""
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from caphuman_edge.runtime.contract import HELD_OUT_SEEDS, IMAGE_MEAN, IMAGE_STD, VaeConfig
from caphuman_edge.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Batch:
    """One training batch on the model's device."""

    latents: Tensor  # (b, 4, h, w) scaled latents of the targets
    maps: Tensor  # (b, 9, H, W) the target's pose, expression, camera and light on a head fitted to another picture
    masks: Tensor  # (b, 1, h, w) 1 on the target's face
    crops: Tensor  # (b, 3, s, s) the reference's face on white, normalised as CLIP's input
    identities: Tensor  # (b, d) the reference's face-recognition vector
    captions: Tensor  # (b, 77) token ids of the target's caption


class Labels:
    """A label folder in memory (maps stay memory-mapped), with latents of pictures of one size."""

    def __init__(self, folder: Path, edge: int):
        with np.load(folder / "labels.npz") as labels, np.load(folder / f"latents-{edge}.npz") as latents:
            if not np.array_equal(labels["names"], latents["names"]):
                raise CheckpointError(f"{folder}: latents-{edge}.npz belongs to other labels; "
                                      "run `export.labels encode` again")
            if min(int(name[:5]) for name in labels["names"]) < HELD_OUT_SEEDS:
                raise CheckpointError(f"{folder} holds seeds below {HELD_OUT_SEEDS}, which are never trained on; "
                                      "run `export.labels measure` again")
            self.latents, self.step = latents["latents"], float(latents["step"])  # (n, variants, 4, h, w) int8 codes
            self.mirrored = latents["mirrored"]  # (n, variants)
            self.captions = latents["captions"].astype(np.int64)  # (n, variants, wordings, 77)
            self.vae = VaeConfig.from_json(json.loads(str(latents["config"])))  # with the latents' own scale
            self.names, self.identities = labels["names"], labels["identities"].astype(np.float32)
            masks = np.unpackbits(labels["masks"], axis=-1).astype(np.float32)[:, None]
            shrink = masks.shape[-1] // self.latents.shape[-1]
            self.masks = (_shrunk(masks, shrink) >= 0.5).astype(np.float32)  # (n, 1, h, w)
            self.empty_caption = labels["empty_caption"].astype(np.int64)
            self.crops = _decode_jpegs(labels["crops"], labels["crop_ends"])
        self.maps = _maps(folder, shrink)
        self.others = _others_of_same_identity(self.names)

    @property
    def words(self) -> Tensor:
        """The token ids that occur in captions, start and end included."""
        return torch.from_numpy(np.unique(np.concatenate([self.captions.ravel(), self.empty_caption])))

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, size: int, rng: np.random.Generator, device: torch.device, text_dropout: float) -> Batch:
        """Random variants of random targets, each with a reference from another picture of the same identity.

        An identity seen in one picture only is its own reference, mirrored, so that no pixel can be copied across.
        """
        targets, variants = rng.integers(len(self), size=size), rng.integers(self.latents.shape[1], size=size)
        flipped = self.mirrored[targets, variants]
        references = np.array([rng.choice(self.others[i]) if len(self.others[i]) else i for i in targets])
        crops = self.crops[references]
        turned = np.where(references == targets, ~flipped, rng.random(size) < 0.5)
        crops[turned] = crops[turned, :, ::-1]
        captions = self.captions[targets, variants, rng.integers(self.captions.shape[2], size=size)]
        captions[rng.random(size) < text_dropout] = self.empty_caption
        maps, masks = self._head(targets, flipped)
        arrays = (self.latents[targets, variants] * np.float32(self.step), maps, masks, normalise(crops),
                  self.identities[references], captions)
        return Batch(*(torch.from_numpy(array).to(device) for array in arrays))

    def _head(self, targets: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps and masks of the targets; a mirrored head's normals point the other way."""
        order = np.argsort(targets)  # neighbours in the memory map are read together
        maps, masks = self.maps[targets[order]][np.argsort(order)].astype(np.float32), self.masks[targets]
        maps[flipped], masks[flipped] = maps[flipped, :, :, ::-1], masks[flipped, :, :, ::-1]
        maps[flipped, 0] *= -1
        return maps, masks


def batches_ahead(make: Callable[[], Batch]) -> Iterator[Batch]:
    """Batches without end, each made while the one before it is trained on."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make)
        while True:
            ready, following = following.result(), pool.submit(make)
            yield ready


def _shrunk(planes: np.ndarray, factor: int) -> np.ndarray:
    """(n, c, h, w) averaged over squares of `factor` cells."""
    count, channels, rows, columns = planes.shape
    squares = planes.reshape(count, channels, rows // factor, factor, columns // factor, factor)
    return np.ascontiguousarray(squares.mean(axis=(3, 5)))


def normalise(crops: np.ndarray) -> np.ndarray:
    """(b, s, s, 3) uint8 to (b, 3, s, s) float32 with CLIP's mean and standard deviation."""
    scaled = (crops.astype(np.float32) / 255 - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _maps(folder: Path, shrink: int) -> np.ndarray:
    """All maps, memory-mapped; smaller ones are kept in a file of their own, made on first use."""
    full = np.load(folder / "maps.npy", mmap_mode="r")
    path = folder / f"maps-{full.shape[-1] // shrink}.npy"
    if shrink == 1 or path.exists():
        return full if shrink == 1 else np.load(path, mmap_mode="r")
    part = path.with_suffix(".part.npy")
    small = np.lib.format.open_memmap(part, "w+", full.dtype, (*full.shape[:2], *(n // shrink for n in full.shape[2:])))
    for start in range(0, len(full), 64):
        small[start:start + 64] = _shrunk(full[start:start + 64].astype(np.float32), shrink)
    small.flush()
    part.replace(path)
    return small


def _decode_jpegs(blob: np.ndarray, ends: np.ndarray) -> np.ndarray:
    starts = np.concatenate([[0], ends[:-1]])
    return np.stack([np.asarray(Image.open(io.BytesIO(blob[a:b].tobytes())))
                     for a, b in zip(starts, ends, strict=True)])


def _others_of_same_identity(names: np.ndarray) -> list[np.ndarray]:
    """For each picture `NNNNN[_x]`, the indices of the other pictures with the same seed NNNNN."""
    seeds = np.array([int(name[:5]) for name in names])
    return [np.flatnonzero((seeds == seed) & (names != name)) for seed, name in zip(seeds, names, strict=True)]
