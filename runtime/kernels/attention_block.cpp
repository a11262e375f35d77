// A transformer's attention block on AMX, x + W (attention of norm(x)), from one norm to the sum: of x to itself, or to keys
// and values that are given.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "exported.h"
#include "heads.h"
#include "memory.h"
#include "products.h"
#include "threads.h"

namespace {

using namespace caphuman;

struct AttentionBlock {
    const bfloat16 *x;
    int64_t rows, width;
    const float *norm;        // gamma and beta, in steps of the int8 of what is normalised
    const int8_t *first;      // panels: queries' columns, or queries', keys' and values'
    int64_t outputs;          // columns of all of them
    const float *inner;       // scale and shift
    float *projected;         // rows of queries, then of keys, of values; attention's results take the queries' place
    const int8_t *last;
    const float *outer;       // scale and shift
    float steps;              // of the int8 of attention's results in 1
    float epsilon;
    bfloat16 *out;

    void project(int64_t first_row, int64_t count, int8_t *normed) const {
        for (int64_t i = 0; i < count; i++)
            layer_norm(x + (first_row + i) * width, norm, norm + width, epsilon, width, i, normed);
        multiply(normed, (count + BLOCK - 1) / BLOCK, first, outputs / BLOCK, width,
                 [&](const Sums &sums, int64_t block, int64_t panel, int64_t row) {
                     const int64_t i = block * BLOCK + row, column = panel * BLOCK;
                     if (i >= count) return;
                     const auto &of = sums.of[row / HALF];
                     float *to = projected + (column / width * rows + first_row + i) * width + column % width;
                     for (int64_t half = 0; half < 2; half++) {
                         const float *scale = inner + column + half * HALF;
                         _mm512_storeu_ps(to + half * HALF, scaled(of[half][row % HALF], scale, scale + outputs));
                     }
                 });
    }

    void add(int64_t first_row, int64_t count, int8_t *attended) const {
        const __m512 by = _mm512_set1_ps(steps);
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < width; d += HALF)
                store_rounded(_mm512_mul_ps(by, _mm512_loadu_ps(projected + (first_row + i) * width + d)),
                              place(attended, width, i, d));
        multiply_and_add(attended, count, last, width, width, outer, x + first_row * width, out + first_row * width);
    }
};

}  // namespace

// x + W (attention) of rows, bfloat16; `keys` and `values` of each batch's `known` rows, or none: x's own. Heads are
// attended to in int8 (`rounded`) or bfloat16. Width is a multiple of 64. Gives 0, or 1 where memory is short or there is
// no such matrix unit.
EXPORTED int caphuman_attention_block(const bfloat16 *x, int64_t batch, int64_t tokens, int64_t width, int64_t heads,
                                      const float *norm, const int8_t *first, const float *inner, const float *keys,
                                      const float *values, int64_t known, const int8_t *last, const float *outer,
                                      int rounded, float scale, float steps, float epsilon, bfloat16 *out, int threads) {
    if (!amx.usable()) return 1;
    try {
        threads = std::max(threads, 1);
        const int64_t rows = batch * tokens, kinds = keys ? 1 : 3;
        const Memory projected = allocated(kinds * rows * width * int64_t(sizeof(float)));
        auto *q = reinterpret_cast<float *>(projected.get());
        const AttentionBlock block = {x, rows, width, norm, first, kinds * width, inner, q, last, outer, steps, epsilon, out};
        Heads all(rounded ? amx : amx_halves, {batch, tokens, keys ? known : tokens, heads, width / heads}, q,
                  keys ? keys : q + rows * width, keys ? values : q + 2 * rows * width, q, scale, threads);
        const Parts parts(rows, threads);
        std::vector<Memory> rooms;
        for (int i = 0; i < threads; i++) rooms.push_back(allocated(parts.step * width));
        Stage projecting, adding;
        on_threads(threads, [&](int i) {
            auto *room = reinterpret_cast<int8_t *>(rooms[i].get());
            std::memset(room, 0, parts.step * width);  // rows that are none
            use_tiles();
            projecting.work(parts.count(), [&](int64_t part) { block.project(parts.first(part), parts.size(part), room); });
            _tile_release();
            all.work(i);
            use_tiles();
            adding.work(parts.count(), [&](int64_t part) { block.add(parts.first(part), parts.size(part), room); });
            _tile_release();
        });
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
