// A node of a drafted tree while its children are tried: what is left of the target's distribution and of the draft's.
//
// With unnormalised weights t(x) of the target and d(x) of the draft, drawn tokens zeroed, and D = sum d:
//     residual(x) = max(alpha t(x) - gamma d(x), 0), at first alpha = 1 / sum t and gamma = 0;
//     dropping x_i, with chance p: gamma' = p gamma + 1 / D; alpha' = p alpha; zero x_i;
//                   Z = sum max(alpha' t - gamma' d, 0); alpha = alpha' / Z; gamma = gamma' / Z; p <- Z / (Z + 1 - p).
// Two numbers are the whole state; a drop is one pass over two rows. The rules that try children, and what a chance is,
// are told in sequoia_kernels/ops/verify_tree/reference.py and traversal.py; from the root down every p is 1.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "rows.h"
#include "warp.h"

namespace sequoia {

struct Stream {
    std::uint64_t seed;
    std::uint64_t offset;
};

struct Tree {
    const std::int32_t* first_child;
    const std::int32_t* num_children;
    std::int64_t num_nodes;
    std::int64_t num_levels;
    std::int64_t max_branching;
};

struct VerifyRequest {
    Tree tree;
    const std::int64_t* tokens;  // [N]
    LogitRows target;            // rows are nodes
    LogitRows draft;
    Warp warp;
    Stream stream;
    bool wide;
};

struct Emitted {
    std::int32_t* nodes;  // [num_levels], -1 behind the last one
    std::int32_t num_accepted;
    std::int64_t next_token;
};

// Memory of a node's weights, rows padded to whole stretches. It may be lent to another node in between.
struct NodeRows {
    std::int32_t node = -1;  // whose weights these are
    Scratch<double> target, draft;
};

struct Residual {
    const double* target;  // weights
    const double* draft;   // weights, drawn tokens zeroed as in target; null if gamma is 0 for good
    double alpha;
    double gamma;

    double at(std::int64_t token) const {
        const double value = alpha * target[token] - (draft == nullptr ? 0.0 : gamma * draft[token]);
        return value > 0 ? value : 0;
    }
};

class TriedNode {
  public:
    // Begin with a node: its rows are loaded into the memory given.
    void open(const VerifyRequest& request, std::int32_t node, NodeRows& rows);

    // Go on with a node: its rows are loaded again, without what was dropped, if the memory was lent in between.
    void reopen(const VerifyRequest& request, NodeRows& rows);

    bool is_draw(std::int64_t token, std::int64_t vocab) const {
        return !closed_ && token >= 0 && token < vocab && residual_.draft[token] != 0;
    }
    double residual_at(std::int64_t token) const { return residual_.at(token); }
    double draft_at(std::int64_t token) const { return residual_.draft[token] / draft_mass_; }

    // Drop a child that is a draw. Returns the chance of this node behind it, from the one before.
    double drop(const VerifyRequest& request, std::int64_t token, double chance);

    // The token behind this node, from its residual.
    std::int64_t draw_next(const VerifyRequest& request) const;

    std::int32_t node() const { return node_; }

  private:
    double load_target(const VerifyRequest& request, NodeRows& rows);
    double* draft_logits(const VerifyRequest& request, double& peak) const;
    double weigh_draft(const VerifyRequest& request, const double* logits);
    void rebase(const VerifyRequest& request);

    std::int32_t node_ = -1;
    Residual residual_{};
    double target_mass_ = 0, draft_mass_ = 0, draft_peak_ = 0;
    NodeRows* rows_ = nullptr;
    bool closed_ = false;    // no further child can be a draw
    bool restored_ = false;  // the residual is the target itself, drawn tokens included
    std::vector<std::pair<std::int64_t, double>> drawn_;  // drawn tokens with the target weights they had
};

// The largest logit of the target behind a node, its lowest token on ties; the logits go into the memory given.
std::int64_t greedy_token(const VerifyRequest& request, std::int32_t node, NodeRows& rows);

// Decides a request at a temperature above 0 by the rule "traversal".
void traverse(const VerifyRequest& request, Emitted& emitted);

}  // namespace sequoia
