// What a launch of few_rows.cu is told, by value: up to 32 layers fit into a kernel's parameters.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sequoia {

constexpr int kFewRowsMaxLayers = 32;
constexpr int kFewRowsMaxRows = 32;
constexpr int kFewRowsQueries = 16;  // that a block attends with at once
constexpr int kFewRowsMaxWidth = 2048;
constexpr int kFewRowsMaxTreeRows = 1024;
constexpr int kFewRowsMaxSlots = 4096;

struct FewRowsLayer {
    const void* input_norm;   // [width]
    const void* projections;  // [(heads + 2 * kv_heads) * head_dim, width]: queries, keys, values
    const void* output;       // [width, heads * head_dim]
    const void* mlp_norm;     // [width]
    const void* gate_up;      // [2 * inner, width]: gates, then what they multiply
    const void* down;         // [width, inner]
    void* keys;               // [B, S, kv_heads, head_dim]
    void* values;             // likewise
};

// A product, and how it is cut: tiles of 8 outputs, chunks of the width.
struct FewRowsProduct {
    bool is_of_normed;
    int matrices;  // of as many outputs each: gates, and what they multiply
    int outputs;
    int width;
    int tiles;  // of a matrix
    int chunks;
    int blocks;        // of 32 columns, of the width
    int chunk_blocks;  // of a chunk; the last may have fewer
};

struct FewRows {
    FewRowsLayer layers[kFewRowsMaxLayers];
    const void* embedding;           // [embeddings, width]
    const void* final_norm;          // [width]
    const void* head;                // [outputs, width]
    const float* table;              // cosines and sines by position, [positions, head_dim]
    const std::int64_t* tokens;      // [B, N]
    const std::int32_t* cache_lens;  // [B]
    const std::int32_t* depths;      // [N]
    const std::int32_t* node_ids;    // [N]
    const std::int32_t* tree_mask;   // [N, words] or [B, N, words]
    void* stream;                    // [B * N, width]: these four are work space
    void* projected;                 // [B * N, (heads + 2 * kv_heads) * head_dim]
    void* attended;                  // [B * N, heads * head_dim]
    void* inner;                     // [B * N, inner]
    void* logits;                    // [B * N, outputs]
    unsigned* counters;              // [2], 0 between launches
    std::int64_t stride_tokens;      // strides in elements
    std::int64_t stride_logits;
    std::int64_t stride_mask_request;
    std::int64_t stride_cache_request;
    std::int64_t stride_cache_slot;
    std::int64_t stride_cache_head;
    std::int64_t num_embeddings;
    int num_layers;
    int num_rows;   // B * N
    int num_nodes;  // N
    int num_words;
    int num_tree_rows;
    int num_slots;
    int last_position;
    int num_heads;
    int num_kv_heads;
    int width;
    int inner_width;
    int num_outputs;
    float eps;
    float scale;          // of scores, log2(e) included
    int num_requests;
    int group;            // heads that share keys
    int projected_width;  // of queries, keys and values together
    int queries;          // of a head of keys: nodes times group
    int query_tiles;      // of kFewRowsQueries of them
    float per_node;       // reciprocals of the nodes and of the group
    float per_group;
    FewRowsProduct products[5];  // of a layer: projections, output, gate and up, down; and the head
    int num_stages;              // in shared memory; where it is laid out, in bytes:
    int stage_stride;            // from row to row of a stage
    int normed_at;
    int stages_at;
};

// Numbers of `few_rows_given`, in their order.
constexpr int kFewRowsLayerAddresses = 8;  // of a layer, as in FewRowsLayer
constexpr int kFewRowsAddresses = 15;      // embedding to counters
constexpr int kFewRowsStrides = 6;         // stride_tokens to stride_cache_head
constexpr int kFewRowsSizes = 13;          // num_embeddings to num_outputs, without num_layers

inline FewRows few_rows_given(
    const std::int64_t* layers,
    int num_layers,
    const std::int64_t* addresses,
    const std::int64_t* strides,
    const std::int64_t* sizes,
    double eps,
    double scale) {
    const auto at = [](std::int64_t address) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)); };
    FewRows given{};
    for (int layer = 0; layer < num_layers; ++layer) {
        const std::int64_t* const own = layers + static_cast<std::size_t>(layer) * kFewRowsLayerAddresses;
        given.layers[layer] = {at(own[0]), at(own[1]), at(own[2]), at(own[3]), at(own[4]), at(own[5]), at(own[6]), at(own[7])};
    }
    given.embedding = at(addresses[0]);
    given.final_norm = at(addresses[1]);
    given.head = at(addresses[2]);
    given.table = static_cast<const float*>(at(addresses[3]));
    given.tokens = static_cast<const std::int64_t*>(at(addresses[4]));
    given.cache_lens = static_cast<const std::int32_t*>(at(addresses[5]));
    given.depths = static_cast<const std::int32_t*>(at(addresses[6]));
    given.node_ids = static_cast<const std::int32_t*>(at(addresses[7]));
    given.tree_mask = static_cast<const std::int32_t*>(at(addresses[8]));
    given.stream = at(addresses[9]);
    given.projected = at(addresses[10]);
    given.attended = at(addresses[11]);
    given.inner = at(addresses[12]);
    given.logits = at(addresses[13]);
    given.counters = static_cast<unsigned*>(at(addresses[14]));
    given.stride_tokens = strides[0];
    given.stride_logits = strides[1];
    given.stride_mask_request = strides[2];
    given.stride_cache_request = strides[3];
    given.stride_cache_slot = strides[4];
    given.stride_cache_head = strides[5];
    given.num_embeddings = sizes[0];
    given.num_layers = num_layers;
    given.num_rows = static_cast<int>(sizes[1]);
    given.num_nodes = static_cast<int>(sizes[2]);
    given.num_words = static_cast<int>(sizes[3]);
    given.num_tree_rows = static_cast<int>(sizes[4]);
    given.num_slots = static_cast<int>(sizes[5]);
    given.last_position = static_cast<int>(sizes[6]);
    given.num_heads = static_cast<int>(sizes[7]);
    given.num_kv_heads = static_cast<int>(sizes[8]);
    // sizes[9] is the width of a head, which the kernel is chosen by
    given.width = static_cast<int>(sizes[10]);
    given.inner_width = static_cast<int>(sizes[11]);
    given.num_outputs = static_cast<int>(sizes[12]);
    given.eps = static_cast<float>(eps);
    given.scale = static_cast<float>(scale * 1.4426950408889634);
    given.num_requests = given.num_rows / given.num_nodes;
    given.group = given.num_heads / given.num_kv_heads;
    given.projected_width = (given.num_heads + 2 * given.num_kv_heads) * static_cast<int>(sizes[9]);
    given.queries = given.num_nodes * given.group;
    given.query_tiles = (given.queries + kFewRowsQueries - 1) / kFewRowsQueries;
    given.per_node = 1.0f / static_cast<float>(given.num_nodes);
    given.per_group = 1.0f / static_cast<float>(given.group);
    return given;
}

}  // namespace sequoia
