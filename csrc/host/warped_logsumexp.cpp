// warped_logsumexp on the CPU: what describes each row's warped distribution, see sequoia_kernels/ops/warping.py.
//
// Computes    (log_normaliser, cut) per row: log sum exp(logit / T) over the tokens kept, and the smallest logit kept;
//             T = 0: the largest logit for both.
// Plan        one thread; rows one after the other; see warp.cpp for how the cut is found.
// Memory      reads each row once; scratch of two rows.
// Numerics    float64 throughout.

#include <algorithm>
#include <cmath>

#include "ops.h"
#include "warp.h"

namespace sequoia {
namespace {

template <class Real>
void warp_rows(const LogitRows& logits, std::int64_t num_rows, const float* temperatures, const std::int32_t* top_ks,
               const float* top_ps, Real* log_normalisers, Real* cuts) {
    static thread_local Scratch<double> row_scratch, weight_scratch;
    double* const row = row_scratch.reserve(padded(logits.vocab));
    double* const weights = weight_scratch.reserve(padded(logits.vocab));
    for (std::int64_t r = 0; r < num_rows; ++r) {
        const double peak = load_row(logits.row(r), logits.type, logits.vocab, row);
        if (temperatures[r] == 0) {
            log_normalisers[r] = cuts[r] = static_cast<Real>(peak);
            continue;
        }
        const Warp warp{temperatures[r], top_ks == nullptr ? 0 : top_ks[r], top_ps == nullptr ? 1.0 : top_ps[r]};
        const WarpedRow warped = warp_row(row, logits.vocab, peak, warp, sizeof(Real) == 8, weights);
        log_normalisers[r] = static_cast<Real>(peak / warp.temperature + std::log(warped.mass));
        const double cut = warped.cut == NOTHING_CUT ? *std::min_element(row, row + logits.vocab) : warped.cut;
        cuts[r] = static_cast<Real>(cut);
    }
}

}  // namespace

bool warped_logsumexp(std::uintptr_t logits_ptr, int type, std::uintptr_t temperature_ptr, std::uintptr_t top_k_ptr,
                      std::uintptr_t top_p_ptr, std::uintptr_t log_normaliser_ptr, std::uintptr_t cut_ptr,
                      std::int64_t num_rows, std::int64_t vocab, std::int64_t row_stride, bool check_values) {
    const ElementType element = static_cast<ElementType>(type);
    const LogitRows logits{reinterpret_cast<const char*>(logits_ptr), element, row_stride * element_bytes(element),
                           vocab};
    const auto* temperatures = reinterpret_cast<const float*>(temperature_ptr);
    const auto* top_ks = reinterpret_cast<const std::int32_t*>(top_k_ptr);
    const auto* top_ps = reinterpret_cast<const float*>(top_p_ptr);
    if (check_values && !(temperatures_valid(temperatures, num_rows) &&
                          (top_ps == nullptr || top_ps_valid(top_ps, num_rows)) && rows_valid(logits, num_rows))) {
        return false;
    }
    if (element == ElementType::float64) {
        warp_rows(logits, num_rows, temperatures, top_ks, top_ps, reinterpret_cast<double*>(log_normaliser_ptr),
                  reinterpret_cast<double*>(cut_ptr));
    } else {
        warp_rows(logits, num_rows, temperatures, top_ks, top_ps, reinterpret_cast<float*>(log_normaliser_ptr),
                  reinterpret_cast<float*>(cut_ptr));
    }
    return true;
}

}  // namespace sequoia
