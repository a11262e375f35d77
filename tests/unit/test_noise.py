"""The noise of a seed: known answers for the generator, published GPU draws for the normals."""
import numpy as np
import pytest

from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.noise import cuda_normal, philox

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)  # binary digits of pi
ONES = (0xFFFFFFFF,) * 6


@pytest.mark.parametrize(("inputs", "want"), [
    ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_gives_the_known_answers_of_random123(inputs, want):
    counter = np.array(inputs[:4], np.uint32)[:, None]
    np.testing.assert_array_equal(philox(counter, inputs[4:])[:, 0], np.array(want, np.uint32))


def test_normals_are_those_that_a100_and_h100_draw_for_seed_1():
    published = [-0.2963, 2.6764, -0.1408]  # pytorch issue 143086, torch 2.5.1
    np.testing.assert_allclose(cuda_normal(1, (3,)), published, atol=6e-5)


def test_normals_are_those_that_an_rtx_3060_draws_for_seed_42():
    rows = cuda_normal(42, (1, 64, 2048))[0, :3]  # pytorch issue 158398, torch 2.7.1
    np.testing.assert_allclose(rows[:, :3], [[0.1940, 2.1614, -0.1721], [-0.4574, 0.8063, 0.1580],
                                             [1.1346, -0.6329, -0.9147]], atol=6e-5)
    np.testing.assert_allclose(rows[:, -3:], [[1.4540, -2.7733, -0.8932], [0.1124, 0.2769, -1.2535],
                                              [-1.0001, -1.1552, -0.6955]], atol=6e-5)


def test_every_bit_is_the_same_on_every_platform():
    bits = cuda_normal(12345, (4,)).view(np.uint32)
    assert [f"{word:08x}" for word in bits] == ["3f1421d5", "bf065664", "be957463", "3c659a53"]


def test_the_shape_only_arranges_the_draw():
    np.testing.assert_array_equal(cuda_normal(7, (1, 4, 8, 8)).ravel(), cuda_normal(7, (256,)))


def test_the_draw_is_standard_normal():
    draw = np.sort(cuda_normal(3, (1, 4, 64, 64)).ravel())
    assert abs(draw.mean()) < 0.03 and abs(draw.std() - 1) < 0.02
    np.testing.assert_allclose(np.interp([0.1, 0.5, 0.9], np.linspace(0, 1, draw.size), draw),
                               [-1.2816, 0, 1.2816], atol=0.04)


def test_seeds_and_draws_are_independent():
    draws = [cuda_normal(0, (4096,)), cuda_normal(1, (4096,)), cuda_normal(2**32, (4096,)), cuda_normal(0, (4096,), 1)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.06


def test_all_64_bits_of_a_seed_count():
    assert cuda_normal(2**64 - 1, (1,)) != cuda_normal(2**32 - 1, (1,))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused_with_the_range(seed):
    with pytest.raises(BadInput, match=f"seed is {seed}, expected 0 to 18446744073709551615"):
        cuda_normal(seed, (1,))
