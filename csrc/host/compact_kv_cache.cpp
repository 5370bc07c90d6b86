// compact_kv_cache_ on the CPU: move the accepted tree rows behind the committed prefix, in every cache, in place.
//
// Computes    for every cache, request b and d < num_accepted[b]:
//                 row[cache_lens[b] + d] <- row[cache_lens[b] + accepted_nodes[b, d]];
//             then cache_lens[b] += num_accepted[b].
// Plan        one thread; caches in order, and of each cache the rows that are not in place already. Accepted nodes
//             rise along a path, so every row lies at or behind its target and so do all that are still to be read:
//             copying in path order never overwrites a row that is needed later.
// Memory      reads and writes moved rows only.
// Numerics    bytes are copied; the element type is irrelevant.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cache_entry.h"
#include "ops.h"

namespace sequoia {
namespace {

struct BlockTable {
    const std::int32_t* pages;  // [B, max_pages], or null: slots are rows of the request's own cache
    std::int64_t stride_request;
    std::int64_t stride_page;
    std::int64_t page_size;
};

char* row_address(const CacheEntry& cache, const BlockTable& table, std::int64_t b, std::int64_t slot) {
    char* const base = reinterpret_cast<char*>(cache.base);
    if (table.pages == nullptr) return base + b * cache.stride_outer + slot * cache.stride_slot;
    const std::int64_t column = slot / table.page_size;
    const std::int64_t page = table.pages[b * table.stride_request + column * table.stride_page];
    return base + page * cache.stride_outer + (slot - column * table.page_size) * cache.stride_slot;
}

void copy_row(const CacheEntry& cache, const char* source, char* target) {
    if (cache.stride_head == cache.head_bytes) {  // the heads of a row lie in one piece
        std::memcpy(target, source, static_cast<std::size_t>(cache.num_heads * cache.head_bytes));
        return;
    }
    for (std::int64_t head = 0; head < cache.num_heads; ++head) {
        std::memcpy(target + head * cache.stride_head, source + head * cache.stride_head,
                    static_cast<std::size_t>(cache.head_bytes));
    }
}

struct Move {
    std::int64_t source_slot;
    std::int64_t target_slot;
};

}  // namespace

void compact_kv_cache(std::uintptr_t table_ptr, std::int64_t num_caches, std::uintptr_t accepted_nodes_ptr,
                      std::int64_t nodes_stride_request, std::int64_t nodes_stride_level,
                      std::uintptr_t num_accepted_ptr, std::int64_t num_accepted_stride, std::uintptr_t cache_lens_ptr,
                      std::int64_t cache_lens_stride, std::int64_t batch_size, std::uintptr_t block_table_ptr,
                      std::int64_t table_stride_request, std::int64_t table_stride_page, std::int64_t page_size) {
    const auto* caches = reinterpret_cast<const CacheEntry*>(table_ptr);
    const auto* num_accepted = reinterpret_cast<const std::int32_t*>(num_accepted_ptr);
    auto* cache_lens = reinterpret_cast<std::int32_t*>(cache_lens_ptr);
    const BlockTable table{reinterpret_cast<const std::int32_t*>(block_table_ptr), table_stride_request,
                           table_stride_page, page_size};
    std::vector<Move> moves;
    for (std::int64_t b = 0; b < batch_size; ++b) {
        const auto* nodes = reinterpret_cast<const std::int32_t*>(accepted_nodes_ptr) + b * nodes_stride_request;
        const std::int32_t count = num_accepted[b * num_accepted_stride];
        std::int32_t& cache_len = cache_lens[b * cache_lens_stride];
        moves.clear();
        for (std::int32_t d = 0; d < count; ++d) {
            const std::int64_t node = nodes[d * nodes_stride_level];
            if (node != d) moves.push_back({cache_len + node, cache_len + d});
        }
        for (std::int64_t index = 0; index < num_caches && !moves.empty(); ++index) {
            if (caches[index].num_heads * caches[index].head_bytes == 0) continue;  // no bytes, perhaps no address
            for (const Move& move : moves) {
                copy_row(caches[index], row_address(caches[index], table, b, move.source_slot),
                         row_address(caches[index], table, b, move.target_slot));
            }
        }
        cache_len += count;
    }
}

}  // namespace sequoia
