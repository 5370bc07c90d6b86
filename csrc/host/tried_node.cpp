#include "tried_node.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "streams.h"

namespace sequoia {
namespace {

// The draft's mass is its last sum less the weights dropped since, down to this part of it: below, too many digits
// would have cancelled.
constexpr double SUM_AGAIN_BELOW = 0x1p-3;

// The draft's mass, in weights of its peak, below which its weights are computed afresh from the largest logit left:
// they are relative to a token that is no longer there, and would underflow.
constexpr double REBASE_BELOW = 0x1p-10;

// A support of at least one token in so many is kept as a whole row: its loops have vectors, and need no search.
constexpr std::int64_t DENSE_FROM = 8;

constexpr double NEVER = -std::numeric_limits<double>::infinity();

template <class Real>
SEQUOIA_INLINE double sum_of_positive(const Real* target, const Real* draft, std::int64_t size, double alpha,
                                      double gamma) {
    double lanes[LANES] = {};
    for (std::int64_t i = 0; i < size; i += LANES) {
        for (std::int64_t lane = 0; lane < LANES; ++lane) {
            const double value =
                alpha * static_cast<double>(target[i + lane]) - gamma * static_cast<double>(draft[i + lane]);
            lanes[lane] += value > 0 ? value : 0.0;
        }
    }
    double mass = 0;
    for (const double lane : lanes) mass += lane;
    return mass;
}

template <class Real>
SEQUOIA_INLINE double sum(const Real* weights, std::int64_t size) {
    double lanes[LANES] = {};
    for (std::int64_t i = 0; i < size; i += LANES) {
        for (std::int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += static_cast<double>(weights[i + lane]);
    }
    double mass = 0;
    for (const double lane : lanes) mass += lane;
    return mass;
}

// The best token so far: the one with the largest log(residual) + gumbel, lowest on ties.
template <class Real>
struct BestToken {
    std::int64_t token = 0;
    double key = NEVER;

    SEQUOIA_INLINE void consider(std::int64_t other, double prob, std::uint32_t word) {
        const float noise = gumbel(word);
        // as the reference rounds it
        const double other_key = std::is_same<Real, double>::value
                                     ? std::log(prob) + static_cast<double>(noise)
                                     : static_cast<double>(static_cast<float>(std::log(prob)) + noise);
        if (other_key > key) {
            key = other_key;
            token = other;
        }
    }
};

// Bounds of the probabilities of a stretch's tokens: at least those, apart from rounding, and 0 only where they are 0
// or none that could win, the largest being at least 1 / vocab.
template <class Real>
struct ProbBounds;

// In float32, which may take a little from either term of a difference: they are taken as what they are at most and
// least.
template <>
struct ProbBounds<float> {
    float alpha, gamma;

    ProbBounds(const Residual<float>& residual, double gamma_of_draft)
        : alpha(static_cast<float>(residual.alpha / residual.mass * (1 + 0x1p-22))),
          gamma(static_cast<float>(std::min(gamma_of_draft / residual.mass * (1 - 0x1p-22), 0x1p127))) {}
    SEQUOIA_INLINE float operator()(float target, float draft) const { return alpha * target - gamma * draft; }
};

template <>
struct ProbBounds<double> {
    double alpha, gamma, scale;

    ProbBounds(const Residual<double>& residual, double gamma_of_draft)
        : alpha(residual.alpha), gamma(gamma_of_draft), scale(1 / residual.mass) {}
    SEQUOIA_INLINE float operator()(double target, double draft) const {
        return static_cast<float>((alpha * target - gamma * draft) * scale);
    }
};

// A token is looked at closely only where a bound of its key is above the best so far, and a stretch of tokens has its
// noise generated only where the largest noise there is could lift one of them above it.
template <class Real>
SEQUOIA_INLINE std::int64_t draw(const Residual<Real>& residual, Stream stream) {
    // Without a draft any finite row stands in for it, times a gamma of 0.
    const Real* const draft = residual.draft == nullptr ? residual.target : residual.draft;
    const ProbBounds<Real> bound(residual, residual.draft == nullptr ? 0.0 : residual.gamma);
    BestToken<Real> best;
    for (std::int64_t first = 0; first < residual.size; first += STRETCH) {
        float bounds[STRETCH];
        for (std::int64_t i = 0; i < STRETCH; ++i) {
            const float prob = bound(residual.target[first + i], draft[first + i]);
            bounds[i] = prob > 0 ? prob : 0.0f;
        }
        std::int32_t largest = 0;  // positive floats are ordered as their bits are
        for (std::int64_t i = 0; i < STRETCH; ++i) {
            const std::int32_t bits = bit_cast<std::int32_t>(bounds[i]);
            largest = bits > largest ? bits : largest;
        }
        const float best_key = static_cast<float>(best.key);
        if (largest == 0 || !(log_upper_bound(bit_cast<float>(largest)) + LARGEST_GUMBEL > best_key)) continue;

        std::uint32_t words[STRETCH];
        stretch_words(stream.seed, stream.offset, RESIDUAL_TAG, first, words);
        int any = 0;
        for (std::int64_t i = 0; i < STRETCH; ++i) {
            bounds[i] = log_upper_bound(bounds[i]) + gumbel_upper_bound(words[i]);
            any |= bounds[i] > best_key;
        }
        if (any == 0) continue;

        for (std::int64_t i = 0; i < STRETCH; ++i) {
            if (!(static_cast<double>(bounds[i]) > best.key)) continue;
            const double prob = residual.at(first + i);
            if (prob > 0) best.consider(first + i, prob, words[i]);
        }
    }
    return best.token;
}

// The same where the entries are those of some tokens.
template <class Real>
std::int64_t draw_of_support(const Residual<Real>& residual, Stream stream) {
    BestToken<Real> best;
    std::uint32_t words[STRETCH];
    std::int64_t generated = -1;
    for (std::int64_t entry = 0; entry < residual.size; ++entry) {
        const double prob = residual.at(entry);
        const float log_bound = log_upper_bound(static_cast<float>(prob));
        if (!(prob > 0) || !(static_cast<double>(log_bound + LARGEST_GUMBEL) > best.key)) continue;
        const std::int64_t token = residual.tokens[entry], first = token / STRETCH * STRETCH;
        if (first != generated) stretch_words(stream.seed, stream.offset, RESIDUAL_TAG, first, words);
        generated = first;
        const std::uint32_t word = words[token - first];
        if (!(static_cast<double>(log_bound + gumbel_upper_bound(word)) > best.key)) continue;
        best.consider(token, prob, word);
    }
    return best.token;
}

}  // namespace

// The loops with clones: one plain function each, since templates cannot be multiversioned.

// Sum of max(alpha target - gamma draft, 0).
SEQUOIA_CLONES double mass_left(const float* target, const float* draft, std::int64_t size, double alpha,
                                double gamma) {
    return sum_of_positive(target, draft, size, alpha, gamma);
}
SEQUOIA_CLONES double mass_left(const double* target, const double* draft, std::int64_t size, double alpha,
                                double gamma) {
    return sum_of_positive(target, draft, size, alpha, gamma);
}

SEQUOIA_CLONES double mass_of(const float* weights, std::int64_t size) { return sum(weights, size); }
SEQUOIA_CLONES double mass_of(const double* weights, std::int64_t size) { return sum(weights, size); }

SEQUOIA_CLONES std::int64_t draw_residual(const Residual<float>& residual, Stream stream) {
    return draw(residual, stream);
}
SEQUOIA_CLONES std::int64_t draw_residual(const Residual<double>& residual, Stream stream) {
    return draw(residual, stream);
}

namespace {

constexpr std::int64_t whole_stretches(std::int64_t size) { return (size + STRETCH - 1) / STRETCH * STRETCH; }

// Weights of the draft's tokens as those of the target's.
template <class Real>
void spread(const Real* own, const std::int32_t* target_to_draft, std::int64_t vocab, std::int64_t draft_vocab,
            Real* out) {
    for (std::int64_t token = 0; token < vocab; ++token) {
        const std::int64_t id = target_to_draft[token];
        out[token] = id >= 0 && id < draft_vocab ? own[id] : Real{0};
    }
}

template <class Real>
Real* reserve_row(Scratch<Real>& scratch, std::int64_t size) {
    Real* const row = scratch.reserve(whole_stretches(size));
    std::fill(row + size, row + whole_stretches(size), Real{0});
    return row;
}

}  // namespace

template <class Real>
void TriedNode<Real>::open(const VerifyRequest& request, std::int32_t node, NodeRows<Real>& rows) {
    node_ = node;
    drawn_.clear();
    restored_ = false;
    target_mass_ = load_target(request, rows);
    residual_.alpha = 1;
    residual_.gamma = 0;
    residual_.mass = target_mass_;
    residual_.draft = nullptr;
    finished_ = request.tree.num_children[node] == 0;
    exhausted_ = !request.has_draft();
    if (finished_ || exhausted_) return;
    draft_weighing_ = Weighing<Real>::of(request.draft_peak(node), request.warp.temperature);
    draft_mass_ = summed_draft_mass_ = weigh_draft(request, undrawn_draft(request));
}

template <class Real>
void TriedNode<Real>::reopen(const VerifyRequest& request, NodeRows<Real>& rows) {
    if (rows.node == node_) return;
    load_target(request, rows);
    if (request.tree.num_children[node_] == 0) return;
    if (request.has_draft()) weigh_draft(request, undrawn_draft(request));
    for (const auto& [token, weight] : drawn_) {
        const std::int64_t entry = entry_of(token);
        if (entry >= 0 && !restored_) rows.target.reserve(0)[entry] = 0;
    }
}

// Returns the sum of the weights.
template <class Real>
double TriedNode<Real>::load_target(const VerifyRequest& request, NodeRows<Real>& rows) {
    static thread_local std::vector<Candidate<Real>> support;
    const std::int64_t vocab = request.target.vocab;
    const void* const row = request.target.row(node_);
    const double peak = request.target_peak(node_);
    rows.node = node_;
    rows_ = &rows;
    if (!request.warp.cuts(vocab)) {
        Real* const target = reserve_row(rows.target, vocab);
        set_entries(target, nullptr, vocab);
        return weigh_row(row, request.target.type, vocab, Weighing<Real>::of(peak, request.warp.temperature), target);
    }
    const double mass = warped_support(row, request.target.type, vocab, peak, request.warp, support);
    if (static_cast<std::int64_t>(support.size()) * DENSE_FROM >= vocab) {
        Real* const target = reserve_row(rows.target, vocab);
        std::fill(target, target + vocab, Real{0});
        for (const Candidate<Real>& kept : support) target[kept.token] = kept.weight;
        set_entries(target, nullptr, vocab);
        return mass;
    }
    const auto size = static_cast<std::int64_t>(support.size());
    Real* const target = reserve_row(rows.target, size);
    rows.tokens.resize(support.size());
    for (std::int64_t entry = 0; entry < size; ++entry) {
        const Candidate<Real>& kept = support[static_cast<std::size_t>(entry)];
        rows.tokens[static_cast<std::size_t>(entry)] = kept.token;
        target[entry] = kept.weight;
    }
    set_entries(target, rows.tokens.data(), size);
    return mass;
}

// The draft's logits outside the drawn tokens: one row.
template <class Real>
LogitRows TriedNode<Real>::undrawn_draft(const VerifyRequest& request) const {
    static thread_local Scratch<Real> scratch;
    if (drawn_.empty()) return request.draft.rows_from(node_);
    const std::int64_t vocab = request.draft.vocab;
    Real* const undrawn = scratch.reserve(padded(vocab));
    load_row(request.draft.row(node_), request.draft.type, vocab, undrawn);
    for (const auto& [token, weight] : drawn_) {
        const std::int64_t id = request.draft_id(token);
        if (id >= 0) undrawn[id] = static_cast<Real>(NEVER);
    }
    const auto type = std::is_same<Real, double>::value ? ElementType::float64 : ElementType::float32;
    return {reinterpret_cast<const char*>(undrawn), type, 0, vocab};
}

// The weights that draft_weighing_ gives to logits of the draft; returns the sum over all tokens.
template <class Real>
double TriedNode<Real>::weigh_draft(const VerifyRequest& request, const LogitRows& logits) {
    const void* const row = logits.row(0);
    Real* const draft = reserve_row(rows_->draft, residual_.size);
    residual_.draft = draft;
    if (residual_.tokens == nullptr) {
        if (request.target_to_draft == nullptr) {
            return weigh_row(row, logits.type, logits.vocab, draft_weighing_, draft);
        }
        static thread_local Scratch<Real> scratch;
        Real* const own = scratch.reserve(padded(logits.vocab));
        const double mass = weigh_row(row, logits.type, logits.vocab, draft_weighing_, own);
        spread(own, request.target_to_draft, residual_.size, logits.vocab, draft);
        return mass;
    }
    for (std::int64_t entry = 0; entry < residual_.size; ++entry) {
        const std::int64_t id = request.draft_id(residual_.tokens[entry]);
        draft[entry] = id < 0 ? Real{0} : draft_weighing_(static_cast<Real>(logit_at(row, logits.type, id)));
    }
    return weigh_row(row, logits.type, logits.vocab, draft_weighing_, nullptr);
}

template <class Real>
double TriedNode<Real>::draft_weight(const VerifyRequest& request, std::int64_t token) const {
    if (residual_.tokens == nullptr) return residual_.draft[token];
    const std::int64_t id = request.draft_id(token);
    if (id < 0 || was_dropped(token)) return 0;
    return draft_weighing_(static_cast<Real>(logit_at(request.draft.row(node_), request.draft.type, id)));
}

template <class Real>
bool TriedNode<Real>::was_dropped(std::int64_t token) const {
    const auto is_token = [token](const std::pair<std::int64_t, double>& drawn) { return drawn.first == token; };
    return std::any_of(drawn_.begin(), drawn_.end(), is_token);
}

// Where a token's weights are, -1 if it is none of those that are kept.
template <class Real>
std::int64_t TriedNode<Real>::entry_of(std::int64_t token) const {
    if (residual_.tokens == nullptr) return token;
    const std::int64_t* const end = residual_.tokens + residual_.size;
    const std::int64_t* const found = std::lower_bound(residual_.tokens, end, token);
    return found != end && *found == token ? found - residual_.tokens : -1;
}

// Zero an entry; returns the target's weight that it had.
template <class Real>
double TriedNode<Real>::take_out(std::int64_t entry) {
    if (entry < 0) return 0;
    Real& weight = rows_->target.reserve(0)[entry];
    if (residual_.draft != nullptr) rows_->draft.reserve(0)[entry] = 0;
    const double had = weight;
    weight = 0;
    return had;
}

// A token of this weight was dropped.
template <class Real>
void TriedNode<Real>::lower_draft_mass(const VerifyRequest& request, double weight) {
    draft_mass_ -= weight;
    if (draft_mass_ >= SUM_AGAIN_BELOW * summed_draft_mass_) return;
    if (residual_.tokens == nullptr) {
        draft_mass_ = summed_draft_mass_ = mass_of(residual_.draft, padded(residual_.size));
        if (draft_mass_ >= REBASE_BELOW * Weighing<Real>::PEAK_WEIGHT) return;
    }
    const LogitRows logits = undrawn_draft(request);
    const RowPeak peak = row_peak(logits.row(0), logits.type, logits.vocab);
    if (!peak.valid) {  // empty draft
        exhausted_ = true;
        return;
    }
    residual_.gamma *= draft_weighing_.relative(peak.logit);
    draft_weighing_ = Weighing<Real>::of(peak.logit, request.warp.temperature);
    draft_mass_ = summed_draft_mass_ = weigh_draft(request, logits);
}

template <class Real>
double TriedNode<Real>::drop(const VerifyRequest& request, std::int32_t child, double chance) {
    const std::int64_t token = request.tokens[child];
    const double mass_before = residual_.mass, draft_weight_before = exhausted_ ? 0 : draft_weight(request, token);
    residual_.alpha *= chance;
    residual_.gamma = chance * residual_.gamma + (request.is_certain(child) ? 0 : mass_before / draft_mass_);
    drawn_.emplace_back(token, take_out(entry_of(token)));
    if (!exhausted_) lower_draft_mass(request, draft_weight_before);
    const std::int64_t size = padded(residual_.size);
    // Without a draft any finite row stands in for it, times a gamma of 0.
    const Real* const draft = residual_.draft == nullptr ? residual_.target : residual_.draft;
    residual_.mass = mass_left(residual_.target, draft, size, residual_.alpha, residual_.gamma);
    if (residual_.mass > 0) {
        const double left = residual_.mass / mass_before;
        const double power_of_2 = std::ldexp(1.0, -std::ilogb(residual_.mass));
        residual_.alpha *= power_of_2;
        residual_.gamma *= power_of_2;
        residual_.mass *= power_of_2;
        return left / (left + (1 - chance));
    }
    if (chance < 1) {  // no path through this node is accepted any more
        finished_ = true;
        return 0;
    }
    // Empty residual: the target without the drawn tokens, or all of it where nothing else is left.
    residual_.alpha = 1;
    residual_.gamma = 0;
    residual_.mass = mass_of(residual_.target, size);
    if (residual_.mass == 0) {
        for (const auto& [drawn, weight] : drawn_) {
            const std::int64_t entry = entry_of(drawn);
            if (entry >= 0) rows_->target.reserve(0)[entry] = static_cast<Real>(weight);
        }
        residual_.mass = target_mass_;
        restored_ = finished_ = true;  // no token that is still to come has any mass
    }
    return chance;
}

template <class Real>
std::int64_t TriedNode<Real>::draw_next(const VerifyRequest& request) const {
    return residual_.tokens == nullptr ? draw_residual(residual_, request.stream)
                                       : draw_of_support(residual_, request.stream);
}

template class TriedNode<float>;
template class TriedNode<double>;

std::int64_t greedy_token(const VerifyRequest& request, std::int32_t node) {
    return first_index_of(request.target.row(node), request.target.type, request.target.vocab,
                          request.target_peak(node));
}

}  // namespace sequoia
