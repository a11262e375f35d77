// Attention on Intel's matrix unit (AMX): scores of int8, weights and values of bfloat16.
//
// A tile holds 16 rows of 64 bytes. Scores: 16 keys x 64 numbers times 64 numbers x 16 queries. Sums: 16 numbers of
// values x 32 keys times 32 keys x 16 queries. So that the unit does not wait, the sums of 32 keys are issued while the
// weights of the next 32 are computed.
#include "attention.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "avx512_math.h"

#pragma GCC target("amx-tile,amx-int8,amx-bf16,avx512bf16")

namespace {

using namespace caphuman;
using bfloat16 = uint16_t;

constexpr int64_t LANES = 16, PAIRED = 32, CHUNK = 128, BLOCKS = 4, WIDE = 80;  // keys: PAIRED a tile of weights
constexpr int64_t TILE = 1024;                                                    // bytes
constexpr float LEAST_SCALE = 0x1p-24f;  // with which INT32_MIN, the score of a key that is none, has no weight
constexpr float LATE = 8;  // powers of two by which the maximum may be out of date: bfloat16 does not mind

int64_t tiles(const Shape &s) { return (s.width + 63) / 64; }  // of one key's numbers
int64_t full(const Shape &s) { return s.width / LANES; }       // tiles of a value's numbers
int64_t rest(const Shape &s) { return s.width % LANES; }
int64_t padded_keys(const Shape &s) { return rounded_up(s.keys, PAIRED); }

int64_t key_bytes(const Shape &s) { return padded_keys(s) * tiles(s) * 64; }
int64_t value_bytes(const Shape &s) { return padded_keys(s) * s.width * int64_t(sizeof(bfloat16)); }

// Numbers of one row, less what is taken off, as int8, each 64 of them `apart` bytes from the ones before.
void round_row(const float *x, const float *less, int64_t width, float by, int64_t count, int64_t apart, int8_t *out) {
    for (int64_t d = 0; d < count * 64; d += LANES) {
        const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(by), difference(x + d, less + d, width - d));
        _mm_store_si128(reinterpret_cast<__m128i *>(out + d / 64 * apart + d % 64),
                        _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(scaled)));
    }
}

// Keys as tiles of 16 keys x 64 numbers; values as tiles of 16 numbers x 32 keys, of the last one only the rows in use.
void pack(const Shape &s, const float *k, const float *center, const float *v, Head &head) {
    auto *keys = static_cast<int8_t *>(head.keys);
    const float largest = largest_of(k, s.keys, s.row(), s.width, center);
    head.key_scale = largest / 127;
    const int64_t whole = s.keys / LANES * LANES * tiles(s) * 64;
    std::memset(keys + whole, 0, key_bytes(s) - whole);
    for (int64_t i = 0; i < s.keys; i++)
        round_row(k + i * s.row(), center, s.width, 127 / largest, tiles(s), TILE,
                  keys + i / LANES * tiles(s) * TILE + i % LANES * 64);

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
    alignas(64) int8_t queries[2 * TILE];
    alignas(64) float sums[WIDE * LANES], top[LANES], total[LANES], scale[LANES];
};

struct Room {
    alignas(64) int32_t scores[2][CHUNK * LANES];
    alignas(64) bfloat16 weights[CHUNK * LANES];
    Block blocks[BLOCKS];
};

// Tiles 6 and 7 are for the last, narrower ones of values; all others are whole.
void enter(const Shape &s) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    if (rest(s)) config.rows[6] = config.rows[7] = uint8_t(rest(s));
    asm volatile("" ::"r"(&config) : "memory");  // GCC takes the first bytes alone for what is read
    _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

void begin(const Shape &s, const Head &head, const float *q, float scale, int64_t count, Block &block) {
    std::memset(&block, 0, sizeof block);
    std::fill_n(block.top, LANES, LOWEST);
    for (int64_t i = 0; i < std::min(LANES, count); i++) {
        alignas(64) int8_t row[128];
        const float largest = largest_of(q + i * s.row(), 1, 0, s.width, NOTHING);
        block.scale[i] = std::max(largest / 127 * head.key_scale * scale * LOG2_E, LEAST_SCALE);
        round_row(q + i * s.row(), NOTHING, s.width, 127 / largest, tiles(s), 64, row);
        for (int64_t d = 0; d < tiles(s) * 16; d++) std::memcpy(block.queries + (d * LANES + i) * 4, row + d * 4, 4);
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

// Of one block of wide heads.
void scores_of_one(const Block &block, const int8_t *keys, int64_t count, int32_t *scores) {
    _tile_loadd(4, block.queries, 64);
    _tile_loadd(5, block.queries + TILE, 64);
    for (int64_t j = 0; j < count; j += LANES, keys += 2 * TILE) {
        _tile_zero(0);
        _tile_loadd(2, keys, 64);
        _tile_dpbssd(0, 2, 4);
        _tile_loadd(3, keys + TILE, 64);
        _tile_dpbssd(0, 3, 5);
        _tile_stored(0, scores + j * LANES, 64);
    }
}

// Where a score is far above the maximum so far, it is the new one, and what was summed is made smaller.
void raise_top(const int32_t *scores, int64_t count, int64_t width, Block &block) {
    __m512i even = _mm512_load_si512(scores), odd = _mm512_load_si512(scores + LANES);
    for (int64_t j = 2; j < count; j += 2) {
        even = _mm512_max_epi32(even, _mm512_load_si512(scores + j * LANES));
        odd = _mm512_max_epi32(odd, _mm512_load_si512(scores + (j + 1) * LANES));
    }
    const __m512 before = _mm512_load_ps(block.top);
    __m512 top = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_max_epi32(even, odd)), _mm512_load_ps(block.scale));
    if (!_mm512_cmp_ps_mask(top, _mm512_add_ps(before, _mm512_set1_ps(LATE)), _CMP_GT_OQ)) return;
    top = _mm512_max_ps(top, before);
    const __m512 by = power_of_two(_mm512_sub_ps(before, top));
    _mm512_store_ps(block.top, top);
    _mm512_store_ps(block.total, _mm512_mul_ps(_mm512_load_ps(block.total), by));
    for (int64_t d = 0; d < width; d++)
        _mm512_store_ps(block.sums + d * LANES, _mm512_mul_ps(_mm512_load_ps(block.sums + d * LANES), by));
}

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
        return power_of_two(_mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_load_si512(scores)), scale, top));
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

// Tiles are named by literals alone, hence macros. FULL tiles of sums are whole; LAST is what is left.
#define FOR_EACH_FULL(DO) \
    if constexpr (FULL > 0) DO(0) \
    if constexpr (FULL > 1) DO(1) \
    if constexpr (FULL > 2) DO(2) \
    if constexpr (FULL > 3) DO(3) \
    if constexpr (FULL > 4) DO(4)
#define LOAD_SUM(N) _tile_loadd(N, block.sums + N * LANES * LANES, 64);
#define STORE_SUM(N) _tile_stored(N, block.sums + N * LANES * LANES, 64);
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

template <int FULL, bool LAST>
void weigh_and_add(const int32_t *scores, const bfloat16 *values, int64_t count, int64_t width, bfloat16 *weights,
                   Block &block) {
    Weigher weigh(block);
    FOR_EACH_FULL(LOAD_SUM)
    if constexpr (LAST) _tile_loadd(6, block.sums + FULL * LANES * LANES, 64);
    for (int64_t j = 0; j < count; j += PAIRED) {
        if (j) add_values<FULL, LAST>(weights + (j - PAIRED) * LANES, values + (j - PAIRED) * width);
        weigh(scores + j * LANES, weights + j * LANES);
    }
    add_values<FULL, LAST>(weights + (count - PAIRED) * LANES, values + (count - PAIRED) * width);
    FOR_EACH_FULL(STORE_SUM)
    if constexpr (LAST) _tile_stored(6, block.sums + FULL * LANES * LANES, 64);
    _mm512_store_ps(block.total, _mm512_add_ps(weigh.even, weigh.odd));
}

using Sum = void (*)(const int32_t *, const bfloat16 *, int64_t, int64_t, bfloat16 *, Block &);
constexpr Sum SUMS[6][2] = {  // by the number of full tiles and whether one is left
    {nullptr, weigh_and_add<0, true>},
    {weigh_and_add<1, false>, weigh_and_add<1, true>},
    {weigh_and_add<2, false>, weigh_and_add<2, true>},
    {weigh_and_add<3, false>, weigh_and_add<3, true>},
    {weigh_and_add<4, false>, weigh_and_add<4, true>},
    {weigh_and_add<5, false>, nullptr},
};

void attend(const Shape &s, const Head &head, const float *q, float scale, int64_t first, float *out, void *memory) {
    Room &room = *static_cast<Room *>(memory);
    const int64_t queries = std::min(BLOCKS * LANES, s.queries - first), blocks = (queries + LANES - 1) / LANES;
    const Sum sum = SUMS[full(s)][rest(s) > 0];
    for (int64_t b = 0; b < rounded_up(blocks, 2); b++)
        begin(s, head, q + b * LANES * s.row(), scale, queries - b * LANES, room.blocks[b]);
    for (int64_t start = 0; start < s.keys; start += CHUNK) {
        const int64_t known = std::min(CHUNK, s.keys - start), count = rounded_up(known, PAIRED);
        const auto *keys = static_cast<const int8_t *>(head.keys) + start * tiles(s) * 64;
        const auto *values = static_cast<const bfloat16 *>(head.values) + start * s.width;
        for (int64_t b = 0; b < blocks; b++) {
            int32_t *scores = room.scores[b % 2];
            if (tiles(s) == 2) scores_of_one(room.blocks[b], keys, count, scores);
            else if (b % 2 == 0) scores_of_two(room.blocks[b], room.blocks[b + 1], keys, count, room);
            std::fill(scores + known * LANES, scores + count * LANES, INT32_MIN);
            raise_top(scores, count, s.width, room.blocks[b]);
            sum(scores, values, count, s.width, room.weights, room.blocks[b]);
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

const caphuman::Kernel caphuman::amx = {"amx", WIDE, usable, key_bytes, value_bytes, pack, BLOCKS * LANES, room,
                                        enter, attend, leave};
