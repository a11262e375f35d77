// Tiles of Intel's matrix unit (AMX), 16 rows of 64 bytes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#pragma GCC target("amx-tile,amx-int8,amx-bf16,avx512bf16")

namespace {

using bfloat16 = uint16_t;

constexpr int64_t TILE = 1024;  // bytes

// All tiles are whole, but for 6 and 7, which may have fewer rows.
inline void use_tiles(uint8_t last_rows = 16) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    config.rows[6] = config.rows[7] = last_rows;
    asm volatile("" ::"r"(&config) : "memory");  // GCC takes the first bytes alone for what is read
    _tile_loadconfig(&config);
}

}  // namespace
