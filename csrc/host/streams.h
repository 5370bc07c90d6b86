// Whole stretches of a Philox stream, and the bound that lets a draw look at few of their words closely.

#pragma once

#include "philox.h"
#include "simd.h"

namespace sequoia {

constexpr std::int64_t STRETCH = 64;  // tokens whose noise is generated together

// Words of the tokens first_token .. first_token + STRETCH - 1; first_token must be a multiple of STRETCH.
void stretch_words(std::uint64_t seed, std::uint64_t offset, std::uint32_t tag, std::int64_t first_token,
                   std::uint32_t* words);

// The bits of a positive float, read as a number, are its logarithm up to a scale, an offset and at most 0.06 below:
// log2(2^e (1 + f)) = e + log2(1 + f), with f <= log2(1 + f) <= f + 0.0861.
constexpr float LOG_PER_BIT = 0x1.62e43p-24f;         // ln(2) / 2^23
constexpr float LOG_BITS_OFFSET = 0x1.601e68p6f;      // 127 ln(2)
constexpr float LOG_OF_2_32 = 0x1.62e43p4f;           // 32 ln(2)
constexpr float LARGEST_GUMBEL = 22.9f;               // gumbel(0) = 33 ln(2)

// At most log(value) apart from rounding.
SEQUOIA_INLINE float log_lower_bound(float value) {
    return static_cast<float>(bit_cast<std::int32_t>(value)) * LOG_PER_BIT - LOG_BITS_OFFSET;
}

// At least log(value) for value >= 0; -87.9 or more for 0 and for what float32 cannot hold.
SEQUOIA_INLINE float log_upper_bound(float value) { return log_lower_bound(value) + 0.07f; }

// At least gumbel(word), by 0.07 or less where it matters. E = -log(1 - u) >= u >= word / 2^32, so the noise -log(E) is
// at most 32 ln(2) - log(word). The 0.01 covers the rounding here and in gumbel(). The last bit of the word is left
// out: vectors convert signed integers only.
SEQUOIA_INLINE float gumbel_upper_bound(std::uint32_t word) {
    constexpr float LOG_OF_2_31 = LOG_OF_2_32 - 0x1.62e43p-1f;
    return LOG_OF_2_31 + 0.01f - log_lower_bound(static_cast<float>(static_cast<std::int32_t>(word >> 1)));
}

}  // namespace sequoia
