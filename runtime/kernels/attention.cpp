// Chooses a kernel and spreads heads and queries over threads.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "exported.h"
#include "heads.h"
#include "threads.h"

namespace {

using namespace caphuman;

constexpr const Kernel *KERNELS[] = {&amx, &avx512, &avx2vnni, &avx2};  // fastest first

}  // namespace

// Names of the kernels that this CPU can run, fastest first, each followed by a space.
EXPORTED const char *caphuman_attention_kernels() {
    static const std::vector<char> names = [] {
        std::vector<char> found;
        for (const Kernel *kernel : KERNELS) {
            if (!kernel->usable()) continue;
            found.insert(found.end(), kernel->name, kernel->name + std::strlen(kernel->name));
            found.push_back(' ');
        }
        found.push_back('\0');
        return found;
    }();
    return names.data();
}

// Whether a kernel takes heads of so many numbers; false for a name that is none.
EXPORTED int caphuman_attention_takes(const char *name, int64_t width) {
    for (const Kernel *kernel : KERNELS)
        if (!std::strcmp(kernel->name, name)) return kernel->takes(width);
    return 0;
}

// softmax(q k' scale) v of each head, of rows of heads: q and out (batch, queries, heads * width), k and v
// (batch, keys, heads * width). Gives 0, or 1 where memory is short. The kernel must be usable here, and no length 0.
EXPORTED int caphuman_attention(const char *name, const float *q, const float *k, const float *v, float *out,
                                int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t width,
                                float scale, int threads) {
    for (const Kernel *kernel : KERNELS) {
        if (std::strcmp(kernel->name, name) || !kernel->usable()) continue;
        try {
            threads = std::max(threads, 1);
            Heads all(*kernel, {batch, queries, keys, heads, width}, q, k, v, out, scale, threads);
            on_threads(threads, [&all](int i) { all.work(i); });
            return 0;
        } catch (const std::bad_alloc &) {
            return 1;
        }
    }
    return 1;
}
