// Vectors of the CPU that a file is compiled for: loads from all types of weights, sums across lanes, exponentials.
//
// Included by the files isa_*.cpp alone, each with flags of its own, inside a namespace of their own and without one
// function of the standard library: a function that two such files shared would be linked once, from either.

#pragma once

#include <cstdint>
#include <cstring>

#include "host/elements.h"
#include "model.h"

#if defined(__AVX512F__)
#define SEQUOIA_LANES 16
#elif defined(__AVX2__)
#define SEQUOIA_LANES 8
#else
#define SEQUOIA_LANES 4
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sequoia::forward {
namespace {

using i64 = std::int64_t;

constexpr int W = SEQUOIA_LANES;
typedef float Float __attribute__((vector_size(4 * W)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * W)));
typedef std::int32_t Ints __attribute__((vector_size(4 * W)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * W)));
typedef float Float4 __attribute__((vector_size(16)));

constexpr i64 up_to_lanes(i64 size) { return (size + W - 1) / W * W; }
SEQUOIA_INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
SEQUOIA_INLINE i64 larger(i64 a, i64 b) { return a < b ? b : a; }

SEQUOIA_INLINE Float all_lanes(float value) { return value - Float{}; }

SEQUOIA_INLINE Float load(const float* source) {
    Float lanes;
    std::memcpy(&lanes, source, sizeof(lanes));
    return lanes;
}

SEQUOIA_INLINE Float load(const BFloat16* source) {
#if defined(__AVX512F__)
    return (Float)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))), 16);
#elif defined(__AVX2__)
    return (Float)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))), 16);
#else
    Halves halves;
    std::memcpy(&halves, source, sizeof(halves));
    return (Float)(__builtin_convertvector(halves, Bits) << 16);
#endif
}

SEQUOIA_INLINE Float load(const Float16* source) {
#if defined(__AVX512F__)
    return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
    return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    // Exponent and mantissa move to their float32 places, where the value is 2^112 too small; subnormals come out right.
    Halves halves;
    std::memcpy(&halves, source, sizeof(halves));
    const Bits bits = __builtin_convertvector(halves, Bits);
    const Float scaled = (Float)((bits & 0x7fffu) << 13) * 0x1p112f;
    const Bits special = (Bits)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinity and NaN
    return (Float)((Bits)scaled | special | ((bits & 0x8000u) << 16));
#endif
}

struct Int8 {
    std::int8_t bits;
};

SEQUOIA_INLINE Float load(const Int8* source) {
#if defined(__AVX512F__)
    return (Float)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#elif defined(__AVX2__)
    return (Float)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
#else
    Ints lanes;
    for (int i = 0; i < W; ++i) lanes[i] = source[i].bits;
    return __builtin_convertvector(lanes, Float);
#endif
}

// A byte a lane.
SEQUOIA_INLINE Bits load_bytes(const std::uint8_t* source) {
#if defined(__AVX512F__)
    return (Bits)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#elif defined(__AVX2__)
    return (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
#else
    Bits lanes;
    for (int i = 0; i < W; ++i) lanes[i] = source[i];
    return lanes;
#endif
}

SEQUOIA_INLINE Bits load_words(const std::uint32_t* source) {
    Bits lanes;
    std::memcpy(&lanes, source, sizeof(lanes));
    return lanes;
}

// Of numbers below 2^31.
SEQUOIA_INLINE Float to_float(Bits numbers) { return __builtin_convertvector((Ints)numbers, Float); }

// The first `count` lanes from memory, 0 in the others.
template <class Element>
SEQUOIA_INLINE Float load_some(const Element* source, i64 count) {
    Element elements[W] = {};
    std::memcpy(elements, source, static_cast<std::size_t>(count) * sizeof(Element));
    return load(elements);
}

SEQUOIA_INLINE void store(float* target, Float lanes) { std::memcpy(target, &lanes, sizeof(lanes)); }

SEQUOIA_INLINE void store_four(float* target, Float4 lanes) { std::memcpy(target, &lanes, sizeof(lanes)); }

// To nearest, ties to even, as `narrow`.
SEQUOIA_INLINE Halves rounded_to_bfloat16(Float x) {
    const Bits bits = (Bits)x;
    const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return __builtin_convertvector(x == x ? rounded : rounded - rounded + 0x7fc0u, Halves);
}

template <class Element>
SEQUOIA_INLINE void narrow_row(const float* row, i64 count, Element* target) {
    for (i64 i = 0; i < count; ++i) narrow(row[i], target + i);
}

SEQUOIA_INLINE void narrow_row(const float* row, i64 count, ElementType type, void* target, i64 first) {
    if (type == ElementType::float32) return narrow_row(row, count, static_cast<float*>(target) + first);
    if (type == ElementType::bfloat16) return narrow_row(row, count, static_cast<BFloat16*>(target) + first);
    narrow_row(row, count, static_cast<Float16*>(target) + first);
}

template <class Element>
SEQUOIA_INLINE void widen_row(const Element* row, i64 count, float* target) {
    i64 i = 0;
    for (; i + W <= count; i += W) store(target + i, load(row + i));
    if (i == count) return;
    const Float rest = load_some(row + i, count - i);
    std::memcpy(target + i, &rest, static_cast<std::size_t>(count - i) * sizeof(float));
}

SEQUOIA_INLINE void widen_row(const void* row, i64 first, i64 count, ElementType type, float* target) {
    if (type == ElementType::float32) return widen_row(static_cast<const float*>(row) + first, count, target);
    if (type == ElementType::bfloat16) return widen_row(static_cast<const BFloat16*>(row) + first, count, target);
    widen_row(static_cast<const Float16*>(row) + first, count, target);
}

// Keep a loaded vector in a register: GCC would otherwise read it from memory in every product again, and loads are what
// inner loops run out of.
SEQUOIA_INLINE void keep(Float& lanes) {
#if defined(__AVX512F__)
    asm("" : "+v"(lanes));
#elif defined(__x86_64__)
    asm("" : "+x"(lanes));
#else
    static_cast<void>(lanes);
#endif
}

SEQUOIA_INLINE void keep(Bits& lanes) {
    Float floats = (Float)lanes;
    keep(floats);
    lanes = (Bits)floats;
}

// The vector's lanes added to four sums, each of every fourth lane: halves are added to one another.
SEQUOIA_INLINE Float4 fold_to_four(Float lanes) {
#if SEQUOIA_LANES == 4
    return lanes;
#else
    typedef float Half __attribute__((vector_size(2 * W)));
    Half halves[2];
    std::memcpy(halves, &lanes, sizeof(lanes));
    const Half sums = halves[0] + halves[1];
#if SEQUOIA_LANES == 8
    return sums;
#else
    Float4 quarters[2];
    std::memcpy(quarters, &sums, sizeof(sums));
    return quarters[0] + quarters[1];
#endif
#endif
}

// Sums of the lanes of four vectors. Each is added up in the same order, whatever lies beside it.
SEQUOIA_INLINE Float4 sums_of(Float a, Float b, Float c, Float d) {
    const Float4 rows[4] = {fold_to_four(a), fold_to_four(b), fold_to_four(c), fold_to_four(d)};
#if defined(__clang__) || __GNUC__ >= 12
    const Float4 ab_low = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);   // a0 b0 a1 b1
    const Float4 ab_high = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);  // a2 b2 a3 b3
    const Float4 cd_low = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
    const Float4 cd_high = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
    const Float4 ab = ab_low + ab_high, cd = cd_low + cd_high;  // a02 b02 a13 b13
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#else
    Float4 sums;
    for (int i = 0; i < 4; ++i) sums[i] = (rows[i][0] + rows[i][2]) + (rows[i][1] + rows[i][3]);
    return sums;
#endif
}

#if defined(__AVX512F__)
// Steps of the sums of many vectors at once, each in the order of `sums_of`: lanes 0 to 7 of a and of b take the sums of
// their halves; then quarters those of eight lanes.
SEQUOIA_INLINE Float fold_halves(Float a, Float b) {
    return (Float)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44) + (Float)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee);
}
SEQUOIA_INLINE Float fold_quarters(Float ab, Float cd) {
    return (Float)_mm512_shuffle_f32x4((__m512)ab, (__m512)cd, 0x88) + (Float)_mm512_shuffle_f32x4((__m512)ab, (__m512)cd, 0xdd);
}
// In each quarter: elements 0 + 2 and 1 + 3 of a, then of b.
SEQUOIA_INLINE Float fold_pairs(Float a, Float b) {
    return (Float)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x44) + (Float)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xee);
}

// Sums of four rows of vectors of four each: out[column] takes those of a column.
SEQUOIA_INLINE void sums_of_sixteen(const Float (&rows)[4][4], float* const (&out)[4]) {
    Float folded[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        folded[r] = fold_quarters(fold_halves(rows[r][0], rows[r][1]), fold_halves(rows[r][2], rows[r][3]));
    }
    const __m512 low = (__m512)fold_pairs(folded[0], folded[1]), high = (__m512)fold_pairs(folded[2], folded[3]);
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xdd));
    _mm_storeu_ps(out[0], _mm512_castps512_ps128(sums));
    _mm_storeu_ps(out[1], _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(out[2], _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(out[3], _mm512_extractf32x4_ps(sums, 3));
}
// Of four rows of two each.
SEQUOIA_INLINE void sums_of_eight(const Float (&rows)[4][2], float* first, float* second) {
    Float halves[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) halves[r] = fold_halves(rows[r][0], rows[r][1]);
    const __m512 pairs = (__m512)fold_pairs(fold_quarters(halves[0], halves[1]), fold_quarters(halves[2], halves[3]));
    const __m512 sums = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));
    const __m512i places = _mm512_setr_epi32(0, 8, 2, 10, 4, 12, 6, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256 both = _mm512_castps512_ps256(_mm512_permutexvar_ps(places, sums));
    _mm_storeu_ps(first, _mm256_castps256_ps128(both));
    _mm_storeu_ps(second, _mm256_extractf128_ps(both, 1));
}

// Sixteen rows of sixteen numbers: columns become rows.
SEQUOIA_INLINE void transpose(Float (&rows)[16]) {
    __m512 fours[16], eights[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // in each quarter: a number of four rows
        const __m512 a = (__m512)rows[i], b = (__m512)rows[i + 1], c = (__m512)rows[i + 2], d = (__m512)rows[i + 3];
        const __m512d low[2] = {(__m512d)_mm512_unpacklo_ps(a, b), (__m512d)_mm512_unpacklo_ps(c, d)};
        const __m512d high[2] = {(__m512d)_mm512_unpackhi_ps(a, b), (__m512d)_mm512_unpackhi_ps(c, d)};
        fours[i] = (__m512)_mm512_unpacklo_pd(low[0], low[1]);
        fours[i + 1] = (__m512)_mm512_unpackhi_pd(low[0], low[1]);
        fours[i + 2] = (__m512)_mm512_unpacklo_pd(high[0], high[1]);
        fours[i + 3] = (__m512)_mm512_unpackhi_pd(high[0], high[1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // quarters 0 and 2, then 1 and 3, of eight rows each
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            eights[8 * half + i] = _mm512_shuffle_f32x4(fours[8 * half + i], fours[8 * half + 4 + i], 0x88);
            eights[8 * half + 4 + i] = _mm512_shuffle_f32x4(fours[8 * half + i], fours[8 * half + 4 + i], 0xdd);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        rows[i] = (Float)_mm512_shuffle_f32x4(eights[i], eights[8 + i], 0x88);
        rows[4 + i] = (Float)_mm512_shuffle_f32x4(eights[4 + i], eights[12 + i], 0x88);
        rows[8 + i] = (Float)_mm512_shuffle_f32x4(eights[i], eights[8 + i], 0xdd);
        rows[12 + i] = (Float)_mm512_shuffle_f32x4(eights[4 + i], eights[12 + i], 0xdd);
    }
}
#endif

SEQUOIA_INLINE float sum_of(Float lanes) {
    const Float4 four = fold_to_four(lanes);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

SEQUOIA_INLINE Float lanes_max(Float a, Float b) { return a > b ? a : b; }
SEQUOIA_INLINE Float lanes_min(Float a, Float b) { return a < b ? a : b; }

SEQUOIA_INLINE float max_of(Float lanes) {
    float values[W], most;
    std::memcpy(values, &lanes, sizeof(values));
    most = values[0];
    for (int i = 1; i < W; ++i) most = values[i] > most ? values[i] : most;
    return most;
}

// exp(x), 0 below -87 and no more than exp(88); about 1 unit in the last place. NaN stays NaN. As `exp_nonpositive` of
// simd.h, for x of both signs.
SEQUOIA_INLINE Float exponential(Float x) {
    const Float shift = all_lanes(0x1.8p23f);
    const Float clamped = lanes_min(lanes_max(x, all_lanes(-87.0f)), all_lanes(88.0f));
    const Float shifted = clamped * 0x1.715476p0f + shift;
    const Float n = shifted - shift;
    const Float r = (clamped - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
    Float series = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r * r + r + 1.0f;
    const Float power = (Float)(((Bits)shifted << 23) + 0x3f800000u);
    const Float result = series * power;
    const Float some = x < -87.0f ? all_lanes(0.0f) : result;
    return x == x ? some : x;
}

SEQUOIA_INLINE Float hyperbolic_tangent(Float x) {
    const Float magnitude = x < 0.0f ? -x : x;
    const Float e = exponential(magnitude * -2.0f);
    const Float tangent = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -tangent : tangent;
}

// The error function to 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
SEQUOIA_INLINE Float error_function(Float x) {
    const Float magnitude = x < 0.0f ? -x : x;
    const Float t = 1.0f / (1.0f + magnitude * 0.3275911f);
    Float series = t * 1.061405429f - 1.453152027f;
    series = series * t + 1.421413741f;
    series = series * t - 0.284496736f;
    series = series * t + 0.254829592f;
    const Float value = 1.0f - series * t * exponential(-magnitude * magnitude);
    return x < 0.0f ? -value : value;
}

SEQUOIA_INLINE Float activate(Activation kind, Float x) {
    switch (kind) {
        case Activation::silu: return x / (1.0f + exponential(-x));
        case Activation::gelu_tanh:
            return 0.5f * x * (1.0f + hyperbolic_tangent((x + x * x * x * 0.044715f) * 0.7978845608028654f));
        case Activation::gelu: return 0.5f * x * (1.0f + error_function(x * 0.7071067811865476f));
        case Activation::relu: return x > 0.0f ? x : x - x;
        case Activation::relu_squared: return x > 0.0f ? x * x : x - x;
    }
    return x;
}

}  // namespace
}  // namespace sequoia::forward
