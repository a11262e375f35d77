// Attention of many keys, in one pass over them: scores, softmax and the weighted sum of values, a few queries at a time.
//
// Scores are computed transposed: the lanes of a vector are queries, and keys come one after the other. So a softmax
// needs no sum across lanes, and its maximum is kept as keys come (Milakov & Gimelshein 2018; FlashAttention, Dao et al.
// 2022). Queries and keys are rounded to int8: queries by the largest number of each, keys by that of each head, after what a
// head's keys have in common was taken off them, which softmax does not see (SageAttention, Zhang et al. 2024).
#pragma once
#include <cstdint>

namespace caphuman {

constexpr float LOG2_E = 1.44269504f;  // softmax is computed in powers of two
constexpr float LOWEST = -1e30f;       // a maximum before any key came
constexpr float TINY = 1e-30f;         // in the place of the largest number where all are zero
constexpr int64_t WIDEST = 160;        // numbers of a head, of any kernel
constexpr float NOTHING[WIDEST] = {};  // to be taken off

struct Shape {
    int64_t batch, queries, keys, heads, width;  // width: numbers of one head

    int64_t row() const { return heads * width; }  // from one query or key to the next
};

struct Head {  // one head's keys and values, as a kernel wants them
    void *keys, *values;
    float key_scale, value_scale;  // of rounded ones
};

struct Kernel {  // what differs between instruction sets; q, k, v and out point at a head's first number
    const char *name;
    bool (*takes)(int64_t width);  // whether so many numbers of a head
    bool (*usable)();
    int64_t (*key_bytes)(const Shape &), (*value_bytes)(const Shape &);  // a head's, packed
    void (*pack)(const Shape &, const float *k, const float *center, const float *v, Head &);
    int64_t step;                     // queries at once
    int64_t (*room)(const Shape &);   // bytes that a thread needs to work
    void (*enter)(const Shape &);     // before a thread's first call
    void (*attend)(const Shape &, const Head &, const float *q, float scale, int64_t first, float *out, void *room);
    void (*leave)();                  // after its last one
};

extern const Kernel amx, avx512, avx2vnni, avx2;
extern const Kernel amx_halves;  // which rounds queries and keys to bfloat16

inline bool any_width(int64_t width) { return width <= WIDEST; }

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace caphuman
