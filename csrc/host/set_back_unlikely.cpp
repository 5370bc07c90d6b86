// A draft's unlikely tokens moved behind the others; the specification is sequoia_kernels/drafts/unlikely.py.
//
// Computes    per row, in place: the bound of what is unlikely; `behind` temperatures off every logit below it.
// Plan        one thread; rows one after the other. The bound is found by halving the range of its powers of 2.
// Memory      reads and writes each row; scratch of one row, read five times.
// Numerics    weights of the row's type; lowered logits are rounded once.

#include <cmath>

#include "ops.h"
#include "rows.h"
#include "warp.h"

namespace sequoia {
namespace {

constexpr int MOST_HALVINGS = 32;  // a power of 2

template <class Real>
void set_back_row(void* row, ElementType type, std::int64_t vocab, double peak, Real temperature, double unlikely_part,
                  Real behind) {
    static thread_local Scratch<Real> scratch;
    Real* const weights = scratch.reserve(padded(vocab));
    const auto weigh = Weighing<Real>::of(peak, static_cast<double>(temperature));
    const double limit = weigh_row(row, type, vocab, weigh, weights) * unlikely_part;
    int halvings = MOST_HALVINGS;
    for (int step = MOST_HALVINGS / 2; step > 0; step /= 2) {
        const double bound = std::ldexp(Weighing<Real>::PEAK_WEIGHT, step - halvings);
        if (mass_up_to(weights, padded(vocab), bound) <= limit) halvings -= step;
    }
    const Real halving = static_cast<Real>(0x1.62e42fefa39efp-1) * temperature;  // ln 2
    const Real cut = static_cast<Real>(peak) - static_cast<Real>(halvings) * halving;
    lower_below(row, type, vocab, cut, behind * temperature);
}

}  // namespace

void set_back_unlikely(std::uintptr_t logits_ptr, int type, std::uintptr_t temperature_ptr, std::uintptr_t top_p_ptr,
                       float behind, std::int64_t batch_size, std::int64_t rows_per_request, std::int64_t vocab,
                       std::int64_t row_stride) {
    const auto element = static_cast<ElementType>(type);
    const std::int64_t row_bytes = row_stride * element_bytes(element);
    for (std::int64_t b = 0; b < batch_size; ++b) {
        const float temperature = reinterpret_cast<const float*>(temperature_ptr)[b];
        const float top_p = reinterpret_cast<const float*>(top_p_ptr)[b];
        if (!(temperature > 0) || !(top_p < 1)) continue;
        const float unlikely_part = (1 - top_p) / 2;
        for (std::int64_t i = 0; i < rows_per_request; ++i) {
            void* const row = reinterpret_cast<char*>(logits_ptr) + (b * rows_per_request + i) * row_bytes;
            const RowPeak peak = row_peak(row, element, vocab);
            if (!peak.valid) continue;
            if (element == ElementType::float64) {
                set_back_row<double>(row, element, vocab, peak.logit, temperature, unlikely_part, behind);
            } else {
                set_back_row<float>(row, element, vocab, peak.logit, temperature, unlikely_part, behind);
            }
        }
    }
}

}  // namespace sequoia
