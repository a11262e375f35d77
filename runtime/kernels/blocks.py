"""Blocks of transformers on Intel's matrix unit (AMX), from a layer norm to a sum: int8 between, bfloat16 outside."""
import numpy as np
from jaxtyping import Float16, Float32, Int8

from ..errors import BadInput
from . import AMX, attention_kernels, takes_heads
from .library import compiled

DEPTH = 64  # numbers of a row in one of the unit's tiles


def feed_forward(
    x: Float16[np.ndarray, "*n c"], norm: Float32[np.ndarray, "2 c"], first: Int8[np.ndarray, "..."],
    inner: Float32[np.ndarray, "4 h"], second: Int8[np.ndarray, "..."], outer: Float32[np.ndarray, "2 c"],
    out: Float16[np.ndarray, "*n c"], *, epsilon: float, threads: int = 1,
) -> None:
    """Write x + second(v gelu(g)), where v, g = first(layer norm of x), into `out`: GEGLU (Shazeer 2020), on AMX.

    Numbers of `x` and `out` are bfloat16, in whatever type numpy holds them. `norm`: gamma and beta in steps of the
    int8 that the norm is rounded to. `first`: `gated_panels` of weights; `inner`: what v's sums are multiplied by and
    what is added, both in steps of the int8 that v gelu(g) is rounded to, then g's. `second`: `panels`; `outer`: factor
    and summand. Raises BadInput for arrays that do not fit or a CPU without AMX, MemoryError.
    """
    library, (width, hidden) = compiled(), (x.shape[-1], inner.shape[-1])
    if (library is None or not _fit(x, norm, outer, out, first, inner, second) or hidden % DEPTH
            or (first.size, second.size) != (2 * width * hidden, width * hidden) or inner.shape != (4, hidden)):
        raise BadInput(f"a feed-forward block of {x.shape} and {hidden} does not fit, or this CPU has no AMX; pass "
                       f"whole arrays of multiples of {DEPTH}")
    failed = library.caphuman_feed_forward(
        x.ctypes.data, x.size // width, width, hidden,
        *(array.ctypes.data for array in (norm, first, inner, second, outer)), epsilon, out.ctypes.data, threads)
    if failed:
        raise MemoryError(f"a feed-forward block of {hidden} needs more memory than there is; close other programs")


def attention_block(
    x: Float16[np.ndarray, "b n c"], norm: Float32[np.ndarray, "2 c"], first: Int8[np.ndarray, "..."],
    inner: Float32[np.ndarray, "2 outputs"], last: Int8[np.ndarray, "..."], outer: Float32[np.ndarray, "2 c"],
    known: tuple[Float32[np.ndarray, "b m c"], Float32[np.ndarray, "b m c"]] | None, out: Float16[np.ndarray, "b n c"],
    *, heads: int, scale: float, rounded: bool, steps: float, epsilon: float, threads: int = 1,
) -> None:
    """Write x + last(softmax(q k' scale) v), with q, k, v = first(layer norm of x), into `out`, on AMX.

    `known`: keys and values that are given; then `first` makes queries alone. `rounded`: queries and keys are rounded
    to int8 as by `attention`, otherwise to bfloat16. `steps`: of the int8 that attention's results are rounded to, in
    1. The rest as of `feed_forward`, weights by `panels`. Raises BadInput for arrays that do not fit or a CPU without
    AMX, MemoryError.
    """
    library, (batch, tokens, width) = compiled(), x.shape
    outputs = width if known else 3 * width
    if (library is None or not _fit(x, norm, outer, out, first, inner, last, *(known or ())) or width % heads
            or not takes_heads(AMX, width // heads) or inner.shape != (2, outputs)
            or (first.size, last.size) != (width * outputs, width * width)
            or any((array.shape[0], array.shape[2]) != (batch, width) for array in known or ())
            or (known and known[0].shape != known[1].shape)):
        raise BadInput(f"an attention block of {x.shape} in {heads} heads does not fit, or this CPU has no AMX; pass "
                       f"whole arrays of multiples of {DEPTH}")
    keys, values = known or (None, None)
    failed = library.caphuman_attention_block(
        x.ctypes.data, batch, tokens, width, heads, *(array.ctypes.data for array in (norm, first, inner)),
        None if keys is None else keys.ctypes.data, None if values is None else values.ctypes.data,
        0 if keys is None else keys.shape[1], last.ctypes.data, outer.ctypes.data, rounded, scale, steps, epsilon,
        out.ctypes.data, threads)
    if failed:
        raise MemoryError(f"an attention block of {x.shape} needs more memory than there is; close other programs")


def _fit(x: np.ndarray, norm: np.ndarray, outer: np.ndarray, out: np.ndarray, *others: np.ndarray) -> bool:
    """Whether this CPU has the unit and the arrays are what both blocks ask for."""
    width, arrays = x.shape[-1], (x, norm, outer, out, *others)
    return (AMX in attention_kernels() and width % DEPTH == 0 and x.shape == out.shape
            and x.itemsize == out.itemsize == 2 and norm.shape == outer.shape == (2, width)
            and all(0 not in array.shape and array.flags.c_contiguous for array in arrays))


def panels(weights: Int8[np.ndarray, "k n"]) -> Int8[np.ndarray, "n/32 k/64 2 16 16 4"]:
    """Weights as AMX wants them: panels of 32 columns, of which a tile holds 64 numbers of 16."""
    tiles = _tiles(weights)
    return np.ascontiguousarray(np.stack([tiles[::2], tiles[1::2]], axis=2))


def gated_panels(
    values: Int8[np.ndarray, "k n"], gates: Int8[np.ndarray, "k n"],
) -> Int8[np.ndarray, "n/16 k/64 2 16 16 4"]:
    """The same of 16 columns of one and the same 16 of the other."""
    return np.ascontiguousarray(np.stack([_tiles(values), _tiles(gates)], axis=2))


def _tiles(weights: Int8[np.ndarray, "k n"]) -> Int8[np.ndarray, "n/16 k/64 16 16 4"]:
    """Of 16 columns each; four numbers of a column lie together."""
    inputs, outputs = weights.shape
    return weights.reshape(inputs // DEPTH, 16, 4, outputs // 16, 16).transpose(3, 0, 1, 4, 2)
