// Threads of a call's own: a runtime's are pinned, and not ours to use.
#pragma once
#include <sched.h>

#include <system_error>
#include <thread>
#include <vector>

namespace caphuman {

// Where this process may run. Asked when the library is loaded: a runtime pins the threads that call later.
inline const cpu_set_t ALLOWED = [] {
    cpu_set_t found;
    CPU_ZERO(&found);
    sched_getaffinity(0, sizeof found, &found);
    return found;
}();

// A new thread would be pinned to where its maker is, and the scheduler leaves it there while workers spin elsewhere.
inline void move_away_from(int cpu) {
    cpu_set_t rest = ALLOWED;
    CPU_CLR(cpu, &rest);
    if (CPU_COUNT(&rest)) sched_setaffinity(0, sizeof rest, &rest);
}

// Calls work(0), work(1), ... at once, on as many threads as can be had of those asked for.
template <class Work>
void on_threads(int threads, const Work &work) {
    const int here = sched_getcpu();
    std::vector<std::thread> others;
    others.reserve(threads);
    for (int i = 1; i < threads; i++) {
        try {
            others.emplace_back([&work, here, i] {
                move_away_from(here);
                work(i);
            });
        } catch (const std::system_error &) {
            break;  // no more threads: fewer do the same work
        }
    }
    work(0);
    for (auto &other : others) other.join();
}

}  // namespace caphuman
