// Finds the cut of top-k and top-p without sorting the vocabulary: a bound that surely keeps too much leaves few
// candidates, and among those the cut is found by repeated halving, O(candidates).

#include "warp.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace sequoia {
namespace {

struct Candidate {
    double logit;
    double weight;
};

constexpr std::int64_t BLOCK = 4 * LANES;  // elements that share one maximum

}  // namespace

SEQUOIA_CLONES void block_maxima(const double* row, std::int64_t size, double* maxima) {
    for (std::int64_t begin = 0; begin < size; begin += BLOCK) {
        double lanes[LANES];
        for (std::int64_t lane = 0; lane < LANES; ++lane) lanes[lane] = row[begin + lane];
        for (std::int64_t i = begin + LANES; i < std::min(begin + BLOCK, size); i += LANES) {
            for (std::int64_t lane = 0; lane < LANES; ++lane) {
                lanes[lane] = row[i + lane] > lanes[lane] ? row[i + lane] : lanes[lane];
            }
        }
        *maxima++ = *std::max_element(lanes, lanes + LANES);
    }
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

// The top_k-th largest logit.
double top_k_cut(const double* logits, std::int64_t vocab, std::int64_t top_k) {
    static thread_local Scratch<double> maxima_scratch, sorted_scratch;
    static thread_local std::vector<double> candidates;
    const std::int64_t size = padded(vocab);
    const std::int64_t num_blocks = (size + BLOCK - 1) / BLOCK;
    double* const maxima = maxima_scratch.reserve(num_blocks);
    block_maxima(logits, size, maxima);

    // top_k blocks have a maximum at or above the top_k-th largest maximum, so top_k logits are at or above it too.
    double bound = -std::numeric_limits<double>::infinity();
    if (num_blocks >= top_k) {
        double* const sorted = sorted_scratch.reserve(num_blocks);
        std::copy(maxima, maxima + num_blocks, sorted);
        std::nth_element(sorted, sorted + top_k - 1, sorted + num_blocks, std::greater<double>());
        bound = sorted[top_k - 1];
    }
    candidates.clear();
    for (std::int64_t block = 0; block < num_blocks; ++block) {
        if (!(maxima[block] >= bound)) continue;
        for (std::int64_t i = block * BLOCK; i < std::min((block + 1) * BLOCK, size); ++i) {
            if (logits[i] >= bound) candidates.push_back(logits[i]);
        }
    }
    std::nth_element(candidates.begin(), candidates.begin() + (top_k - 1), candidates.end(), std::greater<double>());
    return candidates[static_cast<std::size_t>(top_k - 1)];
}

// The smallest logit of the shortest prefix of the row, in falling order, whose weights make up top_p of the mass.
double top_p_cut(const double* logits, const double* weights, std::int64_t vocab, double mass, double top_p) {
    static thread_local Scratch<double> maxima_scratch;
    static thread_local std::vector<Candidate> candidates;
    const std::int64_t size = padded(vocab);
    const std::int64_t num_blocks = (size + BLOCK - 1) / BLOCK;
    double* const maxima = maxima_scratch.reserve(num_blocks);
    block_maxima(weights, size, maxima);

    // Weights up to this bound make up at most 1 - top_p of the mass all together, so none of them is kept.
    const double bound = mass * std::max(0.0, 1.0 - top_p) / static_cast<double>(vocab) * (1.0 - 1e-6);
    candidates.clear();
    for (std::int64_t block = 0; block < num_blocks; ++block) {
        if (!(maxima[block] > bound)) continue;
        for (std::int64_t i = block * BLOCK; i < std::min((block + 1) * BLOCK, size); ++i) {
            if (weights[i] > bound) candidates.push_back({logits[i], weights[i]});
        }
    }

    const auto falling = [](const Candidate& left, const Candidate& right) { return left.logit > right.logit; };
    const double wanted = mass * top_p;
    double above = 0;  // mass of the candidates before `begin`, all of them kept
    auto begin = candidates.begin(), end = candidates.end();
    while (end - begin > 32) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, falling);
        double upper_half = 0;
        for (auto candidate = begin; candidate != middle; ++candidate) upper_half += candidate->weight;
        if (above + upper_half >= wanted) {
            end = middle;
        } else {
            above += upper_half;
            begin = middle;
        }
    }
    std::sort(begin, end, falling);
    double cut = begin->logit;
    for (; begin != end && above < wanted; ++begin) {
        cut = begin->logit;
        above += begin->weight;
    }
    return cut;
}

}  // namespace

WarpedRow warp_row(const double* logits, std::int64_t vocab, double peak, const Warp& warp, bool wide,
                   double* weights) {
    WarpedRow warped{NOTHING_CUT, 0};
    warped.mass = softmax_weights(logits, vocab, peak, warp.temperature, wide, weights);
    if (warp.top_k > 0 && warp.top_k < vocab) {
        warped.cut = top_k_cut(logits, vocab, warp.top_k);
        warped.mass = drop_below(logits, padded(vocab), warped.cut, weights);
    }
    if (warp.top_p < 1) {
        warped.cut = std::max(warped.cut, top_p_cut(logits, weights, vocab, warped.mass, warp.top_p));
        warped.mass = drop_below(logits, padded(vocab), warped.cut, weights);
    }
    return warped;
}

}  // namespace sequoia
