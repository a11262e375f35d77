// Attention on CPUs with AVX-512 and its byte products (VNNI): Intel's since 2019 but for laptops of 2021 and later,
// AMD's since Zen 4.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "avx512_math.h"

#pragma GCC target("avx512vnni")

namespace {

using Floats = __m512;
using Ints = __m512i;
constexpr int64_t LANES = 16, AT_ONCE = 8;

inline Ints load(const int32_t *x) { return _mm512_load_si512(x); }
inline Ints load_bytes(const int8_t (*x)[4]) { return _mm512_load_si512(x); }
inline Floats load(const float *x) { return _mm512_load_ps(x); }
inline void store(int32_t *to, Ints x) { _mm512_store_si512(to, x); }
inline void store(float *to, Floats x) { _mm512_store_ps(to, x); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints zero() { return _mm512_setzero_si512(); }
inline Ints broadcast(const void *x) {  // four bytes
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}
inline Ints add_products(Ints sum, Ints keys, Ints queries) { return _mm512_dpbusd_epi32(sum, keys, queries); }
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline Ints low_and_high(Ints low, Ints high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }
inline Ints as_ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline Floats as_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints larger(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline bool any_above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats times_minus(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }

}  // namespace

#include "lanes.h"

namespace {

bool usable() {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

const caphuman::Kernel caphuman::avx512 = {"avx512", any_width, usable, key_bytes, value_bytes, pack, STEP, room,
                                           enter, attend, leave};
