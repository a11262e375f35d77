// A transformer's feed-forward block, x + W2 (v gelu(g)) with v, g = W1 norm(x), some rows at a time on AMX: what lies
// between the two products never leaves the core's cache.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "attention.h"
#include "exported.h"
#include "memory.h"
#include "products.h"
#include "threads.h"

namespace {

using namespace caphuman;

struct FeedForward {
    const bfloat16 *x;
    int64_t rows, width, hidden;
    const float *norm;    // gamma and beta, in steps of the int8 of what is normalised
    const int8_t *first;  // panels: 16 columns of v, the same of g
    const float *inner;   // v's scale and shift, in steps of the int8 of hidden numbers; g's
    const int8_t *second;
    const float *outer;   // scale and shift
    float epsilon;
    bfloat16 *out;
};

// Phi(x) - 1/2 of a normal distribution, as x times a polynomial of x^2, fitted so that gelu errs by 1.1e-4 at most up
// to 3.8; beyond, 7e-5 of x.
inline __m512 gelu(__m512 x) {
    const __m512 bound = _mm512_set1_ps(3.8f);
    const __m512 near = _mm512_max_ps(_mm512_min_ps(x, bound), _mm512_sub_ps(_mm512_setzero_ps(), bound));
    const __m512 square = _mm512_mul_ps(near, near);
    __m512 y = _mm512_set1_ps(3.025142e-08f);
    for (const float c : {-1.956848e-06f, 5.462011e-05f, -0.0008744077f, 0.009045644f, -0.06513247f, 0.3982565f})
        y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(c));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(y, near, _mm512_set1_ps(0.5f)));
}

void some_rows(const FeedForward &f, int64_t first, int64_t count, int8_t *normed, int8_t *hidden) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    for (int64_t i = 0; i < count; i++)
        layer_norm(f.x + (first + i) * f.width, f.norm, f.norm + f.width, f.epsilon, f.width, i, normed);
    multiply(normed, blocks, f.first, f.hidden / HALF, f.width,
             [&](const Sums &sums, int64_t block, int64_t panel, int64_t row) {
                 const auto &of = sums.of[row / HALF];
                 const float *inner = f.inner + panel * HALF;
                 const __m512 v = scaled(of[0][row % HALF], inner, inner + f.hidden);
                 const __m512 g = scaled(of[1][row % HALF], inner + 2 * f.hidden, inner + 3 * f.hidden);
                 store_rounded(_mm512_mul_ps(v, gelu(g)), place(hidden, f.hidden, block * BLOCK + row, panel * HALF));
             });
    multiply_and_add(hidden, count, f.second, f.hidden, f.width, f.outer, f.x + first * f.width, f.out + first * f.width);
}

}  // namespace

// x + W2 (v gelu(g)) of rows, bfloat16; width and hidden are multiples of 64. Gives 0, or 1 where memory is short or
// there is no such matrix unit.
EXPORTED int caphuman_feed_forward(const bfloat16 *x, int64_t rows, int64_t width, int64_t hidden, const float *norm,
                                   const int8_t *first, const float *inner, const int8_t *second, const float *outer,
                                   float epsilon, bfloat16 *out, int threads) {
    if (!amx.usable()) return 1;
    try {
        const FeedForward f = {x, rows, width, hidden, norm, first, inner, second, outer, epsilon, out};
        threads = std::max(threads, 1);
        const Parts parts(rows, threads);
        std::vector<Memory> rooms;
        for (int i = 0; i < threads; i++) rooms.push_back(allocated(parts.step * (width + hidden)));
        Stage stage;
        on_threads(threads, [&](int i) {
            auto *normed = reinterpret_cast<int8_t *>(rooms[i].get());
            std::memset(normed, 0, parts.step * width);  // rows that are none
            use_tiles();
            stage.work(parts.count(), [&](int64_t part) {
                some_rows(f, parts.first(part), parts.size(part), normed, normed + parts.step * width);
            });
            _tile_release();
        });
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
