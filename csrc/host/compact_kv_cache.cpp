// compact_kv_cache_ on the CPU: move the accepted tree rows behind the committed prefix, in every cache, in place.
//
// Computes    for every cache, request b and d < num_accepted[b]: row[cache_lens[b] + d] <- row[cache_lens[b] + nodes[b, d]];
//             then cache_lens[b] += num_accepted[b].
// Plan        one thread; caches in order, and of each cache the rows that are not in place already.
// Memory      reads and writes moved rows only. Accepted nodes rise along a path, and then a row is read before anything
//             is written over it; where a caller's nodes do not rise, the rows pass through a scratch copy.
// Numerics    bytes are copied; the element type is irrelevant.

#include <cstring>
#include <vector>

#include <pybind11/pybind11.h>

#include "rows.h"

namespace py = pybind11;

namespace sequoia {
namespace {

// One cache: a row of the table [num_caches, 7] int64 that csrc/cuda/compact_kv_cache.cu reads too. Strides in bytes.
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

struct BlockTable {
    const std::int32_t* pages;  // [B, max_pages], or null: slots are rows of the request's own cache
    std::int64_t stride_request;
    std::int64_t stride_page;
    std::int64_t page_size;
    std::int64_t max_pages;
};

char* row_address(const CacheEntry& cache, const BlockTable& table, std::int64_t b, std::int64_t slot) {
    char* const base = reinterpret_cast<char*>(cache.base);
    if (table.pages == nullptr) return base + b * cache.stride_outer + slot * cache.stride_slot;
    const std::int64_t column = slot / table.page_size;
    const std::int64_t page = table.pages[b * table.stride_request + column * table.stride_page];
    return base + page * cache.stride_outer + (slot - column * table.page_size) * cache.stride_slot;
}

// A row may lie in one piece or head by head; scratch rows always lie in one piece.
void copy_row(const CacheEntry& cache, const char* source, std::int64_t source_head, char* target,
              std::int64_t target_head) {
    if (source_head == cache.head_bytes && target_head == cache.head_bytes) {
        std::memcpy(target, source, static_cast<std::size_t>(cache.num_heads * cache.head_bytes));
        return;
    }
    for (std::int64_t head = 0; head < cache.num_heads; ++head) {
        std::memcpy(target + head * target_head, source + head * source_head, static_cast<std::size_t>(cache.head_bytes));
    }
}

struct Move {
    std::int64_t source_slot;
    std::int64_t target_slot;
};

void move_rows(const CacheEntry& cache, const BlockTable& table, std::int64_t b, const std::vector<Move>& moves,
               bool in_order, std::vector<char>& scratch) {
    if (in_order) {
        for (const Move& move : moves) {
            copy_row(cache, row_address(cache, table, b, move.source_slot), cache.stride_head,
                     row_address(cache, table, b, move.target_slot), cache.stride_head);
        }
        return;
    }
    const std::int64_t row_bytes = cache.num_heads * cache.head_bytes;
    scratch.resize(moves.size() * static_cast<std::size_t>(row_bytes));
    char* copy = scratch.data();
    for (const Move& move : moves) {
        copy_row(cache, row_address(cache, table, b, move.source_slot), cache.stride_head, copy, cache.head_bytes);
        copy += row_bytes;
    }
    copy = scratch.data();
    for (const Move& move : moves) {
        copy_row(cache, copy, cache.head_bytes, row_address(cache, table, b, move.target_slot), cache.stride_head);
        copy += row_bytes;
    }
}

bool slot_exists(const CacheEntry* caches, std::int64_t num_caches, const BlockTable& table, std::int64_t b,
                 std::int64_t slot) {
    if (slot < 0) return false;
    std::int64_t place = slot;  // what a cache's extent bounds: a slot, or a page
    if (table.pages != nullptr) {
        const std::int64_t column = slot / table.page_size;
        if (column >= table.max_pages) return false;
        place = table.pages[b * table.stride_request + column * table.stride_page];
    }
    for (std::int64_t index = 0; index < num_caches; ++index) {
        if (place < 0 || place >= caches[index].extent) return false;
    }
    return true;
}

// Returns false, and has written nothing, if `check_values` finds a count, node, slot or page out of range.
bool compact_kv_cache(std::uintptr_t table_ptr,           // [num_caches, 7] int64, see CacheEntry
                      std::int64_t num_caches,            //
                      std::uintptr_t accepted_nodes_ptr,  // [B, num_levels] int32
                      std::int64_t nodes_stride_request, std::int64_t nodes_stride_level, std::int64_t num_levels,
                      std::uintptr_t num_accepted_ptr,  // [B] int32
                      std::int64_t num_accepted_stride,
                      std::uintptr_t cache_lens_ptr,  // in and out: [B] int32
                      std::int64_t cache_lens_stride, std::int64_t batch_size,
                      std::uintptr_t block_table_ptr,  // [B, max_pages] int32, or 0
                      std::int64_t table_stride_request, std::int64_t table_stride_page, std::int64_t page_size,
                      std::int64_t max_pages, bool check_values) {
    const auto* caches = reinterpret_cast<const CacheEntry*>(table_ptr);
    const auto* nodes = reinterpret_cast<const std::int32_t*>(accepted_nodes_ptr);
    const auto* num_accepted = reinterpret_cast<const std::int32_t*>(num_accepted_ptr);
    auto* cache_lens = reinterpret_cast<std::int32_t*>(cache_lens_ptr);
    const BlockTable table{reinterpret_cast<const std::int32_t*>(block_table_ptr), table_stride_request,
                           table_stride_page, page_size, max_pages};

    for (std::int64_t b = 0; b < batch_size && check_values; ++b) {
        const std::int64_t count = num_accepted[b * num_accepted_stride];
        const std::int64_t cache_len = cache_lens[b * cache_lens_stride];
        if (count < 0 || count > num_levels || cache_len < 0) return false;
        for (std::int64_t d = 0; d < count; ++d) {
            const std::int64_t node = nodes[b * nodes_stride_request + d * nodes_stride_level];
            if (node < 0 || !slot_exists(caches, num_caches, table, b, cache_len + node) ||
                !slot_exists(caches, num_caches, table, b, cache_len + d)) {
                return false;
            }
        }
    }

    std::vector<Move> moves;
    std::vector<char> scratch;
    for (std::int64_t b = 0; b < batch_size; ++b) {
        const std::int64_t count = num_accepted[b * num_accepted_stride];
        std::int32_t& cache_len = cache_lens[b * cache_lens_stride];
        moves.clear();
        bool in_order = true;
        std::int64_t last_node = -1;
        for (std::int64_t d = 0; d < count; ++d) {
            const std::int64_t node = nodes[b * nodes_stride_request + d * nodes_stride_level];
            // Rising nodes lie at or behind their target, and so do all that are still to be read.
            in_order = in_order && node > last_node;
            last_node = node;
            if (node != d) moves.push_back({cache_len + node, cache_len + d});
        }
        for (std::int64_t index = 0; index < num_caches && !moves.empty(); ++index) {
            move_rows(caches[index], table, b, moves, in_order, scratch);
        }
        cache_len += static_cast<std::int32_t>(count);
    }
    return true;
}

}  // namespace
}  // namespace sequoia

void bind_compact_kv_cache(py::module_& module) {
    module.def("compact_kv_cache", &sequoia::compact_kv_cache, py::call_guard<py::gil_scoped_release>(),
               py::arg("table_ptr"), py::arg("num_caches"), py::arg("accepted_nodes_ptr"),
               py::arg("nodes_stride_request"), py::arg("nodes_stride_level"), py::arg("num_levels"),
               py::arg("num_accepted_ptr"), py::arg("num_accepted_stride"), py::arg("cache_lens_ptr"),
               py::arg("cache_lens_stride"), py::arg("batch_size"), py::arg("block_table_ptr"),
               py::arg("table_stride_request"), py::arg("table_stride_page"), py::arg("page_size"),
               py::arg("max_pages"), py::arg("check_values"),
               "Move accepted rows behind the committed prefix of all caches; see compact_kv_cache.cpp.");
}
