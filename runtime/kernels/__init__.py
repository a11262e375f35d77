"""Kernels of our own for the CPU, in C++: attention, group norm and blocks of transformers.

They are compiled when the package is installed, for x86 on Linux, where a compiler is at hand; that of the CPU's
instruction set is chosen when it runs. Without them everything works, slower.
"""
import os

import numpy as np
from jaxtyping import Float16, Float32, Int8

from ..errors import BadInput
from .library import compiled

AMX = "amx"  # Intel's matrix unit
LIMITS = {"AVX512_CORE_AMX": AMX, "AVX512_CORE_": "avx512", "AVX2_VNNI": "avx2vnni", "AVX2": "avx2"}  # beginnings
UNLIMITED = ("", "ALL", "DEFAULT", "AVX10")
ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"  # the variable by which users hold back the CPU's newest instructions


def attention_kernels() -> tuple[str, ...]:
    """Names of those that this CPU can run, or may by ISA_LIMIT, the fastest first; none where none were compiled."""
    library = compiled()
    if library is None:
        return ()
    found = tuple(library.caphuman_attention_kernels().decode().split())
    limit = os.environ.get(ISA_LIMIT, "").upper()
    if limit.startswith(UNLIMITED[1:]) or not limit:
        return found
    most = next((name for beginning, name in LIMITS.items() if limit.startswith(beginning)), None)
    return found[found.index(most):] if most in found else ()


def takes_heads(kernel: str, width: int) -> bool:
    """Whether a kernel takes heads of so many numbers."""
    library = compiled()
    return library is not None and bool(library.caphuman_attention_takes(kernel.encode(), width))


def attention(
    q: Float32[np.ndarray, "b n c"], k: Float32[np.ndarray, "b m c"], v: Float32[np.ndarray, "b m c"],
    out: Float32[np.ndarray, "b n c"], *, heads: int, scale: float, kernel: str, threads: int = 1,
) -> None:
    """Write softmax(q k' scale) v of each head into `out`; a row holds its heads one after the other.

    Queries and keys are rounded to int8, by the largest number of each query and of each head's keys; "amx" rounds
    weights and values to bfloat16, too. Infinite or NaN numbers give NaN or nonsense, nothing worse.
    Raises BadInput for arrays that do not fit or a kernel that cannot take them here, MemoryError.
    """
    library = compiled()
    arrays, width = (q, k, v, out), q.shape[2] // heads
    if library is None or kernel not in library.caphuman_attention_kernels().decode().split():
        raise BadInput(f"attention kernel {kernel!r} does not run here; choose from {', '.join(attention_kernels())}")
    if (q.shape[2] % heads or not takes_heads(kernel, width) or out.shape != q.shape or k.shape != v.shape
            or 0 in k.shape or 0 in q.shape or (k.shape[0], k.shape[2]) != (q.shape[0], q.shape[2])
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
    library, channels = compiled(), x.shape[-1]
    if (library is None or channels % groups or 0 in x.shape or x.shape != out.shape
            or not all(array.flags.c_contiguous for array in (x, gamma, beta, out))):
        raise BadInput(f"group norm of {x.shape} in {groups} groups does not fit, or no kernel was compiled; pass "
                       "whole arrays, and groups that divide the channels")
    failed = library.caphuman_group_norm(
        x.ctypes.data, x.itemsize == 2, x.size // channels, channels, groups, gamma.ctypes.data, beta.ctypes.data,
        epsilon, silu, steps, out.ctypes.data, threads)
    if failed:
        raise MemoryError(f"group norm of {channels} channels needs more memory than there is; close other programs")
