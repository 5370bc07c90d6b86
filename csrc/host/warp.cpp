// Finds the cut of top-k and top-p without sorting the vocabulary: a bound that surely keeps too much leaves few
// candidates, and among those the cut is found by repeated halving, O(candidates).

#include "warp.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace sequoia {
namespace {

constexpr std::int64_t BLOCK = 4 * LANES;  // elements that share one maximum

template <class Real>
SEQUOIA_INLINE void maxima_of_blocks(const Real* row, std::int64_t size, Real* maxima) {
    for (std::int64_t begin = 0; begin < size; begin += BLOCK) {
        Real lanes[LANES];
        for (std::int64_t lane = 0; lane < LANES; ++lane) lanes[lane] = row[begin + lane];
        for (std::int64_t i = begin + LANES; i < std::min(begin + BLOCK, size); i += LANES) {
            for (std::int64_t lane = 0; lane < LANES; ++lane) {
                lanes[lane] = row[i + lane] > lanes[lane] ? row[i + lane] : lanes[lane];
            }
        }
        *maxima++ = *std::max_element(lanes, lanes + LANES);
    }
}

}  // namespace

SEQUOIA_CLONES void block_maxima(const float* row, std::int64_t size, float* maxima) {
    maxima_of_blocks(row, size, maxima);
}

SEQUOIA_CLONES void block_maxima(const double* row, std::int64_t size, double* maxima) {
    maxima_of_blocks(row, size, maxima);
}

namespace {

template <class Real>
SEQUOIA_INLINE double sum_up_to(const Real* weights, std::int64_t size, double limit) {
    double lanes[LANES] = {};
    for (std::int64_t i = 0; i < size; i += LANES) {
        for (std::int64_t lane = 0; lane < LANES; ++lane) {
            const double weight = static_cast<double>(weights[i + lane]);
            lanes[lane] += weight > limit ? 0.0 : weight;
        }
    }
    double mass = 0;
    for (const double lane : lanes) mass += lane;
    return mass;
}

}  // namespace

SEQUOIA_CLONES double mass_up_to(const float* weights, std::int64_t size, double limit) {
    return sum_up_to(weights, size, limit);
}

SEQUOIA_CLONES double mass_up_to(const double* weights, std::int64_t size, double limit) {
    return sum_up_to(weights, size, limit);
}

SEQUOIA_CLONES double drop_below(const double* logits, std::int64_t size, double cut, double* weights) {
    double lanes[LANES] = {};
    for (std::int64_t i = 0; i < size; i += LANES) {
        for (std::int64_t lane = 0; lane < LANES; ++lane) {
            const double kept = logits[i + lane] >= cut ? weights[i + lane] : 0.0;
            weights[i + lane] = kept;
            lanes[lane] += kept;
        }
    }
    double mass = 0;
    for (const double lane : lanes) mass += lane;
    return mass;
}

namespace {

// The top_k-th largest logit of a padded row. Leaves the maxima of the row's blocks, which hold until the next call.
template <class Real>
Real top_k_cut(const Real* logits, std::int64_t vocab, std::int64_t top_k, const Real*& block_peaks) {
    static thread_local Scratch<Real> maxima_scratch, sorted_scratch;
    static thread_local std::vector<Real> candidates;
    const std::int64_t size = padded(vocab);
    const std::int64_t num_blocks = (size + BLOCK - 1) / BLOCK;
    Real* const maxima = maxima_scratch.reserve(num_blocks);
    block_maxima(logits, size, maxima);
    block_peaks = maxima;

    // top_k blocks have a maximum at or above the top_k-th largest maximum, so top_k logits are at or above it too.
    Real bound = -std::numeric_limits<Real>::infinity();
    if (num_blocks >= top_k) {
        Real* const sorted = sorted_scratch.reserve(num_blocks);
        std::copy(maxima, maxima + num_blocks, sorted);
        std::nth_element(sorted, sorted + top_k - 1, sorted + num_blocks, std::greater<Real>());
        bound = sorted[top_k - 1];
    }
    candidates.clear();
    for (std::int64_t block = 0; block < num_blocks; ++block) {
        if (!(maxima[block] >= bound)) continue;
        for (std::int64_t i = block * BLOCK; i < std::min((block + 1) * BLOCK, size); ++i) {
            if (logits[i] >= bound) candidates.push_back(logits[i]);
        }
    }
    std::nth_element(candidates.begin(), candidates.begin() + (top_k - 1), candidates.end(), std::greater<Real>());
    return candidates[static_cast<std::size_t>(top_k - 1)];
}

// A bound up to which the weights of a padded row make up at most 1 - top_p of the mass all together, so that top-p
// keeps none of them. That holds for the one that all of them could have; most rows have few weights above a higher
// one, too.
template <class Real>
double never_kept(const Real* weights, std::int64_t vocab, double mass, double top_p) {
    const double rest = mass * std::max(0.0, 1.0 - top_p) * (1.0 - 1e-6);
    const double bound = rest / static_cast<double>(vocab);
    const double higher = 64 * bound;
    return mass_up_to(weights, padded(vocab), higher) <= rest ? higher : bound;
}

// The smallest logit of the shortest prefix of the candidates, in falling order, whose weights make up top_p of the
// mass. Leaves them in another order.
template <class Real>
Real top_p_cut(std::vector<Candidate<Real>>& candidates, double mass, double top_p) {
    const auto falling = [](const Candidate<Real>& left, const Candidate<Real>& right) {
        return left.logit > right.logit;
    };
    const double wanted = mass * top_p;
    double above = 0;  // mass of the candidates before `begin`, all of them kept
    auto begin = candidates.begin(), end = candidates.end();
    while (end - begin > 32) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, falling);
        double upper_half = 0;
        for (auto candidate = begin; candidate != middle; ++candidate) {
            upper_half += static_cast<double>(candidate->weight);
        }
        if (above + upper_half >= wanted) {
            end = middle;
        } else {
            above += upper_half;
            begin = middle;
        }
    }
    std::sort(begin, end, falling);
    Real cut = begin->logit;
    for (; begin != end && above < wanted; ++begin) {
        cut = begin->logit;
        above += static_cast<double>(begin->weight);
    }
    return cut;
}

// Begin with the tokens of a padded row whose weight is above a bound.
template <class Real>
void gather(const Real* weights, std::int64_t vocab, double bound, std::vector<Candidate<Real>>& found) {
    static thread_local Scratch<Real> maxima_scratch;
    const std::int64_t size = padded(vocab);
    Real* maxima = maxima_scratch.reserve((size + BLOCK - 1) / BLOCK);
    block_maxima(weights, size, maxima);
    found.clear();
    for (std::int64_t begin = 0; begin < vocab; begin += BLOCK) {
        if (!(static_cast<double>(*maxima++) > bound)) continue;
        for (std::int64_t i = begin; i < std::min(begin + BLOCK, vocab); ++i) {
            if (static_cast<double>(weights[i]) > bound) found.push_back({i, 0, weights[i]});
        }
    }
}

template <class Real>
double mass_of(const std::vector<Candidate<Real>>& candidates) {
    double mass = 0;
    for (const Candidate<Real>& candidate : candidates) mass += static_cast<double>(candidate.weight);
    return mass;
}

template <class Real>
void keep_from(Real cut, std::vector<Candidate<Real>>& candidates) {
    const auto below = [cut](const Candidate<Real>& candidate) { return !(candidate.logit >= cut); };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), below), candidates.end());
}

}  // namespace

WarpedRow warp_row(const double* logits, std::int64_t vocab, double peak, const Warp& warp, bool wide,
                   double* weights) {
    static thread_local std::vector<Candidate<double>> candidates;
    WarpedRow warped{NOTHING_CUT, 0};
    warped.mass = softmax_weights(logits, vocab, peak, warp.temperature, wide, weights);
    if (warp.top_k > 0 && warp.top_k < vocab) {
        const double* block_peaks;
        warped.cut = top_k_cut(logits, vocab, warp.top_k, block_peaks);
        warped.mass = drop_below(logits, padded(vocab), warped.cut, weights);
    }
    if (warp.top_p < 1) {
        gather(weights, vocab, never_kept(weights, vocab, warped.mass, warp.top_p), candidates);
        for (Candidate<double>& candidate : candidates) candidate.logit = logits[candidate.token];
        warped.cut = std::max(warped.cut, top_p_cut(candidates, warped.mass, warp.top_p));
        warped.mass = drop_below(logits, padded(vocab), warped.cut, weights);
    }
    return warped;
}

template <class Real>
double warped_support(const void* row, ElementType type, std::int64_t vocab, double peak, const Warp& warp,
                      std::vector<Candidate<Real>>& support) {
    static thread_local Scratch<Real> scratch, weights_scratch;
    static thread_local std::vector<Candidate<Real>> sorted;
    const auto weigh = Weighing<Real>::of(peak, warp.temperature);
    double mass;
    if (warp.top_k > 0 && warp.top_k < vocab) {
        Real* const logits = scratch.reserve(padded(vocab));
        load_row(row, type, vocab, logits);
        const Real* block_peaks;
        const Real cut = top_k_cut(logits, vocab, warp.top_k, block_peaks);
        const Real* weights = nullptr;  // of all tokens, where most are kept: as vectors they cost less
        if (warp.top_k > vocab / 8) {
            Real* const all = weights_scratch.reserve(padded(vocab));
            weigh_row(row, type, vocab, weigh, all);
            weights = all;
        }
        support.clear();
        for (std::int64_t begin = 0; begin < vocab; begin += BLOCK) {
            if (!(block_peaks[begin / BLOCK] >= cut)) continue;
            for (std::int64_t i = begin; i < std::min(begin + BLOCK, vocab); ++i) {
                if (!(logits[i] >= cut)) continue;
                const Real weight = weights != nullptr ? weights[i] : weigh(logits[i]);
                if (weight > 0) support.push_back({i, logits[i], weight});
            }
        }
        mass = mass_of(support);
    } else {
        Real* const weights = weights_scratch.reserve(padded(vocab));
        mass = weigh_row(row, type, vocab, weigh, weights);
        gather(weights, vocab, never_kept(weights, vocab, mass, warp.top_p), support);
        for (Candidate<Real>& candidate : support) {
            candidate.logit = static_cast<Real>(logit_at(row, type, candidate.token));
        }
    }
    if (warp.top_p < 1) {
        sorted = support;
        keep_from(top_p_cut(sorted, mass, warp.top_p), support);
        mass = mass_of(support);
    }
    return mass;
}

template double warped_support(const void*, ElementType, std::int64_t, double, const Warp&,
                               std::vector<Candidate<float>>&);
template double warped_support(const void*, ElementType, std::int64_t, double, const Warp&,
                               std::vector<Candidate<double>>&);

}  // namespace sequoia
