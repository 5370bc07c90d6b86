// A forward of few rows through a small decoder, in one launch: a level of a draft's tree.
//
// Computes
//   logits of every row of a step, of a Llama-shaped model (RMS norms, rotated queries and keys, gated MLP, no biases), and
//   writes the rows' keys and values into their cache rows.
//
// Parallel plan
//   Layers of a small draft take less time than a launch, so blocks stay, one on each multiprocessor, and meet at a barrier
//   between the five phases of a layer: norm, queries, keys and values | rotation, cache rows and attention | output, added
//   to the stream | norm, gate and up, activation | down, added to the stream; at last norm and head.
//   Which weights a block reads, and in which order, depends on nothing that is computed. So one of its warps does nothing
//   but fetch them into shared memory, through all phases, as far ahead as there is room: on an H100 and for 8 rows of 768
//   ten stages a block, 16 MB over the device, most of a layer. The others multiply (few_rows_product.h), and attend
//   (few_rows_attention.h).
//   A block arrives at a barrier as soon as it has written, and reads what the next phase wants beside that before it waits.
//   Instructions are a cost of their own (few_rows_common.h).
//   The order of every sum follows from the sizes, so results repeat bit for bit.
//
// Memory
//   Each weight once, rows once a block, from L2. Floor: the weights at copy bandwidth; for 68M parameters (38 MB in layers,
//   49 MB in the head) 29 us at 3 TB/s. Barriers: about 1 us each on an H100, 10 of them. Measured there, before angles were
//   read once a launch: 66 to 73 us for 1 to 8 rows, 89 for 16 (docs/gpu.md).
//
// Numerics
//   float32 inside, rounded where transformers' modules round; rotations are rounded once, by angles that are not rounded.
//   Attention weights are rounded before they multiply values, and what they are divided by is the sum of the rounded ones.
//
// Source
//   Sequoia (arXiv 2402.12374): the levels of a tree follow one another, so a draft's level must take a small part of a step.

#pragma once

#include "few_rows_attention.h"
#include "few_rows_common.h"
#include "few_rows_product.h"

namespace sequoia {
namespace {

constexpr int kLayerProducts = 4;
constexpr int kFactorsAt = 2 * kMostStages * static_cast<int>(sizeof(Gate));  // in shared memory, bytes
constexpr int kTogetherAt = kFactorsAt + 2 * kFewRowsMaxWidth;
constexpr int kSumsAt = kTogetherAt + 4 * kQueries;

// The token of a row; one that the model has no embedding of counts as the last that it has.
__device__ __forceinline__ std::int64_t token_of(const FewRows& given, int row) {
    const int request = quotient(row, given.per_node);
    const std::int64_t token = given.tokens[request * given.stride_tokens + row - request * given.num_nodes];
    return token < 0 ? 0 : token < given.num_embeddings ? token : given.num_embeddings - 1;
}

// Elements from row to row of normed rows: neighbouring rows lie in other banks.
__host__ __device__ inline int normed_stride(int width) { return width + (width % 64 == 0 ? 32 : 0); }

// Norm all rows into shared memory, by `factors`, which are there as well. Of a first layer, the rows are embeddings, and
// become the stream here.
template <typename Number>
__device__ __forceinline__ void norm_rows(
    const FewRows& given, bool embeds, const std::uint16_t* factors, std::uint16_t* normed, int stride) {
    constexpr int kAtOnce = 4;
    constexpr int kStep = 32 * 8;
    const int own = lane_of_thread() * 8;  // the first of a lane's columns
#pragma unroll 1
    for (int row = warp_of_thread(); row < given.num_rows; row += kWarps) {
        std::uint16_t* const stream = static_cast<std::uint16_t*>(given.stream) + row * given.width;
        const std::uint16_t* const source =
            embeds ? numbers(given.embedding) + token_of(given, row) * given.width : stream;
        const bool keeps = embeds && row % static_cast<int>(gridDim.x) == static_cast<int>(blockIdx.x);
        std::uint16_t* const to = normed + row * stride;
        float squares = 0.0f;
#pragma unroll 1
        for (int first = own; first < given.width; first += kAtOnce * kStep) {
            uint4 read[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                read[i] = make_uint4(0, 0, 0, 0);
                if (first + i * kStep < given.width) {
                    read[i] = read_written(reinterpret_cast<const uint4*>(source + first + i * kStep));
                }
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const std::uint32_t pairs[4] = {read[i].x, read[i].y, read[i].z, read[i].w};
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) {
                    const float2 both = Number::widened(pairs[pair]);
                    squares += both.x * both.x + both.y * both.y;
                }
                if (first + i * kStep < given.width) {
                    *reinterpret_cast<uint4*>(to + first + i * kStep) = read[i];
                    if (keeps) {
                        *reinterpret_cast<uint4*>(stream + first + i * kStep) = read[i];
                    }
                }
            }
        }
        const float scale = rsqrtf(sum_of_warp(squares) / static_cast<float>(given.width) + given.eps);
#pragma unroll 1
        for (int column = own; column < given.width; column += kStep) {
            const uint4 read = *reinterpret_cast<const uint4*>(to + column);
            const uint4 factor = *reinterpret_cast<const uint4*>(factors + column);
            std::uint32_t pairs[4] = {read.x, read.y, read.z, read.w};
            const std::uint32_t by[4] = {factor.x, factor.y, factor.z, factor.w};
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const float2 both = Number::widened(pairs[pair]);
                const float2 scaled = Number::widened(Number::narrowed(both.x * scale, both.y * scale));
                const float2 own_factor = Number::widened(by[pair]);
                pairs[pair] = Number::narrowed(scaled.x * own_factor.x, scaled.y * own_factor.y);
            }
            *reinterpret_cast<uint4*>(to + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
    meet();
}

// What the fetching warp does.
__device__ __forceinline__ void fetch_all_weights(const FewRows& given, Ring& ring) {
#pragma unroll 1
    for (int number = 0; number < kLayerProducts * given.num_layers + 1; ++number) {
        const FewRowsLayer& layer = given.layers[number / kLayerProducts];
        const int kind = number == kLayerProducts * given.num_layers ? kHead : number % kLayerProducts;
        const void* const weight = kind == kProjections ? layer.projections
                                   : kind == kOutput    ? layer.output
                                   : kind == kGateUp    ? layer.gate_up
                                   : kind == kDown      ? layer.down
                                                        : given.head;
        fetch_weights(given, ring, given.products[kind], weight);
    }
}

// The SiLU of a gate times what it lets through, rounded as transformers rounds them.
template <typename Number>
__device__ __forceinline__ std::uint16_t gated(float gate, float up) {
    const float first = rounded<Number>(gate);
    const float activated = rounded<Number>(first / (1.0f + exp2f(-1.4426950408889634f * first)));
    return Number::narrowed(activated * rounded<Number>(up));
}

template <typename Number, int HEAD_DIM, int EIGHTS>
__global__ void __launch_bounds__(kThreads, 1) few_rows_kernel(const __grid_constant__ FewRows given) {
    SEQUOIA_SHARED_MEMORY(memory);
    char* const bytes = reinterpret_cast<char*>(memory);
    Gate* const gates = reinterpret_cast<Gate*>(bytes);
    Ring ring{gates, gates + kMostStages, bytes + given.stages_at};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < given.num_stages; ++stage) {
            set_up(ring.filled[stage], arrivals_of_fetch());
            set_up(ring.emptied[stage], kWarps);
        }
        gates_are_set_up();
    }
    __syncthreads();
    if (warp_of_thread() == kWarps) {
        fetch_all_weights(given, ring);
        return;
    }

    std::uint16_t* const factors = reinterpret_cast<std::uint16_t*>(bytes + kFactorsAt);
    float* const sums = reinterpret_cast<float*>(bytes + kSumsAt);  // products and the attention take turns there
    std::uint16_t* const normed = reinterpret_cast<std::uint16_t*>(bytes + given.normed_at);
    auto& attending = *reinterpret_cast<Attending<HEAD_DIM>*>(bytes + kSumsAt);
    const int stride = normed_stride(given.width);
    std::uint16_t* const stream = static_cast<std::uint16_t*>(given.stream);
    std::uint32_t* const together = reinterpret_cast<std::uint32_t*>(bytes + kTogetherAt);
    const Unit unit = unit_of(given, static_cast<int>(blockIdx.x));
    const bool attends = static_cast<int>(blockIdx.x) < units_of(given);
    Known<HEAD_DIM> known;  // of this unit, in all layers
    if (attends) {
        learn<HEAD_DIM>(known, given, unit, together);
    }

    // Where the blocks of a launch meet: what one has written before it arrives, others read when they have waited.
    unsigned barriers = 0;
    const auto arrive_at_barrier = [&] {
        meet();
        if (threadIdx.x == 0) {
            arrive_at(given.counters);
        }
    };
    const auto wait_at_barrier = [&] {
        ++barriers;
        if (threadIdx.x == 0) {
            wait_until(given.counters, barriers * gridDim.x);
        }
        meet();
    };
    const int own_factors = static_cast<int>(threadIdx.x) * 8;
    uint4 next_factors = make_uint4(0, 0, 0, 0);
    if (own_factors < given.width) {
        next_factors = read_constant(reinterpret_cast<const uint4*>(numbers(given.layers[0].input_norm) + own_factors));
        *reinterpret_cast<uint4*>(factors + own_factors) = next_factors;
    }
    meet();
#pragma unroll 1
    for (int number = 0;; ++number) {
        const int kind = number == kLayerProducts * given.num_layers ? kHead : number % kLayerProducts;
        const FewRowsLayer& layer = given.layers[number / kLayerProducts];
        const FewRowsProduct& of = given.products[kind];
        const bool norms = of.is_of_normed;
        if (!norms && own_factors < given.width) {  // of the norm behind this phase
            const void* const next = kind == kOutput                                    ? layer.mlp_norm
                                     : number + 1 == kLayerProducts * given.num_layers ? given.final_norm
                                                                                        : (&layer)[1].input_norm;
            next_factors = read_constant(reinterpret_cast<const uint4*>(numbers(next) + own_factors));
        }
        if (norms) {
            norm_rows<Number>(given, number == 0, factors, normed, stride);
        }
        const Rows rows{norms ? normed : numbers(kind == kOutput ? given.attended : given.inner), norms ? stride : of.width};
        void* const results = kind == kProjections ? given.projected : kind == kHead ? given.logits
                              : kind == kGateUp    ? given.inner
                                                   : given.stream;
        const std::int64_t results_stride = kind == kHead ? given.stride_logits : of.outputs;
        product<Number, EIGHTS>(
            given, ring, of, rows, sums,
            [&](int output, int row) {
                return norms ? 0.0f : Number::widened(read_written(stream + row * given.width + output));
            },
            [&](int output, int row, const float* whole, float before) {
                const std::uint16_t result = kind == kGateUp ? gated<Number>(whole[0], whole[1])
                                             : norms         ? Number::narrowed(whole[0])
                                                             : Number::narrowed(before + rounded<Number>(whole[0]));
                static_cast<std::uint16_t*>(results)[row * results_stride + output] = result;
            });
        if (kind == kHead) {
            break;
        }
        arrive_at_barrier();
        if (kind == kProjections) {
            Slots<HEAD_DIM> first_slots;
            if (attends) {
                read_slots<HEAD_DIM>(first_slots, cached_rows(given, layer, unit), warp_of_thread() * kSlots);
            }
            wait_at_barrier();
            if (attends) {
                attend<Number, HEAD_DIM>(given, layer, unit, known, first_slots, together, attending);
            }
            arrive_at_barrier();
        }
        if (!norms && own_factors < given.width) {
            *reinterpret_cast<uint4*>(factors + own_factors) = next_factors;
        }
        wait_at_barrier();
    }
    // The last block to end sets the counters back, for the next launch. Others have only just looked at them, and nothing
    // is acquired of that here: plain stores would race with their loads.
    if (threadIdx.x == 0 && atomicAdd(given.counters + 1, 1u) + 1 == gridDim.x) {
        atomicExch(given.counters, 0u);
        atomicExch(given.counters + 1, 0u);
    }
}

// Groups of 8 rows, by which a kernel is chosen.
inline int eights_of(int num_rows) { return num_rows <= 8 ? 1 : num_rows <= 16 ? 2 : 4; }

// Cut the products, and lay shared memory out: gates, factors, sums, what the phases have in turns, and as many stages as
// there is room for, up to 1024 columns wide. Returns its bytes, or 0 where there is too little.
inline std::size_t lay_out_shared_memory(FewRows& given, int head_dim, std::size_t most_bytes) {
    const auto up_to = [](std::size_t bytes, std::size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; };
    const std::size_t work_at = kSumsAt + bytes_of_sums(eights_of(given.num_rows));
    const std::size_t normed = sizeof(std::uint16_t) * given.num_rows * normed_stride(given.width);
    const std::size_t attending = head_dim == 64 ? sizeof(Attending<64>) : sizeof(Attending<128>);
    const std::size_t behind = work_at + normed > kSumsAt + attending ? work_at + normed : kSumsAt + attending;
    const std::size_t stages_at = up_to(behind, 128);
    given.normed_at = static_cast<int>(work_at);
    given.stages_at = static_cast<int>(stages_at);
    const int width = given.width;
    const int attended_width = given.num_heads * head_dim;
    // Whether rows are normed, matrices, outputs, width.
    const int shapes[5][4] = {
        {1, 1, given.projected_width, width}, {0, 1, width, attended_width}, {1, 2, given.inner_width, width},
        {0, 1, width, given.inner_width}, {1, 1, given.num_outputs, width}};
    if (stages_at >= most_bytes) {
        return 0;
    }
    constexpr int kEnoughStages = 6;
    for (int most_blocks = kWarps * kBlocks; most_blocks >= kWarps; most_blocks /= 2) {
        int largest = 0;
        for (int kind = 0; kind < 5; ++kind) {
            FewRowsProduct& of = given.products[kind];
            of.is_of_normed = shapes[kind][0] != 0;
            of.matrices = shapes[kind][1];
            of.outputs = shapes[kind][2];
            of.width = shapes[kind][3];
            of.tiles = (of.outputs + kOutputs - 1) / kOutputs;
            of.blocks = of.width / kColumns;
            of.chunks = (of.blocks + most_blocks - 1) / most_blocks;
            of.chunk_blocks = (of.blocks + of.chunks - 1) / of.chunks;
            largest = of.chunk_blocks > largest ? of.chunk_blocks : largest;
        }
        given.stage_stride = (largest + (largest + 1) % 2) * kColumns * 2;  // an odd number of blocks: other banks again
        const std::size_t stage = static_cast<std::size_t>(kOutputs) * given.stage_stride;
        const std::size_t room = (most_bytes - stages_at) / stage;
        given.num_stages = static_cast<int>(room < kMostStages ? room : kMostStages);
        if (given.num_stages >= kEnoughStages) {
            break;
        }
    }
    return given.num_stages < 2 ? 0 : stages_at + static_cast<std::size_t>(given.num_stages) * kOutputs * given.stage_stride;
}

}  // namespace
}  // namespace sequoia
