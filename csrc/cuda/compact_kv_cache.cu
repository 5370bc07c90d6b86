// compact_kv_cache_: move the accepted tree rows behind the committed prefix, in every cache of every layer, in place.
//
// This kernel compiles for all architectures of the build without spills (53 to 149 registers for 8 to 64 levels on sm_80,
// sm_90 and sm_100). Its tests passed on an H100, where memcheck found nothing; it has not been timed.
//
// Computes
//   for every cache, request b and d < num_accepted[b]:  row[cache_lens[b] + d] <- row[cache_lens[b] + accepted_nodes[b, d]]
//   and then, if the lengths are to advance:             cache_lens[b] += num_accepted[b]
//
// Parallel plan
//   Grid (column slices, caches, requests): one launch moves K and V of all layers. A cache row [heads, head_dim] is cut
//   into columns of 16 bytes (8, 4, 2 or 1 where alignment demands it) and one thread owns one column of one request in
//   one cache. It reads its column in all accepted rows into registers before it writes any of them. No other thread
//   touches that column, so overlapping moves are safe in any order of accepted_nodes, without shared memory or a barrier
//   between reading and writing.
//   The lengths advance in the same launch. A block reads its length by an atomic add that also counts it, in the high
//   bits of the length's own word; the last block of a request to arrive knows that all others have read, and writes the
//   new length. The order of arrival decides who writes, never what. No workspace, and nothing to reset between launches.
//
// Memory
//   Reads and writes moved_rows * row_bytes per cache; a row that is already in place (the root always) is not touched.
//
// Numerics
//   Bytes are copied; the element type is irrelevant.
//
// Source
//   The commit step of tree speculative decoding; Sequoia (arXiv 2402.12374) gathers into a copy instead.

#include "launch.h"

#include "cache_entry.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>

namespace sequoia {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxLevels = 64;

// Everything that is the same for all caches; passed by value.
struct Request {
    const std::int32_t* accepted_nodes; // [batch, num_levels] int32
    const std::int32_t* num_accepted;   // [batch] int32
    std::int32_t* cache_lens;           // [batch] int32; the bits from length_bits on count blocks during the launch
    const std::int32_t* block_table;    // [batch, max_pages] int32, or null
    std::int64_t stride_nodes_request;  // strides of the four tensors above, in elements
    std::int64_t stride_nodes_level;
    std::int64_t stride_num_accepted;
    std::int64_t stride_cache_lens;
    std::int64_t stride_table_request;
    std::int64_t stride_table_page;
    std::int64_t page_size;             // this and max_pages are unused without a block table
    std::int64_t max_pages;
    int num_levels;
    int num_caches;
    int length_bits;                    // 0: the lengths do not advance
};

// One thread of a block calls this once: the only read of the length. The last block of the request advances it.
__device__ std::int32_t read_length(const Request& request, int b, int num_rows) {
    std::int32_t* const word = request.cache_lens + b * request.stride_cache_lens;
    if (request.length_bits == 0) {
        return *word;
    }
    // Relaxed, as atomicAdd is: nothing but this word passes between blocks.
    const int counted = atomicAdd(word, 1 << request.length_bits);
    const int cache_len = counted & ((1 << request.length_bits) - 1);
    if (static_cast<unsigned>(counted >> request.length_bits) == gridDim.x * gridDim.y - 1) {
        *word = cache_len + num_rows;
    }
    return cache_len;
}

// Byte offset of a slot's row from the cache's base.
__device__ std::int64_t row_offset(const CacheEntry& cache, const Request& request, int b, std::int64_t slot) {
    // Compiled in release builds too: an index outside the cache must end in an error, not in somebody else's memory.
    assert(slot >= 0);
    if (request.block_table == nullptr) {
        assert(slot < cache.extent);
        return b * cache.stride_outer + slot * cache.stride_slot;
    }
    const std::int64_t table_column = slot / request.page_size;
    assert(table_column < request.max_pages);
    const std::int64_t page =
        request.block_table[b * request.stride_table_request + table_column * request.stride_table_page];
    assert(page >= 0 && page < cache.extent);
    return page * cache.stride_outer + (slot - table_column * request.page_size) * cache.stride_slot;
}

// Moves the columns of one slice. source and target: byte offsets of the rows, equal where nothing is to be moved.
template <typename Column, int MAX_ROWS>
__device__ void move_columns(
    const CacheEntry& cache,
    const std::int64_t* source, // [num_rows] shared
    const std::int64_t* target, // [num_rows] shared
    int num_rows) {
    const std::int64_t columns_per_head = cache.head_bytes / static_cast<std::int64_t>(sizeof(Column));
    const std::int64_t num_columns = columns_per_head * cache.num_heads;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; column < num_columns;
         column += step) {
        const std::int64_t head = column / columns_per_head;
        char* const start = reinterpret_cast<char*>(cache.base) + head * cache.stride_head +
                            (column - head * columns_per_head) * static_cast<std::int64_t>(sizeof(Column));
        Column rows[MAX_ROWS]; // stays in registers: both loops are unrolled
#pragma unroll
        for (int d = 0; d < MAX_ROWS; ++d) {
            if (d < num_rows && source[d] != target[d]) {
                rows[d] = *reinterpret_cast<const Column*>(start + source[d]);
            }
        }
#pragma unroll
        for (int d = 0; d < MAX_ROWS; ++d) {
            if (d < num_rows && source[d] != target[d]) {
                *reinterpret_cast<Column*>(start + target[d]) = rows[d];
            }
        }
    }
}

// Grid (slices, max(num_caches, 1), batch), kThreads threads. MAX_ROWS >= request.num_levels.
template <int MAX_ROWS>
__global__ void __launch_bounds__(kThreads) compact_kv_cache_kernel(
    const CacheEntry* __restrict__ caches, // [num_caches]
    const Request request) {
    __shared__ std::int64_t source[MAX_ROWS];
    __shared__ std::int64_t target[MAX_ROWS];
    __shared__ std::int32_t length;
    const int b = static_cast<int>(blockIdx.z);
    const int num_rows = request.num_accepted[b * request.stride_num_accepted];
    assert(num_rows >= 0 && num_rows <= request.num_levels);
    if (threadIdx.x == 0) {
        length = read_length(request, b, num_rows);
    }
    if (request.num_caches == 0) {
        return;
    }
    __syncthreads();
    const std::int64_t cache_len = length;
    const CacheEntry cache = caches[blockIdx.y];

    bool moves = false;
    for (int d = static_cast<int>(threadIdx.x); d < num_rows; d += kThreads) {
        const std::int64_t node =
            request.accepted_nodes[b * request.stride_nodes_request + d * request.stride_nodes_level];
        source[d] = row_offset(cache, request, b, cache_len + node);
        target[d] = row_offset(cache, request, b, cache_len + d);
        assert(node >= 0); // -1 marks the end of a path and must not lie before it
        moves = moves || node != d;
    }
    // A barrier as well as a vote: the offsets are read by every thread below.
    if (!__syncthreads_or(moves)) {
        return;
    }

    // The widest column that divides every address. Registers hold MAX_ROWS columns a thread, so 64 rows take 8 bytes.
    const std::int64_t bits =
        cache.base | cache.stride_outer | cache.stride_slot | cache.stride_head | cache.head_bytes;
    if constexpr (MAX_ROWS <= 32) {
        if (bits % 16 == 0) {
            move_columns<uint4, MAX_ROWS>(cache, source, target, num_rows);
            return;
        }
    }
    if (bits % 8 == 0) {
        move_columns<uint2, MAX_ROWS>(cache, source, target, num_rows);
    } else if (bits % 4 == 0) {
        move_columns<std::uint32_t, MAX_ROWS>(cache, source, target, num_rows);
    } else if (bits % 2 == 0) {
        move_columns<std::uint16_t, MAX_ROWS>(cache, source, target, num_rows);
    } else {
        move_columns<std::uint8_t, MAX_ROWS>(cache, source, target, num_rows);
    }
}

}  // namespace

// Shapes and strides as in CacheEntry and Request; addresses and the stream as integers. num_slices: blocks that share the
// columns of a cache; any positive value gives the same result. length_bits: as in Request.
void launch_compact_kv_cache(
    int device,
    std::int64_t stream,
    std::int64_t cache_table,
    std::int64_t num_caches,
    std::int64_t num_slices,
    std::int64_t accepted_nodes,
    std::int64_t stride_nodes_request,
    std::int64_t stride_nodes_level,
    std::int64_t num_levels,
    std::int64_t num_accepted,
    std::int64_t stride_num_accepted,
    std::int64_t cache_lens,
    std::int64_t stride_cache_lens,
    std::int64_t length_bits,
    std::int64_t batch_size,
    std::int64_t block_table,
    std::int64_t stride_table_request,
    std::int64_t stride_table_page,
    std::int64_t page_size,
    std::int64_t max_pages) {
    const auto require = requirements_of("compact_kv_cache");
    require(num_levels >= 1 && num_levels <= kMaxLevels, "num_levels", "be in [1, 64]", num_levels);
    require(num_caches >= 0 && num_caches <= 65535, "num_caches", "be in [0, 65535]", num_caches);
    require(batch_size >= 0 && batch_size <= 65535, "batch_size", "be in [0, 65535]", batch_size);
    require(num_slices >= 1 && num_slices <= 65535, "num_slices", "be in [1, 65535]", num_slices);
    require(length_bits >= 0 && length_bits <= 30, "length_bits", "be in [0, 30]", length_bits);
    const std::int64_t num_blocks = num_slices * std::max<std::int64_t>(num_caches, 1);  // of a request
    require(length_bits == 0 || num_blocks < std::int64_t{1} << (31 - length_bits), "length_bits",
            "leave bits to count num_slices * num_caches", length_bits);
    require(block_table == 0 || page_size >= 1, "page_size", "be at least 1", page_size);
    if (batch_size == 0) {
        return;
    }
    const DeviceGuard guard(device, "compact_kv_cache");
    const cudaStream_t cuda_stream = as_stream(stream);

    Request request{};
    request.accepted_nodes = as_pointer<const std::int32_t>(accepted_nodes);
    request.num_accepted = as_pointer<const std::int32_t>(num_accepted);
    request.cache_lens = as_pointer<std::int32_t>(cache_lens);
    request.block_table = as_pointer<const std::int32_t>(block_table);
    request.stride_nodes_request = stride_nodes_request;
    request.stride_nodes_level = stride_nodes_level;
    request.stride_num_accepted = stride_num_accepted;
    request.stride_cache_lens = stride_cache_lens;
    request.stride_table_request = stride_table_request;
    request.stride_table_page = stride_table_page;
    request.page_size = page_size;
    request.max_pages = max_pages;
    request.num_levels = static_cast<int>(num_levels);
    request.num_caches = static_cast<int>(num_caches);
    request.length_bits = static_cast<int>(length_bits);

    const dim3 grid(static_cast<unsigned>(num_slices), static_cast<unsigned>(std::max<std::int64_t>(num_caches, 1)),
                    static_cast<unsigned>(batch_size));
    const CacheEntry* const caches = as_pointer<const CacheEntry>(cache_table);
    if (num_levels <= 8) {
        compact_kv_cache_kernel<8><<<grid, kThreads, 0, cuda_stream>>>(caches, request);
    } else if (num_levels <= 16) {
        compact_kv_cache_kernel<16><<<grid, kThreads, 0, cuda_stream>>>(caches, request);
    } else if (num_levels <= 32) {
        compact_kv_cache_kernel<32><<<grid, kThreads, 0, cuda_stream>>>(caches, request);
    } else {
        compact_kv_cache_kernel<64><<<grid, kThreads, 0, cuda_stream>>>(caches, request);
    }
    check_launch("compact_kv_cache_kernel");
}

// Asks the driver for the kernel, as a launch would: it knows which code of this build the device can run.
cudaError_t find_compact_kv_cache() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, compact_kv_cache_kernel<8>);
}

}  // namespace sequoia
