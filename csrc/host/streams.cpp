// Generates whole stretches of Philox words. This is most of what drawing a token costs, and the one loop here that
// compilers do not vectorise well: between the 32 x 32 -> 64 bit products of a round they move every word back and
// forth between 32- and 64-bit lanes. Written out, the words simply stay in the low halves of 64-bit lanes, where the
// next product wants them; whatever then stands in the high halves is ignored. Measured 2.7 times as fast.

#include "streams.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SEQUOIA_HAS_AVX2_STRETCH
#endif

namespace sequoia {
namespace {

constexpr int BLOCKS = STRETCH / TOKENS_PER_BLOCK;

void portable_stretch(std::uint64_t seed, std::uint64_t offset, std::uint32_t tag, std::uint32_t first_block,
                      std::uint32_t* words) {
    for (int block = 0; block < BLOCKS; ++block) {
        const PhiloxBlock drawn = stream_block(seed, offset, tag, first_block + static_cast<std::uint32_t>(block));
        for (int word = 0; word < TOKENS_PER_BLOCK; ++word) words[TOKENS_PER_BLOCK * block + word] = drawn.word[word];
    }
}

#ifdef SEQUOIA_HAS_AVX2_STRETCH

// Four vectors of four blocks, so that the products of one hide the latency of another.
__attribute__((target("avx2"))) void avx2_stretch(std::uint64_t seed, std::uint64_t offset, std::uint32_t tag,
                                                  std::uint32_t first_block, std::uint32_t* words) {
    constexpr int BLOCKS_PER_VECTOR = 4;
    constexpr int VECTORS = BLOCKS / BLOCKS_PER_VECTOR;
    const __m256i multiplier_0 = _mm256_set1_epi64x(PHILOX_MULTIPLIER_0);
    const __m256i multiplier_1 = _mm256_set1_epi64x(PHILOX_MULTIPLIER_1);
    __m256i word_0[VECTORS], word_1[VECTORS], word_2[VECTORS], word_3[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        // a carry into the high half is ignored like everything else there
        const __m256i numbers = _mm256_set_epi64x(3, 2, 1, 0);
        word_0[v] = _mm256_add_epi64(_mm256_set1_epi64x(std::int64_t{first_block} + BLOCKS_PER_VECTOR * v), numbers);
        word_1[v] = _mm256_set1_epi64x(static_cast<std::uint32_t>(offset));
        word_2[v] = _mm256_set1_epi64x(tag);
        word_3[v] = _mm256_set1_epi64x(static_cast<std::int64_t>(offset >> 32));
    }
    std::uint32_t key_0 = static_cast<std::uint32_t>(seed), key_1 = static_cast<std::uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const __m256i round_key_0 = _mm256_set1_epi64x(key_0), round_key_1 = _mm256_set1_epi64x(key_1);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const __m256i product_0 = _mm256_mul_epu32(word_0[v], multiplier_0);
            const __m256i product_1 = _mm256_mul_epu32(word_2[v], multiplier_1);
            word_0[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product_1, 32), word_1[v]), round_key_0);
            word_1[v] = product_1;
            word_2[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product_0, 32), word_3[v]), round_key_1);
            word_3[v] = product_0;
        }
        key_0 += PHILOX_WEYL_0;
        key_1 += PHILOX_WEYL_1;
    }
    for (int v = 0; v < VECTORS; ++v) {
        const __m256i words_01 = _mm256_blend_epi32(word_0[v], _mm256_slli_epi64(word_1[v], 32), 0xaa);
        const __m256i words_23 = _mm256_blend_epi32(word_2[v], _mm256_slli_epi64(word_3[v], 32), 0xaa);
        const __m256i blocks_02 = _mm256_unpacklo_epi64(words_01, words_23);
        const __m256i blocks_13 = _mm256_unpackhi_epi64(words_01, words_23);
        auto* const out = reinterpret_cast<__m256i*>(words + v * BLOCKS_PER_VECTOR * TOKENS_PER_BLOCK);
        _mm256_storeu_si256(out, _mm256_permute2x128_si256(blocks_02, blocks_13, 0x20));
        _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(blocks_02, blocks_13, 0x31));
    }
}

const bool HAS_AVX2 = __builtin_cpu_supports("avx2") != 0;

#endif

}  // namespace

void stretch_words(std::uint64_t seed, std::uint64_t offset, std::uint32_t tag, std::int64_t first_token,
                   std::uint32_t* words) {
    const auto first_block = static_cast<std::uint32_t>(first_token / TOKENS_PER_BLOCK);
#ifdef SEQUOIA_HAS_AVX2_STRETCH
    if (HAS_AVX2) return avx2_stretch(seed, offset, tag, first_block, words);
#endif
    portable_stretch(seed, offset, tag, first_block, words);
}

}  // namespace sequoia
