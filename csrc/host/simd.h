// What the loops over logit rows are made of: function clones per instruction set, reductions in a fixed order, and an
// exponential that vectorises.
//
// The library is built for the baseline CPU; SEQUOIA_CLONES adds AVX2 and AVX-512 versions of a function, of which the
// loader picks one. Every sum runs over the same number of lanes in the same order whatever the instruction set, and
// nothing here is contracted to fused operations (see CMakeLists.txt), so all machines give the same bits.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

// Function multiversioning needs the loader's ifunc support: GCC on x86-64 with glibc. Elsewhere the baseline is used.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define SEQUOIA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SEQUOIA_CLONES
#endif

#define SEQUOIA_INLINE __attribute__((always_inline)) inline

namespace sequoia {

constexpr std::int64_t LANES = 16;  // of every reduction; rows are padded to a multiple of it

template <class To, class From>
SEQUOIA_INLINE To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
    To result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}

// exp(x) for x <= 0, 0 below the point where it underflows; about 1 unit in the last place. No branch, no table, no
// call: a loop around it vectorises. Range reduction x = n ln 2 + r with |r| <= ln(2) / 2, Taylor series of exp(r).
SEQUOIA_INLINE double exp_nonpositive(double x) {
    constexpr double SHIFT = 0x1.8p52;  // adding it rounds to an integer that then stands in the low mantissa bits
    const double clamped = x < -708.0 ? -708.0 : x;
    const double shifted = clamped * 0x1.71547652b82fep0 + SHIFT;
    const double n = shifted - SHIFT;
    const double r = (clamped - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
    double series = 1.0 / 6227020800.0;
    series = series * r + 1.0 / 479001600.0;
    series = series * r + 1.0 / 39916800.0;
    series = series * r + 1.0 / 3628800.0;
    series = series * r + 1.0 / 362880.0;
    series = series * r + 1.0 / 40320.0;
    series = series * r + 1.0 / 5040.0;
    series = series * r + 1.0 / 720.0;
    series = series * r + 1.0 / 120.0;
    series = series * r + 1.0 / 24.0;
    series = series * r + 1.0 / 6.0;
    series = series * r + 0.5;
    series = series * r * r + r + 1.0;
    const double power = bit_cast<double>((bit_cast<std::uint64_t>(shifted) << 52) + bit_cast<std::uint64_t>(1.0));
    return x < -708.0 ? 0.0 : series * power;
}

SEQUOIA_INLINE float exp_nonpositive(float x) {
    constexpr float SHIFT = 0x1.8p23f;
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = clamped * 0x1.715476p0f + SHIFT;
    const float n = shifted - SHIFT;
    const float r = (clamped - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
    float series = 1.0f / 5040.0f;
    series = series * r + 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r * r + r + 1.0f;
    const float power = bit_cast<float>((bit_cast<std::uint32_t>(shifted) << 23) + bit_cast<std::uint32_t>(1.0f));
    return x < -87.0f ? 0.0f : series * power;
}

// 2^(z + 64), 0 where 2^z underflows in float32; z <= 0. About 1 unit in the last place. The factor keeps all results
// normal numbers: arithmetic on subnormal ones is slow on some CPUs, and they have few digits. Range reduction z = n +
// f with |f| <= 1/2, minimax polynomial of 2^f. What comes of z far below is noise, which the mask makes 0.
SEQUOIA_INLINE float exp2_times_2_64(float z) {
    constexpr float SHIFT = 0x1.8p23f;
    constexpr float LOWEST = -149.9f;
    const float shifted = z + SHIFT;
    const float f = z - (shifted - SHIFT);
    const float f2 = f * f;
    // pairs of terms, so that few operations wait for one another
    const float high = 0x1.41fbbcp-13f * f2 + (0x1.5f3e54p-10f * f + 0x1.3b2d4cp-7f);
    const float series = (high * f2 + (0x1.c6aee8p-5f * f + 0x1.ebfbdcp-3f)) * f2 + (0x1.62e430p-1f * f + 1.0f);
    const std::uint32_t exponent = (bit_cast<std::uint32_t>(shifted) << 23) + (64u << 23);
    return bit_cast<float>((bit_cast<std::uint32_t>(series) + exponent) & (z < LOWEST ? 0u : ~0u));
}

}  // namespace sequoia
