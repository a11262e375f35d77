// Attention with vectors: queries are lanes, keys and values are read number by number and broadcast.
//
// An instruction set's file defines `Floats` and `Ints` (vectors of LANES), what is done with them, and how many numbers
// of values are summed at once (AT_ONCE), so that sums stay in registers; then it includes this.
// Weights are whole numbers up to 2^14 and values up to 2^11, so that a chunk's sum of their products fits into 32 bits.
// Scores in int8 multiply unsigned by signed bytes: keys are stored with 128 added, and what that adds to a score, 128
// times the sum of a query's numbers, is where the score begins.

#include <utility>

namespace {

using namespace caphuman;

constexpr int64_t CHUNK = 64, PAIR = 2, STEP = PAIR * LANES;  // PAIR: vectors of queries at once
constexpr int64_t KEYS_AT_ONCE = 4;
constexpr float WEIGHT_BITS = 14, LARGEST_VALUE = 2047;

int64_t padded(const Shape &s) { return rounded_up(s.width, 4); }  // bytes of a rounded key, of which four meet at once

int64_t padded_keys(const Shape &s) { return rounded_up(s.keys, KEYS_AT_ONCE); }

int64_t key_bytes(const Shape &s) { return padded_keys(s) * padded(s); }
int64_t value_bytes(const Shape &s) { return padded_keys(s) * s.width * int64_t(sizeof(int16_t)); }

float largest_number(const float *x, const float *less, int64_t rows, int64_t row, int64_t width) {
    float largest = TINY;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < width; d++) largest = std::max(largest, std::fabs(x[i * row + d] - less[d]));
    return largest;
}

int rounded(float x) { return int(std::lrint(x)); }

// Values lie in pairs of keys, a number of both beside each other.
void pack(const Shape &s, const float *k, const float *center, const float *v, Head &head) {
    auto *keys = static_cast<uint8_t *>(head.keys);
    auto *values = static_cast<int16_t *>(head.values);
    const float largest_key = largest_number(k, center, s.keys, s.row(), s.width);
    const float largest_value = largest_number(v, NOTHING, s.keys, s.row(), s.width);
    head.key_scale = largest_key / 127;
    head.value_scale = largest_value / LARGEST_VALUE;
    std::memset(keys, 128, key_bytes(s));
    std::memset(values, 0, value_bytes(s));
    for (int64_t i = 0; i < s.keys; i++) {
        const float *key = k + i * s.row(), *value = v + i * s.row();
        for (int64_t d = 0; d < s.width; d++) {
            keys[i * padded(s) + d] = uint8_t(128 + rounded((key[d] - center[d]) * (127 / largest_key)));
            values[(i / 2 * s.width + d) * 2 + i % 2] = int16_t(rounded(value[d] * (LARGEST_VALUE / largest_value)));
        }
    }
}

struct alignas(64) Room {
    int8_t queries[WIDEST / 4][PAIR][LANES][4];
    float sums[WIDEST][PAIR][LANES], top[PAIR][LANES], total[PAIR][LANES], scale[PAIR][LANES];
    int32_t begin[PAIR][LANES];
    int32_t scores[CHUNK][PAIR][LANES], weights[CHUNK / 2][PAIR][LANES];  // of weights two in a number
};

void begin(const Shape &s, const Head &head, const float *q, float scale, int64_t count, Room &room) {
    std::memset(&room, 0, sizeof room);
    std::fill_n(&room.top[0][0], STEP, LOWEST);
    for (int64_t i = 0; i < count; i++) {
        const float *x = q + i * s.row();
        const float largest = largest_number(x, NOTHING, 1, 0, s.width);
        const int64_t vector = i / LANES, lane = i % LANES;
        int sum = 0;
        for (int64_t d = 0; d < s.width; d++) {
            const int number = rounded(x[d] * (127 / largest));
            room.queries[d / 4][vector][lane][d % 4] = int8_t(number);
            sum += number;
        }
        room.begin[vector][lane] = -128 * sum;
        room.scale[vector][lane] = largest / 127 * head.key_scale * scale * LOG2_E;
    }
}

// Folds over k or n are loops that the compiler cannot but unroll: or it keeps arrays of vectors in memory.
template <int64_t... k>
void scores_of(std::integer_sequence<int64_t, k...>, const Shape &s, const uint8_t *keys, int32_t *scores, const Room &room) {
    Ints one[] = {(void(k), load(room.begin[0]))...}, two[] = {(void(k), load(room.begin[1]))...}, four;
    const int64_t bytes = padded(s);
    for (int64_t d = 0; d < bytes; d += 4) {
        const Ints q_one = load_bytes(room.queries[d / 4][0]), q_two = load_bytes(room.queries[d / 4][1]);
        ((four = broadcast(keys + k * bytes + d), one[k] = add_products(one[k], four, q_one),
          two[k] = add_products(two[k], four, q_two)), ...);
    }
    ((store(scores + k * STEP, one[k]), store(scores + k * STEP + LANES, two[k])), ...);
}

void all_scores(const Shape &s, const uint8_t *keys, int64_t count, Room &room) {
    for (int64_t j = 0; j < count; j += KEYS_AT_ONCE)
        scores_of(std::make_integer_sequence<int64_t, KEYS_AT_ONCE>(), s, keys + j * padded(s), room.scores[j][0], room);
}

// Where the maximum grew, what was summed is made smaller.
void weigh(const Shape &s, int64_t count, Room &room) {
    for (int64_t p = 0; p < PAIR; p++) {
        Ints most = load(room.scores[0][p]);
        for (int64_t j = 1; j < count; j++) most = larger(most, load(room.scores[j][p]));
        const Floats scale = load(room.scale[p]), before = load(room.top[p]);
        const Floats top = larger(times(as_floats(most), scale), before);
        Floats total = load(room.total[p]);
        if (any_above(top, before)) {
            const Floats by = power_of_two(minus(before, top));
            total = times(total, by);
            store(room.top[p], top);
            for (int64_t d = 0; d < s.width; d++) store(room.sums[d][p], times(load(room.sums[d][p]), by));
        }
        const Floats below = minus(top, all(WEIGHT_BITS));
        for (int64_t j = 0; j < count; j += 2) {
            const Floats one = power_of_two(times_minus(as_floats(load(room.scores[j][p])), scale, below));
            Floats two = minus(one, one);
            if (j + 1 < count) two = power_of_two(times_minus(as_floats(load(room.scores[j + 1][p])), scale, below));
            total = plus(total, plus(one, two));
            store(room.weights[j / 2][p], low_and_high(as_ints(one), as_ints(two)));
        }
        store(room.total[p], total);
    }
}

// Some numbers of values, of which the first is given.
template <int64_t... n>
void add_some(std::integer_sequence<int64_t, n...>, const int16_t *values, int64_t width, float scale, int64_t count,
              float *sums, const Room &room) {
    Ints one[] = {(void(n), zero())...}, two[] = {(void(n), zero())...}, pair;
    for (const int32_t *weights = room.weights[0][0], *end = weights + (count + 1) / 2 * STEP; weights != end;
         weights += STEP, values += 2 * width) {
        const Ints w_one = load(weights), w_two = load(weights + LANES);
        ((pair = broadcast(values + 2 * n), one[n] = add_pairs(one[n], pair, w_one),
          two[n] = add_pairs(two[n], pair, w_two)), ...);
    }
    const auto add_to = [by = all(scale)](float *sum, Ints more) {
        store(sum, times_plus(as_floats(more), by, load(sum)));
    };
    ((add_to(sums + n * STEP, one[n]), add_to(sums + n * STEP + LANES, two[n])), ...);
}

void add_values(const Shape &s, const int16_t *values, float scale, int64_t count, Room &room) {
    const auto add = [&](int64_t d, auto numbers) {
        add_some(numbers, values + 2 * d, s.width, scale, count, room.sums[d][0], room);
    };
    int64_t d = 0;
    for (; d + AT_ONCE <= s.width; d += AT_ONCE) add(d, std::make_integer_sequence<int64_t, AT_ONCE>());
    for (; d < s.width; d++) add(d, std::make_integer_sequence<int64_t, 1>());
}

void attend(const Shape &s, const Head &head, const float *q, float scale, int64_t first, float *out, void *memory) {
    Room &room = *static_cast<Room *>(memory);
    const int64_t queries = std::min(STEP, s.queries - first);
    begin(s, head, q, scale, queries, room);
    for (int64_t start = 0; start < s.keys; start += CHUNK) {
        const int64_t count = std::min(CHUNK, s.keys - start);
        all_scores(s, static_cast<const uint8_t *>(head.keys) + start * padded(s), count, room);
        weigh(s, count, room);
        add_values(s, static_cast<const int16_t *>(head.values) + start * s.width, head.value_scale, count, room);
    }
    for (int64_t i = 0; i < queries; i++)
        for (int64_t d = 0; d < s.width; d++)
            out[i * s.row() + d] = room.sums[d][i / LANES][i % LANES] / room.total[i / LANES][i % LANES];
}

int64_t room(const Shape &) { return sizeof(Room); }

void enter(const Shape &) {}

void leave() {}

}  // namespace
