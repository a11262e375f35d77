// All heads of an attention at work on several threads: keys and values are packed first, then queries follow.
#pragma once
#include <cstring>
#include <vector>

#include "attention.h"
#include "memory.h"
#include "threads.h"

namespace caphuman {

struct Heads {
    const Kernel &kernel;
    const Shape shape;
    const float *q, *k, *v;
    float *out;  // may be q
    const float scale;

    Heads(const Kernel &kernel, const Shape &shape, const float *q, const float *k, const float *v, float *out,
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

    // What every thread does, each by a number of its own.
    void work(int thread) {
        const int64_t steps = (shape.queries + kernel.step - 1) / kernel.step;
        packing.work(int64_t(heads.size()), [this](int64_t i) {
            float center[WIDEST] = {};
            const int64_t at = first_of(i, shape.keys);
            for (int64_t j = 0; j < shape.keys; j++)
                for (int64_t d = 0; d < shape.width; d++) center[d] += k[at + j * shape.row() + d] / float(shape.keys);
            kernel.pack(shape, k + at, center, v + at, heads[i]);
        });
        void *room = rooms[thread].get();
        std::memset(room, 0, kernel.room(shape));
        kernel.enter(shape);
        attending.work(int64_t(heads.size()) * steps, [&](int64_t i) {
            const int64_t first = i % steps * kernel.step, head = i / steps, at = first_of(head, shape.queries);
            kernel.attend(shape, heads[head], q + at + first * shape.row(), scale, first, out + at + first * shape.row(),
                          room);
        });
        kernel.leave();
    }

  private:
    std::vector<Head> heads;
    std::vector<Memory> rooms;
    Memory packed;
    Stage packing, attending;

    int64_t first_of(int64_t head, int64_t tokens) const {
        return head / shape.heads * tokens * shape.row() + head % shape.heads * shape.width;
    }
};

}  // namespace caphuman
