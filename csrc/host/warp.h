// The distribution that decoding must reproduce: temperature, then top-k, then top-p, as in sequoia_kernels/ops/warping.py.

#pragma once

#include <limits>
#include <vector>

#include "rows.h"

namespace sequoia {

// How one row is warped. top_k outside 1 .. vocab - 1 and top_p >= 1 are off.
struct Warp {
    double temperature;  // above 0
    std::int64_t top_k;
    double top_p;

    bool cuts(std::int64_t vocab) const { return (top_k > 0 && top_k < vocab) || top_p < 1; }
};

constexpr double NOTHING_CUT = -std::numeric_limits<double>::infinity();

struct WarpedRow {
    double cut;   // smallest logit kept, or NOTHING_CUT
    double mass;  // sum of the weights kept
};

// weights = exp((logits - peak) / temperature) where logits >= cut, else 0. Tokens that tie with the cut are all kept.
// logits: padded row. `wide` as for softmax_weights.
WarpedRow warp_row(const double* logits, std::int64_t vocab, double peak, const Warp& warp, bool wide, double* weights);

// Sum of those weights of a padded row that are at most `limit`.
double mass_up_to(const float* weights, std::int64_t size, double limit);
double mass_up_to(const double* weights, std::int64_t size, double limit);

// A token that a cut keeps, or may keep.
template <class Real>
struct Candidate {
    std::int64_t token;
    Real logit;
    Real weight;
};

// The tokens of positive weight that a warp which cuts keeps, in rising order; returns the sum of their weights. Behind
// a small top-k no other token's exponential is taken.
template <class Real>
double warped_support(const void* row, ElementType type, std::int64_t vocab, double peak, const Warp& warp,
                      std::vector<Candidate<Real>>& support);

}  // namespace sequoia
