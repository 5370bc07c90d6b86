// What a confidence head says of the nodes of one level, before their children are drawn.
//
// Computes    with e the head's row of a node's own token, and c what a projection gave for the slot of the level's depth:
//                 sigmoid(c + w e)
// Numerics    float32 whatever the type of e.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "rows.h"

namespace sequoia {

struct ForetoldLevel {
    std::int64_t rank;           // of e; 0 where the head reads no tokens
    const char* table;           // [num_tokens, rank]
    ElementType type;            // of the table
    std::int64_t num_tokens;
    const float* weight;         // w. [rank]
    float* embedded;             // [rank]
    const float* slot;           // c of the first request
    std::int64_t slot_stride;    // floats between requests
    float* out;                  // [B, N]; null: nothing is foretold

    bool reads_tokens() const { return rank > 0; }

    // Of one request. tokens, nodes: of the level. [W] each.
    void run(std::int64_t request, const std::int64_t* tokens, const std::int64_t* nodes, std::int64_t width,
             std::int64_t num_nodes) const {
        for (std::int64_t i = 0; i < width; ++i) {
            float logit = slot[request * slot_stride];
            if (reads_tokens()) {
                const std::int64_t token = std::clamp<std::int64_t>(tokens[i], 0, num_tokens - 1);
                widen_row(table + token * rank * element_bytes(type), type, rank, embedded);
                for (std::int64_t k = 0; k < rank; ++k) logit += weight[k] * embedded[k];
            }
            out[request * num_nodes + nodes[i]] = 1.0f / (1.0f + std::exp(-logit));
        }
    }
};

}  // namespace sequoia
