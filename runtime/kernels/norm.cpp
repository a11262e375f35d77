// Group norm of maps whose channels come last (Wu & He 2018), with SiLU and rounding to int8 in the same pass.
//
// OpenVINO's wants channels first and copies before and after. These loops are plain: the compiler makes vectors of them,
// once for each generation of CPUs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "exported.h"
#include "threads.h"

#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace {

using bfloat16 = uint16_t;

constexpr int64_t SLICES = 64, EXACT_ROWS = 64;  // of a slice, so many rows are summed in float32
constexpr float MAGIC = 0x1.8p23f;               // added, it leaves a whole number in the last bits
constexpr float LOG2_E = 1.44269504f;

struct Norm {
    const void *x;
    bool halves;  // x is bfloat16, not float32
    int64_t rows, channels, groups;
    const float *gamma, *beta;
    float epsilon;
    bool silu;
    float steps;  // of int8 in 1
    int8_t *out;
};

inline float number(float x) { return x; }

inline float number(bfloat16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// 2^x to a relative 1e-4: a cubic fitted to 2^f over [-1/2, 1/2], times 2 to the nearest whole number.
inline float power_of_two(float x) {
    x = x < -126 ? -126 : x > 126 ? 126 : x;
    const float whole = x + MAGIC, f = x - (whole - MAGIC);
    const float y = 1 + f * (0.69328293f + f * (0.242211f + f * 0.05500893f));
    const int32_t bits = bits_of(y) + (bits_of(whole) << 23);
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

// 1 / x to a relative 2e-4, for x from 1: two steps of Newton's from the negated exponent. Vectors divide slowly.
inline float inverse(float x) {
    const int32_t bits = 0x7ef311c3 - bits_of(x);
    float y;
    std::memcpy(&y, &bits, 4);
    y *= 2 - x * y;
    return y * (2 - x * y);
}

template <class Number>
inline void add_rows(const Number *__restrict x, const float *__restrict base, int64_t rows, int64_t channels,
                     float *__restrict sum, float *__restrict square) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t c = 0; c < channels; c++) {
            const float less = number(x[i * channels + c]) - base[c];
            sum[c] += less;
            square[c] += less * less;
        }
    }
}

template <bool SILU, class Number>
inline void write_rows(const Number *__restrict x, const float *__restrict scale, const float *__restrict shift,
                       int64_t rows, int64_t channels, float steps, int8_t *__restrict out) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t c = 0; c < channels; c++) {
            float y = number(x[i * channels + c]) * scale[c] + shift[c];
            if (SILU) y *= inverse(1 + power_of_two(y * -LOG2_E));
            y *= steps;
            y = y < -128 ? -128 : y > 127 ? 127 : y;
            out[i * channels + c] = int8_t(bits_of(y + MAGIC) - bits_of(MAGIC));
        }
    }
}

FOR_EACH_CPU void add(const Norm &n, int64_t first, int64_t rows, const float *base, float *sum, float *square) {
    const int64_t at = first * n.channels;
    if (n.halves) add_rows(static_cast<const bfloat16 *>(n.x) + at, base, rows, n.channels, sum, square);
    else add_rows(static_cast<const float *>(n.x) + at, base, rows, n.channels, sum, square);
}

FOR_EACH_CPU void write(const Norm &n, int64_t first, int64_t rows, const float *scale, const float *shift) {
    const int64_t at = first * n.channels;
    const auto *half = static_cast<const bfloat16 *>(n.x) + at;
    const auto *full = static_cast<const float *>(n.x) + at;
    if (n.halves && n.silu) write_rows<true>(half, scale, shift, rows, n.channels, n.steps, n.out + at);
    else if (n.halves) write_rows<false>(half, scale, shift, rows, n.channels, n.steps, n.out + at);
    else if (n.silu) write_rows<true>(full, scale, shift, rows, n.channels, n.steps, n.out + at);
    else write_rows<false>(full, scale, shift, rows, n.channels, n.steps, n.out + at);
}

struct Moments {
    double sum = 0, square = 0;  // of what is above the base
};

class Call {
  public:
    explicit Call(const Norm &norm)
        : n(norm), slices(std::clamp<int64_t>(n.rows / EXACT_ROWS, 1, SLICES)), base(n.channels),
          moments(slices * n.channels) {
        for (int64_t c = 0; c < n.channels; c++)
            base[c] = n.halves ? number(static_cast<const bfloat16 *>(n.x)[c]) : static_cast<const float *>(n.x)[c];
    }

    // What every thread does: sums of slices, then, when all are there, the slices themselves.
    void work(std::vector<float> &one, std::vector<float> &two) {
        summing.work(slices, [&](int64_t i) { add_slice(i, one, two); });
        find_scales(one, two);
        writing.work(slices, [&](int64_t i) {
            write(n, first_of(i), first_of(i + 1) - first_of(i), one.data(), two.data());
        });
    }

  private:
    const Norm &n;
    const int64_t slices;
    std::vector<float> base;  // the first row: near the mean, so that little is lost by taking squares' difference
    std::vector<Moments> moments;
    caphuman::Stage summing, writing;

    int64_t first_of(int64_t slice) const { return slice * n.rows / slices; }

    void add_slice(int64_t i, std::vector<float> &sum, std::vector<float> &square) {
        for (int64_t first = first_of(i), end = first_of(i + 1); first < end; first += EXACT_ROWS) {
            std::fill(sum.begin(), sum.end(), 0.f);
            std::fill(square.begin(), square.end(), 0.f);
            add(n, first, std::min(EXACT_ROWS, end - first), base.data(), sum.data(), square.data());
            for (int64_t c = 0; c < n.channels; c++) {
                moments[i * n.channels + c].sum += sum[c];
                moments[i * n.channels + c].square += square[c];
            }
        }
    }

    // The same on every thread: sums are taken in the order of slices.
    void find_scales(std::vector<float> &scale, std::vector<float> &shift) const {
        const int64_t of_group = n.channels / n.groups;
        for (int64_t begin = 0; begin < n.channels; begin += of_group) {
            double mean = 0, variance = 0;
            std::vector<Moments> total(of_group);
            for (int64_t c = 0; c < of_group; c++) {
                for (int64_t i = 0; i < slices; i++) {
                    total[c].sum += moments[i * n.channels + begin + c].sum / double(n.rows);
                    total[c].square += moments[i * n.channels + begin + c].square / double(n.rows);
                }
                mean += (base[begin + c] + total[c].sum) / double(of_group);
            }
            for (int64_t c = 0; c < of_group; c++) {
                const double off = base[begin + c] - mean;
                variance += (total[c].square + 2 * off * total[c].sum + off * off) / double(of_group);
            }
            for (int64_t c = begin; c < begin + of_group; c++) {
                scale[c] = float(n.gamma[c] / std::sqrt(variance + n.epsilon));
                shift[c] = float(n.beta[c] - mean * scale[c]);
            }
        }
    }
};

}  // namespace

// Group norm of rows of channels, float32 or bfloat16 (`halves`), with SiLU or without, as int8 of 1 / `steps` each,
// rounded and clamped. Gives 0, or 1 where memory is short. Groups divide the channels, no length is 0.
EXPORTED int caphuman_group_norm(const void *x, int halves, int64_t rows, int64_t channels, int64_t groups,
                                 const float *gamma, const float *beta, float epsilon, int silu, float steps,
                                 int8_t *out, int threads) {
    try {
        const Norm norm = {x, halves != 0, rows, channels, groups, gamma, beta, epsilon, silu != 0, steps, out};
        Call call(norm);
        std::vector<std::vector<float>> rooms(2 * std::max(threads, 1), std::vector<float>(channels));
        caphuman::on_threads(threads, [&](int i) { call.work(rooms[2 * i], rooms[2 * i + 1]); });
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
