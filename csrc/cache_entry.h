// One cache of compact_kv_cache_: a row of the table [num_caches, 7] int64 that Python fills (cache_table.py) and that the
// host's and the CUDA kernel read. A test compares it with Python's columns, from which Triton's kernel takes its own.

#pragma once

#include <cstdint>

namespace sequoia {

// Strides in bytes.
struct CacheEntry {
    std::int64_t base;          // address of element [0, 0, 0, 0]
    std::int64_t stride_outer;  // between requests, or between pages when there is a block table
    std::int64_t stride_slot;
    std::int64_t stride_head;
    std::int64_t num_heads;
    std::int64_t head_bytes;  // head_dim * itemsize, contiguous
    std::int64_t extent;      // slots of one request, or number of pages when there is a block table
};
static_assert(sizeof(CacheEntry) == 7 * sizeof(std::int64_t), "the table is read as packed int64 rows");

}  // namespace sequoia
