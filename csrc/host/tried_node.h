// A node of a drafted tree while its children are tried: what is left of the target's distribution and of the draft's.
//
// With unnormalised weights t(x) of the target and d(x) of the draft, drawn tokens zeroed, and D = sum d:
//     residual(x) = max(alpha t(x) - gamma d(x), 0) / Z, at first alpha = 1, gamma = 0 and Z = sum t;
//     dropping x_i, with chance p: gamma' = p gamma + Z / D; alpha' = p alpha; zero x_i;
//                   Z' = sum max(alpha' t - gamma' d, 0); m = Z' / Z; p <- m / (m + 1 - p).
// A child that is certain has a draft of its own, which is 0 but for it: dropping it leaves gamma' = p gamma.
// Three numbers are the whole state, scaled by powers of 2, so that a sum Z' > 0 is what the draw finds again to the
// last bit; a drop is one pass over two rows. The rules that try children, and what a chance is, are told in
// sequoia_kernels/ops/verify_tree/reference.py and traversal.py; from the root down every p is 1.
//
// Where top-k or top-p leave few tokens of the target, only those are kept of either row: the residual is 0 elsewhere,
// and of the draft's other weights nothing but their sum counts. A draft of fewer tokens is spread out to the target's
// when its weights are made. Weights are float32, or float64 where either of the
// logits is; all sums and what is made of them are float64.

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
    LogitRows draft;             // of no data where nothing was drawn
    const std::int32_t* target_to_draft;  // [vocab], or null where the draft's tokens are the target's
    const bool* certain;         // [N], or null
    const double* target_peaks;  // largest logit of each row, or null where nobody has looked yet
    const double* draft_peaks;   // of nodes with children
    Warp warp;
    Stream stream;

    double target_peak(std::int32_t node) const { return peak(target, target_peaks, node); }
    double draft_peak(std::int32_t node) const { return peak(draft, draft_peaks, node); }
    bool has_draft() const { return draft.data != nullptr; }
    bool is_certain(std::int32_t node) const { return certain != nullptr && certain[node]; }
    // Where a token is in a row of the draft, -1 if the draft does not know it.
    std::int64_t draft_id(std::int64_t token) const {
        if (target_to_draft == nullptr) return token;
        const std::int64_t id = target_to_draft[token];
        return id < draft.vocab ? id : -1;
    }

  private:
    static double peak(const LogitRows& rows, const double* peaks, std::int32_t node) {
        return peaks != nullptr ? peaks[node] : row_peak(rows.row(node), rows.type, rows.vocab).logit;
    }
};

struct Emitted {
    std::int32_t* nodes;  // [num_levels], -1 behind the last one
    std::int32_t num_accepted;
    std::int64_t next_token;
};

// Memory of a node's weights, padded with zeros to whole stretches. It may be lent to another node in between.
template <class Real>
struct NodeRows {
    std::int32_t node = -1;  // whose weights these are
    Scratch<Real> target, draft;
    std::vector<std::int64_t> tokens;  // that the weights belong to, rising, where those are not all
};

template <class Real>
struct Residual {
    const Real* target;          // weights
    const Real* draft;           // weights, drawn tokens zeroed as in target; null if gamma is 0 for good
    const std::int64_t* tokens;  // of the entries; null if they are those of all tokens
    std::int64_t size;           // entries
    double alpha;
    double gamma;
    double mass;

    // Before the division by the mass; 0 or less outside of the residual.
    double value_at(std::int64_t entry) const {
        const double drafted = draft == nullptr ? 0.0 : gamma * static_cast<double>(draft[entry]);
        return alpha * static_cast<double>(target[entry]) - drafted;
    }
    double at(std::int64_t entry) const {
        const double value = value_at(entry);
        return value > 0 ? value / mass : 0;
    }
};

template <class Real>
class TriedNode {
  public:
    // Begin with a node: its rows are loaded into the memory given.
    void open(const VerifyRequest& request, std::int32_t node, NodeRows<Real>& rows);

    // Go on with a node: its rows are loaded again, without what was dropped, if the memory was lent in between.
    void reopen(const VerifyRequest& request, NodeRows<Real>& rows);

    // Whether a child can have been proposed: drawn, or being certain.
    bool is_draw(const VerifyRequest& request, std::int32_t child) const {
        const std::int64_t token = request.tokens[child];
        if (finished_ || token < 0 || token >= request.target.vocab) return false;
        if (request.is_certain(child)) return !was_dropped(token);
        return !exhausted_ && draft_weight(request, token) != 0;
    }
    double residual_at(std::int64_t token) const {
        const std::int64_t entry = entry_of(token);
        return entry < 0 ? 0 : residual_.at(entry);
    }
    // Of a child that is a draw.
    double draft_at(const VerifyRequest& request, std::int32_t child) const {
        return request.is_certain(child) ? 1 : draft_weight(request, request.tokens[child]) / draft_mass_;
    }

    // Drop a child that is a draw. Returns the chance of this node behind it, from the one before.
    double drop(const VerifyRequest& request, std::int32_t child, double chance);

    // The token behind this node, from its residual.
    std::int64_t draw_next(const VerifyRequest& request) const;

    std::int32_t node() const { return node_; }

  private:
    double load_target(const VerifyRequest& request, NodeRows<Real>& rows);
    void set_entries(const Real* target, const std::int64_t* tokens, std::int64_t size) {
        residual_.target = target;
        residual_.tokens = tokens;
        residual_.size = size;
    }
    LogitRows undrawn_draft(const VerifyRequest& request) const;
    double weigh_draft(const VerifyRequest& request, const LogitRows& logits);
    bool was_dropped(std::int64_t token) const;
    double draft_weight(const VerifyRequest& request, std::int64_t token) const;
    std::int64_t entry_of(std::int64_t token) const;
    double take_out(std::int64_t entry);
    void lower_draft_mass(const VerifyRequest& request, double weight);

    std::int32_t node_ = -1;
    Residual<Real> residual_{};
    Weighing<Real> draft_weighing_;
    double target_mass_ = 0, draft_mass_ = 0;
    double summed_draft_mass_ = 0;  // the draft's mass when it was last added up
    NodeRows<Real>* rows_ = nullptr;
    bool finished_ = false;  // no further child counts
    bool exhausted_ = false;  // no further child can have been drawn
    bool restored_ = false;  // the residual is the target itself, drawn tokens included
    std::vector<std::pair<std::int64_t, double>> drawn_;  // drawn tokens with the target weights they had
};

// The largest logit of the target behind a node, its lowest token on ties.
std::int64_t greedy_token(const VerifyRequest& request, std::int32_t node);

// Decides a request at a temperature above 0 by the rule "traversal".
template <class Real>
void traverse(const VerifyRequest& request, Emitted& emitted);

}  // namespace sequoia
