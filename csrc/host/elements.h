// Half-precision elements, and rounding to them: what attention and whole forwards store.

#pragma once

#include <cstdint>

#include "simd.h"

namespace sequoia {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

SEQUOIA_INLINE void narrow(float value, float* target) { *target = value; }

// Both round to nearest, ties to even.
SEQUOIA_INLINE void narrow(float value, BFloat16* target) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    target->bits = static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded);
}

SEQUOIA_INLINE void narrow(float value, Float16* target) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value), magnitude = bits & 0x7fffffffu;
    const std::uint32_t small = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;  // subnormal
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const std::uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const std::uint32_t rounded = magnitude > 0x7f800000u ? 0x7e00u : magnitude >= 0x477ff000u ? 0x7c00u : finite;
    target->bits = static_cast<std::uint16_t>(rounded | (bits >> 16 & 0x8000u));
}

}  // namespace sequoia
