"""Our own kernels against the same in numpy, in double precision."""
import multiprocessing
import platform
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.kernels import ISA_LIMIT, attention, attention_kernels, group_norm, library, takes_heads

HERE = attention_kernels()
ROUNDING = 0.04  # what int8 queries and keys may cost, of the spread of what comes out


def expected(q, k, v, heads, scale):
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3).astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    found = (weights / weights.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
    return found.reshape(*found.shape[:2], -1)


def random_rows(batch, queries, keys, heads, width, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, tokens, heads * width)).astype(np.float32) for tokens in (queries, keys, keys)]


def found_by(kernel, q, k, v, heads, scale, threads=2):
    out = np.full_like(q, np.nan)
    attention(q, k, v, out, heads=heads, scale=scale, kernel=kernel, threads=threads)
    return out


def test_kernels_are_compiled_where_a_compiler_is():
    if sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("kernels are for x86 on Linux, and want a compiler")
    assert library.compiled() is not None, "pip says why with -v"


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("lengths", [
    (1, 64, 128, 2, 40), (2, 100, 77, 3, 40), (1, 70, 600, 2, 80), (1, 33, 1, 2, 16), (1, 1, 130, 1, 8),
    (2, 50, 300, 2, 72), (1, 17, 65, 3, 30), (1, 20, 129, 1, 50), (1, 5, 3, 1, 1),
    (2, 70, 200, 2, 160), (1, 30, 40, 3, 96)])
def test_a_kernel_computes_attention(kernel, lengths):
    q, k, v = random_rows(*lengths)
    heads, scale = lengths[3], lengths[4] ** -0.5
    want = expected(q, k, v, heads, scale)
    error = found_by(kernel, q, k, v, heads, scale) - want
    assert np.sqrt((error ** 2).mean()) < ROUNDING * np.abs(want).std()


@pytest.mark.parametrize("kernel", HERE)
def test_keys_that_come_late_count_as_much_as_early_ones(kernel):
    """The maximum grows from chunk to chunk, and what was summed before must shrink."""
    q = np.ones((1, 40, 16), np.float32)
    k = np.linspace(0, 1, 1000, dtype=np.float32)[None, :, None].repeat(16, axis=2)
    v = k.copy()
    found, want = found_by(kernel, q, k, v, 1, 2.0), expected(q, k, v, 1, 2.0)
    np.testing.assert_allclose(found, want, atol=3e-3)
    backwards = found_by(kernel, q, k[:, ::-1].copy(), v[:, ::-1].copy(), 1, 2.0)
    np.testing.assert_allclose(backwards, want, atol=3e-3)


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scores_may_be_alike_or_far_apart(kernel, scale):
    q, k, v = (np.sign(x) for x in random_rows(1, 40, 200, 1, 32))
    k = np.concatenate([k, -k], axis=1)  # of mean 0, so that int8 holds them without an error
    v = np.concatenate([v, v], axis=1)
    found = found_by(kernel, q, k, v, 1, scale)
    np.testing.assert_allclose(found, expected(q, k, v, 1, scale), atol=6e-3)


@pytest.mark.parametrize("kernel", HERE)
def test_what_keys_have_in_common_costs_nothing(kernel):
    """Softmax does not see it, and it would take up the range of int8."""
    q, k, v = random_rows(1, 40, 300, 2, 40)
    far = k + 100 * np.random.default_rng(9).standard_normal(80).astype(np.float32)
    want = expected(q, k, v, 2, 0.16)
    error = found_by(kernel, q, far, v, 2, 0.16) - want
    assert np.sqrt((error ** 2).mean()) < ROUNDING * want.std()


@pytest.mark.parametrize("kernel", HERE)
def test_zeros_and_small_numbers_do_no_harm(kernel):
    q, k, v = random_rows(1, 20, 90, 2, 40)
    np.testing.assert_allclose(found_by(kernel, q * 0, k * 0, v, 2, 1.0), expected(q * 0, k, v, 2, 1.0), atol=5e-3)
    np.testing.assert_array_equal(found_by(kernel, q, k, v * 0, 2, 1.0), v[:, :20] * 0)
    tiny = found_by(kernel, q * 1e-18, k * 1e-18, v * 1e-18, 2, 1.0)
    np.testing.assert_allclose(tiny, expected(q * 0, k, v * 1e-18, 2, 1.0), atol=2e-20)


@pytest.mark.parametrize("kernel", HERE)
def test_threads_change_nothing(kernel):
    q, k, v = random_rows(2, 150, 200, 3, 40)
    one = found_by(kernel, q, k, v, 3, 0.2, threads=1)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(found_by(kernel, q, k, v, 3, 0.2, threads=threads), one)


@pytest.mark.parametrize("kernel", HERE)
def test_several_callers_at_once_get_what_each_would_alone(kernel):
    """Threads are shared: who finds them at work computes alone."""
    calls = [random_rows(1, 150, 200, 3, 40, seed) for seed in range(12)]
    alone = [found_by(kernel, *rows, 3, 0.2) for rows in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda rows: found_by(kernel, *rows, 3, 0.2), calls))
    np.testing.assert_array_equal(together, alone)


@pytest.mark.skipif(not HERE, reason="no kernel was compiled for this machine")
def test_a_forked_process_computes_too():
    """It has none of its parent's threads."""
    rows = random_rows(1, 150, 200, 3, 40)
    found_by(HERE[0], *rows, 3, 0.2)  # here threads are started
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        there = pool.submit(found_by, HERE[0], *rows, 3, 0.2).result(timeout=60)
    np.testing.assert_array_equal(there, found_by(HERE[0], *rows, 3, 0.2))


@pytest.mark.parametrize("kernel", HERE)
def test_nan_and_infinity_come_back(kernel):
    for bad in (np.nan, np.inf):
        q, k, v = random_rows(1, 20, 90, 2, 40)
        q[0, 3], k[0, 5] = bad, bad
        found_by(kernel, q, k, v, 2, 0.2)  # any numbers, but it returns


@pytest.mark.parametrize("kernel", HERE)
def test_what_does_not_fit_is_refused(kernel):
    q, k, v = random_rows(1, 20, 90, 2, 40)
    out = np.empty_like(q)
    settings = {"heads": 2, "scale": 1.0, "kernel": kernel}
    for arguments, other in [
        ((q, k[:, :0], v[:, :0], out), {}), ((q, k, v, out), {"heads": 3}),
        ((q.swapaxes(1, 2).copy().swapaxes(1, 2), k, v, out), {}),
        (tuple(np.ones((1, 4, 161), np.float32) for _ in range(4)), {"heads": 1})]:
        with pytest.raises(BadInput, match="does not fit"):
            attention(*arguments, **{**settings, **other})


def test_an_unknown_kernel_is_refused():
    q, k, v = random_rows(1, 2, 3, 1, 8)
    with pytest.raises(BadInput, match="'fast' does not run here"):
        attention(q, k, v, q.copy(), heads=1, scale=1.0, kernel="fast")


@pytest.mark.parametrize(("limit", "first"), [
    ("AVX512_CORE_AMX", "amx"), ("ALL", "amx"), ("AVX512_CORE_BF16", "avx512"), ("AVX512_CORE_VNNI", "avx512"),
    ("avx2_vnni_2", "avx2vnni"), ("AVX2", "avx2"), ("AVX512_CORE", None), ("SSE41", None)])
def test_who_holds_back_the_cpu_holds_back_its_kernels(monkeypatch, limit, first):
    monkeypatch.setenv(ISA_LIMIT, limit)
    found = attention_kernels()
    wanted = HERE if first == "amx" else HERE[HERE.index(first):] if first in HERE else ()
    assert found == wanted


def test_without_a_library_there_are_no_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library.compiled.cache_clear()
    try:
        assert attention_kernels() == () and not takes_heads("avx2", 40)
        broken = tmp_path / f"_kernels{library.importlib.machinery.EXTENSION_SUFFIXES[0]}"
        broken.write_bytes(b"of another machine")
        library.compiled.cache_clear()
        assert attention_kernels() == ()
    finally:
        monkeypatch.undo()
        library.compiled.cache_clear()


def normed(x, gamma, beta, groups, epsilon, silu, steps):
    """As int8, in double precision, of rows of channels."""
    apart = x.astype(np.float64).reshape(len(x), groups, -1)
    mean, variance = apart.mean(axis=(0, 2), keepdims=True), apart.var(axis=(0, 2), keepdims=True)
    y = ((apart - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
    if silu:
        y = y / (1 + np.exp(-y))
    return np.clip(np.rint(y * steps), -128, 127)


def as_bfloat16(x):
    """The same numbers with 8 bits each, as float32 and as what a bfloat16 is stored as."""
    bits = (x.view(np.uint32) + 0x8000) >> 16
    return (bits << 16).view(np.float32), bits.astype(np.uint16).view(np.float16)


needs_library = pytest.mark.skipif(library.compiled() is None, reason="no kernel was compiled for this machine")


@needs_library
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("lengths", [(1000, 64, 32), (4096, 320, 32), (1, 32, 4), (33, 50, 1), (70, 7, 7)])
def test_group_norm_to_int8(lengths, halves, silu):
    rows, channels, groups = lengths
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((rows, channels)) * 3 + 20 * rng.standard_normal(channels)).astype(np.float32)
    gamma, beta = rng.uniform(0.5, 1.5, channels).astype(np.float32), rng.standard_normal(channels).astype(np.float32)
    real, given = as_bfloat16(x) if halves else (x, x)
    out = np.empty((rows, channels), np.int8)
    group_norm(given, gamma, beta, out, groups=groups, epsilon=1e-5, silu=silu, steps=40.0, threads=2)
    wanted = normed(real, gamma, beta, groups, 1e-5, silu, 40.0)
    assert np.abs(out - wanted).max() <= 1
    assert (out != wanted).mean() < 2e-3  # those between two numbers may fall to either side


@needs_library
def test_group_norm_is_the_same_on_any_number_of_threads():
    rng = np.random.default_rng(0)
    x, ones = rng.standard_normal((64, 80, 48), np.float32), np.ones(48, np.float32)
    outs = [np.empty(x.shape, np.int8) for _ in range(4)]
    for threads, out in enumerate(outs, start=1):
        group_norm(x, ones, ones, out, groups=4, epsilon=0.0, silu=True, steps=30.0, threads=threads)
        np.testing.assert_array_equal(out, outs[0])


@needs_library
def test_group_norm_refuses_what_does_not_fit():
    x, ones = np.ones((10, 48), np.float32), np.ones(48, np.float32)
    settings = {"groups": 4, "epsilon": 0.0, "silu": True, "steps": 1.0}
    for rows, other in [(x, {"groups": 5}), (x[::2], {}), (x[:0], {})]:
        with pytest.raises(BadInput, match="does not fit"):
            group_norm(rows, ones, ones, np.empty(rows.shape, np.int8), **{**settings, **other})
