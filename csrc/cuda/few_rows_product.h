// Products of few_rows_kernel.h: a warp fetches weights into a ring of stages, the others multiply rows by them.
//
// A tile is 8 outputs of a matrix, a stage a tile's weights in a chunk of the width: all, where the width is at most 1024.
// Both sides walk the same way: groups of four tiles that a block has at once, of these chunk after chunk, of a chunk tile
// after tile; gates and what they multiply take turns. The fetching warp goes on through the phases of a launch as far as
// there is room, whatever the others wait for.
#pragma once

#include "few_rows_common.h"

namespace sequoia {
namespace {

constexpr int kMostStages = 16;
constexpr int kBlocks = 4;  // of a chunk, that a warp has at most
constexpr int kTiles = 4;   // that a block has at once

struct Ring {
    Gate* filled;   // [stages]
    Gate* emptied;  // [stages]
    char* bytes;
    int stage = 0;
    unsigned parity = 0;

    __device__ __forceinline__ void advance(const FewRows& given) {
        if (++stage == given.num_stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ char* rows(const FewRows& given) const {
        return bytes + stage * kOutputs * given.stage_stride;
    }
};

__device__ __forceinline__ int blocks_of(const FewRowsProduct& of, int chunk) {
    const int left = of.blocks - chunk * of.chunk_blocks;
    return left < of.chunk_blocks ? left : of.chunk_blocks;
}

// The fetching warp's part of a product.
__device__ __forceinline__ void fetch_weights(
    const FewRows& given, Ring& ring, const FewRowsProduct& of, const void* weight) {
    const int step = static_cast<int>(gridDim.x);
    const int odd = of.matrices - 1;
    for (int first = static_cast<int>(blockIdx.x); first < of.tiles; first += (kTiles >> odd) * step) {
        for (int chunk = 0; chunk < of.chunks; ++chunk) {
#pragma unroll 1
            for (int tile = 0; tile < kTiles && first + (tile >> odd) * step < of.tiles; ++tile) {
                const int output = (first + (tile >> odd) * step) * kOutputs;
                const int rows = of.outputs - output < kOutputs ? of.outputs - output : kOutputs;
                const std::uint16_t* const from = numbers(weight) +
                                                  static_cast<std::size_t>((tile & odd) * of.outputs + output) * of.width +
                                                  chunk * of.chunk_blocks * kColumns;
                wait_for(ring.emptied[ring.stage], ring.parity ^ 1);
                fetch_rows(ring.rows(given), given.stage_stride, reinterpret_cast<const char*>(from),
                           sizeof(std::uint16_t) * of.width, rows, blocks_of(of, chunk) * kColumns * 2,
                           ring.filled[ring.stage]);
                ring.advance(given);
            }
        }
    }
}

// Where a product's rows are: normed ones in shared memory, others as a phase before has left them.
struct Rows {
    const std::uint16_t* first;
    int stride;  // elements
};

// Multiply the tiles of this block. begin(output, row) reads what finish(output, row, sums of the matrices, begun) wants
// beside the sums, before there are any. `sums_of_warps`: [warp, tile, row, output].
template <typename Number, int EIGHTS, typename Begin, typename Finish>
__device__ __forceinline__ void product(const FewRows& given, Ring& ring, const FewRowsProduct& of, const Rows& rows,
                                        float* sums_of_warps, Begin begin, Finish finish) {
    constexpr int kRows = 8 * EIGHTS;
    constexpr int kSixteens = (EIGHTS + 1) / 2;
    constexpr int kOfThread = kTiles * kRows * kOutputs / kComputing;
    const int lane = lane_of_thread();
    const int warp = warp_of_thread();
    const int step = static_cast<int>(gridDim.x);
    const int odd = of.matrices - 1;
    for (int first = static_cast<int>(blockIdx.x); first < of.tiles; first += (kTiles >> odd) * step) {
        // What this thread finishes: an output of a row.
        const auto is_mine = [&](int i, int& output, int& row) {
            const int number = static_cast<int>(threadIdx.x) + i * kComputing;
            const int tile = first + number / (kRows * kOutputs) * step;
            output = tile * kOutputs + number % kOutputs;
            row = number / kOutputs % kRows;
            return number < (kTiles >> odd) * kRows * kOutputs && output < of.outputs && row < given.num_rows;
        };
        float begun[kOfThread];
#pragma unroll
        for (int i = 0; i < kOfThread; ++i) {
            int output = 0, row = 0;
            begun[i] = is_mine(i, output, row) ? begin(output, row) : 0.0f;
        }
        float sums[kTiles][kSixteens][4] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < of.chunks; ++chunk) {
            const int blocks = blocks_of(of, chunk);
            uint4 left[kBlocks][EIGHTS];  // a lane has the same 8 columns of a block as of the weights
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) {
                const int block = warp + kWarps * i;
#pragma unroll
                for (int n = 0; n < EIGHTS; ++n) {
                    const int row = n * 8 + (lane >> 2);
                    left[i][n] = make_uint4(0, 0, 0, 0);
                    if (block < blocks && row < given.num_rows) {
                        const auto* const address = reinterpret_cast<const uint4*>(
                            rows.first + row * rows.stride + (chunk * of.chunk_blocks + block) * kColumns + (lane & 3) * 8);
                        left[i][n] = of.is_of_normed ? *address : read_written(address);
                    }
                }
            }
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                if (first + (tile >> odd) * step < of.tiles) {
                    wait_for(ring.filled[ring.stage], ring.parity);
                    const char* const own = ring.rows(given) + (lane >> 2) * given.stage_stride + (lane & 3) * 16;
#pragma unroll
                    for (int i = 0; i < kBlocks; ++i) {
                        const int block = warp + kWarps * i;
                        if (block < blocks) {
                            const uint4 right = *reinterpret_cast<const uint4*>(own + block * kColumns * 2);
#pragma unroll
                            for (int n = 0; n < kSixteens; ++n) {
                                const uint4 low = left[i][2 * n];
                                const bool is_there = 2 * n + 1 < EIGHTS;
                                const uint4 high = is_there ? left[i][(2 * n + 1) % EIGHTS] : make_uint4(0, 0, 0, 0);
                                multiply<Number>(sums[tile][n], low.x, high.x, low.y, high.y, right.x, right.y);
                                multiply<Number>(sums[tile][n], low.z, high.z, low.w, high.w, right.z, right.w);
                            }
                        }
                    }
                    wait_for_warp();
                    if (lane == 0) {
                        arrive(ring.emptied[ring.stage]);
                    }
                    ring.advance(given);
                }
            }
        }
        if (first != static_cast<int>(blockIdx.x)) {
            meet();  // the sums of the tiles before have been added up
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n) {
                auto* const place = reinterpret_cast<float2*>(
                    sums_of_warps + (((warp * kTiles + tile) * kRows + n * 8 + (lane >> 2)) * kOutputs + (lane & 3) * 2));
                *place = make_float2(sums[tile][n / 2][n % 2 * 2], sums[tile][n / 2][n % 2 * 2 + 1]);
            }
        }
        meet();
#pragma unroll
        for (int i = 0; i < kOfThread; ++i) {
            int output = 0, row = 0;
            if (is_mine(i, output, row)) {
                const int number = static_cast<int>(threadIdx.x) + i * kComputing;
                const float* const parts = sums_of_warps + number % (kRows * kOutputs) +
                                           (number / (kRows * kOutputs) << odd) * kRows * kOutputs;
                float whole[2] = {};
#pragma unroll
                for (int part = 0; part < kWarps; ++part) {
                    whole[0] += parts[part * kTiles * kRows * kOutputs];
                }
                if (odd) {
#pragma unroll
                    for (int part = 0; part < kWarps; ++part) {
                        whole[1] += parts[(part * kTiles + 1) * kRows * kOutputs];
                    }
                }
                finish(output, row, whole, begun[i]);
            }
        }
    }
}

// Bytes of the sums of warps.
inline std::size_t bytes_of_sums(int eights) { return sizeof(float) * kWarps * kTiles * 8 * eights * kOutputs; }

}  // namespace
}  // namespace sequoia
