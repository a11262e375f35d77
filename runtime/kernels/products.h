// Products of int8 rows and weights on Intel's matrix unit (AMX), and vectors at work on the last ones meanwhile.
//
// A tile holds 16 rows of 64 bytes. Rows are kept as tiles of 16 rows x 64 numbers; weights as panels of two tiles side
// by side, each of 64 numbers x 16 columns, four numbers of a column together. A block of 32 rows times a panel gives
// four tiles of sums, which the unit reaches with one load a product.
#pragma once
#include <algorithm>
#include <cmath>

#include "amx_tiles.h"
#include "avx512_math.h"
#include "memory.h"

namespace {

using caphuman::LINE;
constexpr int64_t DEPTH = 64, HALF = 16, BLOCK = 32;  // numbers of a row in a tile; rows of a tile, and of a block
constexpr int64_t MOST_BLOCKS = 4;                    // of a part: with its weights it stays in a core's cache

struct Sums {  // of a block and a panel, by the halves of both
    alignas(64) int32_t of[2][2][HALF][HALF];
};

// Rows in parts of a few blocks, for threads to share.
struct Parts {
    const int64_t rows, step;

    Parts(int64_t rows, int64_t threads)
        : rows(rows), step(BLOCK * std::clamp<int64_t>((rows + BLOCK * threads - 1) / (BLOCK * threads), 1, MOST_BLOCKS)) {}

    int64_t count() const { return (rows + step - 1) / step; }
    int64_t first(int64_t part) const { return part * step; }
    int64_t size(int64_t part) const { return std::min(step, rows - part * step); }
};

// Where a number lies in rows kept as tiles.
inline int8_t *place(int8_t *rows, int64_t inputs, int64_t row, int64_t number) {
    return rows + row / HALF * HALF * inputs + number / DEPTH * TILE + row % HALF * DEPTH + number % DEPTH;
}

// 16 numbers to the nearest int8.
inline void store_rounded(__m512 x, int8_t *out) {
    _mm_store_si128(reinterpret_cast<__m128i *>(out), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

inline __m512 sixteen(const bfloat16 *x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 scaled(const int32_t *sums, const float *scale, const float *shift) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), _mm512_loadu_ps(scale), _mm512_loadu_ps(shift));
}

// Multiplies blocks of rows with panels of weights; calls finish(sums, block, panel, row of the block) for every row of
// sums, some of them between two products of what comes next.
template <class Finish>
inline void multiply(const int8_t *rows, int64_t blocks, const int8_t *weights, int64_t panels, int64_t inputs,
                     const Finish &finish) {
    Sums sums[2];
    const int64_t depth = inputs / DEPTH, half = HALF * inputs;
    const int64_t share = (2 * TILE + blocks * LINE - 1) / (blocks * LINE) * LINE;  // of the next panel, a block's
    int64_t turn = 0, block_before = 0, panel_before = -1;
    for (int64_t panel = 0; panel < panels; panel++, weights += 2 * half) {
        const int8_t *above = rows;
        for (int64_t block = 0; block < blocks; block++, above += 2 * half, turn ^= 1) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0, row = 0; k < depth; k++) {
                _tile_loadd(4, above + k * TILE, DEPTH);
                _tile_loadd(6, weights + 2 * k * TILE, DEPTH);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(7, weights + 2 * k * TILE + TILE, DEPTH);
                _tile_dpbssd(1, 4, 7);
                _tile_loadd(5, above + half + k * TILE, DEPTH);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
                for (int64_t i = share * block; i < share * (block + 1); i += LINE)
                    _mm_prefetch(reinterpret_cast<const char *>(weights + 2 * half + 2 * k * TILE + i), _MM_HINT_T1);
                if (panel_before < 0) continue;
                for (const int64_t end = BLOCK * (k + 1) / depth; row < end; row++)
                    finish(sums[turn ^ 1], block_before, panel_before, row);
            }
            _tile_stored(0, sums[turn].of[0][0], DEPTH);
            _tile_stored(1, sums[turn].of[0][1], DEPTH);
            _tile_stored(2, sums[turn].of[1][0], DEPTH);
            _tile_stored(3, sums[turn].of[1][1], DEPTH);
            block_before = block, panel_before = panel;
        }
    }
    for (int64_t row = 0; row < BLOCK; row++) finish(sums[turn ^ 1], block_before, panel_before, row);
}

// x + scale (rows weights) + shift, of rows of bfloat16.
inline void multiply_and_add(const int8_t *rows, int64_t count, const int8_t *weights, int64_t inputs, int64_t outputs,
                             const float *affine, const bfloat16 *x, bfloat16 *out) {
    multiply(rows, (count + BLOCK - 1) / BLOCK, weights, outputs / BLOCK, inputs,
             [=](const Sums &sums, int64_t block, int64_t panel, int64_t row) {
                 const int64_t i = block * BLOCK + row, column = panel * BLOCK, at = i * outputs + column;
                 if (i >= count) return;
                 const auto &of = sums.of[row / HALF];
                 const float *scale = affine + column, *shift = scale + outputs;
                 const __m512 low = scaled(of[0][row % HALF], scale, shift);
                 const __m512 high = scaled(of[1][row % HALF], scale + HALF, shift + HALF);
                 const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_add_ps(high, sixteen(x + at + HALF)),
                                                           _mm512_add_ps(low, sixteen(x + at)));
                 _mm512_storeu_si512(out + at, (__m512i)both);
             });
}

// A row's layer norm (Ba et al. 2016), rounded; gamma and beta are in steps of int8.
inline void layer_norm(const bfloat16 *x, const float *gamma, const float *beta, float epsilon, int64_t width,
                       int64_t row, int8_t *rows) {
    const __m512 base = _mm512_set1_ps(_mm512_cvtss_f32(sixteen(x)));  // near the mean, so that squares lose little
    __m512 sum = _mm512_setzero_ps(), square = sum;
    for (int64_t d = 0; d < width; d += HALF) {
        const __m512 less = _mm512_sub_ps(sixteen(x + d), base);
        sum = _mm512_add_ps(sum, less);
        square = _mm512_fmadd_ps(less, less, square);
    }
    const float mean = _mm512_reduce_add_ps(sum) / float(width);
    const float variance = _mm512_reduce_add_ps(square) / float(width) - mean * mean;
    const __m512 by = _mm512_set1_ps(1 / std::sqrt(variance + epsilon));
    const __m512 center = _mm512_add_ps(base, _mm512_set1_ps(mean));
    for (int64_t d = 0; d < width; d += HALF) {
        const __m512 y = _mm512_mul_ps(_mm512_sub_ps(sixteen(x + d), center), by);
        store_rounded(_mm512_fmadd_ps(y, _mm512_loadu_ps(gamma + d), _mm512_loadu_ps(beta + d)),
                      place(rows, width, row, d));
    }
}

}  // namespace
