// verify_tree on the CPU.
//
// Computes    the accepted path and the next token of each request; the rules, their corners and their reasons are in
//             sequoia_kernels/ops/verify_tree/reference.py and traversal.py.
// Plan        one thread; requests one after the other. Here is the rule "sequoia", which walks from the root, so that
//             only nodes on the accepted path cost anything (a GPU decides all nodes at once instead); the rule
//             "traversal" is in traverse_tree.cpp.
// Memory      checking reads all rows that may be used once, which gives their largest logits as well; then two rows of
//             logits per visited node are read once more. Scratch of a few rows.
// Numerics    exponentials in float32 (float64 where either of the logits is), as in the reference; sums and what is
//             made of them in float64. The keys of the next token are rounded as the reference's. Weights that
//             underflow in float32 are 0: both agree on what cannot be drawn.

#include <algorithm>
#include <vector>

#include "ops.h"
#include "philox.h"
#include "tried_node.h"

namespace sequoia {
namespace {

// Memory of the walks of one thread.
template <class Real>
struct Workspace {
    TriedNode<Real> tried;
    NodeRows<Real> rows;
};

// What is decided at one node: the accepted child, or the next token where there is none.
struct Decision {
    std::int32_t child;
    std::int64_t next_token;
};

Decision decide_greedily(const VerifyRequest& request, std::int32_t node) {
    const Tree& tree = request.tree;
    const std::int64_t largest = greedy_token(request, node);
    for (std::int32_t rank = 0; rank < tree.num_children[node]; ++rank) {
        const std::int32_t child = tree.first_child[node] + rank;
        if (request.tokens[child] == largest) return {child, -1};
    }
    return {-1, largest};
}

template <class Real>
Decision decide(const VerifyRequest& request, std::int32_t node, Workspace<Real>& workspace) {
    const Tree& tree = request.tree;
    TriedNode<Real>& tried = workspace.tried;
    tried.open(request, node, workspace.rows);
    for (std::int32_t rank = 0; rank < tree.num_children[node]; ++rank) {
        const std::int32_t child = tree.first_child[node] + rank;
        if (!tried.is_draw(request, child)) continue;
        const double coin = node_coin(request.stream.seed, request.stream.offset, static_cast<std::uint32_t>(child));
        if (coin * tried.draft_at(request, child) < tried.residual_at(request.tokens[child])) return {child, -1};
        tried.drop(request, child, 1.0);
    }
    return {-1, tried.draw_next(request)};
}

template <class Real>
void walk(const VerifyRequest& request, Emitted& emitted) {
    static thread_local Workspace<Real> workspace;
    std::fill(emitted.nodes, emitted.nodes + request.tree.num_levels, -1);
    emitted.num_accepted = 0;
    for (std::int32_t node = 0; node >= 0;) {
        emitted.nodes[emitted.num_accepted++] = node;
        const Decision decision = request.warp.temperature == 0 ? decide_greedily(request, node)
                                                                : decide(request, node, workspace);
        node = decision.child;
        emitted.next_token = decision.next_token;
    }
}

// Children lie behind their parents and inside the tree, and no node has two parents, so that every walk ends; and the
// two bounds hold.
bool tree_valid(const Tree& tree, std::vector<std::int64_t>& depths) {
    depths.assign(static_cast<std::size_t>(tree.num_nodes), 0);
    std::int64_t unclaimed = 1;  // the first node that may be a child of the nodes to come
    for (std::int64_t node = 0; node < tree.num_nodes; ++node) {
        const std::int64_t first = tree.first_child[node], count = tree.num_children[node];
        if (count < 0 || count > tree.max_branching || depths[node] >= tree.num_levels) return false;
        if (count == 0) continue;
        if (first <= node || first < unclaimed || first > tree.num_nodes - count) return false;
        unclaimed = first + count;
        std::fill_n(depths.begin() + first, count, depths[node] + 1);
    }
    return true;
}

// Largest logits of the rows of one request, as VerifyRequest has them.
struct Peaks {
    double* target;
    double* draft;
};

bool values_valid(const VerifyRequest& request, Peaks peaks) {
    const Tree& tree = request.tree;
    const float temperature = static_cast<float>(request.warp.temperature);
    const float top_p = static_cast<float>(request.warp.top_p);
    if (!temperatures_valid(&temperature, 1) || !top_ps_valid(&top_p, 1)) return false;
    for (std::int64_t node = 1; node < tree.num_nodes; ++node) {
        if (request.tokens[node] < -1 || request.tokens[node] >= request.target.vocab) return false;
    }
    const auto look = [](const LogitRows& rows, std::int64_t node, double* found) {
        const RowPeak peak = row_peak(rows.row(node), rows.type, rows.vocab);
        found[node] = peak.logit;
        return peak.valid;
    };
    for (std::int64_t node = 0; node < tree.num_nodes; ++node) {
        if (!look(request.target, node, peaks.target)) return false;
        if (request.has_draft() && tree.num_children[node] > 0 && !look(request.draft, node, peaks.draft)) {
            return false;
        }
    }
    return true;
}

}  // namespace

bool verify_tree(std::uintptr_t tokens_ptr, std::uintptr_t target_ptr, int target_type, std::uintptr_t draft_ptr,
                 int draft_type, std::uintptr_t target_to_draft_ptr, std::uintptr_t certain_ptr,
                 std::uintptr_t first_child_ptr, std::uintptr_t num_children_ptr,
                 std::int64_t max_branching, std::uintptr_t temperature_ptr, std::uintptr_t seeds_ptr,
                 std::uintptr_t offsets_ptr, std::uintptr_t top_k_ptr, std::uintptr_t top_p_ptr,
                 std::uintptr_t nodes_ptr, std::uintptr_t num_accepted_ptr, std::uintptr_t next_token_ptr,
                 std::int64_t batch_size, std::int64_t num_nodes, std::int64_t num_levels, std::int64_t vocab,
                 std::int64_t draft_vocab, std::int64_t topology_stride, std::int64_t certain_stride,
                 std::int64_t tokens_stride, std::int64_t target_batch_stride,
                 std::int64_t target_node_stride, std::int64_t draft_batch_stride, std::int64_t draft_node_stride,
                 int rule_code, bool check_values) {
    const auto rule = static_cast<VerificationRule>(rule_code);
    const auto target_element = static_cast<ElementType>(target_type);
    const auto draft_element = static_cast<ElementType>(draft_type);
    const std::int64_t target_bytes = element_bytes(target_element), draft_bytes = element_bytes(draft_element);
    const auto* top_ks = reinterpret_cast<const std::int32_t*>(top_k_ptr);
    const auto* top_ps = reinterpret_cast<const float*>(top_p_ptr);

    static thread_local Scratch<double> peaks_scratch;
    double* const all_peaks = check_values ? peaks_scratch.reserve(2 * batch_size * num_nodes) : nullptr;
    const auto peaks = [&](std::int64_t b) {
        if (!check_values) return Peaks{nullptr, nullptr};
        double* const own = all_peaks + 2 * b * num_nodes;
        return Peaks{own, own + num_nodes};
    };
    const auto request = [&](std::int64_t b) {
        const char* const target = reinterpret_cast<const char*>(target_ptr) + b * target_batch_stride * target_bytes;
        const char* const draft =
            draft_ptr == 0 ? nullptr : reinterpret_cast<const char*>(draft_ptr) + b * draft_batch_stride * draft_bytes;
        return VerifyRequest{
            Tree{reinterpret_cast<const std::int32_t*>(first_child_ptr) + b * topology_stride,
                 reinterpret_cast<const std::int32_t*>(num_children_ptr) + b * topology_stride, num_nodes, num_levels,
                 max_branching},
            reinterpret_cast<const std::int64_t*>(tokens_ptr) + b * tokens_stride,
            LogitRows{target, target_element, target_node_stride * target_bytes, vocab},
            LogitRows{draft, draft_element, draft_node_stride * draft_bytes, draft_vocab},
            reinterpret_cast<const std::int32_t*>(target_to_draft_ptr),
            certain_ptr == 0 ? nullptr : reinterpret_cast<const bool*>(certain_ptr) + b * certain_stride,
            peaks(b).target,
            peaks(b).draft,
            Warp{reinterpret_cast<const float*>(temperature_ptr)[b], top_ks == nullptr ? 0 : top_ks[b],
                 top_ps == nullptr ? 1.0 : top_ps[b]},
            Stream{static_cast<std::uint64_t>(reinterpret_cast<const std::int64_t*>(seeds_ptr)[b]),
                   static_cast<std::uint64_t>(reinterpret_cast<const std::int64_t*>(offsets_ptr)[b])}};
    };
    const bool wide =
        target_element == ElementType::float64 || (draft_ptr != 0 && draft_element == ElementType::float64);
    static thread_local std::vector<std::int64_t> depths;
    for (std::int64_t b = 0; b < batch_size && check_values; ++b) {
        const VerifyRequest checked = request(b);
        // A tree that all share is looked at once.
        if ((b == 0 || topology_stride != 0) && !tree_valid(checked.tree, depths)) return false;
        if (!values_valid(checked, peaks(b))) return false;
    }
    for (std::int64_t b = 0; b < batch_size; ++b) {
        Emitted emitted{reinterpret_cast<std::int32_t*>(nodes_ptr) + b * num_levels, 0, -1};
        const VerifyRequest own = request(b);
        if (rule == VerificationRule::traversal && own.warp.temperature != 0) {  // greedily all rules are one
            wide ? traverse<double>(own, emitted) : traverse<float>(own, emitted);
        } else {
            wide ? walk<double>(own, emitted) : walk<float>(own, emitted);
        }
        reinterpret_cast<std::int32_t*>(num_accepted_ptr)[b] = emitted.num_accepted;
        reinterpret_cast<std::int64_t*>(next_token_ptr)[b] = emitted.next_token;
    }
    return true;
}

}  // namespace sequoia
