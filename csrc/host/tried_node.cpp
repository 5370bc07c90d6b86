#include "tried_node.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "streams.h"

namespace sequoia {
namespace {

// The draft's mass below which its weights are computed afresh from the largest logit left: they are relative to a
// token that is no longer there, and would underflow.
constexpr double REBASE_BELOW = 0x1p-10;

constexpr double NEVER = -std::numeric_limits<double>::infinity();

struct Masses {
    double residual;
    double draft;
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

double* reserve_row(Scratch<double>& scratch, std::int64_t vocab, double padding) {
    const std::int64_t room = (vocab + STRETCH - 1) / STRETCH * STRETCH;
    double* const row = scratch.reserve(room);
    std::fill(row + vocab, row + room, padding);
    return row;
}

// Logits of the row that is being loaded: nobody needs them once there are weights.
double* reserve_logits(std::int64_t vocab) {
    static thread_local Scratch<double> logits;
    return reserve_row(logits, vocab, NEVER);
}

}  // namespace

void TriedNode::open(const VerifyRequest& request, std::int32_t node, NodeRows& rows) {
    node_ = node;
    drawn_.clear();
    restored_ = false;
    target_mass_ = load_target(request, rows);
    residual_.alpha = 1.0 / target_mass_;
    residual_.gamma = 0;
    closed_ = request.tree.num_children[node] == 0;
    if (closed_) {
        residual_.draft = nullptr;
        return;
    }
    double* const logits = draft_logits(request, draft_peak_);
    draft_mass_ = weigh_draft(request, logits);
}

void TriedNode::reopen(const VerifyRequest& request, NodeRows& rows) {
    if (rows.node == node_) return;
    load_target(request, rows);
    for (const auto& [token, weight] : drawn_) {
        if (!restored_) rows.target.reserve(0)[token] = 0;
    }
    if (request.tree.num_children[node_] == 0) return;
    double peak;
    weigh_draft(request, draft_logits(request, peak));
}

double TriedNode::load_target(const VerifyRequest& request, NodeRows& rows) {
    const std::int64_t vocab = request.target.vocab;
    rows.node = node_;
    rows_ = &rows;
    double* const logits = reserve_logits(vocab);
    double* const target = reserve_row(rows.target, vocab, 0);
    const double peak = load_row(request.target.row(node_), request.target.type, vocab, logits);
    residual_.target = target;
    return warp_row(logits, vocab, peak, request.warp, request.wide, target).mass;
}

// Logits outside the drawn tokens; `peak` becomes the largest of them.
double* TriedNode::draft_logits(const VerifyRequest& request, double& peak) const {
    const std::int64_t vocab = request.target.vocab;
    double* const logits = reserve_logits(vocab);
    peak = load_row(request.draft.row(node_), request.draft.type, vocab, logits);
    if (drawn_.empty()) return logits;
    for (const auto& [token, weight] : drawn_) logits[token] = NEVER;
    peak = *std::max_element(logits, logits + vocab);
    return logits;
}

// Weights relative to draft_peak_; returns their sum.
double TriedNode::weigh_draft(const VerifyRequest& request, const double* logits) {
    const std::int64_t vocab = request.target.vocab;
    double* const draft = reserve_row(rows_->draft, vocab, 0);
    residual_.draft = draft;
    return softmax_weights(logits, vocab, draft_peak_, request.warp.temperature, request.wide, draft);
}

// Take the draft's weights relative to the largest logit left.
void TriedNode::rebase(const VerifyRequest& request) {
    double peak;
    const double* const logits = draft_logits(request, peak);
    if (peak == NEVER) {  // empty draft: no further child can be a draw
        closed_ = true;
        return;
    }
    residual_.gamma *= std::exp((peak - draft_peak_) / request.warp.temperature);
    draft_peak_ = peak;
    draft_mass_ = weigh_draft(request, logits);
}

double TriedNode::drop(const VerifyRequest& request, std::int64_t token, double chance) {
    const std::int64_t size = padded(request.target.vocab);
    double* const target = rows_->target.reserve(size);
    double* const draft = rows_->draft.reserve(size);
    drawn_.emplace_back(token, target[token]);
    target[token] = 0;
    draft[token] = 0;
    residual_.alpha *= chance;
    residual_.gamma = chance * residual_.gamma + 1.0 / draft_mass_;
    const Masses left = masses_left(target, draft, size, residual_.alpha, residual_.gamma);
    draft_mass_ = left.draft;
    if (left.residual > 0) {
        residual_.alpha /= left.residual;
        residual_.gamma /= left.residual;
        chance = left.residual / (left.residual + (1 - chance));
    } else if (chance < 1) {  // no path through this node is accepted any more
        closed_ = true;
        return 0;
    } else {  // empty residual: the target without the drawn tokens, or all of it where nothing else is left
        const double undrawn_mass = mass_left(target, size);
        residual_.gamma = 0;
        residual_.alpha = 1.0 / (undrawn_mass > 0 ? undrawn_mass : target_mass_);
        if (undrawn_mass == 0) {
            for (const auto& [drawn, weight] : drawn_) target[drawn] = weight;
            restored_ = closed_ = true;  // no token that is still to come has any mass
        }
    }
    if (!closed_ && draft_mass_ < REBASE_BELOW) rebase(request);
    return chance;
}

std::int64_t TriedNode::draw_next(const VerifyRequest& request) const {
    return draw_residual(residual_, request.target.vocab, request.stream, request.wide);
}

std::int64_t greedy_token(const VerifyRequest& request, std::int32_t node, NodeRows& rows) {
    rows.node = -1;
    double* const logits = reserve_row(rows.target, request.target.vocab, NEVER);
    return first_index_of(logits, load_row(request.target.row(node), request.target.type, request.target.vocab, logits));
}

}  // namespace sequoia
