// sample_without_replacement on the CPU.
//
// Computes    per row: the k largest keys logit / T + gumbel in falling order (ties: lower token first), and
//             log sum exp(logit / T). T = 0: the k largest logits, and the largest.
// Plan        one thread; rows one after the other. Noise comes 64 tokens at a time; a cheap upper bound of each key
//             leaves only those that can enter the current best k, about k ln(vocab / k) of them, to take logarithms
//             for. A stretch that could not enter with the largest noise there is costs no random words at all.
// Memory      reads each row once; scratch of one row.
// Numerics    keys in float64 as in the reference; the bounds, in the type of the row, drop no key that counts.
// Source      Gumbel top-k, see sequoia_kernels/ops/sample_without_replacement/reference.py.

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"
#include "rows.h"
#include "streams.h"

namespace sequoia {
namespace {

// The best k so far in falling order; of equal keys the earlier one stays in front.
class BestKeys {
  public:
    BestKeys(std::int64_t capacity, double* keys, std::int64_t* tokens)
        : capacity_(capacity), keys_(keys), tokens_(tokens) {}

    // What a new key must exceed. -inf at first, so that a token of key -inf never enters.
    double threshold() const {
        return size_ < capacity_ ? -std::numeric_limits<double>::infinity() : keys_[capacity_ - 1];
    }

    void insert(double key, std::int64_t token) {
        std::int64_t place = size_ < capacity_ ? size_++ : capacity_ - 1;
        for (; place > 0 && keys_[place - 1] < key; --place) {
            keys_[place] = keys_[place - 1];
            tokens_[place] = tokens_[place - 1];
        }
        keys_[place] = key;
        tokens_[place] = token;
    }

    std::int64_t size() const { return size_; }

  private:
    std::int64_t capacity_;
    std::int64_t size_ = 0;
    double* keys_;          // [capacity]
    std::int64_t* tokens_;  // [capacity]
};

struct NoiseStream {
    std::uint64_t seed;
    std::uint64_t offset;
};

// A threshold in the type of the bounds. One that is too large for it stays below infinity, or a bound that overflowed,
// of a key that did not, would not exceed it.
template <class Real>
SEQUOIA_INLINE Real rounded_threshold(const BestKeys& best) {
    return static_cast<Real>(std::min(best.threshold(), static_cast<double>(std::numeric_limits<Real>::max())));
}

template <class Real>
SEQUOIA_INLINE bool any_above(const Real* values, Real bound) {
    int above = 0;
    for (std::int64_t i = 0; i < STRETCH; ++i) above |= values[i] > bound;
    return above != 0;
}

template <class Real>
SEQUOIA_INLINE void best_logits(const Real* logits, std::int64_t vocab, BestKeys& best) {
    for (std::int64_t first = 0; first < vocab; first += STRETCH) {
        if (!any_above(logits + first, rounded_threshold<Real>(best))) continue;
        for (std::int64_t i = first; i < first + STRETCH; ++i) {
            const double key = static_cast<double>(logits[i]);
            if (key > best.threshold()) best.insert(key, i);
        }
    }
}

template <class Real>
SEQUOIA_INLINE void best_keys(const Real* logits, std::int64_t vocab, Real temperature, NoiseStream stream,
                              BestKeys& best) {
    // What rounding can take from the bound of a key: that of the quotient, of the sum with the noise (the two bounds of
    // which have room for themselves), and of the threshold it meets.
    constexpr Real ROUNDING = 4 * std::numeric_limits<Real>::epsilon();
    for (std::int64_t first = 0; first < vocab; first += STRETCH) {
        Real scaled[STRETCH];
        Real bounds[STRETCH];
        for (std::int64_t i = 0; i < STRETCH; ++i) {
            const Real quotient = logits[first + i] / temperature;
            scaled[i] = quotient * (quotient < 0 ? 1 - ROUNDING : 1 + ROUNDING);
            bounds[i] = scaled[i] + static_cast<Real>(LARGEST_GUMBEL);
        }
        if (!any_above(bounds, rounded_threshold<Real>(best))) continue;

        std::uint32_t words[STRETCH];
        stretch_words(stream.seed, stream.offset, DRAFT_TAG, first, words);
        for (std::int64_t i = 0; i < STRETCH; ++i) {
            bounds[i] = scaled[i] + static_cast<Real>(gumbel_upper_bound(words[i]));
        }
        if (!any_above(bounds, rounded_threshold<Real>(best))) continue;

        for (std::int64_t i = 0; i < STRETCH; ++i) {
            if (!(bounds[i] > rounded_threshold<Real>(best))) continue;
            const double key = static_cast<double>(logits[first + i]) / static_cast<double>(temperature) +
                               static_cast<double>(gumbel(words[i]));
            if (key > best.threshold()) best.insert(key, first + i);
        }
    }
}

}  // namespace

SEQUOIA_CLONES void best_logits_float(const float* logits, std::int64_t vocab, BestKeys* best) {
    best_logits(logits, vocab, *best);
}

SEQUOIA_CLONES void best_logits_double(const double* logits, std::int64_t vocab, BestKeys* best) {
    best_logits(logits, vocab, *best);
}

SEQUOIA_CLONES void best_keys_float(const float* logits, std::int64_t vocab, float temperature, NoiseStream stream,
                                    BestKeys* best) {
    best_keys(logits, vocab, temperature, stream, *best);
}

SEQUOIA_CLONES void best_keys_double(const double* logits, std::int64_t vocab, double temperature, NoiseStream stream,
                                     BestKeys* best) {
    best_keys(logits, vocab, temperature, stream, *best);
}

namespace {

void select(const float* logits, std::int64_t vocab, float temperature, NoiseStream stream, BestKeys& best) {
    temperature == 0 ? best_logits_float(logits, vocab, &best)
                     : best_keys_float(logits, vocab, temperature, stream, &best);
}

void select(const double* logits, std::int64_t vocab, double temperature, NoiseStream stream, BestKeys& best) {
    temperature == 0 ? best_logits_double(logits, vocab, &best)
                     : best_keys_double(logits, vocab, temperature, stream, &best);
}

template <class Real>
void sample_rows(const LogitRows& logits, std::int64_t num_rows, std::int64_t num_samples, const float* temperatures,
                 const std::int64_t* seeds, const std::int64_t* offsets, std::int64_t* tokens, Real* log_normalisers) {
    static thread_local Scratch<Real> row_scratch;
    static thread_local Scratch<double> key_scratch;
    const std::int64_t room = (logits.vocab + STRETCH - 1) / STRETCH * STRETCH;
    Real* const row = row_scratch.reserve(room);
    double* const keys = key_scratch.reserve(num_samples);
    std::fill(row + logits.vocab, row + room, -std::numeric_limits<Real>::infinity());
    for (std::int64_t r = 0; r < num_rows; ++r) {
        const Real peak = load_row(logits.row(r), logits.type, logits.vocab, row);
        const Real temperature = static_cast<Real>(temperatures[r]);
        BestKeys best(num_samples, keys, tokens + r * num_samples);
        const NoiseStream stream{static_cast<std::uint64_t>(seeds[r]), static_cast<std::uint64_t>(offsets[r])};
        select(row, logits.vocab, temperature, stream, best);
        std::fill(tokens + r * num_samples + best.size(), tokens + (r + 1) * num_samples, std::int64_t{-1});
        log_normalisers[r] =
            temperature == 0
                ? peak
                : static_cast<Real>(static_cast<double>(peak) / static_cast<double>(temperature) +
                                    std::log(softmax_mass(row, logits.vocab, peak, temperature)));
    }
}

}  // namespace

bool sample_without_replacement(std::uintptr_t logits_ptr, int type, std::uintptr_t temperature_ptr,
                                std::uintptr_t seeds_ptr, std::uintptr_t offsets_ptr, std::uintptr_t tokens_ptr,
                                std::uintptr_t log_normaliser_ptr, std::int64_t num_rows, std::int64_t vocab,
                                std::int64_t row_stride, std::int64_t num_samples, bool check_values) {
    const ElementType element = static_cast<ElementType>(type);
    const LogitRows logits{reinterpret_cast<const char*>(logits_ptr), element, row_stride * element_bytes(element),
                           vocab};
    const auto* temperatures = reinterpret_cast<const float*>(temperature_ptr);
    if (check_values && !(temperatures_valid(temperatures, num_rows) && rows_valid(logits, num_rows))) return false;
    const auto* seeds = reinterpret_cast<const std::int64_t*>(seeds_ptr);
    const auto* offsets = reinterpret_cast<const std::int64_t*>(offsets_ptr);
    auto* tokens = reinterpret_cast<std::int64_t*>(tokens_ptr);
    if (element == ElementType::float64) {
        sample_rows(logits, num_rows, num_samples, temperatures, seeds, offsets, tokens,
                    reinterpret_cast<double*>(log_normaliser_ptr));
    } else {
        sample_rows(logits, num_rows, num_samples, temperatures, seeds, offsets, tokens,
                    reinterpret_cast<float*>(log_normaliser_ptr));
    }
    return true;
}

}  // namespace sequoia
