// Jobs of all sizes on the team of threads that runs native forwards, from two callers at once, while the team is ended
// between. Built and run under the thread sanitizer by sanitize_host.py: prints nothing and returns 0 where all is right.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "host/forward/team.h"

namespace {

constexpr int CELLS = 64, PHASES = 5, JOBS = 400, MOST_THREADS = 5;

struct Sheet {
    std::vector<int> cells = std::vector<int>(CELLS);  // not atomic: barriers alone order what threads do
    int num_threads = 1;                              // of the job that runs
    std::atomic<bool> wrong{false};
};

// Each phase counts all cells up, every thread some of them, then every thread reads all.
void count_up(void* argument, int thread) {
    Sheet& sheet = *static_cast<Sheet*>(argument);
    sequoia::forward::Team& team = sequoia::forward::shared_team();
    const int num_threads = sheet.num_threads;
    for (int phase = 0; phase < PHASES; ++phase) {
        for (int cell = thread; cell < CELLS; cell += num_threads) ++sheet.cells[static_cast<std::size_t>(cell)];
        team.barrier(num_threads);
        for (const int cell : sheet.cells) {
            if (cell != sheet.cells[0]) sheet.wrong = true;
        }
        team.barrier(num_threads);
    }
}

void run_jobs(unsigned seed, Sheet& sheet) {
    std::mt19937 generator(seed);
    for (int job = 0; job < JOBS; ++job) {
        sheet.num_threads = 1 + static_cast<int>(generator() % MOST_THREADS);
        sequoia::forward::run_in_team(sheet.num_threads, count_up, &sheet);
        if (job % 50 == 3) sequoia::forward::stop_team();
        if (job % 70 == 5) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // members fall asleep
    }
    if (sheet.wrong || sheet.cells[0] != JOBS * PHASES) {
        std::fprintf(stderr, "a barrier let a thread pass too early\n");
        std::exit(1);
    }
}

}  // namespace

int main() {
    Sheet sheets[2];
    std::thread other(run_jobs, 1u, std::ref(sheets[1]));
    run_jobs(2u, sheets[0]);
    other.join();
    return 0;
}
