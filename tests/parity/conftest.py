"""Weights that need no file: full-size networks filled from their tensors' names."""
import zlib

import numpy as np
import pytest
import torch


@pytest.fixture
def recipe():
    """`recipe(network, gain, bn_scale)` fills a network as it was when the golden vectors were recorded.

    `bn_scale` gives the scale of a batch norm by its parameter's name.
    """

    def fill(network, gain, bn_scale=lambda name: 1.0):
        network.load_state_dict({name: torch.from_numpy(weight(name, tuple(tensor.shape), gain, bn_scale(name)))
                                 for name, tensor in network.state_dict().items()})
        return network.eval().requires_grad_(False)

    return fill


def weight(name, shape, gain, bn_scale):
    """A tensor as a pure function of its name and shape, of about unit gain."""
    leaf, values = name.rsplit(".", 1)[-1], uniform(name, int(np.prod(shape, dtype=np.int64)))
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        values = 1 + 0.2 * values
    elif leaf in ("running_mean", "bias"):
        values = 0.1 * values
    elif leaf == "weight" and len(shape) == 1:
        values = bn_scale * (1 + 0.1 * values)
    else:
        values = values * gain * np.sqrt(3 / np.prod(shape[1:]))
    return values.astype(np.float32).reshape(shape)


def uniform(name, count):
    """Multiples of 2**-23 in [-1, 1): splitmix64 (Steele et al. 2014), seeded with the name's checksum."""
    with np.errstate(over="ignore"):
        z = np.uint64(zlib.crc32(name.encode()) << 32) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2**23 - 1
