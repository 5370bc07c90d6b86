// Stands in for csrc/cuda/lanes.h: a kernel runs on a CPU, each of its threads a fiber, all blocks of a launch at once.
//
// Fibers take turns, in an order that is drawn anew for every turn: what works only because one thread comes before another
// fails here sooner or later. A fiber hands over where it waits: at a barrier of its block, in an exchange of its warp, and
// for other blocks. Memory is the CPU's, so nothing is told here of caches that are not coherent.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { std::uint32_t x, y; };
struct alignas(16) uint4 { std::uint32_t x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) { return {x, y, z, w}; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

namespace emulated {

struct Index { unsigned x; };

struct Warp {
    int waiting = 0;
    unsigned round = 0;
    std::array<std::array<std::uint32_t, 8>, 32> words;
};

struct Block {
    Index index;
    int num_threads = 0;
    int waiting = 0;
    unsigned round = 0;
    int first_waiting = 0;  // of the first threads, without the others
    unsigned first_round = 0;
    std::vector<Warp> warps;
    std::vector<uint4> memory;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Block* block = nullptr;
    Index thread;
    bool is_done = false;
};

inline std::uint64_t steps = 0;  // arrivals of all kinds: where none comes in a turn, none ever will
inline ucontext_t scheduler;
inline Fiber* running = nullptr;
inline Index grid, threads_of_block;

inline void hand_over() { swapcontext(&running->context, &scheduler); }

inline void wait_in(int& waiting, unsigned& round, int count) {
    const unsigned own = round;
    ++steps;
    if (++waiting == count) {
        waiting = 0;
        ++round;
    }
    while (round == own) {
        hand_over();
    }
}

inline void wait_for_warp() {
    Warp& warp = running->block->warps[running->thread.x / 32];
    wait_in(warp.waiting, warp.round, 32);
}

// What all lanes of the warp have given, [lane][word].
inline std::array<std::array<std::uint32_t, 8>, 32> exchanged(const std::array<std::uint32_t, 8>& own) {
    Warp& warp = running->block->warps[running->thread.x / 32];
    warp.words[running->thread.x % 32] = own;
    wait_for_warp();
    const auto all = warp.words;
    wait_for_warp();
    return all;
}

inline std::function<void()> body;

inline void enter() {
    body();
    running->is_done = true;
    hand_over();
}

// Run a launch. False where every fiber waits for another: the kernel would hang.
inline bool launch(unsigned num_blocks, unsigned num_threads, std::size_t shared_bytes, unsigned seed, std::function<void()> call) {
    body = std::move(call);
    grid = {num_blocks};
    threads_of_block = {num_threads};
    std::vector<Block> blocks(num_blocks);
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::mt19937 random(seed);
    for (unsigned number = 0; number < num_blocks; ++number) {
        Block& block = blocks[number];
        block.index = {number};
        block.num_threads = static_cast<int>(num_threads);
        block.warps.resize(num_threads / 32);
        block.memory.resize(shared_bytes / 16 + 1);
        for (auto& word : block.memory) {  // what nobody wrote is NaN, in every type
            word = {0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu};
        }
        for (unsigned thread = 0; thread < num_threads; ++thread) {
            auto fiber = std::make_unique<Fiber>();
            fiber->block = &block;
            fiber->thread = {thread};
            fiber->stack.resize(32 << 10);
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.data();
            fiber->context.uc_stack.ss_size = fiber->stack.size();
            fiber->context.uc_link = &scheduler;
            makecontext(&fiber->context, enter, 0);
            fibers.push_back(std::move(fiber));
        }
    }
    std::size_t left = fibers.size();
    while (left > 0) {
        std::shuffle(fibers.begin(), fibers.begin() + static_cast<std::ptrdiff_t>(left), random);
        const std::size_t before = left;
        const std::uint64_t steps_before = steps;
        for (std::size_t place = 0; place < left;) {
            running = fibers[place].get();
            swapcontext(&scheduler, &running->context);
            if (running->is_done) {
                std::swap(fibers[place], fibers[--left]);
            } else {
                ++place;
            }
        }
        if (left == before && steps == steps_before) {
            return false;
        }
    }
    return true;
}

}  // namespace emulated

#define threadIdx (::emulated::running->thread)
#define blockIdx (::emulated::running->block->index)
#define gridDim (::emulated::grid)
#define SEQUOIA_SHARED_MEMORY(name) uint4* const name = ::emulated::running->block->memory.data()

inline void __syncthreads() {
    auto& block = *emulated::running->block;
    emulated::wait_in(block.waiting, block.round, block.num_threads);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::exchange(*address, *address + value); }
inline unsigned atomicExch(unsigned* address, unsigned value) { return std::exchange(*address, value); }
inline std::uint32_t atomicOr(std::uint32_t* address, std::uint32_t value) { return std::exchange(*address, *address | value); }

namespace sequoia {

struct Bfloat16 {
    static float widened(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
    static float2 widened(std::uint32_t pair) {
        return {widened(static_cast<std::uint16_t>(pair)), widened(static_cast<std::uint16_t>(pair >> 16))};
    }
    static std::uint16_t narrowed(float value) {
        const auto bits = std::bit_cast<std::uint32_t>(value);
        return std::isnan(value) ? 0x7fff : static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    static std::uint32_t narrowed(float low, float high) {
        return narrowed(low) | static_cast<std::uint32_t>(narrowed(high)) << 16;
    }
};

struct Float16 {
    static float widened(std::uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
    static float2 widened(std::uint32_t pair) {
        return {widened(static_cast<std::uint16_t>(pair)), widened(static_cast<std::uint16_t>(pair >> 16))};
    }
    static std::uint16_t narrowed(float value) { return std::bit_cast<std::uint16_t>(static_cast<_Float16>(value)); }
    static std::uint32_t narrowed(float low, float high) {
        return narrowed(low) | static_cast<std::uint32_t>(narrowed(high)) << 16;
    }
};

template <typename Number>
void multiply(float (&sums)[4], std::uint32_t left0, std::uint32_t left1, std::uint32_t left2, std::uint32_t left3,
              std::uint32_t right0, std::uint32_t right1) {
    const auto all = emulated::exchanged({left0, left1, left2, left3, right0, right1, 0, 0});
    const unsigned lane = emulated::running->thread.x % 32;
    const auto number = [](std::uint32_t pair, unsigned place) {
        return Number::widened(static_cast<std::uint16_t>(pair >> (16 * place)));
    };
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + (i / 2) * 8;
        const unsigned column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const auto& left = all[row % 8 * 4 + k % 8 / 2];
            const auto& right = all[column * 4 + k % 8 / 2];
            sums[i] += number(left[row / 8 + k / 8 * 2], k % 2) * number(right[4 + k / 8], k % 2);
        }
    }
}

inline std::uint32_t any_of_warp(std::uint32_t bits) {
    const auto all = emulated::exchanged({bits});
    std::uint32_t any = 0;
    for (const auto& words : all) {
        any |= words[0];
    }
    return any;
}

inline void wait_for_warp() { emulated::wait_for_warp(); }

template <int THREADS>
void wait_for_threads() {
    auto& block = *emulated::running->block;
    emulated::wait_in(block.first_waiting, block.first_round, THREADS);
}

inline float of_lane(float value, int mask) {
    const auto all = emulated::exchanged({std::bit_cast<std::uint32_t>(value)});
    return std::bit_cast<float>(all[(emulated::running->thread.x % 32) ^ static_cast<unsigned>(mask)][0]);
}

inline uint4 read_constant(const uint4* address) { return *address; }
inline uint4 read_written(const uint4* address) { return *address; }
inline uint2 read_written(const uint2* address) { return *address; }
inline std::uint32_t read_written(const std::uint32_t* address) { return *address; }
inline std::uint16_t read_written(const std::uint16_t* address) { return *address; }

inline void arrive_at(unsigned* counter) {
    ++emulated::steps;
    ++*counter;
}

inline void wait_until(const unsigned* counter, unsigned arrivals) {
    while (*counter < arrivals) {
        emulated::hand_over();
    }
}

struct Gate {
    std::uint16_t all;
    std::uint16_t missing;
    std::uint32_t openings;
};

inline void set_up(Gate& gate, unsigned arrivals) {
    gate = {static_cast<std::uint16_t>(arrivals), static_cast<std::uint16_t>(arrivals), 0};
}

inline void gates_are_set_up() {}

inline void arrive(Gate& gate) {
    ++emulated::steps;
    if (--gate.missing == 0) {
        gate.missing = gate.all;
        ++gate.openings;
    }
}

inline void wait_for(const Gate& gate, unsigned parity) {
    while ((gate.openings & 1) == parity) {
        emulated::hand_over();
    }
}

inline unsigned arrivals_of_fetch() { return 8; }

// A lane copies a row, up to 31 turns later than it is told to; what is behind the last row is not there.
inline void fetch_rows(
    char* to, int to_stride, const char* from, std::size_t from_stride, int rows, int bytes, Gate& gate) {
    const unsigned lane = threadIdx.x % 32;
    if (lane < 8) {
        const unsigned turns = static_cast<std::uint32_t>(emulated::steps * 2654435761u) >> 27;
        for (unsigned turn = 0; turn < turns; ++turn) {
            ++emulated::steps;
            emulated::hand_over();
        }
        if (lane < static_cast<unsigned>(rows)) {
            std::memcpy(to + lane * to_stride, from + lane * from_stride, bytes);
        }
        arrive(gate);
    }
    wait_for_warp();
}

}  // namespace sequoia
