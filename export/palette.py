"""Weights as indices into a small table of values (palettisation), the table chosen by k-means.

In one dimension k-means is cheap: halves have at most 65,536 values, so a tensor of any size is a histogram.
Sources: Lloyd 1982, "Least squares quantization in PCM"; Panter and Dite 1951 for where to start.
"""
import numpy as np
from jaxtyping import Float, Float64, Int64, UInt8

ITERATIONS = 200  # at most; a few dozen settle most tensors


def palettise(weight: Float[np.ndarray, "*shape"],
              bits: int) -> tuple[Float[np.ndarray, "colours"], UInt8[np.ndarray, "size"]]:
    """2**bits ascending values of the weight's dtype, and for every weight, flattened, the index of the nearest.

    Exact where the weights, rounded to halves, have no more than 2**bits values.
    """
    codes = np.ascontiguousarray(weight, np.float16).reshape(-1).view(np.uint16)
    counts = np.bincount(codes, minlength=1 << 16)
    values, counts = _ascending(counts)
    if len(values) <= 1 << bits:
        centres = np.append(values, np.repeat(values[-1:], (1 << bits) - len(values)))
    else:
        centres = _kmeans(values, counts, 1 << bits)
    return centres.astype(weight.dtype), _nearest(centres)[codes]


def _ascending(counts: Int64[np.ndarray, "codes"]) -> tuple[Float64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """The halves that occur, ascending, and how often."""
    present = np.flatnonzero(counts).astype(np.uint16)
    values = present.view(np.float16).astype(np.float64)
    order = np.argsort(values, kind="stable")
    return values[order], counts[present[order]]


def _kmeans(values: Float64[np.ndarray, "n"], counts: Int64[np.ndarray, "n"], k: int) -> Float64[np.ndarray, "k"]:
    """Lloyd's iteration on sorted values, whose clusters are ranges."""
    weights = np.concatenate([[0], np.cumsum(counts)])
    sums = np.concatenate([[0.0], np.cumsum(counts * values)])
    centres = _start(values, counts, k)
    for _ in range(ITERATIONS):
        ends = np.concatenate([[0], np.searchsorted(values, _borders(centres)), [len(values)]])
        held = np.diff(weights[ends])
        means = np.diff(sums[ends]) / np.maximum(held, 1)
        moved = np.where(held > 0, means, centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _start(values: Float64[np.ndarray, "n"], counts: Int64[np.ndarray, "n"], k: int) -> Float64[np.ndarray, "k"]:
    """Centres as dense as the cube root of the weights' density, which is best for many of them (Panter and Dite).

    Rice's rule sets the histogram's bins: finer ones leave each weight of a small tensor a peak of its own.
    """
    bins = round(2 * np.cbrt(counts.sum()))
    density, edges = np.histogram(values, bins, weights=counts)
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    return np.interp((np.arange(k) + 0.5) / k * mass[-1], mass, edges)


def _nearest(centres: Float64[np.ndarray, "k"]) -> UInt8[np.ndarray, "codes"]:
    """For every half, by its bits, the index of the nearest centre."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    return np.searchsorted(_borders(centres), halves).astype(np.uint8)


def _borders(centres: Float64[np.ndarray, "k"]) -> Float64[np.ndarray, "k-1"]:
    with np.errstate(invalid="ignore"):  # the middle between two infinities, of an attention mask, is none
        return (centres[1:] + centres[:-1]) / 2
