"""torch's CUDA generator re-made in numpy, so that a seed means the same picture on every machine.

`torch.manual_seed(seed); torch.randn(shape, device="cuda")` in float32, as torch has drawn it up to 2.13: each element
has a thread of its own, whose Philox 4x32-10 counter is (draw, 0, element, 0) under the seed as key, and takes the
first of the four normals that the thread makes. That holds up to one element per resident thread of the GPU, 40,960 on
a small one; 512x512 px need 16,384. Beyond it torch itself draws differently on different cards.

The words are exact (known answers in tests/unit/test_noise.py) and the normals agree with published GPU draws to the
four decimals that those give. Equality in the last bits is unconfirmed so far: the GPU's fast sine and logarithm may
differ by about 1e-6.
"""
import math

import numpy as np
from jaxtyping import Float32, Float64, UInt32

from .errors import BadInput

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # Salmon et al. 2011, table 2
KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # golden ratio, sqrt(3) - 1
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
TURN = float(np.float32(2 * math.pi / 2**32))  # radians a step of the angle word


def cuda_normal(seed: int, shape: tuple[int, ...], offset: int = 0) -> Float32[np.ndarray, "..."]:
    """Standard normal numbers, as torch draws them on CUDA for a generator seeded with `seed`.

    `offset` counts the draws of this size made before. Raises BadInput unless 0 <= seed < 2**64. Image k of a batch
    uses seed + k.
    """
    if not 0 <= seed < 2**64:
        raise BadInput(f"seed is {seed}, expected 0 to {2**64 - 1}; choose one in that range")
    elements = np.arange(math.prod(shape), dtype=np.uint32)
    counter = np.zeros((4, elements.size), np.uint32)
    counter[0], counter[2] = offset, elements
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return _box_muller(words[0], words[1]).reshape(shape)


def philox(counter: UInt32[np.ndarray, "4 n"], key: tuple[int, int]) -> UInt32[np.ndarray, "4 n"]:
    """Philox 4x32-10 (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3), a column a counter."""
    words = counter.astype(np.uint64)
    for round_ in range(ROUNDS):
        keys = [np.uint64((k + round_ * step) & 0xFFFFFFFF) for k, step in zip(key, KEY_STEPS, strict=True)]
        first, second = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        words = np.stack([second >> HALF ^ words[1] ^ keys[0], second & LOW, first >> HALF ^ words[3] ^ keys[1],
                          first & LOW])
    return words.astype(np.uint32)


def _box_muller(radius: UInt32[np.ndarray, "n"], angle: UInt32[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
    """One normal of each pair (Box and Muller 1958), the sine's.

    u and v are rounded to float32 where the GPU rounds them. The rest is computed in float64 and rounded once, so that
    platforms whose float32 sines differ agree.
    """
    u = _float32(_float32(radius) / 2**32 + 0.5 / 2**32)  # (0, 1]
    v = _float32(_float32(angle) * TURN + TURN / 2)
    return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32)


def _float32(values: UInt32[np.ndarray, "n"] | Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Values rounded to float32, to compute on with in float64."""
    return values.astype(np.float32).astype(np.float64)
