// Attention on Intel's matrix unit (AMX): scores of int8 or bfloat16, weights and values of bfloat16.
//
// A tile holds 16 rows of 64 bytes. Scores: 16 keys x 64 bytes of numbers times as many x 16 queries. Sums: 16 numbers of
// values x 32 keys times 32 keys x 16 queries. So that the unit does not wait, the sums of 32 keys are issued while the
// weights of the next 32 are computed.
#include "attention.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "amx_tiles.h"
#include "avx512_math.h"

namespace {

using namespace caphuman;

constexpr int64_t LANES = 16, PAIRED = 32, CHUNK = 128, BLOCKS = 4;  // keys: PAIRED a tile of weights
constexpr int64_t WIDE = 80, MOST_TILES = 5;  // numbers that are summed at once; tiles of 16 queries
constexpr float LEAST_SCALE = 0x1p-24f;  // with which INT32_MIN, the score of a key that is none, has no weight
constexpr float LATE = 8;  // powers of two by which the maximum may be out of date: bfloat16 does not mind

// ROUNDED: queries and keys to int8; otherwise they are bfloat16.
template <bool ROUNDED>
int64_t tiles(const Shape &s) { return ROUNDED ? (s.width + 63) / 64 : (s.width + 31) / 32; }  // of one key's numbers
int64_t full(int64_t width) { return width / LANES; }  // tiles of a value's numbers
int64_t rest(int64_t width) { return width % LANES; }
int64_t padded_keys(const Shape &s) { return rounded_up(s.keys, PAIRED); }

template <bool ROUNDED>
int64_t key_bytes(const Shape &s) { return padded_keys(s) * tiles<ROUNDED>(s) * 64; }
int64_t value_bytes(const Shape &s) { return padded_keys(s) * s.width * int64_t(sizeof(bfloat16)); }

// Tiles' last rows may be fewer, of which only narrow heads' leave room for.
bool takes(int64_t width) { return width <= WIDE || (width <= WIDEST && rest(width) == 0); }

// Numbers of one row, less what is taken off, as int8 or bfloat16, each 64 bytes of them `apart` from the ones before.
template <bool ROUNDED>
void pack_row(const float *x, const float *less, int64_t width, float by, int64_t count, int64_t apart, int8_t *out) {
    for (int64_t at = 0, d = 0; at < count * 64; at += ROUNDED ? LANES : 2 * LANES, d += LANES) {
        const __m512 number = difference(x + d, less + d, width - d);
        int8_t *to = out + at / 64 * apart + at % 64;
        if constexpr (ROUNDED) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_set1_ps(by), number));
            _mm_store_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtsepi32_epi8(whole));
        } else {
            _mm256_store_si256(reinterpret_cast<__m256i *>(to), (__m256i)_mm512_cvtneps_pbh(number));
        }
    }
}

// Keys as tiles of 16 keys x 64 bytes; values as tiles of 16 numbers x 32 keys, of the last one only the rows in use.
template <bool ROUNDED>
void pack(const Shape &s, const float *k, const float *center, const float *v, Head &head) {
    auto *keys = static_cast<int8_t *>(head.keys);
    const float largest = ROUNDED ? largest_of(k, s.keys, s.row(), s.width, center) : 127;
    head.key_scale = largest / 127;
    const int64_t count = tiles<ROUNDED>(s), whole = s.keys / LANES * LANES * count * 64;
    std::memset(keys + whole, 0, key_bytes<ROUNDED>(s) - whole);
    for (int64_t i = 0; i < s.keys; i++)
        pack_row<ROUNDED>(k + i * s.row(), center, s.width, 127 / largest, count, TILE,
                          keys + i / LANES * count * TILE + i % LANES * 64);

    auto *values = static_cast<bfloat16 *>(head.values);
    const __m512i rows = rows_apart(s.row());
    for (int64_t i = 0; i < s.keys; i += PAIRED) {
        for (int64_t d = 0; d < s.width; d++, values += PAIRED) {
            const float *first = v + i * s.row() + d;
            const __m512 low = gather_some(first, rows, s.keys - i);
            const __m512 high = gather_some(first + LANES * s.row(), rows, s.keys - i - LANES);
            _mm512_store_si512(values, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

struct Block {  // what is known of 16 queries, a lane each
    alignas(64) int8_t queries[MOST_TILES * TILE];
    alignas(64) float sums[WIDEST * LANES], top[LANES], total[LANES], scale[LANES];
};

struct Room {
    alignas(64) int32_t scores[2][CHUNK * LANES];  // or floats
    alignas(64) bfloat16 weights[CHUNK * LANES];
    Block blocks[BLOCKS];
};

// Tiles 6 and 7 are for the last, narrower ones of values.
void enter(const Shape &s) { use_tiles(rest(s.width) ? uint8_t(rest(s.width)) : uint8_t(LANES)); }

void leave() { _tile_release(); }

template <bool ROUNDED>
void begin(const Shape &s, const Head &head, const float *q, float scale, int64_t count, Block &block) {
    const int64_t most = tiles<ROUNDED>(s);
    std::memset(block.queries, 0, most * TILE);
    std::fill_n(block.sums, s.width * LANES, 0.f);
    std::fill_n(block.top, LANES, LOWEST);
    std::fill_n(block.total, LANES, 0.f);
    std::fill_n(block.scale, LANES, LEAST_SCALE);
    for (int64_t i = 0; i < std::min(LANES, count); i++) {
        alignas(64) int8_t row[MOST_TILES * 64];
        const float largest = ROUNDED ? largest_of(q + i * s.row(), 1, 0, s.width, NOTHING) : 127;
        block.scale[i] = std::max(largest / 127 * head.key_scale * scale * LOG2_E, LEAST_SCALE);
        pack_row<ROUNDED>(q + i * s.row(), NOTHING, s.width, 127 / largest, most, 64, row);
        for (int64_t d = 0; d < most * 16; d++) std::memcpy(block.queries + (d * LANES + i) * 4, row + d * 4, 4);
    }
}

// Of two blocks of narrow heads, which read the same keys.
void scores_of_two(const Block &one, const Block &two, const int8_t *keys, int64_t count, Room &room) {
    _tile_loadd(4, one.queries, 64);
    _tile_loadd(5, two.queries, 64);
    for (int64_t j = 0; j < count; j += LANES, keys += TILE) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(2, keys, 64);
        _tile_dpbssd(0, 2, 4);
        _tile_dpbssd(1, 2, 5);
        _tile_stored(0, room.scores[0] + j * LANES, 64);
        _tile_stored(1, room.scores[1] + j * LANES, 64);
    }
}

// Tiles are named by literals alone, hence macros.
#define FOR_EACH_TILE(DO) \
    if constexpr (TILES > 0) DO(0, 3) \
    if constexpr (TILES > 1) DO(1, 4) \
    if constexpr (TILES > 2) DO(2, 5) \
    if constexpr (TILES > 3) DO(3, 6) \
    if constexpr (TILES > 4) DO(4, 7)
#define LOAD_QUERIES(N, TO) _tile_loadd(TO, block.queries + N * TILE, 64);
#define ADD_PRODUCT(N, FROM) { \
    _tile_loadd(2, keys + N * TILE, 64); \
    if constexpr (ROUNDED) _tile_dpbssd(0, 2, FROM); \
    else _tile_dpbf16ps(0, 2, FROM); \
}

// Of one block.
template <bool ROUNDED, int TILES>
void scores_of_one(const Block &block, const int8_t *keys, int64_t count, int32_t *scores) {
    FOR_EACH_TILE(LOAD_QUERIES)
    for (int64_t j = 0; j < count; j += LANES, keys += TILES * TILE) {
        _tile_zero(0);
        FOR_EACH_TILE(ADD_PRODUCT)
        _tile_stored(0, scores + j * LANES, 64);
    }
}

using Score = void (*)(const Block &, const int8_t *, int64_t, int32_t *);
template <bool ROUNDED>
constexpr Score SCORES[] = {scores_of_one<ROUNDED, 1>, scores_of_one<ROUNDED, 2>, scores_of_one<ROUNDED, 3>,
                            scores_of_one<ROUNDED, 4>, scores_of_one<ROUNDED, 5>};  // by tiles

// 16 scores, as numbers.
template <bool ROUNDED>
__m512 load_scores(const int32_t *scores) {
    if constexpr (ROUNDED) return _mm512_cvtepi32_ps(_mm512_load_si512(scores));
    else return _mm512_load_ps(scores);
}

template <bool ROUNDED>
__m512 largest_scores(const int32_t *scores, int64_t count) {
    if constexpr (ROUNDED) {
        __m512i even = _mm512_load_si512(scores), odd = _mm512_load_si512(scores + LANES);
        for (int64_t j = 2; j < count; j += 2) {
            even = _mm512_max_epi32(even, _mm512_load_si512(scores + j * LANES));
            odd = _mm512_max_epi32(odd, _mm512_load_si512(scores + (j + 1) * LANES));
        }
        return _mm512_cvtepi32_ps(_mm512_max_epi32(even, odd));
    } else {
        __m512 largest = _mm512_load_ps(scores);
        for (int64_t j = 1; j < count; j++) largest = _mm512_max_ps(largest, _mm512_load_ps(scores + j * LANES));
        return largest;
    }
}

// Where a score is far above the maximum so far, it is the new one, and what was summed is made smaller.
template <bool ROUNDED>
void raise_top(const int32_t *scores, int64_t count, int64_t width, Block &block) {
    const __m512 before = _mm512_load_ps(block.top);
    __m512 top = _mm512_mul_ps(largest_scores<ROUNDED>(scores, count), _mm512_load_ps(block.scale));
    if (!_mm512_cmp_ps_mask(top, _mm512_add_ps(before, _mm512_set1_ps(LATE)), _CMP_GT_OQ)) return;
    top = _mm512_max_ps(top, before);
    const __m512 by = power_of_two(_mm512_sub_ps(before, top));
    _mm512_store_ps(block.top, top);
    _mm512_store_ps(block.total, _mm512_mul_ps(_mm512_load_ps(block.total), by));
    for (int64_t d = 0; d < width; d++)
        _mm512_store_ps(block.sums + d * LANES, _mm512_mul_ps(_mm512_load_ps(block.sums + d * LANES), by));
}

template <bool ROUNDED>
struct Weigher {  // scores to weights, 32 keys at a time, in pairs of keys as a tile wants them
    __m512 scale, top, even, odd;
    __m512i order;

    explicit Weigher(const Block &block)
        : scale(_mm512_load_ps(block.scale)), top(_mm512_load_ps(block.top)), even(_mm512_load_ps(block.total)),
          odd(_mm512_setzero_ps()) {
        alignas(64) uint16_t pairs[2 * LANES];
        for (int i = 0; i < 2 * LANES; i++) pairs[i] = uint16_t(i / 2 + i % 2 * LANES);
        order = _mm512_load_si512(pairs);
    }

    __m512 weight(const int32_t *scores) const {
        return power_of_two(_mm512_fmsub_ps(load_scores<ROUNDED>(scores), scale, top));
    }

    void operator()(const int32_t *scores, bfloat16 *weights) {
        for (int64_t j = 0; j < PAIRED * LANES; j += 2 * LANES) {
            const __m512 one = weight(scores + j), two = weight(scores + j + LANES);
            even = _mm512_add_ps(even, one);
            odd = _mm512_add_ps(odd, two);
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(two, one);
            _mm512_store_si512(weights + j, _mm512_permutexvar_epi16(order, both));
        }
    }
};

// FULL tiles of sums are whole; LAST is what is left.
#define FOR_EACH_FULL(DO) \
    if constexpr (FULL > 0) DO(0) \
    if constexpr (FULL > 1) DO(1) \
    if constexpr (FULL > 2) DO(2) \
    if constexpr (FULL > 3) DO(3) \
    if constexpr (FULL > 4) DO(4)
#define LOAD_SUM(N) _tile_loadd(N, sums + N * LANES * LANES, 64);
#define STORE_SUM(N) _tile_stored(N, sums + N * LANES * LANES, 64);
#define ADD_LAST { _tile_loadd(7, values + FULL * 512, 64); _tile_dpbf16ps(6, 7, 5); }
#define ADD_BESIDE_LAST(N) { _tile_loadd(4, values + N * 512, 64); _tile_dpbf16ps(N, 4, 5); }
#define ADD_ALONE(N) { _tile_loadd(6, values + N * 512, 64); _tile_dpbf16ps(N, 6, 7); }

template <int FULL, bool LAST>
void add_values(const bfloat16 *weights, const bfloat16 *values) {
    if constexpr (LAST) {
        _tile_loadd(5, weights, 64);
        FOR_EACH_FULL(ADD_BESIDE_LAST)
        ADD_LAST
    } else {
        _tile_loadd(7, weights, 64);
        FOR_EACH_FULL(ADD_ALONE)
    }
}

// Numbers of values from one on, whose weights are known or, by `weigh`, become known on the way.
template <int FULL, bool LAST, class Weigh>
void add_some(const bfloat16 *values, int64_t count, int64_t width, const bfloat16 *weights, float *sums,
              const Weigh &weigh) {
    FOR_EACH_FULL(LOAD_SUM)
    if constexpr (LAST) _tile_loadd(6, sums + FULL * LANES * LANES, 64);
    for (int64_t j = 0; j < count; j += PAIRED) {
        if (j) add_values<FULL, LAST>(weights + (j - PAIRED) * LANES, values + (j - PAIRED) * width);
        weigh(j);
    }
    add_values<FULL, LAST>(weights + (count - PAIRED) * LANES, values + (count - PAIRED) * width);
    FOR_EACH_FULL(STORE_SUM)
    if constexpr (LAST) _tile_stored(6, sums + FULL * LANES * LANES, 64);
}

template <bool ROUNDED, int FULL, bool LAST>
void weigh_and_add(const int32_t *scores, const bfloat16 *values, int64_t count, int64_t width, bfloat16 *weights,
                   Block &block) {
    Weigher<ROUNDED> weigher(block);
    add_some<FULL, LAST>(values, count, width, weights, block.sums,
                         [&](int64_t j) { weigher(scores + j * LANES, weights + j * LANES); });
    _mm512_store_ps(block.total, _mm512_add_ps(weigher.even, weigher.odd));
}

template <int FULL>
void add_more(const bfloat16 *values, int64_t count, int64_t width, const bfloat16 *weights, Block &block) {
    add_some<FULL, false>(values + WIDE * PAIRED, count, width, weights, block.sums + WIDE * LANES, [](int64_t) {});
}

using Sum = void (*)(const int32_t *, const bfloat16 *, int64_t, int64_t, bfloat16 *, Block &);
template <bool ROUNDED>
constexpr Sum SUMS[6][2] = {  // by the number of full tiles and whether one is left
    {nullptr, weigh_and_add<ROUNDED, 0, true>},
    {weigh_and_add<ROUNDED, 1, false>, weigh_and_add<ROUNDED, 1, true>},
    {weigh_and_add<ROUNDED, 2, false>, weigh_and_add<ROUNDED, 2, true>},
    {weigh_and_add<ROUNDED, 3, false>, weigh_and_add<ROUNDED, 3, true>},
    {weigh_and_add<ROUNDED, 4, false>, weigh_and_add<ROUNDED, 4, true>},
    {weigh_and_add<ROUNDED, 5, false>, nullptr},
};
using More = void (*)(const bfloat16 *, int64_t, int64_t, const bfloat16 *, Block &);
constexpr More MORE[6] = {nullptr, add_more<1>, add_more<2>, add_more<3>, add_more<4>, add_more<5>};  // by full tiles

template <bool ROUNDED>
void attend(const Shape &s, const Head &head, const float *q, float scale, int64_t first, float *out, void *memory) {
    Room &room = *static_cast<Room *>(memory);
    const int64_t queries = std::min(BLOCKS * LANES, s.queries - first), blocks = (queries + LANES - 1) / LANES;
    const int64_t narrow = std::min(s.width, WIDE), of_key = tiles<ROUNDED>(s);
    const Sum sum = SUMS<ROUNDED>[full(narrow)][rest(narrow) > 0];
    const More more = MORE[full(s.width - narrow)];
    for (int64_t b = 0; b < rounded_up(blocks, 2); b++)
        begin<ROUNDED>(s, head, q + b * LANES * s.row(), scale, queries - b * LANES, room.blocks[b]);
    for (int64_t start = 0; start < s.keys; start += CHUNK) {
        const int64_t known = std::min(CHUNK, s.keys - start), count = rounded_up(known, PAIRED);
        const auto *keys = static_cast<const int8_t *>(head.keys) + start * of_key * 64;
        const auto *values = static_cast<const bfloat16 *>(head.values) + start * s.width;
        for (int64_t b = 0; b < blocks; b++) {
            int32_t *scores = room.scores[b % 2];
            if (!ROUNDED || of_key > 1) SCORES<ROUNDED>[of_key - 1](room.blocks[b], keys, count, scores);
            else if (b % 2 == 0) scores_of_two(room.blocks[b], room.blocks[b + 1], keys, count, room);
            int32_t none = INT32_MIN;
            if constexpr (!ROUNDED) std::memcpy(&none, &LOWEST, sizeof none);
            std::fill(scores + known * LANES, scores + count * LANES, none);
            raise_top<ROUNDED>(scores, count, s.width, room.blocks[b]);
            sum(scores, values, count, s.width, room.weights, room.blocks[b]);
            if (more) more(values, count, s.width, room.weights, room.blocks[b]);
        }
    }
    for (int64_t b = 0; b < blocks; b++) {
        const Block &block = room.blocks[b];
        const __m512 by = _mm512_div_ps(_mm512_set1_ps(1), _mm512_load_ps(block.total));
        scatter_rows(block.sums, s.width, by, queries - b * LANES, s.row(), out + b * LANES * s.row());
    }
}

int64_t room(const Shape &) { return sizeof(Room); }

bool usable() {
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw")) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned TILES = 1u << 24, INT8 = 1u << 25, BF16 = 1u << 22;
    constexpr long ASK_FOR_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux' arch_prctl
    return (d & TILES) && (d & INT8) && (d & BF16) && syscall(SYS_arch_prctl, ASK_FOR_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

const caphuman::Kernel caphuman::amx = {"amx", takes, usable, key_bytes<true>, value_bytes, pack<true>,
                                        BLOCKS * LANES, room, enter, attend<true>, leave};
const caphuman::Kernel caphuman::amx_halves = {"amx_halves", takes, usable, key_bytes<false>, value_bytes, pack<false>,
                                               BLOCKS * LANES, room, enter, attend<false>, leave};
