#include "rows.h"

#include <algorithm>
#include <limits>

#include "elements.h"

namespace sequoia {
namespace {

constexpr std::int64_t CHUNK = 512;  // elements converted at a time, so that the reduction finds them in the cache

SEQUOIA_INLINE float widen(float value) { return value; }

SEQUOIA_INLINE float widen(BFloat16 value) { return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }

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
SEQUOIA_INLINE void widen_all(const void* row, std::int64_t count, float* out) {
    const Element* const elements = static_cast<const Element*>(row);
    for (std::int64_t i = 0; i < count; ++i) out[i] = widen(elements[i]);
}

template <class Element>
SEQUOIA_INLINE void add_all(const float* sums, const void* row, std::int64_t vocab, void* out) {
    const Element* const elements = static_cast<const Element*>(row);
    Element* const target = static_cast<Element*>(out);
    for (std::int64_t i = 0; i < vocab; ++i) narrow(sums[i] + widen(elements[i]), target + i);
}

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

// Elements begin .. begin + CHUNK - 1 of a row, padded with -inf to a multiple of LANES; returns how many that makes.
template <class Element, class Real>
SEQUOIA_INLINE std::int64_t load_chunk(const char* row, std::int64_t begin, std::int64_t vocab, Real* chunk) {
    const std::int64_t count = std::min(vocab - begin, CHUNK), whole = count / LANES * LANES;
    for (std::int64_t i = 0; i < whole; i += LANES) {
        for (std::int64_t lane = 0; lane < LANES; ++lane) {
            chunk[i + lane] = static_cast<Real>(widen(element_at<Element>(row, begin + i + lane)));
        }
    }
    for (std::int64_t i = whole; i < count; ++i) {
        chunk[i] = static_cast<Real>(widen(element_at<Element>(row, begin + i)));
    }
    for (std::int64_t i = count; i < padded(count); ++i) chunk[i] = -std::numeric_limits<Real>::infinity();
    return padded(count);
}

template <class Element, class Real>
SEQUOIA_INLINE double weigh_all(const void* source, std::int64_t vocab, Weighing<Real> weigh, Real* weights) {
    const char* row = static_cast<const char*>(source);
    double lanes[LANES] = {};
    for (std::int64_t begin = 0; begin < vocab; begin += CHUNK) {
        Real logits[CHUNK], unwanted[CHUNK];
        const std::int64_t count = load_chunk<Element>(row, begin, vocab, logits);
        Real* const out = weights == nullptr ? unwanted : weights + begin;
        for (std::int64_t i = 0; i < count; ++i) out[i] = weigh(logits[i]);
        for (std::int64_t i = 0; i < count; i += LANES) {
            for (std::int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += static_cast<double>(out[i + lane]);
        }
    }
    return sum_of_lanes(lanes);
}

// Bit patterns of floating-point numbers, read as integers, order the positive ones upwards and, behind those, the
// negative ones downwards; NaN stands behind the infinity of its sign. So three extremes of the patterns, taken without
// a look at the numbers, tell a row's largest element and what is wrong with it.
template <class Signed, class Unsigned>
struct Extremes {
    Signed signed_max = std::numeric_limits<Signed>::min();
    Unsigned max = 0, min = std::numeric_limits<Unsigned>::max();

    Unsigned largest() const { return signed_max >= 0 ? static_cast<Unsigned>(signed_max) : min; }
    bool valid(Unsigned infinity) const {
        const Unsigned minus_infinity = infinity | static_cast<Unsigned>(~(static_cast<Unsigned>(-1) >> 1));
        return signed_max < static_cast<Signed>(infinity) && max <= minus_infinity && min < minus_infinity;
    }
};

template <class Value>
SEQUOIA_INLINE Value larger(Value left, Value right) {
    return left > right ? left : right;
}

template <class Value>
SEQUOIA_INLINE Value smaller(Value left, Value right) {
    return left < right ? left : right;
}

// Runs down four parts of the row side by side: one alone comes from memory at little more than half of the speed.
template <class Signed, class Unsigned, std::int64_t BYTES>
SEQUOIA_INLINE Extremes<Signed, Unsigned> extremes_by(const void* source, std::int64_t vocab) {
    constexpr std::int64_t WIDTH = BYTES / sizeof(Unsigned), PARTS = 4;
    const char* row = static_cast<const char*>(source);
    Extremes<Signed, Unsigned> all;
    Signed signed_max[WIDTH];
    Unsigned max[WIDTH], min[WIDTH];
    for (std::int64_t lane = 0; lane < WIDTH; ++lane) {
        signed_max[lane] = all.signed_max;
        max[lane] = all.max;
        min[lane] = all.min;
    }
    const auto add = [&](std::int64_t begin) {
        for (std::int64_t lane = 0; lane < WIDTH; ++lane) {
            const Unsigned bits = element_at<Unsigned>(row, begin + lane);
            signed_max[lane] = larger(static_cast<Signed>(bits), signed_max[lane]);
            max[lane] = larger(bits, max[lane]);
            min[lane] = smaller(bits, min[lane]);
        }
    };
    const std::int64_t part = vocab / (WIDTH * PARTS) * WIDTH;
    for (std::int64_t begin = 0; begin < part; begin += WIDTH) {
        for (std::int64_t i = begin; i < PARTS * part; i += part) add(i);
    }
    std::int64_t end = PARTS * part;
    for (; end + WIDTH <= vocab; end += WIDTH) add(end);
    for (std::int64_t i = end; i < vocab; ++i) {
        const Unsigned bits = element_at<Unsigned>(row, i);
        all = {larger(static_cast<Signed>(bits), all.signed_max), larger(bits, all.max), smaller(bits, all.min)};
    }
    if (end == 0) return all;
    for (std::int64_t half = WIDTH / 2; half > 0; half /= 2) {
        for (std::int64_t lane = 0; lane < half; ++lane) {
            signed_max[lane] = larger(signed_max[lane], signed_max[half + lane]);
            max[lane] = larger(max[lane], max[half + lane]);
            min[lane] = smaller(min[lane], min[half + lane]);
        }
    }
    return {larger(all.signed_max, signed_max[0]), larger(all.max, max[0]), smaller(all.min, min[0])};
}

// More lanes are faster along a row, but in a short one bringing them together is most of the work.
template <class Signed, class Unsigned>
SEQUOIA_INLINE Extremes<Signed, Unsigned> extremes(const void* row, std::int64_t vocab) {
    return vocab < 1024 ? extremes_by<Signed, Unsigned, 64>(row, vocab)
                        : extremes_by<Signed, Unsigned, 128>(row, vocab);
}

template <class Element, class Real>
SEQUOIA_INLINE std::int64_t find(const void* source, std::int64_t vocab, Real logit) {
    constexpr std::int64_t BLOCK = 4 * LANES;
    const char* row = static_cast<const char*>(source);
    std::int64_t begin = 0;
    for (; begin + BLOCK <= vocab; begin += BLOCK) {
        int found = 0;
        for (std::int64_t i = 0; i < BLOCK; ++i) found |= widen(element_at<Element>(row, begin + i)) == logit;
        if (found != 0) break;
    }
    while (widen(element_at<Element>(row, begin)) != logit) ++begin;
    return begin;
}

using sequoia::narrow;
SEQUOIA_INLINE void narrow(double value, double* target) { *target = value; }

// What is not below the cut, and what is -inf, goes back as it came.
template <class Element, class Real>
SEQUOIA_INLINE void lower(void* source, std::int64_t vocab, Real cut, Real by, Real smallest) {
    Element* const row = static_cast<Element*>(source);
    for (std::int64_t i = 0; i < vocab; ++i) {
        const Real logit = widen(row[i]);
        const Real lowered = logit - by > smallest ? logit - by : smallest;
        narrow((logit < cut) & (logit >= smallest) ? lowered : logit, row + i);
    }
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

SEQUOIA_CLONES void widen_bfloat16(const void* row, std::int64_t n, float* out) { widen_all<BFloat16>(row, n, out); }
SEQUOIA_CLONES void widen_float16(const void* row, std::int64_t n, float* out) { widen_all<Float16>(row, n, out); }

SEQUOIA_CLONES void add_float32(const float* sums, const void* row, std::int64_t n, void* out) {
    add_all<float>(sums, row, n, out);
}
SEQUOIA_CLONES void add_bfloat16(const float* sums, const void* row, std::int64_t n, void* out) {
    add_all<BFloat16>(sums, row, n, out);
}
SEQUOIA_CLONES void add_float16(const float* sums, const void* row, std::int64_t n, void* out) {
    add_all<Float16>(sums, row, n, out);
}

SEQUOIA_CLONES double weigh_float32(const void* row, std::int64_t n, Weighing<float> weigh, float* out) {
    return weigh_all<float>(row, n, weigh, out);
}
SEQUOIA_CLONES double weigh_bfloat16(const void* row, std::int64_t n, Weighing<float> weigh, float* out) {
    return weigh_all<BFloat16>(row, n, weigh, out);
}
SEQUOIA_CLONES double weigh_float16(const void* row, std::int64_t n, Weighing<float> weigh, float* out) {
    return weigh_all<Float16>(row, n, weigh, out);
}
SEQUOIA_CLONES double weigh_float32(const void* row, std::int64_t n, Weighing<double> weigh, double* out) {
    return weigh_all<float>(row, n, weigh, out);
}
SEQUOIA_CLONES double weigh_float64(const void* row, std::int64_t n, Weighing<double> weigh, double* out) {
    return weigh_all<double>(row, n, weigh, out);
}
SEQUOIA_CLONES double weigh_bfloat16(const void* row, std::int64_t n, Weighing<double> weigh, double* out) {
    return weigh_all<BFloat16>(row, n, weigh, out);
}
SEQUOIA_CLONES double weigh_float16(const void* row, std::int64_t n, Weighing<double> weigh, double* out) {
    return weigh_all<Float16>(row, n, weigh, out);
}

SEQUOIA_CLONES Extremes<std::int16_t, std::uint16_t> extremes_16(const void* row, std::int64_t n) {
    return extremes<std::int16_t, std::uint16_t>(row, n);
}
SEQUOIA_CLONES Extremes<std::int32_t, std::uint32_t> extremes_32(const void* row, std::int64_t n) {
    return extremes<std::int32_t, std::uint32_t>(row, n);
}
SEQUOIA_CLONES Extremes<std::int64_t, std::uint64_t> extremes_64(const void* row, std::int64_t n) {
    return extremes<std::int64_t, std::uint64_t>(row, n);
}

SEQUOIA_CLONES std::int64_t find_float32(const void* row, std::int64_t n, float value) {
    return find<float>(row, n, value);
}
SEQUOIA_CLONES std::int64_t find_float64(const void* row, std::int64_t n, double value) {
    return find<double>(row, n, value);
}
SEQUOIA_CLONES std::int64_t find_bfloat16(const void* row, std::int64_t n, float value) {
    return find<BFloat16>(row, n, value);
}
SEQUOIA_CLONES std::int64_t find_float16(const void* row, std::int64_t n, float value) {
    return find<Float16>(row, n, value);
}

SEQUOIA_CLONES void lower_float32(void* row, std::int64_t n, float cut, float by, float smallest) {
    lower<float>(row, n, cut, by, smallest);
}
SEQUOIA_CLONES void lower_float64(void* row, std::int64_t n, double cut, double by, double smallest) {
    lower<double>(row, n, cut, by, smallest);
}
SEQUOIA_CLONES void lower_bfloat16(void* row, std::int64_t n, float cut, float by, float smallest) {
    lower<BFloat16>(row, n, cut, by, smallest);
}
SEQUOIA_CLONES void lower_float16(void* row, std::int64_t n, float cut, float by, float smallest) {
    lower<Float16>(row, n, cut, by, smallest);
}

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

void widen_row(const void* row, ElementType type, std::int64_t count, float* out) {
    switch (type) {
        case ElementType::bfloat16: return widen_bfloat16(row, count, out);
        case ElementType::float16: return widen_float16(row, count, out);
        default: std::memcpy(out, row, static_cast<std::size_t>(count) * sizeof(float));
    }
}

void add_to_row(const float* sums, const void* row, ElementType type, std::int64_t vocab, void* out) {
    switch (type) {
        case ElementType::bfloat16: return add_bfloat16(sums, row, vocab, out);
        case ElementType::float16: return add_float16(sums, row, vocab, out);
        default: return add_float32(sums, row, vocab, out);
    }
}

double weigh_row(const void* row, ElementType type, std::int64_t vocab, Weighing<float> weigh, float* weights) {
    switch (type) {
        case ElementType::bfloat16: return weigh_bfloat16(row, vocab, weigh, weights);
        case ElementType::float16: return weigh_float16(row, vocab, weigh, weights);
        default: return weigh_float32(row, vocab, weigh, weights);
    }
}

double weigh_row(const void* row, ElementType type, std::int64_t vocab, Weighing<double> weigh, double* weights) {
    switch (type) {
        case ElementType::float64: return weigh_float64(row, vocab, weigh, weights);
        case ElementType::bfloat16: return weigh_bfloat16(row, vocab, weigh, weights);
        case ElementType::float16: return weigh_float16(row, vocab, weigh, weights);
        default: return weigh_float32(row, vocab, weigh, weights);
    }
}

RowPeak row_peak(const void* row, ElementType type, std::int64_t vocab) {
    switch (type) {
        case ElementType::float64: {
            const auto seen = extremes_64(row, vocab);
            return {bit_cast<double>(seen.largest()), seen.valid(0x7ff0000000000000u)};
        }
        case ElementType::bfloat16: {
            const auto seen = extremes_16(row, vocab);
            return {widen(BFloat16{seen.largest()}), seen.valid(0x7f80u)};
        }
        case ElementType::float16: {
            const auto seen = extremes_16(row, vocab);
            return {widen(Float16{seen.largest()}), seen.valid(0x7c00u)};
        }
        default: {
            const auto seen = extremes_32(row, vocab);
            return {bit_cast<float>(seen.largest()), seen.valid(0x7f800000u)};
        }
    }
}

double logit_at(const void* row, ElementType type, std::int64_t index) {
    const char* const elements = static_cast<const char*>(row);
    switch (type) {
        case ElementType::float64: return element_at<double>(elements, index);
        case ElementType::bfloat16: return widen(element_at<BFloat16>(elements, index));
        case ElementType::float16: return widen(element_at<Float16>(elements, index));
        default: return element_at<float>(elements, index);
    }
}

std::int64_t first_index_of(const void* row, ElementType type, std::int64_t vocab, double logit) {
    switch (type) {
        case ElementType::float64: return find_float64(row, vocab, logit);
        case ElementType::bfloat16: return find_bfloat16(row, vocab, static_cast<float>(logit));
        case ElementType::float16: return find_float16(row, vocab, static_cast<float>(logit));
        default: return find_float32(row, vocab, static_cast<float>(logit));
    }
}

void lower_below(void* row, ElementType type, std::int64_t vocab, double cut, double by) {
    const auto narrow_cut = static_cast<float>(cut), narrow_by = static_cast<float>(by);
    switch (type) {
        case ElementType::float64:
            return lower_float64(row, vocab, cut, by, std::numeric_limits<double>::lowest());
        case ElementType::bfloat16: return lower_bfloat16(row, vocab, narrow_cut, narrow_by, -0x1.fep127f);
        case ElementType::float16: return lower_float16(row, vocab, narrow_cut, narrow_by, -65504.0f);
        default: return lower_float32(row, vocab, narrow_cut, narrow_by, std::numeric_limits<float>::lowest());
    }
}

bool rows_valid(const LogitRows& logits, std::int64_t num_rows) {
    for (std::int64_t index = 0; index < num_rows; ++index) {
        if (!row_peak(logits.row(index), logits.type, logits.vocab).valid) return false;
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

}  // namespace sequoia
