// Philox4x32-10 and what the package derives from its words. The same streams run in every backend.
//
// Computes    philox4x32   one block of four 32-bit words from a 128-bit counter and a 64-bit key
//             coin         word -> float32 in [0, 1), exact
//             gumbel       word -> standard Gumbel noise, float32, always finite
// Streams     key = (low, high) word of the request's seed; counter = (index, low offset, domain tag, high offset).
//             Token streams put four tokens into a block: index = token / 4, word = token % 4. Accept coins take
//             word 0 of index = node.
// Numerics    gumbel = -log(E), E = -log(1 - u) an exponential. A winner has a large Gumbel, hence a small u, where
//             1 - u would lose u's digits in float32: there E comes from its series, which keeps full precision.
// Source      Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC11).
//
// Plain C++17 without a dependency, so that CUDA kernels include this header as well.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SEQUOIA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SEQUOIA_HOST_DEVICE inline
#endif

namespace sequoia {

constexpr std::uint32_t DRAFT_TAG = 1;
constexpr std::uint32_t ACCEPT_TAG = 2;
constexpr std::uint32_t RESIDUAL_TAG = 3;

constexpr int PHILOX_ROUNDS = 10;
constexpr std::uint32_t PHILOX_MULTIPLIER_0 = 0xD2511F53u;
constexpr std::uint32_t PHILOX_MULTIPLIER_1 = 0xCD9E8D57u;
constexpr std::uint32_t PHILOX_WEYL_0 = 0x9E3779B9u;
constexpr std::uint32_t PHILOX_WEYL_1 = 0xBB67AE85u;

constexpr int TOKENS_PER_BLOCK = 4;

struct PhiloxBlock {
    std::uint32_t word[4];
};

SEQUOIA_HOST_DEVICE PhiloxBlock philox4x32(PhiloxBlock counter, std::uint32_t key_0, std::uint32_t key_1) {
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const std::uint64_t product_0 = static_cast<std::uint64_t>(PHILOX_MULTIPLIER_0) * counter.word[0];
        const std::uint64_t product_1 = static_cast<std::uint64_t>(PHILOX_MULTIPLIER_1) * counter.word[2];
        counter = PhiloxBlock{{static_cast<std::uint32_t>(product_1 >> 32) ^ counter.word[1] ^ key_0,
                               static_cast<std::uint32_t>(product_1),
                               static_cast<std::uint32_t>(product_0 >> 32) ^ counter.word[3] ^ key_1,
                               static_cast<std::uint32_t>(product_0)}};
        key_0 += PHILOX_WEYL_0;
        key_1 += PHILOX_WEYL_1;
    }
    return counter;
}

// Block `index` of the stream (seed, offset, tag).
SEQUOIA_HOST_DEVICE PhiloxBlock stream_block(std::uint64_t seed, std::uint64_t offset, std::uint32_t tag,
                                             std::uint32_t index) {
    const PhiloxBlock counter{
        {index, static_cast<std::uint32_t>(offset), tag, static_cast<std::uint32_t>(offset >> 32)}};
    return philox4x32(counter, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

// Uniform in [0, 1), a multiple of 2^-24.
SEQUOIA_HOST_DEVICE float coin(std::uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// Uniform in (0, 1); spaced 2^-32 near 0, at most 1 - 2^-24.
SEQUOIA_HOST_DEVICE float open_uniform(std::uint32_t word) {
    const float uniform = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
    return uniform < 1.0f - 0x1p-24f ? uniform : 1.0f - 0x1p-24f;
}

// Standard exponential, at least 2^-33.
SEQUOIA_HOST_DEVICE float exponential(std::uint32_t word) {
    const float uniform = open_uniform(word);
    if (uniform < 0x1p-7f) {
        return uniform * (1.0f + uniform * (0.5f + uniform * (1.0f / 3.0f + uniform * 0.25f)));
    }
    return -logf(1.0f - uniform);
}

SEQUOIA_HOST_DEVICE float gumbel(std::uint32_t word) { return -logf(exponential(word)); }

// The coin of one tree node.
SEQUOIA_HOST_DEVICE float node_coin(std::uint64_t seed, std::uint64_t offset, std::uint32_t node) {
    return coin(stream_block(seed, offset, ACCEPT_TAG, node).word[0]);
}

}  // namespace sequoia
