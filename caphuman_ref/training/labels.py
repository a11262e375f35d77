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
    """A label folder, with latents of pictures of one size. On a CPU the maps stay memory-mapped."""

    def __init__(self, folder: Path, edge: int, device: torch.device | None = None):
        """`device`: where batches are put together. Raises CheckpointError for labels that do not belong together."""
        with np.load(folder / "labels.npz") as labels, np.load(folder / f"latents-{edge}.npz") as latents:
            if not np.array_equal(labels["names"], latents["names"]):
                raise CheckpointError(f"{folder}: latents-{edge}.npz belongs to other labels; "
                                      "run `export.labels encode` again")
            if min(int(name[:5]) for name in labels["names"]) < HELD_OUT_SEEDS:
                raise CheckpointError(f"{folder} holds seeds below {HELD_OUT_SEEDS}, which are never trained on; "
                                      "run `export.labels measure` again")
            self.names, self.step, self.mirrored = labels["names"], float(latents["step"]), latents["mirrored"]
            self.vae = VaeConfig.from_json(json.loads(str(latents["config"])))  # with the latents' own scale
            masks = np.unpackbits(labels["masks"], axis=-1).astype(np.float32)[:, None]
            shrink = masks.shape[-1] // latents["latents"].shape[-1]
            arrays = {
                "latents": latents["latents"],  # (n, variants, 4, h, w) int8 codes
                "captions": latents["captions"].astype(np.int64),  # (n, variants, wordings, 77)
                "identities": labels["identities"].astype(np.float32),
                "masks": (_shrunk(masks, shrink) >= 0.5).astype(np.float32),  # (n, 1, h, w)
                "empty_caption": labels["empty_caption"].astype(np.int64),
                "crops": _decode_jpegs(labels["crops"], labels["crop_ends"])}
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        self.latents, self.captions, self.identities = (tensors[n] for n in ("latents", "captions", "identities"))
        self.masks, self.empty_caption, self.crops = (tensors[n] for n in ("masks", "empty_caption", "crops"))
        self.maps = torch.from_numpy(_maps(folder, shrink)).to(device)  # (n, 9, H, W) float16
        self.others = _others_of_same_identity(self.names)

    @property
    def words(self) -> Tensor:
        """The token ids that occur in captions, start and end included."""
        return torch.cat([self.captions.flatten(), self.empty_caption]).unique().cpu()

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, size: int, rng: np.random.Generator, text_dropout: float) -> Batch:
        """Random variants of random targets, each with a reference from another picture of the same identity.

        An identity seen in one picture only is its own reference, mirrored, so that no pixel can be copied across.
        """
        targets = np.sort(rng.integers(len(self), size=size))  # neighbours in the memory map are read together
        variants = rng.integers(self.latents.shape[1], size=size)
        flipped = self.mirrored[targets, variants]
        references = np.array([rng.choice(self.others[i]) if len(self.others[i]) else i for i in targets])
        turned = np.where(references == targets, ~flipped, rng.random(size) < 0.5)
        wordings, silent = rng.integers(self.captions.shape[2], size=size), rng.random(size) < text_dropout
        target, variant, reference, wording = (self._index(a) for a in (targets, variants, references, wordings))
        captions = torch.where(self._each(silent, 2), self.empty_caption, self.captions[target, variant, wording])
        maps, masks = self._head(target, flipped)
        crops = self.crops[reference]
        crops = torch.where(self._each(turned, 4), crops.flip(2), crops)
        return Batch(self.latents[target, variant] * self.step, maps, masks, normalise(crops),
                     self.identities[reference], captions)

    def _head(self, target: Tensor, flipped: np.ndarray) -> tuple[Tensor, Tensor]:
        """Maps and masks of the targets; a mirrored head's normals point the other way."""
        maps, masks, mirrored = self.maps[target].float(), self.masks[target], self._each(flipped, 4)
        across = maps.flip(3)
        across[:, 0] *= -1
        return torch.where(mirrored, across, maps), torch.where(mirrored, masks.flip(3), masks)

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.latents.device)

    def _each(self, flags: np.ndarray, dimensions: int) -> Tensor:
        """(b,) flags as a tensor of that many dimensions."""
        return self._index(flags).view(-1, *(dimensions - 1) * [1])


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


def normalise(crops: Tensor) -> Tensor:
    """(b, s, s, 3) uint8 to (b, 3, s, s) float32 with CLIP's mean and standard deviation."""
    mean, deviation = (torch.tensor(values, dtype=torch.float32, device=crops.device)
                       for values in (IMAGE_MEAN, IMAGE_STD))
    return ((crops.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()


def _maps(folder: Path, shrink: int) -> np.ndarray:
    """All maps, memory-mapped; smaller ones are kept in a file of their own, made on first use."""
    full = np.load(folder / "maps.npy", mmap_mode="c")
    path = folder / f"maps-{full.shape[-1] // shrink}.npy"
    if shrink == 1 or path.exists():
        return full if shrink == 1 else np.load(path, mmap_mode="c")
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
