// Rows of logits: element types, loading into float or double, and the reductions the ops share.
//
// A loaded row is padded with -inf to a multiple of LANES, so that no loop has a remainder.

#pragma once

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

// The ranges that the ops refuse values outside of. sequoia_kernels/checks.py has the last word and the messages: it is
// asked when one of these says no, so they may be stricter than it is, but never laxer.
bool rows_valid(const LogitRows& logits, std::int64_t num_rows);  // no NaN, no +inf, something above -inf in each
bool temperatures_valid(const float* temperatures, std::int64_t count);  // 0, or from 1e-5 to below +inf
bool top_ps_valid(const float* top_ps, std::int64_t count);  // in (0, 1]

// Lowest index of a value in a row, which must hold it.
std::int64_t first_index_of(const double* row, double value);

// weights = exp((logits - peak) / temperature), 0 where that underflows in float32 (or float64, if `wide`), so that
// "probability 0" means the same as in the reference. Returns the sum. Rows padded; weights may be the logits.
double softmax_weights(const double* logits, std::int64_t vocab, double peak, double temperature, bool wide,
                       double* weights);

// Sum of exp((logits - peak) / temperature). Row padded.
double softmax_mass(const float* logits, std::int64_t vocab, float peak, float temperature);
double softmax_mass(const double* logits, std::int64_t vocab, double peak, double temperature);

}  // namespace sequoia
