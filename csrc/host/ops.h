// The ops, and what else Python calls: each function is defined in the file of its name, which tells what it computes,
// those of Philox streams in philox.cpp. Pointers are addresses of the caller's memory. module.cpp binds them all; they run
// without the interpreter's lock.

#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

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

// Changes nothing of a request whose temperature is 0 or whose top_p is 1, or of a row with NaN or infinity.
void set_back_unlikely(std::uintptr_t logits_ptr,       // [B, rows_per_request, vocab] type, rows row_stride apart
                       int type,                        //
                       std::uintptr_t temperature_ptr,  // [B] float32
                       std::uintptr_t top_p_ptr,        // [B] float32
                       float behind, std::int64_t batch_size, std::int64_t rows_per_request, std::int64_t vocab,
                       std::int64_t row_stride);

// Codes shared with sequoia_kernels/ops/host_calls.py.
enum class VerificationRule : int { sequoia = 0, traversal = 1 };

// Returns false, and has written nothing, if `check_values` finds a tree, temperature, top_p, token, a row of the
// target's logits or a row of the draft's at a node with children out of range.
bool verify_tree(std::uintptr_t tokens_ptr,         // [B, N] int64, requests tokens_stride apart
                 std::uintptr_t target_ptr,         // [B, N, vocab] target_type
                 int target_type,                   //
                 std::uintptr_t draft_ptr,          // [B, N, draft_vocab] draft_type, or 0 where nothing was drawn
                 int draft_type,                    //
                 std::uintptr_t target_to_draft_ptr,  // [vocab] int32, or 0 where the vocabularies are one
                 std::uintptr_t certain_ptr,        // [N] bool, requests certain_stride apart, or 0
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
                 std::int64_t draft_vocab, std::int64_t topology_stride, std::int64_t certain_stride,  // elements
                 std::int64_t tokens_stride,                                         //
                 std::int64_t target_batch_stride, std::int64_t target_node_stride,  //
                 std::int64_t draft_batch_stride, std::int64_t draft_node_stride,    //
                 int rule_code,                                                      // of VerificationRule
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

std::pair<bool, bool> expand_tree_mask(std::string_view packed,  // [B or 1, N, num_words] int32
                                       std::int64_t num_words, std::int64_t num_rows,
                                       const std::vector<std::int64_t>& cache_lens,  // [B]
                                       std::int64_t sliding_window,                  // 0 is off
                                       std::uintptr_t out_ptr,                       // out: [B, 1, N, num_slots] type
                                       int type,  // a code of ElementType (additive), or 4 (boolean)
                                       std::int64_t num_slots);

// Returns false, and has written nothing, if `check_values` finds a temperature, top_p or row of logits out of range.
bool warped_logsumexp(std::uintptr_t logits_ptr,          // [R, vocab] type, rows row_stride apart
                      int type,                           //
                      std::uintptr_t temperature_ptr,     // [R] float32
                      std::uintptr_t top_k_ptr,           // [R] int32, or 0
                      std::uintptr_t top_p_ptr,           // [R] float32, or 0
                      std::uintptr_t log_normaliser_ptr,  // out: [R] float32; float64 for float64
                      std::uintptr_t cut_ptr,             // out: [R], as log_normaliser
                      std::int64_t num_rows, std::int64_t vocab, std::int64_t row_stride, bool check_values);

// Of a tensor of 4 dimensions; strides in elements.
struct Layout4d {
    std::int64_t shape[4], strides[4];
};

// Returns false, and has written nothing, if a length or page lies outside the cache. With first_rows, [B], the rows of q
// and out are those of all requests one behind the other, and a request's begin at its entry; no log-sum-exp then.
bool tree_attention(std::uintptr_t q_ptr, const Layout4d& q_layout, std::uintptr_t keys_ptr,
                    const Layout4d& keys_layout, std::uintptr_t values_ptr, const Layout4d& values_layout, int type,
                    std::uintptr_t mask_ptr, std::int64_t num_words, bool mask_per_request,
                    std::uintptr_t cache_lens_ptr, double scale, double softcap, std::int64_t sliding_window,
                    std::uintptr_t sinks_ptr, std::uintptr_t block_table_ptr, std::int64_t max_pages,
                    std::uintptr_t out_ptr, std::uintptr_t lse_ptr, int num_threads,
                    const std::int64_t* first_rows = nullptr);

// ---- Philox streams ----

std::array<std::uint32_t, 4> philox_block(const std::array<std::uint32_t, 4>& counter,
                                          const std::array<std::uint32_t, 2>& key);

void token_words(std::int64_t seed, std::int64_t offset, std::uint32_t tag, std::int64_t vocab, std::uintptr_t out_ptr);

void token_gumbel(std::uintptr_t seeds_ptr, std::uintptr_t offsets_ptr, std::int64_t num_rows, std::int64_t vocab,
                  std::uint32_t tag, std::uintptr_t out_ptr);

void node_coins(std::uintptr_t seeds_ptr, std::uintptr_t offsets_ptr, std::int64_t num_rows, std::int64_t num_nodes,
                std::uintptr_t out_ptr);

}  // namespace sequoia
