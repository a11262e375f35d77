// Memory that begins with a cache's line.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "attention.h"

namespace caphuman {

constexpr int64_t LINE = 64;  // bytes, of a cache's

struct Freed {
    void operator()(void *memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Freed>;

inline Memory allocated(int64_t bytes) {
    Memory memory(static_cast<char *>(std::aligned_alloc(LINE, rounded_up(std::max<int64_t>(bytes, 1), LINE))));
    if (!memory) throw std::bad_alloc();
    return memory;
}

}  // namespace caphuman
