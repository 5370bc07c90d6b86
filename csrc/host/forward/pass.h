// What the threads of one pass share: up to MAX_ROWS rows of a call on their way through all layers.

#pragma once

#include <cstdint>

#include "model.h"
#include "team.h"

// Of functions that multiply pairs of bfloat16, where the compiler knows the instruction.
#if defined(SEQUOIA_X86) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define SEQUOIA_AVX512_BF16 __attribute__((target("avx512bf16")))
#endif

namespace sequoia::forward {

// The cache rows that the nodes of one request in a pass see: a run of committed ones, then tree slots.
struct Columns {
    std::int64_t count, num_prefix;
    std::int64_t first_row;           // of the request in the caches, 0 where they are paged
    const std::int32_t* rows;         // [count], behind the first one
    const std::int32_t* num_hidden;   // [nodes] prefix columns before the node's window
    const float* tree_hidden;         // [nodes, tree_stride]: 0 where the node sees the tree column, else -inf
    std::int64_t tree_stride;
};

constexpr std::int64_t TILE = 16;    // weight rows that are multiplied before anything is done with the products
constexpr std::int64_t STRIP = 256;  // the same where the weights lie transposed
constexpr std::int64_t PARTED_ROWS = 10;  // nodes, at most, with which a tile is multiplied in parts of its rows
constexpr std::int64_t PACKED_FLOATS = 16384;  // for a strip of a matrix of four bits, whatever its groups

// Consecutive nodes of one request.
struct Segment {
    std::int64_t request, first_node, num_nodes;
    std::int64_t first_row;  // of the pass
};

// One thread's memory.
struct Bench {
    float* panel;   // of whole rows
    float* rest;    // what rounding took away from it
    float* tiles;   // products of one tile of two matrices, [2, MAX_ROWS, TILE], or of a strip's tiles of each
    float* unpacked;  // of a strip of a matrix of four bits, [PACKED_FLOATS + groups * 2 * PACKED_ROWS]
    float* rows;    // two rows of any width
    float* wide;    // four rows of a matrix
    float* sums;    // of a tile and PARTED_ROWS nodes, lane by lane
    float* queries;  // ROW_BLOCK query rows, as a panel or side by side
    float* keys;    // [head_dim, columns of a vector]
    float* scores;  // [ROW_BLOCK, columns]
    float* mixed;   // [ROW_BLOCK, head_dim]
    // Of a layer with experts. A choice is a row and an expert; choices lie in the order of their experts, then rows.
    float* shares;                // [experts], of one row
    std::int32_t* expert_ids;     // [MAX_ROWS, chosen]
    float* expert_weights;        // [MAX_ROWS, chosen]
    std::int32_t* first_choices;  // [experts + 1]
    std::int32_t* choice_rows;    // [MAX_ROWS * chosen]
    float* choice_weights;        // [MAX_ROWS * chosen]
};

struct Pass {
    const Model* model;
    const Call* call;
    const std::int64_t* rows;  // [num_rows] of the call
    std::int64_t num_rows;
    const Segment* segments;
    std::int64_t num_segments;
    const Columns* columns;         // [windows, segments]
    const int* window_of_layer;     // index of the layer's window
    const std::int32_t* positions;  // [num_rows]
    const std::int64_t* cache_rows;  // [num_rows], where keys and values go
    const std::int32_t* wanted;     // [num_wanted] rows of the pass whose logits are wanted
    const std::int64_t* logit_rows;  // [num_wanted] rows of the logits
    std::int64_t num_wanted;
    float *stream, *branch, *projected, *attended, *gated;  // [MAX_ROWS, stride of each]
    std::int64_t stream_stride, projected_stride, attended_stride, gated_stride, scores_stride;
    float* routes;  // [MAX_ROWS, routes_stride], logits of experts
    std::int64_t routes_stride;
    const Bench* benches;  // [num_threads]
    int num_threads;
    Team* team;
};

using Work = void (*)(const Pass& pass, int thread);

}  // namespace sequoia::forward
