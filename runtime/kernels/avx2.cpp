// Attention on CPUs with AVX2 alone: Intel's since 2013, AMD's since 2017.
#include "avx2.h"

namespace {

// Pairs of byte products would not fit into 16 bits: even and odd bytes are multiplied apart.
inline Ints add_products(Ints sum, Ints keys, Ints queries) {
    const Ints even = _mm256_and_si256(keys, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(keys, 8);
    const Ints q_even = _mm256_srai_epi16(_mm256_slli_epi16(queries, 8), 8), q_odd = _mm256_srai_epi16(queries, 8);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, q_even), _mm256_madd_epi16(odd, q_odd)));
}

inline Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

}  // namespace

#include "lanes.h"

namespace {

bool usable() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const caphuman::Kernel caphuman::avx2 = {"avx2", any_width, usable, key_bytes, value_bytes, pack, STEP, room,
                                         enter, attend, leave};
