// What a Markov head multiplies to logits, for the nodes of one level of a tree.
//
// Computes    with e the head's row of a node's own token, c what a projection gave for the slot of the level's depth, and
//             s the state of the node's parent:
//                 plain   m = e
//                 gated   m = sigmoid(P e + c) e
//                 rnn     g, h, o = P [s; e] + c;  s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(h);  m = tanh(o)
//             and, behind the product of m that another forward takes, the row of the depth of each request is added.
// Numerics    float32 whatever the type of the weights: no m and no s is rounded to it, a sum of rows once.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "forward/bound.h"
#include "rows.h"

namespace sequoia {

struct MarkovLevel {
    std::int64_t rank;           // r; 0 where the level's own forward reads rows of the head by their tokens
    bool hands_states;           // rnn
    const char* table;           // [num_tokens, r]
    ElementType type;            // of the table
    std::int64_t num_tokens;
    forward::BoundForward* mixing;  // P, over the rows of `inputs`
    const std::uintptr_t* mixing_weights;
    float* inputs;               // [B, W, r], or [B, W, 2 r] with the states in front
    float* mixed;                // what P gives: [B, W, r] or [B, W, 3 r]
    float* outputs;              // m, which the level's own forward reads. [B, W, r]
    const float* slot;           // c of the first request
    std::int64_t slot_stride;    // floats between requests
    float* states;               // [B, N + 1, r], node j's at j + 1, what the root goes on from first
    const std::int32_t* parents;  // [N] or [B, N]
    std::int64_t parents_stride;  // 0 or N

    bool reads_slots() const { return rank > 0; }

    // tokens, nodes: of the level. [B, W] and [W]. Returns false where a product is refused.
    bool run(const std::int64_t* tokens, const std::int64_t* nodes, std::int64_t batch_size, std::int64_t width,
             std::int64_t num_nodes, int num_threads) const {
        const std::int64_t inputs_of_row = hands_states ? 2 * rank : rank, mixed_of_row = hands_states ? 3 * rank : rank;
        for (std::int64_t b = 0; b < batch_size; ++b) {
            for (std::int64_t i = 0; i < width; ++i) {
                float* input = inputs + (b * width + i) * inputs_of_row;
                if (hands_states) {
                    const std::int64_t parent = parents[b * parents_stride + nodes[i]];  // the root's is -1
                    const float* const state = states + (b * (num_nodes + 1) + parent + 1) * rank;
                    for (std::int64_t k = 0; k < rank; ++k) *input++ = state[k];
                }
                const std::int64_t token = std::clamp<std::int64_t>(tokens[b * width + i], 0, num_tokens - 1);
                widen_row(table + token * rank * element_bytes(type), type, rank, input);
            }
        }
        if (!mixing->run(mixing_weights, mixed, num_threads)) return false;
        const auto sigmoid = [](float value) { return 1.0f / (1.0f + std::exp(-value)); };
        for (std::int64_t b = 0; b < batch_size; ++b) {
            const float* const c = slot + b * slot_stride;
            for (std::int64_t i = 0; i < width; ++i) {
                const std::int64_t row = b * width + i;
                const float *const input = inputs + row * inputs_of_row, *const p = mixed + row * mixed_of_row;
                float* const out = outputs + row * rank;
                if (!hands_states) {
                    for (std::int64_t k = 0; k < rank; ++k) out[k] = sigmoid(p[k] + c[k]) * input[k];
                    continue;
                }
                float* const state = states + (b * (num_nodes + 1) + nodes[i] + 1) * rank;
                for (std::int64_t k = 0; k < rank; ++k) {
                    const float gate = sigmoid(p[k] + c[k]);
                    state[k] = gate * input[k] + (1.0f - gate) * std::tanh(p[rank + k] + c[rank + k]);
                    out[k] = std::tanh(p[2 * rank + k] + c[2 * rank + k]);
                }
            }
        }
        return true;
    }
};

}  // namespace sequoia
