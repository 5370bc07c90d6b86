// Rows of logits: element types, loading into float or double, and the reductions the ops share.
//
// A loaded row is padded with -inf to a multiple of LANES, so that no loop has a remainder.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace sequoia {

// Codes shared with sequoia_kernels/ops/host_calls.py.
enum class ElementType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

std::int64_t element_bytes(ElementType type);

// A matrix of logits in the caller's memory: rows `row_bytes` apart, elements of a row adjacent.
struct LogitRows {
    const char* data;
    ElementType type;
    std::int64_t row_bytes;
    std::int64_t vocab;

    const void* row(std::int64_t index) const { return data + index * row_bytes; }
    LogitRows rows_from(std::int64_t index) const { return {data + index * row_bytes, type, row_bytes, vocab}; }
};

// How a row's logits become weights: PEAK_WEIGHT exp((logit - peak) / temperature), 0 where that exponential underflows
// in the type, so that "probability 0" means the same as in the reference. Equal logits have equal weights, and one
// that is taken alone has the same bits as in a row. The peak must be the largest logit of those that count.
template <class Real>
struct Weighing;

template <>
struct Weighing<float> {
    float peak = 0;
    float rate = 0;

    static constexpr double PEAK_WEIGHT = 0x1p64;
    static Weighing of(double peak, double temperature) {
        return {static_cast<float>(peak), static_cast<float>(0x1.71547652b82fep0 / temperature)};  // log2(e) / T
    }
    SEQUOIA_INLINE float operator()(float logit) const { return exp2_times_2_64((logit - peak) * rate); }
    double relative(double logit) const { return std::exp2((logit - peak) * rate); }  // to the peak's weight, unrounded
};

template <>
struct Weighing<double> {
    double peak = 0;
    double rate = 0;

    static constexpr double PEAK_WEIGHT = 1;
    static Weighing of(double peak, double temperature) { return {peak, 1 / temperature}; }
    SEQUOIA_INLINE double operator()(double logit) const { return exp_nonpositive((logit - peak) * rate); }
    double relative(double logit) const { return std::exp((logit - peak) * rate); }
};

constexpr std::int64_t padded(std::int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// Memory that grows and is then kept: the loops run every few milliseconds on rows of one size, and fresh pages would
// cost more than the arithmetic.
template <class Element>
class Scratch {
  public:
    Element* reserve(std::int64_t size) {
        if (static_cast<std::int64_t>(elements_.size()) < size) elements_.resize(static_cast<std::size_t>(size));
        return elements_.data();
    }

  private:
    std::vector<Element> elements_;
};

// Load a row with its padding; returns its largest logit.
float load_row(const void* row, ElementType type, std::int64_t vocab, float* out);
double load_row(const void* row, ElementType type, std::int64_t vocab, double* out);

// Load a row as it is, without padding. Not of float64.
void widen_row(const void* row, ElementType type, std::int64_t count, float* out);

// out = sums + row, in float32 and rounded once to the row's type, which is not float64. `out` may be `sums`.
void add_to_row(const float* sums, const void* row, ElementType type, std::int64_t vocab, void* out);

// Weights of a row, with zeros for its padding; returns their sum. `weights` may be null: then only the sum is wanted.
double weigh_row(const void* row, ElementType type, std::int64_t vocab, Weighing<float> weigh, float* weights);
double weigh_row(const void* row, ElementType type, std::int64_t vocab, Weighing<double> weigh, double* weights);

// What one look at a row tells.
struct RowPeak {
    double logit;  // the largest; anything where the row is not valid
    bool valid;    // no NaN, no +inf, something above -inf
};

RowPeak row_peak(const void* row, ElementType type, std::int64_t vocab);

double logit_at(const void* row, ElementType type, std::int64_t index);

// Lowest index of a logit in a row, which must hold it.
std::int64_t first_index_of(const void* row, ElementType type, std::int64_t vocab, double logit);

// Take `by` off every finite logit below `cut`, in the arithmetic of the type or float32; none falls below the type's
// smallest finite number. Row without NaN or +inf.
void lower_below(void* row, ElementType type, std::int64_t vocab, double cut, double by);

// The ranges that the ops refuse values outside of. sequoia_kernels/checks.py has the last word and the messages: it is
// asked when one of these says no, so they may be stricter than it is, but never laxer.
bool rows_valid(const LogitRows& logits, std::int64_t num_rows);  // as RowPeak::valid
bool temperatures_valid(const float* temperatures, std::int64_t count);  // 0, or from 1e-5 to below +inf
bool top_ps_valid(const float* top_ps, std::int64_t count);  // in (0, 1]

// weights = exp((logits - peak) / temperature), 0 where that underflows in float32 (or float64, if `wide`), so that
// "probability 0" means the same as in the reference. Returns the sum. Rows padded; weights may be the logits.
double softmax_weights(const double* logits, std::int64_t vocab, double peak, double temperature, bool wide,
                       double* weights);

// Sum of exp((logits - peak) / temperature). Row padded.
double softmax_mass(const float* logits, std::int64_t vocab, float peak, float temperature);
double softmax_mass(const double* logits, std::int64_t vocab, double peak, double temperature);

}  // namespace sequoia
