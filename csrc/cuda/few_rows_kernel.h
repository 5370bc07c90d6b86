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
//   In a product a block owns 16 outputs of all rows at a time, and its warps share the width out in blocks of 32. A lane
//   reads 16 bytes of two outputs at once; which of a block's columns a lane multiplies together is the same for weights
//   and rows, so no shuffle is needed, and no shared memory for weights. The first weights of the next phase are read
//   before its barrier. In the attention a block owns a head of a row at a time.
//   The order of every sum follows from the sizes, so results repeat bit for bit.
//
// Memory
//   Each weight once, rows once a block, from L2. Floor: the weights at copy bandwidth; for 68M parameters (38 MB in layers,
//   49 MB in the head) 29 us at 3 TB/s. Barriers: 1 us each on an H100, 10 of them.
//
// An H100 computed it rightly and took 88 us for up to 8 rows of that model, in a form of before: what was on its way moved
// from place to place then, and so was waited for (docs/gpu.md). In this form it has not run on a GPU. Compiled for sm_90
// without spills, but for 20 bytes a thread at more than 16 rows.
//
// Numerics
//   float32 inside, rounded where transformers' modules round; rotations are rounded once, by angles that are not rounded,
//   and attention weights are not rounded.
//
// Source
//   Sequoia (arXiv 2402.12374): the levels of a tree follow one another, so a draft's level must take a small part of a step.

#pragma once

#include "few_rows.h"
#include "lanes.h"

#include <cstddef>
#include <cstdint>

namespace sequoia {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kOutputs = 16;      // of a tile
constexpr int kColumns = 32;      // of a block of the width
constexpr int kAhead = 3;         // blocks of the width that a warp reads at once
constexpr int kPlaces = 4;        // of weights on their way
constexpr int kPhases = 5;        // of a layer
constexpr int kNormed = kFewRowsMaxWidth / 256;  // 8 columns each, that a lane has of a row that is normed
constexpr int kSlotsAhead = 6;    // slots that a lane reads at once in the attention

// Weights on their way, two outputs a lane: the next four steps of a matrix, or the next two of two matrices. A step's place
// is filled anew where it was read: to move numbers that are on their way would be to wait for them.
struct Fetched {
    uint4 low[kPlaces][kAhead];
    uint4 high[kPlaces][kAhead];
};

// What a norm multiplies by: the columns of a lane.
struct Factors {
    uint4 of_columns[kNormed];
};

__device__ inline int warp_of_thread() { return static_cast<int>(threadIdx.x) >> 5; }
__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) & 31; }

__device__ inline const std::uint16_t* numbers(const void* address) { return static_cast<const std::uint16_t*>(address); }

__device__ inline float sum_of_warp(float value) {
    for (int mask = 16; mask > 0; mask >>= 1) {
        value += of_lane(value, mask);
    }
    return value;
}

__device__ inline float largest_of_warp(float value) {
    for (int mask = 16; mask > 0; mask >>= 1) {
        value = fmaxf(value, of_lane(value, mask));
    }
    return value;
}

template <typename Number>
__device__ inline float rounded(float value) {
    return Number::widened(Number::narrowed(value));
}

// A warp's blocks of the width of one step of a tile. `matrix`: 1 for what gates are multiplied with.
__device__ inline void fetch(
    uint4 (&low)[kAhead], uint4 (&high)[kAhead], const void* weight, int matrix, int outputs, int width, int tile, int step) {
    const int lane = lane_of_thread();
    const int last = outputs - 1;
    const int output = tile * kOutputs + (lane >> 2);
    const int low_row = output < outputs ? output : last;  // what lies behind is computed and not kept
    const int high_row = output + 8 < outputs ? output + 8 : last;
    const std::uint16_t* const first = numbers(weight) + static_cast<std::size_t>(matrix) * outputs * width + (lane & 3) * 8;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        const int column = (warp_of_thread() + kWarps * (step * kAhead + i)) * kColumns;
        if (column < width) {
            low[i] = read_constant(reinterpret_cast<const uint4*>(first + static_cast<std::size_t>(low_row) * width + column));
            high[i] = read_constant(reinterpret_cast<const uint4*>(first + static_cast<std::size_t>(high_row) * width + column));
        }
    }
}

// A product's steps, in the order in which a block takes them.
struct Place {
    int tile;
    int step;

    __device__ Place behind(int steps) const {
        return step + 1 < steps ? Place{tile, step + 1} : Place{tile + static_cast<int>(gridDim.x), 0};
    }
};

__device__ inline int steps_of(int width) { return (width / kColumns + kWarps * kAhead - 1) / (kWarps * kAhead); }

__device__ inline int tiles_of(int outputs) { return (outputs + kOutputs - 1) / kOutputs; }

// The first weights of a product, before its phase begins.
template <int MATRICES>
__device__ void fetch_first(Fetched& fetched, const void* weight, int outputs, int width) {
    Place place{static_cast<int>(blockIdx.x), 0};
#pragma unroll
    for (int first = 0; first < kPlaces; first += MATRICES) {
        if (place.tile < tiles_of(outputs)) {
#pragma unroll
            for (int matrix = 0; matrix < MATRICES; ++matrix) {
                fetch(fetched.low[first + matrix], fetched.high[first + matrix], weight, matrix, outputs, width, place.tile,
                      place.step);
            }
        }
        place = place.behind(steps_of(width));
    }
}

// Where a product's rows are: normed ones in shared memory, others as a phase before has left them.
struct Rows {
    const std::uint16_t* first;
    int stride;  // elements
    int count;
};

// A lane's numbers of the rows for one step. [kAhead, TILES]
template <int TILES, bool IS_SHARED>
__device__ inline void read_rows(uint4 (&right)[kAhead][TILES], const Rows& rows, int width, int step) {
    const int lane = lane_of_thread();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        const int column = (warp_of_thread() + kWarps * (step * kAhead + i)) * kColumns;
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            const int row = n * 8 + (lane >> 2);
            right[i][n] = make_uint4(0, 0, 0, 0);
            if (column < width && row < rows.count) {
                const auto* const address =
                    reinterpret_cast<const uint4*>(rows.first + row * rows.stride + column + (lane & 3) * 8);
                right[i][n] = IS_SHARED ? *address : read_written(address);
            }
        }
    }
}

// Add up the parts of a tile that the warps have, hand each number on, and begin anew. `parts`: [warp, matrix, row, output]; a
// product has two such, in turns, so that a slow warp may still read the other.
template <typename Number, int TILES, int MATRICES, typename Finish>
__device__ void add_up(
    float (&sums)[MATRICES][TILES][4], float* parts, int tile, int outputs, int num_rows, const Finish& finish) {
    constexpr int kRows = 8 * TILES;
    const int lane = lane_of_thread();
#pragma unroll
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            float* const part =
                parts + ((warp_of_thread() * MATRICES + matrix) * kRows + n * 8 + (lane & 3) * 2) * kOutputs + (lane >> 2);
            part[0] = sums[matrix][n][0];
            part[kOutputs] = sums[matrix][n][1];
            part[8] = sums[matrix][n][2];
            part[kOutputs + 8] = sums[matrix][n][3];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[matrix][n][i] = 0.0f;
            }
        }
    }
    __syncthreads();
    for (int number = threadIdx.x; number < kOutputs * kRows; number += kThreads) {
        const int output = tile * kOutputs + number % kOutputs;
        const int row = number / kOutputs;
        if (output < outputs && row < num_rows) {
            float whole[MATRICES];
#pragma unroll
            for (int matrix = 0; matrix < MATRICES; ++matrix) {
                whole[matrix] = 0.0f;
#pragma unroll
                for (int part = 0; part < kWarps; ++part) {
                    whole[matrix] += parts[(part * MATRICES + matrix) * kRows * kOutputs + number];
                }
            }
            finish(output, row, whole);
        }
    }
}

// Multiply the tiles of this block, and hand each finished number on: finish(output, row, sums of the matrices).
template <typename Number, int TILES, int MATRICES, bool IS_SHARED, typename Finish>
__device__ void product(
    Fetched& fetched, const void* weight, int outputs, int width, const Rows& rows, float* partial, Finish finish) {
    constexpr int kSums = kWarps * MATRICES * 8 * TILES * kOutputs;
    const int warp = warp_of_thread();
    const int num_tiles = tiles_of(outputs);
    const int steps = steps_of(width);
    float sums[MATRICES][TILES][4] = {};
    bool is_odd = false;
    Place place{static_cast<int>(blockIdx.x), 0};
    Place ahead = place;
#pragma unroll
    for (int first = 0; first < kPlaces; first += MATRICES) {
        ahead = ahead.behind(steps);
    }
    while (place.tile < num_tiles) {
#pragma unroll
        for (int first = 0; first < kPlaces; first += MATRICES) {
            if (place.tile >= num_tiles) {
                break;
            }
            uint4 right[kAhead][TILES];
            read_rows<TILES, IS_SHARED>(right, rows, width, place.step);
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if ((warp + kWarps * (place.step * kAhead + i)) * kColumns < width) {
#pragma unroll
                    for (int n = 0; n < TILES; ++n) {
#pragma unroll
                        for (int matrix = 0; matrix < MATRICES; ++matrix) {
                            const uint4 low = fetched.low[first + matrix][i];
                            const uint4 high = fetched.high[first + matrix][i];
                            multiply<Number>(sums[matrix][n], low.x, high.x, low.y, high.y, right[i][n].x, right[i][n].y);
                            multiply<Number>(sums[matrix][n], low.z, high.z, low.w, high.w, right[i][n].z, right[i][n].w);
                        }
                    }
                }
            }
            if (ahead.tile < num_tiles) {
#pragma unroll
                for (int matrix = 0; matrix < MATRICES; ++matrix) {
                    fetch(fetched.low[first + matrix], fetched.high[first + matrix], weight, matrix, outputs, width,
                          ahead.tile, ahead.step);
                }
            }
            ahead = ahead.behind(steps);
            if (place.step + 1 == steps) {
                add_up<Number, TILES, MATRICES>(sums, partial + (is_odd ? kSums : 0), place.tile, outputs, rows.count, finish);
                is_odd = !is_odd;
            }
            place = place.behind(steps);
        }
    }
    __syncthreads();  // the next phase has something else there
}

// The token of a row; one that the model has no embedding of counts as the last that it has.
__device__ inline std::int64_t token_of(const FewRows& given, int row) {
    const std::int64_t token = given.tokens[row / given.num_nodes * given.stride_tokens + row % given.num_nodes];
    return token < 0 ? 0 : token < given.num_embeddings ? token : given.num_embeddings - 1;
}

__device__ inline void fetch_factors(Factors& factors, const void* weight, int width) {
#pragma unroll
    for (int i = 0; i < kNormed; ++i) {
        const int column = (lane_of_thread() + 32 * i) * 8;
        if (column < width) {
            factors.of_columns[i] = read_constant(reinterpret_cast<const uint4*>(numbers(weight) + column));
        }
    }
}

// Norm all rows into shared memory. Of a first layer, the rows are embeddings, and become the stream here.
template <typename Number>
__device__ void norm_rows(const FewRows& given, const Factors& factors, bool embeds, std::uint16_t* normed, int stride) {
    const int lane = lane_of_thread();
    for (int row = warp_of_thread(); row < given.num_rows; row += kWarps) {
        std::uint16_t* const stream = static_cast<std::uint16_t*>(given.stream) + static_cast<std::size_t>(row) * given.width;
        const std::uint16_t* const source =
            embeds ? numbers(given.embedding) + token_of(given, row) * given.width : stream;
        const bool keeps = embeds && row % static_cast<int>(gridDim.x) == static_cast<int>(blockIdx.x);
        uint4 read[kNormed];
#pragma unroll
        for (int i = 0; i < kNormed; ++i) {
            const int column = (lane + 32 * i) * 8;
            read[i] = make_uint4(0, 0, 0, 0);
            if (column < given.width) {
                const auto* const address = reinterpret_cast<const uint4*>(source + column);
                read[i] = embeds ? read_constant(address) : read_written(address);
            }
        }
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kNormed; ++i) {
            const std::uint32_t pairs[4] = {read[i].x, read[i].y, read[i].z, read[i].w};
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const float2 both = Number::widened(pairs[pair]);
                squares += both.x * both.x + both.y * both.y;
            }
        }
        const float scale = rsqrtf(sum_of_warp(squares) / static_cast<float>(given.width) + given.eps);
#pragma unroll
        for (int i = 0; i < kNormed; ++i) {
            const int column = (lane + 32 * i) * 8;
            if (column < given.width) {
                if (keeps) {
                    *reinterpret_cast<uint4*>(stream + column) = read[i];
                }
                std::uint32_t pairs[4] = {read[i].x, read[i].y, read[i].z, read[i].w};
                const uint4 own = factors.of_columns[i];
                const std::uint32_t by[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) {
                    const float2 both = Number::widened(pairs[pair]);
                    const float2 factor = Number::widened(by[pair]);
                    const std::uint32_t first = Number::narrowed(rounded<Number>(both.x * scale) * factor.x);
                    const std::uint32_t second = Number::narrowed(rounded<Number>(both.y * scale) * factor.y);
                    pairs[pair] = first | second << 16;
                }
                *reinterpret_cast<uint4*>(normed + row * stride + column) =
                    make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
    }
    __syncthreads();
}

// What a block's threads share while they attend.
struct Attending {
    float query[kFewRowsMaxHeadDim];
    float partial[kWarps][kFewRowsMaxHeadDim];
    float of_warps[kWarps];
    std::uint32_t fresh[kFewRowsMaxTreeRows / 32];  // tree slots that this launch fills
    float scores[kFewRowsMaxSlots];
};

// A rotated number of a head that lies at `head` in the projections; dims are in two halves.
template <typename Number, int HEAD_DIM>
__device__ inline float rotated(const std::uint16_t* head, const float* angles, int dim) {
    constexpr int kHalf = HEAD_DIM / 2;
    const int first = dim % kHalf;
    const float low = Number::widened(read_written(head + first));
    const float high = Number::widened(read_written(head + first + kHalf));
    const float cosine = angles[first];
    const float sine = angles[first + kHalf];
    return rounded<Number>(dim < kHalf ? low * cosine - high * sine : high * cosine + low * sine);
}

template <typename Number>
__device__ inline float dot_of(const uint4& key, const float* query) {
    const std::uint32_t pairs[4] = {key.x, key.y, key.z, key.w};
    float sum = 0.0f;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const float2 both = Number::widened(pairs[pair]);
        sum += both.x * query[2 * pair] + both.y * query[2 * pair + 1];
    }
    return sum;
}

template <typename Number>
__device__ inline void add_weighted(float (&sums)[8], float weight, const uint4& value) {
    const std::uint32_t pairs[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const float2 both = Number::widened(pairs[pair]);
        sums[2 * pair] += weight * both.x;
        sums[2 * pair + 1] += weight * both.y;
    }
}

// A stretch of slots for a lane: `first` is its first one. Behind the cache's end, the last slot stands in.
template <int STEP>
__device__ inline void read_slots(
    uint4 (&read)[kSlotsAhead], const std::uint16_t* rows, const FewRows& given, int first, int dim) {
#pragma unroll
    for (int i = 0; i < kSlotsAhead; ++i) {
        const int slot = first + i * STEP < given.num_slots ? first + i * STEP : given.num_slots - 1;
        read[i] = *reinterpret_cast<const uint4*>(rows + static_cast<std::size_t>(slot) * given.stride_cache_slot + dim);
    }
}

template <typename Number, int HEAD_DIM>
__device__ void attend(const FewRows& given, const FewRowsLayer& layer, Attending& shared) {
    constexpr int kParts = HEAD_DIM / 8;        // lanes that share a slot
    constexpr int kSlots = 32 / kParts;         // slots that a warp reads at once
    constexpr int kStep = kWarps * kSlots;
    const int thread = threadIdx.x;
    const int lane = lane_of_thread();
    const int warp = warp_of_thread();
    const int part = lane % kParts;
    const int group = given.num_heads / given.num_kv_heads;
    const int projected_width = (given.num_heads + 2 * given.num_kv_heads) * HEAD_DIM;
    for (int unit = blockIdx.x; unit < given.num_rows * given.num_heads; unit += gridDim.x) {
        const int row = unit / given.num_heads;
        const int head = unit % given.num_heads;
        const int kv_head = head / group;
        const int request = row / given.num_nodes;
        const int node = row % given.num_nodes;
        const int told = given.cache_lens[request];
        const int length = told < 0 ? 0 : told < given.num_slots ? told : given.num_slots;
        const int end = length + given.num_tree_rows < given.num_slots ? length + given.num_tree_rows : given.num_slots;
        const std::uint16_t* const rows_of_request =
            numbers(given.projected) + static_cast<std::size_t>(request * given.num_nodes) * projected_width;
        const std::int32_t* const mask =
            given.tree_mask + static_cast<std::size_t>(request) * given.stride_mask_request + node * given.num_words;
        const auto angles_of = [&](int other) {
            const std::int64_t behind = static_cast<std::int64_t>(told) + given.depths[other];
            const std::int64_t position = behind < given.last_position ? behind : given.last_position;
            return given.table + (position > 0 ? position : 0) * HEAD_DIM;
        };
        const auto is_visible = [&](int slot) {  // of the tree
            const int bit = slot - length;
            return bit < 32 * given.num_words && ((mask[bit >> 5] >> (bit & 31)) & 1) != 0;
        };
        const std::size_t cache_rows = static_cast<std::size_t>(request) * given.stride_cache_request +
                                       static_cast<std::size_t>(kv_head) * given.stride_cache_head;
        const std::uint16_t* const keys = numbers(layer.keys) + cache_rows;
        const std::uint16_t* const values = numbers(layer.values) + cache_rows;
        const std::uint16_t* const own = rows_of_request + static_cast<std::size_t>(node) * projected_width;
        const std::uint16_t* const own_key = own + (given.num_heads + kv_head) * HEAD_DIM;
        const std::uint16_t* const own_value = own_key + given.num_kv_heads * HEAD_DIM;
        // All of a short text is on its way at once, and nothing of it is written in this launch but what is left out below.
        const int first_slot = warp * kSlots + lane / kParts;
        uint4 first_keys[kSlotsAhead];
        uint4 first_values[kSlotsAhead];
        read_slots<kStep>(first_keys, keys, given, first_slot, part * 8);
        read_slots<kStep>(first_values, values, given, first_slot, part * 8);

        // The query; and, by one head of those that share them, the row's key and value.
        for (int word = thread; word < (given.num_tree_rows + 31) / 32; word += kThreads) {
            shared.fresh[word] = 0;
        }
        if (thread < HEAD_DIM) {
            shared.query[thread] = rotated<Number, HEAD_DIM>(own + head * HEAD_DIM, angles_of(node), thread);
        } else if (thread < 2 * HEAD_DIM && head % group == 0) {
            const int dim = thread - HEAD_DIM;
            const std::int64_t slot = static_cast<std::int64_t>(told) + given.node_ids[node];
            if (slot >= 0 && slot < given.num_slots) {  // nothing else may be written, whatever a length says
                const std::size_t place = cache_rows + static_cast<std::size_t>(slot) * given.stride_cache_slot + dim;
                const float key = rotated<Number, HEAD_DIM>(own_key, angles_of(node), dim);
                static_cast<std::uint16_t*>(layer.keys)[place] = Number::narrowed(key);
                static_cast<std::uint16_t*>(layer.values)[place] = read_written(own_value + dim);
            }
        }
        __syncthreads();
        if (thread < given.num_nodes) {
            const int id = given.node_ids[thread];
            if (id >= 0 && id < given.num_tree_rows) {
                atomicOr(&shared.fresh[id >> 5], 1u << (id & 31));
            }
        }
        __syncthreads();

        // Scores of slots, a few lanes each. Slots of this launch's own rows come from the projections below: another block
        // may not have written them yet.
        float query[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            query[i] = shared.query[part * 8 + i];
        }
        float largest = -INFINITY;
        for (int first = first_slot; first - lane / kParts < end; first += kStep * kSlotsAhead) {
            if (first != first_slot) {
                read_slots<kStep>(first_keys, keys, given, first, part * 8);
            }
#pragma unroll
            for (int i = 0; i < kSlotsAhead; ++i) {
                const int slot = first + i * kStep;
                bool is_seen = slot < end;
                if (is_seen && slot >= length) {
                    const int bit = slot - length;
                    is_seen = is_visible(slot) && ((shared.fresh[bit >> 5] >> (bit & 31)) & 1) == 0;
                }
                float score = dot_of<Number>(first_keys[i], query);
                for (int mask_bits = kParts / 2; mask_bits > 0; mask_bits >>= 1) {
                    score += of_lane(score, mask_bits);
                }
                score = is_seen ? score * given.scale : -INFINITY;
                largest = fmaxf(largest, score);
                if (part == 0 && slot < end) {
                    shared.scores[slot] = score;
                }
            }
        }
        __syncthreads();
        for (int other = warp; other < given.num_nodes; other += kWarps) {
            const int slot = length + given.node_ids[other];
            if (slot < end && is_visible(slot)) {
                const std::uint16_t* const key = rows_of_request + static_cast<std::size_t>(other) * projected_width +
                                                 (given.num_heads + kv_head) * HEAD_DIM;
                const float* const angles = angles_of(other);
                float score = 0.0f;
                for (int dim = lane; dim < HEAD_DIM; dim += 32) {
                    score += rotated<Number, HEAD_DIM>(key, angles, dim) * shared.query[dim];
                }
                score = sum_of_warp(score) * given.scale;
                largest = fmaxf(largest, score);
                if (lane == 0) {
                    shared.scores[slot] = score;
                }
            }
        }
        largest = largest_of_warp(largest);
        if (lane == 0) {
            shared.of_warps[warp] = largest;
        }
        __syncthreads();
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            largest = fmaxf(largest, shared.of_warps[other]);
        }
        const float pivot = largest == -INFINITY ? 0.0f : largest;
        float total = 0.0f;
        for (int slot = thread; slot < end; slot += kThreads) {
            const float weight = exp2f(shared.scores[slot] - pivot);
            shared.scores[slot] = weight;
            total += weight;
        }
        total = sum_of_warp(total);
        __syncthreads();  // all have read of_warps, and written their weights
        if (lane == 0) {
            shared.of_warps[warp] = total;
        }

        float sums[8] = {};
        for (int first = first_slot; first - lane / kParts < end; first += kStep * kSlotsAhead) {
            if (first != first_slot) {
                read_slots<kStep>(first_values, values, given, first, part * 8);
            }
#pragma unroll
            for (int i = 0; i < kSlotsAhead; ++i) {
                const int slot = first + i * kStep;
                const float weight = slot < end ? shared.scores[slot] : 0.0f;
                bool is_read = weight != 0.0f;  // what nobody sees may hold anything
                if (is_read && slot >= length) {
                    const int bit = slot - length;
                    is_read = ((shared.fresh[bit >> 5] >> (bit & 31)) & 1) == 0;
                }
                if (is_read) {
                    add_weighted<Number>(sums, weight, first_values[i]);
                }
            }
        }
        for (int other = warp * kSlots + lane / kParts; other < given.num_nodes; other += kStep) {
            const int slot = length + given.node_ids[other];
            if (slot < end && is_visible(slot)) {
                const std::uint16_t* const value = rows_of_request + static_cast<std::size_t>(other) * projected_width +
                                                   (given.num_heads + given.num_kv_heads + kv_head) * HEAD_DIM + part * 8;
                add_weighted<Number>(sums, shared.scores[slot], read_written(reinterpret_cast<const uint4*>(value)));
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            for (int mask_bits = kParts; mask_bits < 32; mask_bits <<= 1) {
                sums[i] += of_lane(sums[i], mask_bits);
            }
            if (lane < kParts) {
                shared.partial[warp][part * 8 + i] = sums[i];
            }
        }
        __syncthreads();
        if (thread < HEAD_DIM) {
            float sum = 0.0f;
            float whole = 0.0f;
#pragma unroll
            for (int other = 0; other < kWarps; ++other) {
                sum += shared.partial[other][thread];
                whole += shared.of_warps[other];
            }
            static_cast<std::uint16_t*>(given.attended)[static_cast<std::size_t>(unit) * HEAD_DIM + thread] =
                Number::narrowed(whole == 0.0f ? 0.0f : sum / whole);
        }
        __syncthreads();
    }
}

template <typename Number, int HEAD_DIM, int TILES>
__global__ void __launch_bounds__(kThreads, 1) few_rows_kernel(const __grid_constant__ FewRows given) {
    SEQUOIA_SHARED_MEMORY(memory);
    float* const partial = reinterpret_cast<float*>(memory);  // of products; the attention has its own there
    std::uint16_t* const normed = reinterpret_cast<std::uint16_t*>(reinterpret_cast<char*>(memory) + given.partial_bytes);
    const int stride = given.width + few_rows_padding(given.width);
    const Rows normed_rows{normed, stride, given.num_rows};
    const int attended_width = given.num_heads * HEAD_DIM;
    const int projected_width = attended_width + 2 * given.num_kv_heads * HEAD_DIM;
    std::uint16_t* const stream = static_cast<std::uint16_t*>(given.stream);
    std::uint16_t* const projected = static_cast<std::uint16_t*>(given.projected);
    std::uint16_t* const inner = static_cast<std::uint16_t*>(given.inner);
    const auto add_to_stream = [&](int output, int row, const float* sum) {
        std::uint16_t* const place = stream + static_cast<std::size_t>(row) * given.width + output;
        *place = Number::narrowed(Number::widened(read_written(place)) + rounded<Number>(sum[0]));
    };
    const auto runs = [&](int phase) { return given.first_phase <= phase && phase < given.end_phase; };
    const auto meet = [&](int phase) {  // what the phase in front has written is read behind this
        if (given.first_phase < phase && phase < given.end_phase) {
            wait_for_blocks(given.counters, static_cast<unsigned>(phase - given.first_phase) * gridDim.x);
        }
    };
    Fetched fetched;
    Factors factors;
    if (runs(0)) {
        fetch_factors(factors, given.layers[0].input_norm, given.width);
        fetch_first<1>(fetched, given.layers[0].projections, projected_width, given.width);
    }
    const int head_phase = kPhases * given.num_layers;
    for (int number = 0; number < given.num_layers; ++number) {
        const FewRowsLayer& layer = given.layers[number];
        const int phase = kPhases * number;
        meet(phase);
        if (runs(phase)) {
            norm_rows<Number>(given, factors, phase == 0, normed, stride);
            product<Number, TILES, 1, true>(
                fetched, layer.projections, projected_width, given.width, normed_rows, partial,
                [&](int output, int row, const float* sum) {
                    projected[static_cast<std::size_t>(row) * projected_width + output] = Number::narrowed(sum[0]);
                });
        }
        meet(phase + 1);
        if (runs(phase + 1)) {
            attend<Number, HEAD_DIM>(given, layer, *reinterpret_cast<Attending*>(memory));
        }
        if (runs(phase + 2)) {
            fetch_first<1>(fetched, layer.output, given.width, attended_width);
        }
        meet(phase + 2);
        if (runs(phase + 2)) {
            const Rows rows{numbers(given.attended), attended_width, given.num_rows};
            product<Number, TILES, 1, false>(fetched, layer.output, given.width, attended_width, rows, partial, add_to_stream);
        }
        if (runs(phase + 3)) {
            fetch_factors(factors, layer.mlp_norm, given.width);
            fetch_first<2>(fetched, layer.gate_up, given.inner_width, given.width);
        }
        meet(phase + 3);
        if (runs(phase + 3)) {
            norm_rows<Number>(given, factors, false, normed, stride);
            product<Number, TILES, 2, true>(
                fetched, layer.gate_up, given.inner_width, given.width, normed_rows, partial,
                [&](int output, int row, const float* sums) {
                    const float gate = rounded<Number>(sums[0]);
                    const float activated = rounded<Number>(gate / (1.0f + exp2f(-1.4426950408889634f * gate)));
                    inner[static_cast<std::size_t>(row) * given.inner_width + output] =
                        Number::narrowed(activated * rounded<Number>(sums[1]));
                });
        }
        if (runs(phase + 4)) {
            fetch_first<1>(fetched, layer.down, given.width, given.inner_width);
        }
        meet(phase + 4);
        if (runs(phase + 4)) {
            const Rows rows{inner, given.inner_width, given.num_rows};
            product<Number, TILES, 1, false>(fetched, layer.down, given.width, given.inner_width, rows, partial, add_to_stream);
        }
        if (runs(phase + kPhases)) {
            const bool is_last = number + 1 == given.num_layers;
            const FewRowsLayer& next = given.layers[is_last ? 0 : number + 1];
            fetch_factors(factors, is_last ? given.final_norm : next.input_norm, given.width);
            fetch_first<1>(fetched, is_last ? given.head : next.projections,
                           is_last ? given.num_outputs : projected_width, given.width);
        }
    }
    meet(head_phase);
    if (runs(head_phase)) {
        norm_rows<Number>(given, factors, false, normed, stride);
        product<Number, TILES, 1, true>(
            fetched, given.head, given.num_outputs, given.width, normed_rows, partial,
            [&](int output, int row, const float* sum) {
                static_cast<std::uint16_t*>(given.logits)[row * given.stride_logits + output] = Number::narrowed(sum[0]);
            });
    }
    // The last block to end sets the counters back, for the next launch.
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(given.counters + 1, 1u) + 1 == gridDim.x) {
        given.counters[0] = 0;
        given.counters[1] = 0;
    }
}

// Tiles of 8 rows, by which a kernel is chosen.
inline int tiles_of_rows(int num_rows) { return num_rows <= 8 ? 1 : num_rows <= 16 ? 2 : 4; }

// Lay shared memory out: sums, twice, or what the attention has there; then the normed rows. Returns its bytes.
inline std::size_t lay_out_shared_memory(FewRows& given) {
    const std::size_t sums = 2 * sizeof(float) * kWarps * 2 * 8 * tiles_of_rows(given.num_rows) * kOutputs;
    const std::size_t first = sums > sizeof(Attending) ? sums : sizeof(Attending);
    given.partial_bytes = static_cast<int>((first + 15) / 16 * 16);
    return given.partial_bytes + 2 * static_cast<std::size_t>(given.num_rows) * (given.width + few_rows_padding(given.width));
}

}  // namespace
}  // namespace sequoia
