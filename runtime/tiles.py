"""Pictures decoded a tile at a time: less memory for more time, and an approximation.

A tile's features are normalised and attend among themselves, so neighbours differ a little; they overlap, and fade into
each other.
"""
from collections.abc import Callable
from itertools import product

import numpy as np
from jaxtyping import Float32

OVERLAP = 0.25  # of a tile's edge, at least, that its neighbour shows, too
Decode = Callable[[Float32[np.ndarray, "1 c r k"]], Float32[np.ndarray, "1 d _ _"]]


def in_tiles(decode: Decode, latent: Float32[np.ndarray, "1 c h w"], rows: int,
             columns: int) -> Float32[np.ndarray, "1 d H W"]:
    """What `decode`, which takes latents of `rows` x `columns` cells, makes of a latent at least as large.

    A latent of that very size is decoded as it is. Of several tiles each point is the mean, weighted by how deep it
    lies in each of them.
    """
    height, width = latent.shape[-2:]
    if (height, width) == (rows, columns):
        return decode(latent)
    drawn = weights = np.zeros((), np.float32)
    for top, left in product(_starts(height, rows), _starts(width, columns)):
        tile = decode(np.ascontiguousarray(latent[..., top:top + rows, left:left + columns]))
        scale = tile.shape[-2] // rows
        if not drawn.ndim:
            drawn = np.zeros((*tile.shape[:2], height * scale, width * scale), np.float32)
            weights = np.zeros(drawn.shape[-2:], np.float32)
        place = np.s_[..., top * scale:(top + rows) * scale, left * scale:(left + columns) * scale]
        depth = _depth(rows * scale)[:, None] * _depth(columns * scale)
        drawn[place] += depth * tile
        weights[place] += depth
    return np.divide(drawn, weights, out=drawn)


def _starts(whole: int, tile: int) -> list[int]:
    """Where tiles begin: as few as overlap enough, evenly from edge to edge."""
    stride = max(1, tile - round(OVERLAP * tile))
    gaps = -(-(whole - tile) // stride)
    return [round(k * (whole - tile) / gaps) for k in range(gaps + 1)] if gaps else [0]


def _depth(count: int) -> Float32[np.ndarray, "count"]:
    """How far each point of a row is from the nearer end."""
    inwards = np.arange(count, dtype=np.float32) + np.float32(0.5)
    return np.minimum(inwards, inwards[::-1])
