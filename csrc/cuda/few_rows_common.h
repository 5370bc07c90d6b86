// What the phases of few_rows_kernel.h share.
//
// Instructions come from L2 the first time that a multiprocessor runs them, and again when it has run so many others that
// they were dropped: some 57 cycles for eight of them on an H100 (docs/gpu.md). So there is one place for each kind of work,
// taken by all phases with their own numbers, loops that gain little from it are not unrolled, and quotients of numbers that
// are not known in advance are few.
#pragma once

#include "few_rows.h"
#include "lanes.h"

#include <cstddef>
#include <cstdint>

namespace sequoia {
namespace {

constexpr int kWarps = 8;  // that compute
constexpr int kComputing = 32 * kWarps;
constexpr int kThreads = kComputing + 32;  // and a warp that fetches weights
constexpr int kOutputs = 8;                // of a tile: rows of a weight
constexpr int kColumns = 32;               // of a block of a width

// Places in `FewRows::products`.
constexpr int kProjections = 0;
constexpr int kOutput = 1;
constexpr int kGateUp = 2;
constexpr int kDown = 3;
constexpr int kHead = 4;

__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) >> 5; }
__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) & 31; }

// The threads that compute wait for each other.
__device__ __forceinline__ void meet() { wait_for_threads<kComputing>(); }

__device__ __forceinline__ const std::uint16_t* numbers(const void* address) {
    return static_cast<const std::uint16_t*>(address);
}

template <typename Number>
__device__ __forceinline__ float rounded(float value) {
    return Number::widened(Number::narrowed(value));
}

// How often a small number holds another one, whose reciprocal is known.
__device__ __forceinline__ int quotient(int number, float per) {
    return static_cast<int>((static_cast<float>(number) + 0.5f) * per);
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        value += of_lane(value, mask);
    }
    return value;
}

}  // namespace
}  // namespace sequoia
