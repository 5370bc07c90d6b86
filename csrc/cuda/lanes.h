// What a warp does together, numbers of two bytes, and copies that run beside the threads: the few instructions that the
// kernels below name themselves.
//
// All of it is in this one file so that the kernels can be run on a CPU, a thread being a fiber
// (python_tests/support/cuda_on_cpu): there, the file of the same name takes its place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
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
    static __device__ std::uint32_t narrowed(float low, float high) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const std::uint32_t*>(&pair);
    }
};

struct Float16 {
    static __device__ float2 widened(std::uint32_t pair) {
        return make_float2(widened(static_cast<std::uint16_t>(pair)), widened(static_cast<std::uint16_t>(pair >> 16)));
    }
    static __device__ float widened(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
    static __device__ std::uint16_t narrowed(float value) { return __half_as_ushort(__float2half_rn(value)); }
    static __device__ std::uint32_t narrowed(float low, float high) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const std::uint32_t*>(&pair);
    }
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

// Bits that any lane has.
__device__ inline std::uint32_t any_of_warp(std::uint32_t bits) { return __reduce_or_sync(0xffffffffu, bits); }

__device__ inline void wait_for_warp() { __syncwarp(); }

// The first `THREADS` threads of a block wait for each other; the others have something else to do.
template <int THREADS>
__device__ inline void wait_for_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// ---- global memory

// Weights and other numbers that no kernel writes meanwhile.
__device__ inline uint4 read_constant(const uint4* address) { return __ldg(address); }

// What another block of the same launch has written: from L2, since this multiprocessor may hold an older copy.
__device__ inline uint4 read_written(const uint4* address) { return __ldcg(address); }
__device__ inline uint2 read_written(const uint2* address) { return __ldcg(address); }
__device__ inline std::uint32_t read_written(const std::uint32_t* address) { return __ldcg(address); }
__device__ inline std::uint16_t read_written(const std::uint16_t* address) { return __ldcg(address); }

// Blocks of a launch wait for each other in two halves, so that something can be done in between. One thread of a block calls
// these, behind and in front of a wait for its other threads; `arrivals` is what the counter will have come to.
__device__ inline void arrive_at(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline void wait_until(const unsigned* counter, unsigned arrivals) {
    unsigned seen = 0;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < arrivals);
}

// ---- copies to shared memory that run beside the threads

// A gate in shared memory (an mbarrier): opens once for every time that all it waits for have arrived.
struct Gate {
    std::uint64_t state;
};

__device__ inline unsigned shared_address(const void* address) {
    return static_cast<unsigned>(__cvta_generic_to_shared(address));
}

__device__ inline void set_up(Gate& gate, unsigned arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&gate)), "r"(arrivals) : "memory");
}

// Behind the last gate, before the threads of the block meet.
__device__ inline void gates_are_set_up() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline void arrive(Gate& gate) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(&gate)) : "memory");
}

// Wait for the opening of this parity: 0 for the first, 1 for the second and, since a new gate counts as having been open,
// for the one before the first.
__device__ inline void wait_for(const Gate& gate, unsigned parity) {
    unsigned is_open = 0;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile(
            "{ .reg .pred open; mbarrier.try_wait.parity.shared.b64 open, [%1], %2; selp.u32 %0, 1, 0, open; }"
            : "=r"(is_open)
            : "r"(shared_address(&gate)), "r"(parity)
            : "memory");
#else
        asm volatile(
            "{ .reg .pred open; mbarrier.test_wait.parity.shared.b64 open, [%1], %2; selp.u32 %0, 1, 0, open; }"
            : "=r"(is_open)
            : "r"(shared_address(&gate)), "r"(parity)
            : "memory");
#endif
    } while (is_open == 0);
}

// Arrivals at a gate that one `fetch_rows` makes.
__device__ inline constexpr unsigned arrivals_of_fetch() {
#if __CUDA_ARCH__ >= 900
    return 1;
#else
    return 32;
#endif
}

// Begin to copy up to 8 rows of `bytes`, a multiple of 16, to shared memory; the gate is told when they are there. A whole
// warp calls it, its lanes together.
__device__ inline void fetch_rows(
    char* to, int to_stride, const char* from, std::size_t from_stride, int rows, int bytes, Gate& gate) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(shared_address(&gate)),
                     "r"(rows * bytes)
                     : "memory");
    }
    __syncwarp();
    if (lane < rows) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(to + lane * to_stride)),
                     "l"(from + lane * from_stride), "r"(bytes), "r"(shared_address(&gate))
                     : "memory");
    }
#else
    const int pieces = bytes / 16;
    for (int piece = lane; piece < rows * pieces; piece += 32) {
        const int row = piece / pieces;
        const int place = piece % pieces * 16;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + row * to_stride + place)),
                     "l"(from + row * from_stride + place)
                     : "memory");
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&gate)) : "memory");
#endif
}

}  // namespace sequoia
