// The ops as they are called from inside of this module; see each one's file for what it computes. Pointers as in the
// bindings: addresses of the caller's memory.

#pragma once

#include <cstdint>

namespace sequoia {

// Returns false, and has written nothing, if `check_values` finds a temperature or a row of logits out of range.
bool sample_without_replacement(std::uintptr_t logits_ptr,          // [R, vocab] type, rows row_stride apart
                                int type,                           //
                                std::uintptr_t temperature_ptr,     // [R] float32
                                std::uintptr_t seeds_ptr,           // [R] int64
                                std::uintptr_t offsets_ptr,         // [R] int64
                                std::uintptr_t tokens_ptr,          // out: [R, num_samples] int64
                                std::uintptr_t log_normaliser_ptr,  // out: [R] float32; float64 for float64
                                std::int64_t num_rows, std::int64_t vocab, std::int64_t row_stride,
                                std::int64_t num_samples, bool check_values);

// Returns false, and has written nothing, if `check_values` finds a tree, temperature, top_p, token, a row of the
// target's logits or a row of the draft's at a node with children out of range.
bool verify_tree(std::uintptr_t tokens_ptr,         // [B, N] int64, requests tokens_stride apart
                 std::uintptr_t target_ptr,         // [B, N, vocab] target_type
                 int target_type,                   //
                 std::uintptr_t draft_ptr,          // [B, N, vocab] draft_type, or 0 for a tree of one node
                 int draft_type,                    //
                 std::uintptr_t first_child_ptr,    // [N] int32, requests topology_stride apart: 0 where they share it
                 std::uintptr_t num_children_ptr,   // [N] int32, likewise
                 std::int64_t max_branching,        //
                 std::uintptr_t temperature_ptr,    // [B] float32
                 std::uintptr_t seeds_ptr,          // [B] int64
                 std::uintptr_t offsets_ptr,        // [B] int64
                 std::uintptr_t top_k_ptr,          // [B] int32, or 0
                 std::uintptr_t top_p_ptr,          // [B] float32, or 0
                 std::uintptr_t nodes_ptr,          // out: [B, num_levels] int32
                 std::uintptr_t num_accepted_ptr,   // out: [B] int32
                 std::uintptr_t next_token_ptr,     // out: [B] int64
                 std::int64_t batch_size, std::int64_t num_nodes, std::int64_t num_levels, std::int64_t vocab,
                 std::int64_t topology_stride, std::int64_t tokens_stride,           // elements
                 std::int64_t target_batch_stride, std::int64_t target_node_stride,  //
                 std::int64_t draft_batch_stride, std::int64_t draft_node_stride,    //
                 bool check_values);

// The caller has checked that paths rise and stay inside the caches.
void compact_kv_cache(std::uintptr_t table_ptr,           // [num_caches, 7] int64, see CacheEntry
                      std::int64_t num_caches,            //
                      std::uintptr_t accepted_nodes_ptr,  // [B, num_levels] int32
                      std::int64_t nodes_stride_request, std::int64_t nodes_stride_level,
                      std::uintptr_t num_accepted_ptr,  // [B] int32
                      std::int64_t num_accepted_stride,
                      std::uintptr_t cache_lens_ptr,  // in and out: [B] int32
                      std::int64_t cache_lens_stride, std::int64_t batch_size,
                      std::uintptr_t block_table_ptr,  // [B, max_pages] int32, or 0
                      std::int64_t table_stride_request, std::int64_t table_stride_page, std::int64_t page_size);

}  // namespace sequoia
