// The loops behind peaks.h, for the vectors of the CPU that a file is compiled for.

#pragma once

#include "pairs.h"
#include "peaks.h"

namespace sequoia::forward {
namespace {

// Vectors of a thread's part in order, requested as far ahead as a forward requests its weights.
SEQUOIA_INLINE Float read_all(const float* data, i64 count) {
    constexpr i64 STEP = 8 * W, AHEAD = 16384 / static_cast<i64>(sizeof(float));
    Float sums[8] = {};
    for (i64 i = 0; i + STEP <= count; i += STEP) {
        for (i64 line = 0; line < STEP; line += 16) __builtin_prefetch(data + i + AHEAD + line, 0, 2);
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) sums[v] += load(data + i + v * W);
    }
    for (int v = 1; v < 8; ++v) sums[0] += sums[v];
    return sums[0];
}

SEQUOIA_INLINE Float multiply_add(i64 steps) {
    Float chains[PEAK_CHAINS] = {}, factor = all_lanes(0.5f), summand = all_lanes(1.0f);
    keep(factor), keep(summand);
    for (Float& chain : chains) keep(chain);  // or the compiler sees that all are equal, and makes one
    for (i64 step = 0; step < steps; ++step) {
#pragma GCC unroll 12
        for (int c = 0; c < PEAK_CHAINS; ++c) chains[c] = chains[c] * factor + summand;
    }
    for (int c = 1; c < PEAK_CHAINS; ++c) chains[0] += chains[c];
    return chains[0];
}

#if defined(__AVX512F__) && defined(SEQUOIA_AVX512_BF16)
// The same of pairs of bfloat16.
SEQUOIA_AVX512_BF16 Float multiply_add_pairs(i64 steps) {
    Float chains[PEAK_CHAINS] = {};
    Bits factor = (Bits)all_lanes(0.5f), other = (Bits)all_lanes(1.0f);
    keep(factor), keep(other);
    for (Float& chain : chains) keep(chain);
    for (i64 step = 0; step < steps; ++step) {
#pragma GCC unroll 12
        for (int c = 0; c < PEAK_CHAINS; ++c) chains[c] = add_pairs(chains[c], factor, other);
    }
    for (int c = 1; c < PEAK_CHAINS; ++c) chains[0] += chains[c];
    return chains[0];
}
#else
SEQUOIA_INLINE Float multiply_add_pairs(i64) { return Float{}; }
#endif

SEQUOIA_INLINE void measure(const Peak& peak, int thread) {
    const i64 begin = peak.count * thread / peak.num_threads, end = peak.count * (thread + 1) / peak.num_threads;
    const Float sum = peak.data != nullptr ? read_all(peak.data + begin, end - begin)
                      : peak.pairs         ? multiply_add_pairs(peak.count)
                                           : multiply_add(peak.count);
    store(peak.sums + thread * 16, sum);
}

}  // namespace
}  // namespace sequoia::forward
