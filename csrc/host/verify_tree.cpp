// verify_tree on the CPU.
//
// Computes    the accepted path and the next token of each request; the rule, its corners and their reasons are in
//             sequoia_kernels/ops/verify_tree/reference.py.
// Plan        one thread; requests one after the other, each walking from the root, so that only nodes on the accepted
//             path cost anything (a GPU decides all nodes at once instead).
// Memory      two rows of logits per visited node; scratch of a few rows.
// Numerics    float64 throughout; only the keys of the next token are rounded to float32 (but for float64 logits), as
//             in the reference. Weights that underflow in float32 are 0: both agree on what cannot be drawn.
//
// At a node, with unnormalised weights t(x) of the target and d(x) of the draft, drawn tokens zeroed, and D = sum d:
//     residual(x) = max(alpha t(x) - gamma d(x), 0), at first alpha = 1 / sum t and gamma = 0;
//     rejecting x_i: gamma' = gamma + 1 / D; zero x_i; Z = sum max(alpha t - gamma' d, 0);
//                    alpha /= Z; gamma = gamma' / Z.
// Two numbers are the whole state; a rejection is one pass over two rows.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "ops.h"
#include "streams.h"
#include "warp.h"

namespace sequoia {
namespace {

// The draft's mass below which its weights are computed afresh from the largest logit left: they are relative to a
// token that is no longer there, and would underflow.
constexpr double REBASE_BELOW = 0x1p-10;

constexpr double NEVER = -std::numeric_limits<double>::infinity();

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

struct Masses {
    double residual;
    double draft;
};

struct Stream {
    std::uint64_t seed;
    std::uint64_t offset;
};

}  // namespace

// Sums of max(alpha target - gamma draft, 0) and of draft.
SEQUOIA_CLONES Masses masses_left(const double* target, const double* draft, std::int64_t size, double alpha,
                                  double gamma) {
    double residual_lanes[LANES] = {}, draft_lanes[LANES] = {};
    for (std::int64_t i = 0; i < size; i += LANES) {
        for (std::int64_t lane = 0; lane < LANES; ++lane) {
            const double value = alpha * target[i + lane] - gamma * draft[i + lane];
            residual_lanes[lane] += value > 0 ? value : 0.0;
            draft_lanes[lane] += draft[i + lane];
        }
    }
    Masses masses{0, 0};
    for (std::int64_t lane = 0; lane < LANES; ++lane) {
        masses.residual += residual_lanes[lane];
        masses.draft += draft_lanes[lane];
    }
    return masses;
}

SEQUOIA_CLONES double mass_left(const double* weights, std::int64_t size) {
    double lanes[LANES] = {};
    for (std::int64_t i = 0; i < size; i += LANES) {
        for (std::int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += weights[i + lane];
    }
    double mass = 0;
    for (const double lane : lanes) mass += lane;
    return mass;
}

// The token with the largest log(residual) + gumbel, lowest on ties. Weights padded with zeros to whole stretches.
SEQUOIA_CLONES std::int64_t draw_residual(const Residual& residual, std::int64_t vocab, Stream stream, bool wide) {
    const double* const target = residual.target;
    // Without a draft any finite row stands in for it, times a gamma of 0.
    const double* const draft = residual.draft == nullptr ? residual.target : residual.draft;
    const double gamma = residual.draft == nullptr ? 0.0 : residual.gamma;
    std::int64_t best_token = 0;
    double best_key = NEVER;
    for (std::int64_t first = 0; first < vocab; first += STRETCH) {
        float probs[STRETCH];
        int any = 0;
        for (std::int64_t i = 0; i < STRETCH; ++i) {
            const double value = residual.alpha * target[first + i] - gamma * draft[first + i];
            probs[i] = static_cast<float>(value > 0 ? value : 0.0);
            any |= value > 0;
        }
        if (any == 0) continue;

        std::uint32_t words[STRETCH];
        stretch_words(stream.seed, stream.offset, RESIDUAL_TAG, first, words);
        float bounds[STRETCH];
        const float best = static_cast<float>(best_key);
        any = 0;
        for (std::int64_t i = 0; i < STRETCH; ++i) {
            bounds[i] = log_upper_bound(probs[i]) + gumbel_upper_bound(words[i]);
            any |= bounds[i] > best;
        }
        if (any == 0) continue;

        for (std::int64_t i = 0; i < STRETCH; ++i) {
            if (!(static_cast<double>(bounds[i]) > best_key)) continue;
            const double prob = residual.at(first + i);
            const float noise = gumbel(words[i]);
            const double key = wide ? std::log(prob) + static_cast<double>(noise)
                                    : static_cast<double>(static_cast<float>(std::log(prob)) + noise);
            if (key > best_key) {
                best_key = key;
                best_token = first + i;
            }
        }
    }
    return best_token;
}

namespace {

struct Tree {
    const std::int32_t* first_child;
    const std::int32_t* num_children;
    std::int64_t num_nodes;
    std::int64_t num_levels;
    std::int64_t max_branching;
};

struct Request {
    Tree tree;
    const std::int64_t* tokens;  // [N]
    LogitRows target;            // rows are nodes
    LogitRows draft;
    Warp warp;
    Stream stream;
    bool wide;
};

struct Emitted {
    std::int32_t* nodes;  // [num_levels]
    std::int32_t num_accepted;
    std::int64_t next_token;
};

// Memory of one walk, rows padded to whole stretches.
struct Workspace {
    Scratch<double> target_logits, target_weights, draft_logits, draft_weights;
    std::vector<std::pair<std::int64_t, double>> drawn_targets;  // drawn tokens with the target weights they had
    std::vector<std::int64_t> depths;                            // of the nodes, while a tree is looked at
};

double* reserve_row(Scratch<double>& scratch, std::int64_t vocab, double padding) {
    const std::int64_t room = (vocab + STRETCH - 1) / STRETCH * STRETCH;
    double* const row = scratch.reserve(room);
    std::fill(row + vocab, row + room, padding);
    return row;
}

// What is decided at one node: the accepted child, or the next token where there is none.
struct Decision {
    std::int32_t child;
    std::int64_t next_token;
};

Decision decide_greedily(const Request& request, std::int32_t node, Workspace& workspace) {
    const Tree& tree = request.tree;
    const std::int64_t vocab = request.target.vocab;
    double* const logits = reserve_row(workspace.target_logits, vocab, NEVER);
    const double peak = load_row(request.target.row(node), request.target.type, vocab, logits);
    const std::int64_t largest = first_index_of(logits, peak);
    for (std::int32_t rank = 0; rank < tree.num_children[node]; ++rank) {
        const std::int32_t child = tree.first_child[node] + rank;
        if (request.tokens[child] == largest) return {child, -1};
    }
    return {-1, largest};
}

Decision decide(const Request& request, std::int32_t node, Workspace& workspace) {
    const Tree& tree = request.tree;
    const std::int64_t vocab = request.target.vocab;
    const std::int64_t size = padded(vocab);
    const double temperature = request.warp.temperature;
    double* const logits = reserve_row(workspace.target_logits, vocab, NEVER);
    double* const target = reserve_row(workspace.target_weights, vocab, 0);
    const double target_peak = load_row(request.target.row(node), request.target.type, vocab, logits);
    const WarpedRow warped = warp_row(logits, vocab, target_peak, request.warp, request.wide, target);
    Residual residual{target, nullptr, 1.0 / warped.mass, 0.0};

    const std::int32_t num_children = tree.num_children[node];
    if (num_children == 0) return {-1, draw_residual(residual, vocab, request.stream, request.wide)};

    double* const draft_logits = reserve_row(workspace.draft_logits, vocab, NEVER);
    double* const draft = reserve_row(workspace.draft_weights, vocab, 0);
    double draft_peak = load_row(request.draft.row(node), request.draft.type, vocab, draft_logits);
    double draft_mass = softmax_weights(draft_logits, vocab, draft_peak, temperature, request.wide, draft);
    residual.draft = draft;
    workspace.drawn_targets.clear();

    for (std::int32_t rank = 0; rank < num_children; ++rank) {
        const std::int32_t child = tree.first_child[node] + rank;
        const std::int64_t token = request.tokens[child];
        if (token < 0 || token >= vocab || draft[token] == 0) continue;  // not a draw

        const double coin = node_coin(request.stream.seed, request.stream.offset, static_cast<std::uint32_t>(child));
        if (coin * (draft[token] / draft_mass) < residual.at(token)) return {child, -1};

        workspace.drawn_targets.emplace_back(token, target[token]);
        target[token] = 0;
        draft[token] = 0;
        draft_logits[token] = NEVER;
        residual.gamma += 1.0 / draft_mass;
        const Masses left = masses_left(target, draft, size, residual.alpha, residual.gamma);
        draft_mass = left.draft;
        if (left.residual > 0) {
            residual.alpha /= left.residual;
            residual.gamma /= left.residual;
        } else {  // empty residual: the target without the drawn tokens, or all of it where nothing else is left
            const double undrawn_mass = mass_left(target, size);
            residual.gamma = 0;
            residual.alpha = 1.0 / (undrawn_mass > 0 ? undrawn_mass : warped.mass);
            if (undrawn_mass == 0) {
                for (const auto& [drawn, weight] : workspace.drawn_targets) target[drawn] = weight;
                break;  // no token that is still to come has any mass
            }
        }
        if (draft_mass < REBASE_BELOW) {
            const double peak = *std::max_element(draft_logits, draft_logits + vocab);
            if (peak == NEVER) break;  // empty draft: no further child can be a draw
            residual.gamma *= std::exp((peak - draft_peak) / temperature);
            draft_peak = peak;
            draft_mass = softmax_weights(draft_logits, vocab, draft_peak, temperature, request.wide, draft);
        }
    }
    return {-1, draw_residual(residual, vocab, request.stream, request.wide)};
}

void walk(const Request& request, Workspace& workspace, Emitted& emitted) {
    std::fill(emitted.nodes, emitted.nodes + request.tree.num_levels, -1);
    emitted.num_accepted = 0;
    for (std::int32_t node = 0; node >= 0;) {
        emitted.nodes[emitted.num_accepted++] = node;
        const Decision decision = request.warp.temperature == 0 ? decide_greedily(request, node, workspace)
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

bool values_valid(const Request& request) {
    const Tree& tree = request.tree;
    const float temperature = static_cast<float>(request.warp.temperature);
    const float top_p = static_cast<float>(request.warp.top_p);
    if (!temperatures_valid(&temperature, 1) || !top_ps_valid(&top_p, 1)) return false;
    for (std::int64_t node = 1; node < tree.num_nodes; ++node) {
        if (request.tokens[node] < -1 || request.tokens[node] >= request.target.vocab) return false;
    }
    if (!rows_valid(request.target, tree.num_nodes)) return false;
    for (std::int64_t node = 0; node < tree.num_nodes && request.draft.data != nullptr; ++node) {
        if (tree.num_children[node] > 0 && !rows_valid(request.draft.rows_from(node), 1)) return false;
    }
    return true;
}

}  // namespace

bool verify_tree(std::uintptr_t tokens_ptr, std::uintptr_t target_ptr, int target_type, std::uintptr_t draft_ptr,
                 int draft_type, std::uintptr_t first_child_ptr, std::uintptr_t num_children_ptr,
                 std::int64_t max_branching, std::uintptr_t temperature_ptr, std::uintptr_t seeds_ptr,
                 std::uintptr_t offsets_ptr, std::uintptr_t top_k_ptr, std::uintptr_t top_p_ptr,
                 std::uintptr_t nodes_ptr, std::uintptr_t num_accepted_ptr, std::uintptr_t next_token_ptr,
                 std::int64_t batch_size, std::int64_t num_nodes, std::int64_t num_levels, std::int64_t vocab,
                 std::int64_t topology_stride, std::int64_t tokens_stride, std::int64_t target_batch_stride,
                 std::int64_t target_node_stride, std::int64_t draft_batch_stride, std::int64_t draft_node_stride,
                 bool check_values) {
    const auto target_element = static_cast<ElementType>(target_type);
    const auto draft_element = static_cast<ElementType>(draft_type);
    const std::int64_t target_bytes = element_bytes(target_element), draft_bytes = element_bytes(draft_element);
    const auto* top_ks = reinterpret_cast<const std::int32_t*>(top_k_ptr);
    const auto* top_ps = reinterpret_cast<const float*>(top_p_ptr);

    const auto request = [&](std::int64_t b) {
        const char* const target = reinterpret_cast<const char*>(target_ptr) + b * target_batch_stride * target_bytes;
        const char* const draft =
            draft_ptr == 0 ? nullptr : reinterpret_cast<const char*>(draft_ptr) + b * draft_batch_stride * draft_bytes;
        return Request{
            Tree{reinterpret_cast<const std::int32_t*>(first_child_ptr) + b * topology_stride,
                 reinterpret_cast<const std::int32_t*>(num_children_ptr) + b * topology_stride, num_nodes, num_levels,
                 max_branching},
            reinterpret_cast<const std::int64_t*>(tokens_ptr) + b * tokens_stride,
            LogitRows{target, target_element, target_node_stride * target_bytes, vocab},
            LogitRows{draft, draft_element, draft_node_stride * draft_bytes, vocab},
            Warp{reinterpret_cast<const float*>(temperature_ptr)[b], top_ks == nullptr ? 0 : top_ks[b],
                 top_ps == nullptr ? 1.0 : top_ps[b]},
            Stream{static_cast<std::uint64_t>(reinterpret_cast<const std::int64_t*>(seeds_ptr)[b]),
                   static_cast<std::uint64_t>(reinterpret_cast<const std::int64_t*>(offsets_ptr)[b])},
            target_element == ElementType::float64 || (draft_ptr != 0 && draft_element == ElementType::float64)};
    };
    static thread_local Workspace workspace;
    for (std::int64_t b = 0; b < batch_size && check_values; ++b) {
        const Request checked = request(b);
        // A tree that all share is looked at once.
        if ((b == 0 || topology_stride != 0) && !tree_valid(checked.tree, workspace.depths)) return false;
        if (!values_valid(checked)) return false;
    }
    for (std::int64_t b = 0; b < batch_size; ++b) {
        Emitted emitted{reinterpret_cast<std::int32_t*>(nodes_ptr) + b * num_levels, 0, -1};
        walk(request(b), workspace, emitted);
        reinterpret_cast<std::int32_t*>(num_accepted_ptr)[b] = emitted.num_accepted;
        reinterpret_cast<std::int64_t*>(next_token_ptr)[b] = emitted.next_token;
    }
    return true;
}

}  // namespace sequoia
