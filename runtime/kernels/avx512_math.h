// Vectors of 16 numbers (AVX-512).
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "attention.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")

namespace {

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }

inline __m512 load_some(const float *x, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), x); }

inline __m512 difference(const float *x, const float *less, int64_t n) {
    return _mm512_sub_ps(load_some(x, n), load_some(less, n));
}

// Offsets of 16 rows.
inline __m512i rows_apart(int64_t row) {
    return _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                              _mm512_set1_epi32(int(row)));
}

inline __m512 gather_some(const float *first, __m512i offsets, int64_t n) {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_lanes(n), offsets, first, 4);
}

// Columns of lanes, times a number a lane, as rows; of the first n lanes.
inline void scatter_rows(const float *columns, int64_t width, __m512 by, int64_t n, int64_t row, float *out) {
    const __m512i offsets = rows_apart(row);
    for (int64_t d = 0; d < width; d++)
        _mm512_mask_i32scatter_ps(out + d, first_lanes(n), offsets, _mm512_mul_ps(by, _mm512_load_ps(columns + d * 16)), 4);
}

// The largest absolute number of some rows, less what is taken off each.
inline float largest_of(const float *x, int64_t rows, int64_t row, int64_t width, const float *less) {
    __m512 largest = _mm512_set1_ps(caphuman::TINY);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < width; d += 16)
            largest = _mm512_max_ps(largest, _mm512_abs_ps(difference(x + i * row + d, less + d, width - d)));
    return _mm512_reduce_max_ps(largest);
}

// 2^x to a relative 2.7e-03, exact for whole numbers: 2^f over [0, 1) as a parabola, times 2 to the whole part. Rounding
// queries and keys to int8 errs several times as much.
inline __m512 power_of_two(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, 0x01);  // x minus its floor
    __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.33977f), f, _mm512_set1_ps(0.66023f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1));
    return _mm512_scalef_ps(y, x);  // which takes x's floor
}

}  // namespace
