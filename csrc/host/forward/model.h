// What a forward is made of: a model as a description of its layers, and one call of it.
//
// Nothing is copied from the model. A description names tensors by their number in a table of addresses, which comes with
// every call: whatever the caller's tensors hold then is what is multiplied.

#pragma once

#include <cstdint>
#include <vector>

#include "host/rows.h"

namespace sequoia::forward {

constexpr std::int64_t MAX_ROWS = 64;   // fed through all layers at a time
constexpr std::int64_t ROW_BLOCK = 32;  // query rows of one unit of attention

constexpr std::int64_t PACKED_ROWS = 64;  // of a matrix of 4 bits, which are shared out together

// How a matrix of few bits lies. Words are GPTQ's: the columns 8 i + j of a row are bits 4 j.. of its word i, and so are
// the rows 8 i + j of zeros. Blocks are those that torch makes for its kernel on CPUs: the low bits of a column's bytes
// are the first half of a block's rows, the high bits the second; in a last block that is not whole they are turns.
enum class Packing : int {
    none = 0,
    int8_rows = 1,    // [rows, columns] int8; scales [rows]
    int4_words = 2,   // [columns / 8, rows] int32; scales [groups, rows], zeros [groups, rows / 8] int32
    int4_blocks = 3,  // [rows / block][columns, block / 2] bytes; scales and zeros side by side, [groups, rows, 2]
};

// What a matrix of few bits has beside its numbers. Of 4 bits a weight is (number - zero) * scale in words, where the
// zero is what lies there + `zero_shift`; (number - 8) * scale + zero in blocks.
struct Quantised {
    Packing packing = Packing::none;
    int scales = -1, zeros = -1, order = -1;  // numbers in the table of addresses; order: of words, [columns] int32, the group of each column
    ElementType scales_type = ElementType::float32;
    std::int64_t group = 0;       // columns of a group
    std::int64_t whole_rows = 0;  // of the tensor, where the matrix has some of its rows
    std::int64_t block = 0;
    float zero_shift = 0.0f;

    bool four_bits() const { return packing == Packing::int4_words || packing == Packing::int4_blocks; }
};

// Rows of a row-major tensor: [rows, columns]; or a whole one that lies transposed, [columns, rows]; or packed ones.
struct Matrix {
    int tensor = -1;  // number in the table of addresses, -1 for none
    bool transposed = false;
    std::int64_t first_row = 0;
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    ElementType type = ElementType::float32;
    Quantised quantised;

    bool given() const { return tensor >= 0; }
    bool packed() const { return quantised.packing != Packing::none; }
    std::int64_t num_groups() const { return (columns + quantised.group - 1) / quantised.group; }
};

// A linear layer; the bias is a matrix of one row.
struct Linear {
    Matrix weight;
    Matrix bias;
};

enum class NormKind : int { none = 0, rms = 1, layer = 2 };

struct Norm {
    NormKind kind = NormKind::none;
    Matrix weight, bias;
    float eps = 0.0f;
    float offset = 0.0f;  // added to the weight

    bool given() const { return kind != NormKind::none; }
};

enum class Activation : int { silu = 0, gelu_tanh = 1, gelu = 2, relu = 3, relu_squared = 4 };

// Experts of an MLP. The layer's gate, up and down are the first expert's; those of the others lie further down in the
// same tensors.
struct Experts {
    Linear router;  // a row an expert
    std::int64_t count = 0, chosen = 0;  // chosen: by each row; count 0: the MLP has no experts
    bool normalised = false;  // the weights of a row's experts add up to 1, not those of all experts
    std::int64_t gate_stride = 0, up_stride = 0, down_stride = 0;  // rows from an expert to the next

    bool given() const { return count > 0; }
};

// Where the heads of one kind lie in a row of all projections: head h starts at first + h * stride.
struct Heads {
    std::int64_t first = 0, stride = 0;
};

struct Layer {
    std::int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
    float scale = 1.0f;
    float softcap = 0.0f;          // 0 is off
    std::int64_t window = 0;       // 0 is off
    int rotation = -1;             // number of the table of sines and cosines, -1 for none
    std::int64_t rotated_dims = 0;  // of a head, the first ones
    bool parallel = false;         // the MLP reads what the attention reads
    bool norms_whole_rows = false;  // query_norm and key_norm over all heads at once
    Norm input_norm, query_norm, key_norm, attended_norm, mlp_norm, mlp_output_norm;
    std::vector<Linear> projections;  // of queries, keys and values; their rows follow one another
    Heads queries, keys, values;
    Linear output, gate, up, down;  // gate: none in a plain MLP
    Experts experts;
    Activation activation = Activation::silu;
    ElementType cache_type = ElementType::float32;

    std::int64_t group() const { return num_heads / num_kv_heads; }
};

struct Model {
    std::int64_t width = 0;  // of the residual stream
    Matrix embedding, positions;
    std::int64_t position_offset = 0;  // of the table of learned positions
    float embedding_scale = 1.0f;
    float residual_scale = 1.0f;
    Norm final_norm;
    Linear head;
    float logit_scale = 1.0f;
    float logit_softcap = 0.0f;
    std::vector<Layer> layers;
    std::vector<std::int64_t> rotation_dims;  // of each table
    // Of a draft on features of its target: rows come with a feature, which is the stream's first value, and the first
    // layer's projections read [its norm of the embedding, feature_norm of the feature], of twice the width.
    bool has_features = false;
    bool normed_residual = false;  // the stream begins with the normed feature
    Norm feature_norm;
};

// One forward: num_requests x num_nodes rows, all nodes of a request after those of the one before.
struct Call {
    const std::uintptr_t* tensors;  // the table of addresses
    const std::int64_t* tokens;     // [B, N]
    const std::int32_t* depths;     // [N]
    const std::int32_t* node_ids;   // [N]
    const std::uint32_t* tree_mask;  // [N, num_words] or [B, N, num_words]
    const std::int32_t* cache_lens;  // [B]
    const std::int32_t* active;      // [B], or null: a request with 0 is left out, and nothing of it is read or written
    std::int64_t num_requests, num_nodes, num_words;
    bool mask_per_request;
    std::int64_t max_position;  // positions behind it are fed as it
    const std::uintptr_t* caches;  // keys and values of each layer, [B, cache_rows, num_kv_heads, head_dim]
    std::int64_t cache_rows;       // of a request
    // Of paged caches, [num_pages, page_size, num_kv_heads, head_dim]: row s of request b lies in page
    // block_table[b, s / page_size]. Read anew by every run.
    const std::int32_t* block_table;  // [B, cache_rows / page_size], or null
    std::int64_t page_size;           // 0: not paged
    std::int64_t num_pages;
    const std::uintptr_t* rotations;   // tables [positions, dims]: cosines of dims / 2 frequencies, then sines
    const std::int64_t* wanted_nodes;  // [B, num_wanted] different ones, or null: the logits of all rows
    std::int64_t num_wanted;           // of each request
    void* logits;                      // [B, N or num_wanted, vocab]
    ElementType logits_type;
    float* const* hidden;  // for each layer and behind the last norm null, or [B, N, width]; or null
    const float* features;  // [B, N, width], of a model that has features
    float* outputs;         // of the last layer, before the norm: [B, N, width], or null

    std::int64_t num_rows() const { return num_requests * num_nodes; }
    bool is_active(std::int64_t request) const { return active == nullptr || active[request] != 0; }
    bool paged() const { return page_size > 0; }
};

}  // namespace sequoia::forward
