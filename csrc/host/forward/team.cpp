#include "team.h"

#include <chrono>

#if defined(__linux__)
#include <dlfcn.h>
#define SEQUOIA_OPENMP 1
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define SEQUOIA_POSIX 1
#endif

namespace sequoia::forward {
namespace {

// A member is awake for so long behind a job: the next level of a draft comes within it.
constexpr auto AWAKE = std::chrono::microseconds(100);
// Then somebody else has the processor that the missing thread needs.
constexpr int PAUSES = 4000;
constexpr int SIZE_BITS = 16;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Shared {
    std::mutex busy;
    Team team;
};

// Functions of the OpenMP library that the process has loaded already, whichever it is: libgomp's are libiomp's, too.
struct OpenMp {
    using Function = void (*)(void*);
    void (*parallel)(Function function, void* data, unsigned num_threads, unsigned flags) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
    int (*in_parallel)() = nullptr;

    bool found() const { return parallel != nullptr && thread_num != nullptr && num_threads != nullptr; }
};

OpenMp find_openmp() {
    OpenMp found;
#if defined(SEQUOIA_OPENMP)
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.thread_num = reinterpret_cast<decltype(found.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    found.num_threads = reinterpret_cast<decltype(found.num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    found.in_parallel = reinterpret_cast<decltype(found.in_parallel)>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
#endif
    return found;
}

std::atomic<bool> by_openmp{false};
const OpenMp& openmp() {
    static const OpenMp found = find_openmp();
    return found;
}

Shared* shared = nullptr;
std::uint64_t num_forks = 0;
std::mutex creation;

// The child of a fork has none of the members, and the locks as they happened to be: it begins anew.
void forget() {
    new (&creation) std::mutex;
    shared = nullptr;
    ++num_forks;
}

void notice_forks() {
#if defined(SEQUOIA_POSIX)
    static const bool registered = pthread_atfork(nullptr, nullptr, forget) == 0;
    static_cast<void>(registered);
#endif
}

Shared& current() {
    const std::lock_guard<std::mutex> lock(creation);
    notice_forks();
    if (shared == nullptr) shared = new Shared;  // never freed: members wait in it until the process ends
    return *shared;
}

}  // namespace

void Team::run(int size, Job job, void* argument) {
    if (size == 1) return job(argument, 0);
    if (by_openmp.load(std::memory_order_relaxed) && run_by_openmp(size, job, argument)) return;
    job_ = job;
    argument_ = argument;
    while (static_cast<int>(members_.size()) + 1 < size) {
        const int thread = static_cast<int>(members_.size()) + 1;
        members_.emplace_back(&Team::serve, this, thread, epoch_.load());
    }
    begin(size);
    job(argument, 0);
    barrier(size);
}

// Returns false, and has run nothing, where the library gives fewer threads.
bool Team::run_by_openmp(int size, Job job, void* argument) {
    struct Work {
        Job job;
        void* argument;
        int size;
        bool whole;
    } work{job, argument, size, true};
    if (openmp().in_parallel != nullptr && openmp().in_parallel() != 0) return false;
    openmp().parallel(
        [](void* data) {
            Work& mine = *static_cast<Work*>(data);
            const int thread = openmp().thread_num();
            if (openmp().num_threads() != mine.size) {
                if (thread == 0) mine.whole = false;
                return;
            }
            mine.job(mine.argument, thread);
        },
        &work, static_cast<unsigned>(size), 0);
    return work.whole;
}

void Team::barrier(int size) {
    if (size == 1) return;
    const unsigned phase = phase_.load(std::memory_order_acquire);
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        num_arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int pauses = 0; phase_.load(std::memory_order_acquire) == phase; ++pauses) {
        if (pauses < PAUSES) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

void Team::stop() {
    begin(0);
    for (std::thread& member : members_) member.join();
    members_.clear();
}

void Team::begin(int size) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        const std::uint64_t number = (epoch_.load() >> SIZE_BITS) + 1;
        epoch_.store(number << SIZE_BITS | static_cast<std::uint64_t>(size));
    }
    if (num_sleeping_.load() != 0) changed_.notify_all();
}

void Team::serve(int thread, std::uint64_t seen) {
#if defined(SEQUOIA_POSIX)
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
#endif
    for (;;) {
        const auto until = std::chrono::steady_clock::now() + AWAKE;
        for (int pauses = 1; epoch_.load(std::memory_order_acquire) == seen; ++pauses) {
            pause();
            if (pauses % 32 == 0 && std::chrono::steady_clock::now() > until) {
                std::unique_lock<std::mutex> lock(mutex_);
                num_sleeping_.fetch_add(1);
                changed_.wait(lock, [&] { return epoch_.load() != seen; });
                num_sleeping_.fetch_sub(1);
            }
        }
        seen = epoch_.load(std::memory_order_acquire);
        const int size = static_cast<int>(seen & ((1u << SIZE_BITS) - 1));
        if (size == 0) return;
        if (thread >= size) continue;
        job_(argument_, thread);
        barrier(size);
    }
}

std::mutex& ForkedLock::get() {
    const std::lock_guard<std::mutex> lock(creation);
    notice_forks();
    if (mutex_ == nullptr || num_forks_ != num_forks) {
        static_cast<void>(mutex_.release());  // never freed: who held it is not here to let it go
        mutex_ = std::make_unique<std::mutex>();
        num_forks_ = num_forks;
    }
    return *mutex_;
}

bool use_openmp(bool wanted) {
    const bool taken = wanted && openmp().found();
    by_openmp.store(taken);
    return taken;
}

void run_in_team(int size, Team::Job job, void* argument) {
    if (size == 1) return job(argument, 0);
    Shared& here = current();
    const std::lock_guard<std::mutex> lock(here.busy);
    here.team.run(size, job, argument);
}

void stop_team() {
    Shared& here = current();
    const std::lock_guard<std::mutex> lock(here.busy);
    here.team.stop();
}

Team& shared_team() { return current().team; }

}  // namespace sequoia::forward
