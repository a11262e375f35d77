"""Blocks of transformers on AMX against the same in numpy, in double precision."""
import math

import numpy as np
import pytest

from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.kernels import AMX, attention_kernels
from caphuman_edge.runtime.kernels.blocks import attention_block, feed_forward, gated_panels, panels

pytestmark = pytest.mark.skipif(AMX not in attention_kernels(), reason="this CPU has no AMX, or no kernel was compiled")

EPSILON, OF_NORM, OF_HIDDEN, OF_ATTENDED = 1e-5, 1 / 0.03, 1 / 0.06, 1 / 0.02  # steps of int8 in 1


REFUSED = (BadInput, TypeError)  # the latter by the annotations, where tests check them


def as_bfloat16(x):
    """The same numbers with 8 bits each, as float32 and as what a bfloat16 is stored as."""
    bits = (x.astype(np.float32).view(np.uint32) + 0x8000) >> 16
    return (bits << 16).view(np.float32), bits.astype(np.uint16).view(np.float16)


def from_bfloat16(x):
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def rounded(x, steps):
    return np.clip(np.rint(x * steps), -128, 127)


class Layer:
    """A linear layer of int8 rows of which `steps` are 1."""

    def __init__(self, rng, inputs, outputs, steps):
        self.weights = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
        scale = rng.uniform(0.5, 1.5, outputs) / 127 / math.sqrt(inputs) / steps
        self.affine = np.stack([scale, rng.standard_normal(outputs) / 4]).astype(np.float32)

    def __call__(self, rows):
        return rows @ self.weights.astype(np.float64) * self.affine[0] + self.affine[1]


def normed(x, norm):
    x = x.astype(np.float64)
    apart = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + EPSILON)
    return np.clip(np.rint(apart * norm[0] + norm[1]), -128, 127)


def some_rows(rng, *shape):
    """Rows with a mean of their own, and what their norm is multiplied by."""
    x, stored = as_bfloat16(rng.standard_normal(shape) * 2 + 5 * rng.standard_normal((*shape[:-1], 1)))
    norm = np.stack([rng.uniform(0.5, 1.5, shape[-1]), rng.standard_normal(shape[-1]) / 4]) * OF_NORM
    return x, stored, norm.astype(np.float32)


def branch_error(found, x, wanted):
    """Of what was added to x, in its spread, beyond what 8 bits of the sum make."""
    error, half_a_step = from_bfloat16(found) - x - wanted, np.abs(x + wanted) / 256
    return np.sqrt((np.maximum(np.abs(error) - half_a_step, 0) ** 2).mean()) / wanted.std()


def feed_forward_case(rows, width, hidden):
    rng = np.random.default_rng(0)
    x, stored, norm = some_rows(rng, rows, width)
    values, gates = (Layer(rng, width, hidden, OF_NORM) for _ in range(2))
    second = Layer(rng, hidden, width, OF_HIDDEN)
    inner = np.concatenate([values.affine * np.float32(OF_HIDDEN), gates.affine])
    arrays = (stored, norm, gated_panels(values.weights, gates.weights), inner, panels(second.weights), second.affine)
    whole = normed(x, norm)
    gate = gates(whole)
    product = values(whole) * gate / 2 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    return x, arrays, second(rounded(product, OF_HIDDEN))


@pytest.mark.parametrize("lengths", [(64, 64, 128), (1, 64, 64), (33, 128, 64), (300, 192, 320)])
def test_feed_forward(lengths):
    x, arrays, wanted = feed_forward_case(*lengths)
    out = np.empty_like(arrays[0])
    feed_forward(*arrays, out, epsilon=EPSILON, threads=2)
    assert branch_error(out, x, wanted) < 0.01


def test_feed_forward_far_from_zero():
    """Gates where gelu is 0 or the gate itself; what is too large for int8 is the largest."""
    x, arrays, _ = feed_forward_case(40, 64, 64)
    inner, out = arrays[3].copy(), np.empty_like(arrays[0])
    for gate, least, most in [(-20.0, 0, 0), (20.0, -128, 127)]:
        inner[2], inner[3] = 0, gate
        inner[1] = np.where(np.arange(64) % 2, 100.0, -100.0)  # times 20: over the edge
        second = Layer(np.random.default_rng(3), 64, 64, OF_HIDDEN)
        feed_forward(*arrays[:3], inner, panels(second.weights), second.affine, out, epsilon=EPSILON)
        assert branch_error(out, x, second(np.tile([least, most], (40, 32)))) < 0.01


def attention_case(batch, tokens, width, heads, known=None):
    rng = np.random.default_rng(0)
    x, stored, norm = some_rows(rng, batch, tokens, width)
    layers = [Layer(rng, width, width, OF_NORM) for _ in range(1 if known else 3)]
    last = Layer(rng, width, width, OF_ATTENDED)
    given = tuple(rng.standard_normal((2, batch, known, width)).astype(np.float32)) if known else None
    arrays = (stored, norm, np.concatenate([panels(layer.weights) for layer in layers]),
              np.concatenate([layer.affine for layer in layers], axis=1), panels(last.weights), last.affine, given)
    whole = normed(x, norm)
    q, k, v = (rows.reshape(batch, -1, heads, width // heads).transpose(0, 2, 1, 3)
               for rows in [*(layer(whole) for layer in layers), *(given or ())])
    scale = (width // heads) ** -0.5
    weights = np.exp(q @ k.swapaxes(-1, -2) * scale)
    attended = (weights / weights.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    settings = {"heads": heads, "scale": scale, "rounded": known is None, "steps": OF_ATTENDED, "epsilon": EPSILON}
    return x, arrays, settings, last(rounded(attended, OF_ATTENDED))


@pytest.mark.parametrize("lengths", [
    (1, 64, 64, 2), (2, 70, 320, 8), (1, 100, 320, 2), (2, 40, 128, 2, 30), (1, 33, 640, 8, 258), (1, 50, 320, 2, 77)])
def test_attention_block(lengths):
    x, arrays, settings, wanted = attention_case(*lengths)
    out = np.empty_like(arrays[0])
    attention_block(*arrays, out, **settings, threads=2)
    assert branch_error(out, x, wanted) < 0.06  # of int8 queries and keys, and of results between two steps


def test_threads_change_nothing():
    for threads in (2, 3, 7):
        of_attention = attention_case(2, 150, 64, 2)
        for block, arrays, settings in [(feed_forward, feed_forward_case(300, 64, 128)[1], {"epsilon": EPSILON}),
                                        (attention_block, *of_attention[1:3])]:
            one, other = np.empty_like(arrays[0]), np.empty_like(arrays[0])
            block(*arrays, one, **settings, threads=1)
            block(*arrays, other, **settings, threads=threads)
            np.testing.assert_array_equal(other.view(np.uint16), one.view(np.uint16))


def test_nan_stays_where_it_is():
    _, arrays, _ = feed_forward_case(40, 64, 64)
    out = np.empty_like(arrays[0])
    arrays[0].view(np.uint16)[3, 5] = 0x7fc0
    feed_forward(*arrays, out, epsilon=EPSILON)
    found = from_bfloat16(out)
    assert np.isnan(found[3, 5]) and np.isfinite(np.delete(found, 3, axis=0)).all()


@pytest.mark.parametrize("change", [
    lambda a: [a[0][:, :32].copy(), *a[1:]], lambda a: [a[0][:0], *a[1:]], lambda a: [a[0].astype(np.float32), *a[1:]],
    lambda a: [*a[:2], a[2][:1], *a[3:]], lambda a: [*a[:3], a[3][:, ::2], *a[4:]], lambda a: [*a[:5], a[5][:1]]])
def test_a_feed_forward_that_does_not_fit_is_refused(change):
    arrays = change(list(feed_forward_case(40, 64, 128)[1]))
    with pytest.raises(REFUSED):
        feed_forward(*arrays, np.empty(arrays[0].shape, np.float16), epsilon=EPSILON)


@pytest.mark.parametrize("other", [
    {"heads": 3}, {"known": (np.ones((1, 9, 64), np.float32),) * 2},
    {"known": (np.ones((2, 9, 64), np.float32), np.ones((2, 8, 64), np.float32))}])
def test_an_attention_block_that_does_not_fit_is_refused(other):
    _, arrays, settings, _ = attention_case(2, 40, 64, 2, 9)
    known = other.pop("known", arrays[6])
    with pytest.raises(REFUSED):
        attention_block(*arrays[:6], known, np.empty_like(arrays[0]), **{**settings, **other})
