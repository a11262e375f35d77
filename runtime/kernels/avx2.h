// Vectors of 8 numbers (AVX2 with FMA).
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"

#pragma GCC target("avx2,fma")

namespace {

using Floats = __m256;
using Ints = __m256i;
constexpr int64_t LANES = 8, AT_ONCE = 4;

inline Ints load(const int32_t *x) { return _mm256_load_si256(reinterpret_cast<const Ints *>(x)); }
inline Ints load_bytes(const int8_t (*x)[4]) { return _mm256_load_si256(reinterpret_cast<const Ints *>(x)); }
inline Floats load(const float *x) { return _mm256_load_ps(x); }
inline void store(int32_t *to, Ints x) { _mm256_store_si256(reinterpret_cast<Ints *>(to), x); }
inline void store(float *to, Floats x) { _mm256_store_ps(to, x); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Ints zero() { return _mm256_setzero_si256(); }
inline Ints broadcast(const void *x) {  // four bytes
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
inline Ints low_and_high(Ints low, Ints high) { return _mm256_or_si256(low, _mm256_slli_epi32(high, 16)); }
inline Ints as_ints(Floats x) { return _mm256_cvtps_epi32(x); }
inline Floats as_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints larger(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline bool any_above(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats minus(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats times_minus(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }

// As in avx512_math.h; the power of the whole part is put into the exponent. Below 2^-126 it stays that.
inline Floats power_of_two(Floats x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-126));
    const Floats whole = _mm256_floor_ps(x), f = _mm256_sub_ps(x, whole);
    Floats y = _mm256_fmadd_ps(_mm256_set1_ps(0.33977f), f, _mm256_set1_ps(0.66023f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1));
    const Ints exponent = _mm256_slli_epi32(_mm256_cvttps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
}

}  // namespace
