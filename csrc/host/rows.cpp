#include "rows.h"

#include <algorithm>
#include <limits>

namespace sequoia {
namespace {

constexpr std::int64_t CHUNK = 512;  // elements converted at a time, so that the reduction finds them in the cache

SEQUOIA_INLINE float widen(float value) { return value; }

struct BFloat16 {
    std::uint16_t bits;
};

SEQUOIA_INLINE float widen(BFloat16 value) { return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }

struct Float16 {
    std::uint16_t bits;
};

// Exponent and mantissa move to their float32 places, where the value is 2^112 too small; subnormals come out right.
SEQUOIA_INLINE float widen(Float16 value) {
    const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
    const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
    const std::uint32_t special = (value.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    return bit_cast<float>(bit_cast<std::uint32_t>(scaled) | special | sign);
}

SEQUOIA_INLINE double widen(double value) { return value; }

template <class Element>
SEQUOIA_INLINE Element element_at(const char* row, std::int64_t index) {
    Element element;
    std::memcpy(&element, row + index * static_cast<std::int64_t>(sizeof(Element)), sizeof(Element));
    return element;
}

template <class Element, class Real>
SEQUOIA_INLINE Real load(const void* source, std::int64_t vocab, Real* out) {
    const char* row = static_cast<const char*>(source);
    Real lanes[LANES];
    for (Real& lane : lanes) lane = -std::numeric_limits<Real>::infinity();
    for (std::int64_t begin = 0; begin < vocab; begin += CHUNK) {
        const std::int64_t end = std::min(vocab, begin + CHUNK);
        for (std::int64_t i = begin; i < end; ++i) out[i] = static_cast<Real>(widen(element_at<Element>(row, i)));
        for (std::int64_t i = end; i < padded(end); ++i) out[i] = -std::numeric_limits<Real>::infinity();
        for (std::int64_t i = begin; i < padded(end); i += LANES) {
            for (std::int64_t lane = 0; lane < LANES; ++lane) {
                lanes[lane] = out[i + lane] > lanes[lane] ? out[i + lane] : lanes[lane];
            }
        }
    }
    return *std::max_element(lanes, lanes + LANES);
}

template <class Real>
SEQUOIA_INLINE Real sum_of_lanes(const Real* lanes) {
    Real sum = 0;
    for (std::int64_t lane = 0; lane < LANES; ++lane) sum += lanes[lane];
    return sum;
}

template <class Real>
SEQUOIA_INLINE double mass(const Real* logits, std::int64_t vocab, Real peak, Real temperature) {
    const Real scale = 1 / temperature;
    double lanes[LANES] = {};
    for (std::int64_t begin = 0; begin < vocab; begin += CHUNK) {
        const std::int64_t count = padded(std::min(vocab - begin, CHUNK));
        Real weights[CHUNK];
        for (std::int64_t i = 0; i < count; ++i) weights[i] = exp_nonpositive((logits[begin + i] - peak) * scale);
        for (std::int64_t i = 0; i < count; i += LANES) {
            for (std::int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += static_cast<double>(weights[i + lane]);
        }
    }
    return sum_of_lanes(lanes);
}

// Whether every element is a number below +inf and one is above -inf.
template <class Element>
SEQUOIA_INLINE bool valid(const void* source, std::int64_t vocab) {
    using Real = decltype(widen(Element()));
    const char* row = static_cast<const char*>(source);
    int bad = 0, finite = 0;
    for (std::int64_t i = 0; i < vocab; ++i) {
        const Real value = widen(element_at<Element>(row, i));
        bad |= !(value <= std::numeric_limits<Real>::max());
        finite |= value >= -std::numeric_limits<Real>::max();
    }
    return finite != 0 && bad == 0;
}

}  // namespace

// The loops with clones: one plain function each, since templates cannot be multiversioned.

SEQUOIA_CLONES float load_float32(const void* row, std::int64_t n, float* out) { return load<float>(row, n, out); }
SEQUOIA_CLONES float load_bfloat16(const void* row, std::int64_t n, float* out) { return load<BFloat16>(row, n, out); }
SEQUOIA_CLONES float load_float16(const void* row, std::int64_t n, float* out) { return load<Float16>(row, n, out); }
SEQUOIA_CLONES double load_float32(const void* row, std::int64_t n, double* out) { return load<float>(row, n, out); }
SEQUOIA_CLONES double load_float64(const void* row, std::int64_t n, double* out) { return load<double>(row, n, out); }
SEQUOIA_CLONES double load_bfloat16(const void* row, std::int64_t n, double* out) {
    return load<BFloat16>(row, n, out);
}
SEQUOIA_CLONES double load_float16(const void* row, std::int64_t n, double* out) { return load<Float16>(row, n, out); }

SEQUOIA_CLONES bool valid_float32(const void* row, std::int64_t n) { return valid<float>(row, n); }
SEQUOIA_CLONES bool valid_float64(const void* row, std::int64_t n) { return valid<double>(row, n); }
SEQUOIA_CLONES bool valid_bfloat16(const void* row, std::int64_t n) { return valid<BFloat16>(row, n); }
SEQUOIA_CLONES bool valid_float16(const void* row, std::int64_t n) { return valid<Float16>(row, n); }

SEQUOIA_CLONES double softmax_weights(const double* logits, std::int64_t vocab, double peak, double temperature,
                                      bool wide, double* weights) {
    const double lowest = wide ? -745.1 : -103.9;
    const double scale = 1 / temperature;
    double lanes[LANES] = {};
    for (std::int64_t begin = 0; begin < vocab; begin += CHUNK) {
        const std::int64_t count = padded(std::min(vocab - begin, CHUNK));
        for (std::int64_t i = begin; i < begin + count; ++i) {
            const double scaled = (logits[i] - peak) * scale;
            weights[i] = scaled < lowest ? 0.0 : exp_nonpositive(scaled);
        }
        for (std::int64_t i = begin; i < begin + count; i += LANES) {
            for (std::int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += weights[i + lane];
        }
    }
    return sum_of_lanes(lanes);
}

SEQUOIA_CLONES double softmax_mass(const float* logits, std::int64_t vocab, float peak, float temperature) {
    return mass(logits, vocab, peak, temperature);
}

SEQUOIA_CLONES double softmax_mass(const double* logits, std::int64_t vocab, double peak, double temperature) {
    return mass(logits, vocab, peak, temperature);
}

std::int64_t element_bytes(ElementType type) {
    switch (type) {
        case ElementType::float32: return 4;
        case ElementType::float64: return 8;
        default: return 2;
    }
}

float load_row(const void* row, ElementType type, std::int64_t vocab, float* out) {
    switch (type) {
        case ElementType::bfloat16: return load_bfloat16(row, vocab, out);
        case ElementType::float16: return load_float16(row, vocab, out);
        default: return load_float32(row, vocab, out);
    }
}

double load_row(const void* row, ElementType type, std::int64_t vocab, double* out) {
    switch (type) {
        case ElementType::float64: return load_float64(row, vocab, out);
        case ElementType::bfloat16: return load_bfloat16(row, vocab, out);
        case ElementType::float16: return load_float16(row, vocab, out);
        default: return load_float32(row, vocab, out);
    }
}

bool rows_valid(const LogitRows& logits, std::int64_t num_rows) {
    bool (*valid)(const void*, std::int64_t) = valid_float32;
    if (logits.type == ElementType::float64) valid = valid_float64;
    if (logits.type == ElementType::bfloat16) valid = valid_bfloat16;
    if (logits.type == ElementType::float16) valid = valid_float16;
    for (std::int64_t index = 0; index < num_rows; ++index) {
        if (!valid(logits.row(index), logits.vocab)) return false;
    }
    return true;
}

bool temperatures_valid(const float* temperatures, std::int64_t count) {
    return std::all_of(temperatures, temperatures + count, [](float value) {
        return value == 0 || (value >= 1.001e-5f && value <= std::numeric_limits<float>::max());
    });
}

bool top_ps_valid(const float* top_ps, std::int64_t count) {
    return std::all_of(top_ps, top_ps + count, [](float value) { return value > 0 && value <= 1; });
}

std::int64_t first_index_of(const double* row, double value) {
    std::int64_t index = 0;
    while (row[index] != value) ++index;
    return index;
}

}  // namespace sequoia
