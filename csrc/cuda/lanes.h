// What a warp does together, and numbers of two bytes: the few instructions that the kernels below name themselves.
//
// All of it is in this one file so that the kernels can be run on a CPU, a thread being a fiber
// (python_tests/support/cuda_on_cpu): there, the file of the same name takes its place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// The shared memory that a launch has asked for.
#define SEQUOIA_SHARED_MEMORY(name) extern __shared__ uint4 name[]

namespace sequoia {

// Numbers of two bytes, of which a word holds two.
struct Bfloat16 {
    static __device__ float2 widened(std::uint32_t pair) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    static __device__ float widened(std::uint16_t bits) { return __uint_as_float(static_cast<std::uint32_t>(bits) << 16); }
    static __device__ std::uint16_t narrowed(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
};

struct Float16 {
    static __device__ float2 widened(std::uint32_t pair) {
        return make_float2(widened(static_cast<std::uint16_t>(pair)), widened(static_cast<std::uint16_t>(pair >> 16)));
    }
    static __device__ float widened(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
    static __device__ std::uint16_t narrowed(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

// sums += left * right: [16, 16] times [16, 8] of a warp, as `mma.m16n8k16` has it laid out over the lanes.
template <typename Number>
__device__ void multiply(float (&sums)[4], std::uint32_t left0, std::uint32_t left1, std::uint32_t left2, std::uint32_t left3,
                         std::uint32_t right0, std::uint32_t right1);

template <>
__device__ inline void multiply<Bfloat16>(float (&sums)[4], std::uint32_t left0, std::uint32_t left1, std::uint32_t left2,
                                          std::uint32_t left3, std::uint32_t right0, std::uint32_t right1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left0), "r"(left1), "r"(left2), "r"(left3), "r"(right0), "r"(right1));
}

template <>
__device__ inline void multiply<Float16>(float (&sums)[4], std::uint32_t left0, std::uint32_t left1, std::uint32_t left2,
                                         std::uint32_t left3, std::uint32_t right0, std::uint32_t right1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left0), "r"(left1), "r"(left2), "r"(left3), "r"(right0), "r"(right1));
}

// Of the lane whose number differs in the bits of `mask`.
__device__ inline float of_lane(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Weights and other numbers that no kernel writes meanwhile.
__device__ inline uint4 read_constant(const uint4* address) { return __ldg(address); }

// What another block of the same launch has written: from L2, since this multiprocessor may hold an older copy.
__device__ inline uint4 read_written(const uint4* address) { return __ldcg(address); }
__device__ inline std::uint16_t read_written(const std::uint16_t* address) { return __ldcg(address); }

// All blocks of a launch wait for each other; `arrivals` is what the counter will then have come to.
__device__ inline void wait_for_blocks(unsigned* counter, unsigned arrivals) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1u);
        unsigned seen = 0;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while (seen < arrivals);
        __threadfence();
    }
    __syncthreads();
}

}  // namespace sequoia
