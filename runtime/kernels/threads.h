// Threads of our own, which sleep between calls: a runtime's are pinned, and not ours to use.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace caphuman {

// Where this process may run. Asked when the library is loaded: a runtime pins the threads that call later.
inline const cpu_set_t ALLOWED = [] {
    cpu_set_t found;
    CPU_ZERO(&found);
    sched_getaffinity(0, sizeof found, &found);
    return found;
}();

// A new thread would be pinned to where its maker is, and the scheduler leaves it there while others spin elsewhere.
inline void move_away_from(int cpu) {
    cpu_set_t rest = ALLOWED;
    CPU_CLR(cpu, &rest);
    if (CPU_COUNT(&rest)) sched_setaffinity(0, sizeof rest, &rest);
}

// A new thread waits 1 to 8 ms for its turn while a runtime's spin, one that wakes up 0.03.
class Threads {
  public:
    using Work = std::function<void(int)>;

    // Calls work(0) here and work(1), work(2), ... on those of the other threads that wake before it returns. Any one
    // of these calls must do all that is left to do. Who calls while others do is served here alone.
    void run(int threads, const Work &work) {
        const std::unique_lock<std::mutex> turn(turns, std::try_to_lock);
        if (!turn) return work(0);
        std::unique_lock<std::mutex> lock(state);
        start(threads - 1);
        call = {&work, threads, sched_getcpu(), call.number + 1};
        lock.unlock();
        wake.notify_all();
        work(0);
        lock.lock();
        call.work = nullptr;
        done.wait(lock, [this] { return !busy; });
    }

  private:
    struct Call {
        const Work *work = nullptr;  // none when it is over
        int threads = 0, from = 0;   // the caller's CPU
        long number = 0;
    };
    std::mutex turns, state;
    std::condition_variable wake, done;
    Call call;
    int started = 0, busy = 0;

    void start(int count) {
        try {
            for (; started < count; started++) std::thread([this, i = started + 1] { serve(i); }).detach();
        } catch (const std::system_error &) {  // no more threads: fewer do the same work
        }
    }

    [[noreturn]] void serve(int i) {
        std::unique_lock<std::mutex> lock(state);
        for (long last = 0; ; busy--, done.notify_one()) {
            wake.wait(lock, [&] { return call.work && i < call.threads && call.number != last; });
            const Call mine = call;
            last = mine.number;
            busy++;
            lock.unlock();
            move_away_from(mine.from);
            (*mine.work)(i);
            lock.lock();
        }
    }
};

// Of this process: a fork's child has none of its parent's threads. Never destroyed, as they never end.
inline Threads *&threads_here() {
    static Threads *found = [] {
        pthread_atfork(nullptr, nullptr, [] { threads_here() = new Threads; });
        return new Threads;
    }();
    return found;
}

// Items of which each thread takes the next, until all are done.
class Stage {
  public:
    template <class Each>
    void work(int64_t count, const Each &each) {
        for (int64_t i; (i = next++) < count; done++) each(i);
        while (done < count) std::this_thread::yield();
    }

  private:
    std::atomic<int64_t> next{0}, done{0};
};

inline void on_threads(int threads, const Threads::Work &work) { threads_here()->run(threads, work); }

}  // namespace caphuman
