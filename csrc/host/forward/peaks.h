// What a CPU can do at most: how fast it reads, and how many multiply-adds it makes. A forward's time is compared with it.

#pragma once

#include <cstdint>

namespace sequoia::forward {

constexpr std::int64_t PEAK_CHAINS = 12;  // of multiply-adds that do not wait for one another

// What the threads of one measurement share.
struct Peak {
    const float* data;   // that is read, each thread a part; null: multiply-adds instead
    bool pairs;          // the multiply-adds are of pairs of bfloat16
    std::int64_t count;  // floats; of multiply-adds the steps of each thread's PEAK_CHAINS vectors
    int num_threads;
    float* sums;  // [num_threads, 16] results, so that nothing is left out
};

using MeasurePeak = void (*)(const Peak& peak, int thread);

}  // namespace sequoia::forward
