"""Decoding in tiles: they cover everything, overlap enough, and leave no seam."""
from itertools import pairwise

import numpy as np
import pytest

from caphuman_edge.runtime.tiles import OVERLAP, _starts, in_tiles

SCALE = 8


def enlarged(latent):
    """A decoder that looks at no cell's neighbours: tiles of it are the whole."""
    return np.repeat(np.repeat(latent[:, :3], SCALE, axis=2), SCALE, axis=3)


def latent_of(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(1, 4, rows, columns)).astype(np.float32)


@pytest.mark.parametrize(("shape", "tile"), [((64, 64), (40, 40)), ((64, 64), (32, 32)), ((64, 96), (40, 40)),
                                             ((33, 47), (16, 20)), ((20, 64), (20, 24)), ((5, 4), (1, 1))])
def test_of_what_looks_at_no_neighbour_tiles_make_the_whole(shape, tile):
    latent, seen = latent_of(*shape), []
    drawn = in_tiles(lambda part: seen.append(part.shape[-2:]) or enlarged(part), latent, *tile)
    np.testing.assert_allclose(drawn, enlarged(latent), atol=1e-5)
    assert {*seen} == {tile} and drawn.dtype == np.float32


def test_a_latent_of_a_tile_s_size_is_decoded_as_it_is():
    latent, given = latent_of(32, 32), []
    assert in_tiles(lambda part: given.append(part) or part, latent, 32, 32) is latent and given[0] is latent


@pytest.mark.parametrize(("whole", "tile"), [(64, 40), (64, 32), (128, 40), (64, 63), (64, 16), (9, 2)])
def test_tiles_reach_both_edges_and_overlap_by_a_quarter(whole, tile):
    starts = _starts(whole, tile)
    assert starts[0] == 0 and starts[-1] == whole - tile
    assert all(first + tile - second >= np.floor(OVERLAP * tile) for first, second in pairwise(starts))


def test_no_more_tiles_than_that_takes():
    assert len(_starts(64, 40)) == 2 and len(_starts(64, 32)) == 3 and _starts(64, 64) == [0]


def test_tiles_that_differ_fade_into_each_other():
    """Each as bright as its number: from point to point nothing jumps."""
    count = iter(range(100))
    drawn = in_tiles(lambda part: np.full((1, 3, 8 * 40, 8 * 40), next(count), np.float32), latent_of(64, 64), 40, 40)
    assert drawn.min() < 0.1 and drawn.max() > 2.9
    assert max(np.abs(np.diff(drawn, axis=axis)).max() for axis in (2, 3)) < 0.05
