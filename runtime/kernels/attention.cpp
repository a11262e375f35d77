// Chooses a kernel and spreads heads and queries over threads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "exported.h"
#include "memory.h"
#include "threads.h"

namespace {

using namespace caphuman;

constexpr const Kernel *KERNELS[] = {&amx, &avx512, &avx2vnni, &avx2};  // fastest first

struct Call {
    const Kernel &kernel;
    const Shape shape;
    const float *q, *k, *v;
    float *out;
    const float scale;

    std::vector<Head> heads;
    std::vector<Memory> rooms;
    Memory packed;
    std::atomic<int64_t> next_head{0}, packed_heads{0}, next_step{0};

    Call(const Kernel &kernel, const Shape &shape, const float *q, const float *k, const float *v, float *out,
         float scale, int threads)
        : kernel(kernel), shape(shape), q(q), k(k), v(v), out(out), scale(scale), heads(shape.batch * shape.heads) {
        const int64_t keys = rounded_up(kernel.key_bytes(shape), LINE);
        const int64_t values = rounded_up(kernel.value_bytes(shape), LINE);
        packed = allocated(int64_t(heads.size()) * (keys + values));
        for (size_t i = 0; i < heads.size(); i++) {
            char *first = packed.get() + int64_t(i) * (keys + values);
            heads[i] = {first, first + keys, 1, 1};
        }
        for (int i = 0; i < threads; i++) rooms.push_back(allocated(kernel.room(shape)));
    }

    // What every thread does: heads, then, when all are packed, queries.
    void work(void *room) {
        const int64_t count = int64_t(heads.size()), steps = (shape.queries + kernel.step - 1) / kernel.step;
        for (int64_t i; (i = next_head++) < count; packed_heads++) {
            float center[WIDEST] = {};
            const int64_t at = first_of(i, shape.keys);
            for (int64_t j = 0; j < shape.keys; j++)
                for (int64_t d = 0; d < shape.width; d++) center[d] += k[at + j * shape.row() + d] / float(shape.keys);
            kernel.pack(shape, k + at, center, v + at, heads[i]);
        }
        while (packed_heads < count) std::this_thread::yield();
        std::memset(room, 0, kernel.room(shape));
        kernel.enter(shape);
        for (int64_t i; (i = next_step++) < count * steps;) {
            const int64_t first = i % steps * kernel.step, head = i / steps, at = first_of(head, shape.queries);
            kernel.attend(shape, heads[head], q + at + first * shape.row(), scale, first, out + at + first * shape.row(),
                          room);
        }
        kernel.leave();
    }

    int64_t first_of(int64_t head, int64_t tokens) const {
        return head / shape.heads * tokens * shape.row() + head % shape.heads * shape.width;
    }
};

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

// The most numbers of a head that a kernel takes; 0 for a name that is none.
EXPORTED int64_t caphuman_attention_widest(const char *name) {
    for (const Kernel *kernel : KERNELS)
        if (!std::strcmp(kernel->name, name)) return kernel->widest;
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
            Call call(*kernel, {batch, queries, keys, heads, width}, q, k, v, out, scale, std::max(threads, 1));
            on_threads(int(call.rooms.size()), [&call](int i) { call.work(call.rooms[i].get()); });
            return 0;
        } catch (const std::bad_alloc &) {
            return 1;
        }
    }
    return 1;
}
