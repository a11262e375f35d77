"""Kernels of our own for the CPU, in C++: attention, group norm and feed-forward blocks.

They are compiled when the package is installed, for x86 on Linux, where a compiler is at hand; that of the CPU's
instruction set is chosen when it runs. Without them everything works, slower.
"""
import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Float32, Int8

from ..errors import BadInput

LIBRARY = "_kernels"
AMX = "amx"  # Intel's matrix unit
DEPTH = 64  # numbers of a row in one of its tiles
LIMITS = {"AVX512_CORE_AMX": AMX, "AVX512_CORE_": "avx512", "AVX2_VNNI": "avx2vnni", "AVX2": "avx2"}  # beginnings
UNLIMITED = ("", "ALL", "DEFAULT", "AVX10")
ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"  # the variable by which users hold back the CPU's newest instructions


def attention_kernels() -> tuple[str, ...]:
    """Names of those that this CPU can run, or may by ISA_LIMIT, the fastest first; none where none were compiled."""
    library = _library()
    if library is None:
        return ()
    found = tuple(library.caphuman_attention_kernels().decode().split())
    limit = os.environ.get(ISA_LIMIT, "").upper()
    if limit.startswith(UNLIMITED[1:]) or not limit:
        return found
    most = next((name for beginning, name in LIMITS.items() if limit.startswith(beginning)), None)
    return found[found.index(most):] if most in found else ()


def widest_head(kernel: str) -> int:
    """The most numbers of a head that a kernel takes."""
    library = _library()
    return 0 if library is None else int(library.caphuman_attention_widest(kernel.encode()))


def attention(
    q: Float32[np.ndarray, "b n c"], k: Float32[np.ndarray, "b m c"], v: Float32[np.ndarray, "b m c"],
    out: Float32[np.ndarray, "b n c"], *, heads: int, scale: float, kernel: str, threads: int = 1,
) -> None:
    """Write softmax(q k' scale) v of each head into `out`; a row holds its heads one after the other.

    Queries and keys are rounded to int8, by the largest number of each query and of each head's keys; "amx" rounds
    weights and values to bfloat16, too. Infinite or NaN numbers give NaN or nonsense, nothing worse.
    Raises BadInput for arrays that do not fit or a kernel that cannot take them here, MemoryError.
    """
    library = _library()
    arrays, width = (q, k, v, out), q.shape[2] // heads
    if library is None or kernel not in library.caphuman_attention_kernels().decode().split():
        raise BadInput(f"attention kernel {kernel!r} does not run here; choose from {', '.join(attention_kernels())}")
    if (q.shape[2] % heads or width > widest_head(kernel) or out.shape != q.shape or k.shape != v.shape or 0 in k.shape
            or 0 in q.shape or (k.shape[0], k.shape[2]) != (q.shape[0], q.shape[2])
            or not all(array.flags.c_contiguous for array in arrays)):
        raise BadInput(f"attention of {q.shape}, {k.shape}, {v.shape} in {heads} heads does not fit kernel {kernel}; "
                       "pass whole arrays of equal batch and width, and narrower heads")
    failed = library.caphuman_attention(
        kernel.encode(), *(array.ctypes.data for array in arrays), q.shape[0], q.shape[1], k.shape[1], heads, width,
        scale, threads)
    if failed:
        raise MemoryError(f"attention of {k.shape[1]} keys needs more memory than there is; close other programs")


def group_norm(
    x: Float32[np.ndarray, "*hw c"] | Float16[np.ndarray, "*hw c"], gamma: Float32[np.ndarray, "c"],
    beta: Float32[np.ndarray, "c"], out: Int8[np.ndarray, "*hw c"], *, groups: int, epsilon: float, silu: bool,
    steps: float, threads: int = 1,
) -> None:
    """Write a map's group norm (Wu & He 2018) into `out` as int8, rounded and clamped; `steps` of it are 1.

    Channels are last. `silu`: y sigmoid(y) of each y = gamma z + beta. Of two bytes, a number of `x` is a bfloat16, in
    whatever type numpy, which has none, holds it. Raises BadInput for arrays that do not fit, MemoryError.
    """
    library, channels = _library(), x.shape[-1]
    if (library is None or channels % groups or 0 in x.shape or x.shape != out.shape
            or not all(array.flags.c_contiguous for array in (x, gamma, beta, out))):
        raise BadInput(f"group norm of {x.shape} in {groups} groups does not fit, or no kernel was compiled; pass "
                       "whole arrays, and groups that divide the channels")
    failed = library.caphuman_group_norm(
        x.ctypes.data, x.itemsize == 2, x.size // channels, channels, groups, gamma.ctypes.data, beta.ctypes.data,
        epsilon, silu, steps, out.ctypes.data, threads)
    if failed:
        raise MemoryError(f"group norm of {channels} channels needs more memory than there is; close other programs")


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
    library, (width, hidden) = _library(), (x.shape[-1], inner.shape[-1])
    if (library is None or AMX not in attention_kernels() or width % DEPTH or hidden % DEPTH or 0 in x.shape
            or x.shape != out.shape or x.itemsize != 2 or out.itemsize != 2
            or (first.size, second.size) != (2 * width * hidden, width * hidden)
            or (norm.shape, inner.shape, outer.shape) != ((2, width), (4, hidden), (2, width))
            or not all(array.flags.c_contiguous for array in (x, norm, first, inner, second, outer, out))):
        raise BadInput(f"a feed-forward block of {x.shape} and {hidden} does not fit, or this CPU has no AMX; pass "
                       f"whole arrays of multiples of {DEPTH}")
    failed = library.caphuman_feed_forward(
        x.ctypes.data, x.size // width, width, hidden,
        *(array.ctypes.data for array in (norm, first, inner, second, outer)), epsilon, out.ctypes.data, threads)
    if failed:
        raise MemoryError(f"a feed-forward block of {hidden} needs more memory than there is; close other programs")


def panels(weights: Int8[np.ndarray, "k n"]) -> Int8[np.ndarray, "n/32 k/64 2 16 16 4"]:
    """Weights as AMX wants them: panels of 32 columns, of which a tile holds 64 numbers of 16."""
    tiles = _tiles(weights)
    return np.stack([tiles[::2], tiles[1::2]], axis=2)


def gated_panels(
    values: Int8[np.ndarray, "k n"], gates: Int8[np.ndarray, "k n"],
) -> Int8[np.ndarray, "n/16 k/64 2 16 16 4"]:
    """The same of 16 columns of one and the same 16 of the other."""
    return np.stack([_tiles(values), _tiles(gates)], axis=2)


def _tiles(weights: Int8[np.ndarray, "k n"]) -> Int8[np.ndarray, "n/16 k/64 16 16 4"]:
    """Of 16 columns each; four numbers of a column lie together."""
    inputs, outputs = weights.shape
    return weights.reshape(inputs // DEPTH, 16, 4, outputs // 16, 16).transpose(3, 0, 1, 4, 2)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """What was compiled, if it was and can be loaded."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(LIBRARY + suffix)
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # such as of another processor, or a C++ library that is missing: works without
                return None
            pointers, lengths = [ctypes.c_void_p] * 4, [ctypes.c_int64] * 5
            library.caphuman_attention.argtypes = [ctypes.c_char_p, *pointers, *lengths, ctypes.c_float, ctypes.c_int]
            library.caphuman_attention_kernels.restype = ctypes.c_char_p
            library.caphuman_attention_widest.argtypes = [ctypes.c_char_p]
            library.caphuman_attention_widest.restype = ctypes.c_int64
            library.caphuman_group_norm.argtypes = [
                pointers[0], ctypes.c_int, *lengths[:3], *pointers[:2], ctypes.c_float, ctypes.c_int, ctypes.c_float,
                pointers[0], ctypes.c_int]
            library.caphuman_feed_forward.argtypes = [
                pointers[0], *lengths[:3], *[ctypes.c_void_p] * 5, ctypes.c_float, pointers[0], ctypes.c_int]
            return library
    return None
