// Requests of a batch that still decode: an ended one's lane takes no work.

#pragma once

#include <cstdint>
#include <vector>

namespace sequoia {

// Requests [first, first + count), all of them active.
struct ActiveRun {
    std::int64_t first, count;
};

// active: [batch_size], 0 for a request that has ended.
inline void find_active_runs(const std::int32_t* active, std::int64_t batch_size, std::vector<ActiveRun>& runs) {
    runs.clear();
    for (std::int64_t b = 0; b < batch_size; ++b) {
        if (active[b] == 0) continue;
        if (runs.empty() || runs.back().first + runs.back().count < b) runs.push_back({b, 0});
        ++runs.back().count;
    }
}

}  // namespace sequoia
