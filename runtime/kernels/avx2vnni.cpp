// Attention on CPUs with AVX2 and byte products of that width (AVX-VNNI): Intel's laptops since 2021, AMD's Zen 5.
#include <cpuid.h>

#include "avx2.h"

#pragma GCC target("avxvnni")

namespace {

inline Ints add_products(Ints sum, Ints keys, Ints queries) { return _mm256_dpbusd_avx_epi32(sum, keys, queries); }
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }

}  // namespace

#include "lanes.h"

namespace {

bool usable() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
           (a & (1u << 4));
}

}  // namespace

const caphuman::Kernel caphuman::avx2vnni = {"avx2vnni", any_width, usable, key_bytes, value_bytes, pack, STEP, room,
                                             enter, attend, leave};
