// The attention of few_rows_kernel.h: a block has 16 queries of a head of keys at a time, its warps share the slots out.
//
// A warp takes tiles of 16 slots. Keys and values are read in the layout in which tensor cores take them: a lane reads 16
// bytes of a slot, and which of a head's dims it multiplies together is the same for queries and keys. Softmax is taken
// along the way, per warp; at last the warps' parts are put together. The rows of this launch come from the projections, by way of
// shared memory, since another block may not have written them to the cache yet; the block that has the first queries of a
// head of keys writes them there.
#pragma once

#include "few_rows_common.h"

namespace sequoia {
namespace {

constexpr int kQueries = kFewRowsQueries;
constexpr int kSlots = 16;                    // of a tile
constexpr int kOfSlot = kComputing / kSlots;  // threads that rotate a query or a row, or put a query together
constexpr std::uint32_t kAllSlots = (1u << kSlots) - 1;

// A lane's part of 16 slots. Keys: of a slot of each half 8 dims in every 32. Values: of four slots 8 dims in every 64.
template <int HEAD_DIM>
struct Slots {
    uint4 keys[2][HEAD_DIM / 32];
    uint4 values[2][2][HEAD_DIM / 64];
};

// Where slots are: in a cache, or in shared memory.
struct SlotRows {
    const std::uint16_t* keys;
    const std::uint16_t* values;
    int stride;  // elements
    int last;    // stands in for what lies behind it
};

// What the warps share. Behind each row there is room, so that neighbouring ones lie in other banks.
template <int HEAD_DIM>
struct Attending {
    std::uint16_t queries[kQueries][HEAD_DIM + 32];  // rotated
    std::uint16_t keys[kFewRowsMaxRows][HEAD_DIM + 8];  // this launch's rows of the request, rotated
    std::uint16_t values[kFewRowsMaxRows][HEAD_DIM + 8];
    float largest[kWarps][kQueries];
    float total[kWarps][kQueries];
    float sums[kWarps][kQueries][HEAD_DIM + 4];
};

// Which queries a block has: of the nodes and the heads that share keys, those from the first one.
struct Unit {
    int request;
    int kv_head;
    int first_query;
};

__device__ __forceinline__ int units_of(const FewRows& given) {
    return given.query_tiles * given.num_kv_heads * given.num_requests;
}

__device__ __forceinline__ Unit unit_of(const FewRows& given, int number) {
    const int heads = number / given.query_tiles;
    return {heads / given.num_kv_heads, heads % given.num_kv_heads, number % given.query_tiles * kQueries};
}

// A text's length, which is not trusted where something is written or read by it.
__device__ __forceinline__ int length_of(const FewRows& given, const Unit& unit) {
    const int told = given.cache_lens[unit.request];
    return told < 0 ? 0 : told < given.num_slots ? told : given.num_slots;
}

// What a query sees of the tree.
__device__ __forceinline__ const std::int32_t* mask_of(const FewRows& given, const Unit& unit, int query) {
    return given.tree_mask + unit.request * given.stride_mask_request + quotient(query, given.per_group) * given.num_words;
}

__device__ __forceinline__ std::int64_t cache_offset(const FewRows& given, const Unit& unit) {
    return unit.request * given.stride_cache_request + unit.kv_head * given.stride_cache_head;
}

__device__ __forceinline__ SlotRows cached_rows(const FewRows& given, const FewRowsLayer& layer, const Unit& unit) {
    const std::int64_t offset = cache_offset(given, unit);
    return {numbers(layer.keys) + offset, numbers(layer.values) + offset, static_cast<int>(given.stride_cache_slot),
            given.num_slots - 1};
}

template <int HEAD_DIM>
__device__ __forceinline__ void read_slots(Slots<HEAD_DIM>& slots, const SlotRows& rows, int first) {
    const int lane = lane_of_thread();
    const auto at = [&](const std::uint16_t* part, int slot, int dim) {
        const int known = slot < rows.last ? slot : rows.last;
        return *reinterpret_cast<const uint4*>(part + known * rows.stride + dim);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int block = 0; block < HEAD_DIM / 32; ++block) {
            slots.keys[half][block] = at(rows.keys, first + half * 8 + (lane >> 2), block * 32 + (lane & 3) * 8);
        }
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
            for (int part = 0; part < HEAD_DIM / 64; ++part) {
                slots.values[half][odd][part] =
                    at(rows.values, first + half * 8 + (lane & 3) * 2 + odd, part * 64 + (lane >> 2) * 8);
            }
        }
    }
}

// By what a thread rotates: two neighbouring dims, or four, and those that turn with them.
template <int HEAD_DIM>
struct Angles {
    float cosines[HEAD_DIM / 2 / kOfSlot];
    float sines[HEAD_DIM / 2 / kOfSlot];
};

template <int HEAD_DIM>
__device__ __forceinline__ void read_angles(Angles<HEAD_DIM>& angles, const FewRows& given, int request, int node) {
    constexpr int kDims = HEAD_DIM / 2 / kOfSlot;
    const std::int64_t behind = static_cast<std::int64_t>(given.cache_lens[request]) + given.depths[node];
    const std::int64_t position = behind < given.last_position ? behind : given.last_position;
    const float* const row = given.table + (position > 0 ? position : 0) * HEAD_DIM + threadIdx.x % kOfSlot * kDims;
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
        angles.cosines[i] = row[i];
        angles.sines[i] = row[i + HEAD_DIM / 2];
    }
}

// Rotate a thread's part of a head of the projections, into shared memory and, where there is such a place, into a cache.
template <typename Number, int HEAD_DIM>
__device__ __forceinline__ void rotate(
    const Angles<HEAD_DIM>& angles, const std::uint16_t* head, bool is_one, std::uint16_t* to, std::uint16_t* also_to) {
    constexpr int kDims = HEAD_DIM / 2 / kOfSlot;
    const int first = static_cast<int>(threadIdx.x) % kOfSlot * kDims;
#pragma unroll
    for (int i = 0; i < kDims; i += 2) {
        std::uint32_t words[2] = {};
        if (is_one) {
            words[0] = read_written(reinterpret_cast<const std::uint32_t*>(head + first + i));
            words[1] = read_written(reinterpret_cast<const std::uint32_t*>(head + first + i + HEAD_DIM / 2));
        }
        const float2 low = Number::widened(words[0]);
        const float2 high = Number::widened(words[1]);
        words[0] = Number::narrowed(low.x * angles.cosines[i] - high.x * angles.sines[i],
                                    low.y * angles.cosines[i + 1] - high.y * angles.sines[i + 1]);
        words[1] = Number::narrowed(high.x * angles.cosines[i] + low.x * angles.sines[i],
                                    high.y * angles.cosines[i + 1] + low.y * angles.sines[i + 1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            *reinterpret_cast<std::uint32_t*>(to + first + i + half * (HEAD_DIM / 2)) = words[half];
            if (also_to != nullptr) {
                *reinterpret_cast<std::uint32_t*>(also_to + first + i + half * (HEAD_DIM / 2)) = words[half];
            }
        }
    }
}

// What a warp has of its queries so far: those of the lane's row, and 8 further on.
template <int HEAD_DIM>
struct Sums {
    float largest[2];
    float total[2];
    float of_dims[HEAD_DIM / 64][8][4];
};

// Take 16 slots in. `seen`: bits of the slots that the lane's two queries see. What nobody sees may hold anything.
template <typename Number, int HEAD_DIM>
__device__ __forceinline__ void take(Sums<HEAD_DIM>& sums, const Attending<HEAD_DIM>& shared, const Slots<HEAD_DIM>& slots,
                                     float scale, const std::uint32_t (&seen)[2]) {
    const int lane = lane_of_thread();
    const std::uint32_t live = any_of_warp(seen[0] | seen[1]);
    const auto query = [&](int half, int block) {
        return *reinterpret_cast<const uint4*>(&shared.queries[half * 8 + (lane >> 2)][block * 32 + (lane & 3) * 8]);
    };
    const auto slot_of = [&](int i) { return i / 2 * 8 + (lane & 3) * 2 + i % 2; };  // of a lane's four
    float scores[2][4] = {};
#pragma unroll
    for (int block = 0; block < HEAD_DIM / 32; ++block) {
        const uint4 low = query(0, block);
        const uint4 high = query(1, block);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 key = slots.keys[half][block];
            multiply<Number>(scores[half], low.x, high.x, low.y, high.y, key.x, key.y);
            multiply<Number>(scores[half], low.z, high.z, low.w, high.w, key.z, key.w);
        }
    }
    std::uint32_t weights[2][2];  // by half of the slots and query
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float largest = sums.largest[row];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& score = scores[i / 2][2 * row + i % 2];
            score = (seen[row] >> slot_of(i) & 1u) != 0 ? score * scale : -INFINITY;
            largest = fmaxf(largest, score);
        }
        largest = fmaxf(largest, of_lane(largest, 1));
        largest = fmaxf(largest, of_lane(largest, 2));
        const float pivot = largest == -INFINITY ? 0.0f : largest;
        const float shrink = exp2f(sums.largest[row] - pivot);
        sums.largest[row] = largest;
        sums.total[row] *= shrink;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            weights[half][row] =
                Number::narrowed(exp2f(scores[half][2 * row] - pivot), exp2f(scores[half][2 * row + 1] - pivot));
            const float2 both = Number::widened(weights[half][row]);
            sums.total[row] += both.x + both.y;
        }
#pragma unroll
        for (int part = 0; part < HEAD_DIM / 64; ++part) {
#pragma unroll
            for (int dim = 0; dim < 8; ++dim) {
                sums.of_dims[part][dim][2 * row] *= shrink;
                sums.of_dims[part][dim][2 * row + 1] *= shrink;
            }
        }
    }
#pragma unroll
    for (int part = 0; part < HEAD_DIM / 64; ++part) {
        std::uint32_t words[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t kept = (live >> slot_of(i) & 1u) != 0 ? 0xffffffffu : 0u;
            const uint4 value = slots.values[i / 2][i % 2][part];
            words[i][0] = value.x & kept;
            words[i][1] = value.y & kept;
            words[i][2] = value.z & kept;
            words[i][3] = value.w & kept;
        }
#pragma unroll
        for (int dim = 0; dim < 8; ++dim) {
            std::uint32_t right[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const std::uint32_t first = words[2 * half][dim / 2];
                const std::uint32_t second = words[2 * half + 1][dim / 2];
                right[half] = dim % 2 ? (first >> 16) | (second & 0xffff0000u) : (first & 0xffffu) | (second << 16);
            }
            multiply<Number>(sums.of_dims[part][dim], weights[0][0], weights[0][1], weights[1][0], weights[1][1], right[0],
                             right[1]);
        }
    }
}

// Put the warps' parts together, and hand the queries' rows on.
template <typename Number, int HEAD_DIM>
__device__ __forceinline__ void put_together(
    const FewRows& given, const Unit& unit, const Sums<HEAD_DIM>& sums, Attending<HEAD_DIM>& shared) {
    constexpr int kDims = HEAD_DIM / kOfSlot;  // of a thread
    const int lane = lane_of_thread();
    const int warp = warp_of_thread();
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int query = row * 8 + (lane >> 2);
        float total = sums.total[row] + of_lane(sums.total[row], 1);
        total += of_lane(total, 2);
        if ((lane & 3) == 0) {
            shared.largest[warp][query] = sums.largest[row];
            shared.total[warp][query] = total;
        }
#pragma unroll
        for (int part = 0; part < HEAD_DIM / 64; ++part) {
#pragma unroll
            for (int i = 0; i < 16; i += 4) {
                const auto& dims = sums.of_dims[part];
                *reinterpret_cast<float4*>(&shared.sums[warp][query][part * 64 + (lane & 3) * 16 + i]) =
                    make_float4(dims[i % 8][2 * row + i / 8], dims[i % 8 + 1][2 * row + i / 8],
                                dims[i % 8 + 2][2 * row + i / 8], dims[i % 8 + 3][2 * row + i / 8]);
            }
        }
    }
    meet();
    const int query = static_cast<int>(threadIdx.x) / kOfSlot;
    const int first = static_cast<int>(threadIdx.x) % kOfSlot * kDims;
    const int number = unit.first_query + query;
    if (number < given.queries) {
        float largest = -INFINITY;
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            largest = fmaxf(largest, shared.largest[other][query]);
        }
        const float pivot = largest == -INFINITY ? 0.0f : largest;
        float total = 0.0f;
        float whole[kDims] = {};
#pragma unroll 4
        for (int other = 0; other < kWarps; ++other) {
            const float weight = exp2f(shared.largest[other][query] - pivot);
            total += weight * shared.total[other][query];
#pragma unroll
            for (int dim = 0; dim < kDims; dim += 4) {
                const float4 four = *reinterpret_cast<const float4*>(&shared.sums[other][query][first + dim]);
                whole[dim] += weight * four.x;
                whole[dim + 1] += weight * four.y;
                whole[dim + 2] += weight * four.z;
                whole[dim + 3] += weight * four.w;
            }
        }
        const float scale = total == 0.0f ? 0.0f : 1.0f / total;
        const int node = quotient(number, given.per_group);
        const int row = unit.request * given.num_nodes + node;
        const int head = unit.kv_head * given.group + number - node * given.group;
        auto* const place = reinterpret_cast<std::uint32_t*>(
            static_cast<std::uint16_t*>(given.attended) + (row * given.num_heads + head) * HEAD_DIM + first);
#pragma unroll
        for (int dim = 0; dim < kDims; dim += 2) {
            place[dim / 2] = Number::narrowed(whole[dim] * scale, whole[dim + 1] * scale);
        }
    }
}

// What does not differ from layer to layer: angles, of a thread's query and row.
template <int HEAD_DIM>
struct Known {
    Angles<HEAD_DIM> of_query;
    Angles<HEAD_DIM> of_row;
};

// Read that, and note down which of this launch's rows each query sees. `together`: [kQueries]; whoever reads it meets
// first.
template <int HEAD_DIM>
__device__ __forceinline__ void learn(
    Known<HEAD_DIM>& known, const FewRows& given, const Unit& unit, std::uint32_t* together) {
    const int place = static_cast<int>(threadIdx.x) / kOfSlot;
    const int own = unit.first_query + place < given.queries ? unit.first_query + place : 0;
    read_angles<HEAD_DIM>(known.of_query, given, unit.request, quotient(own, given.per_group));
    read_angles<HEAD_DIM>(known.of_row, given, unit.request, place < given.num_nodes ? place : 0);
    const int lane = lane_of_thread();
    const int id = lane < given.num_nodes ? given.node_ids[lane] : -1;
    const int room = given.num_slots - length_of(given, unit);
    const bool is_there = id >= 0 && id < given.num_tree_rows && id < room && id < 32 * given.num_words;
#pragma unroll
    for (int query = warp_of_thread(); query < kQueries; query += kWarps) {
        std::uint32_t bits = 0;
        if (is_there && unit.first_query + query < given.queries) {
            const std::int32_t* const mask = mask_of(given, unit, unit.first_query + query);
            bits = (static_cast<std::uint32_t>(mask[id >> 5]) >> (id & 31) & 1u) << lane;
        }
        bits = any_of_warp(bits);
        if (lane == 0) {
            together[query] = bits;
        }
    }
}

// Rotate the unit's queries and the request's rows into shared memory, the rows also into the cache if asked.
template <typename Number, int HEAD_DIM>
__device__ __forceinline__ void rotate_all(const FewRows& given, const FewRowsLayer& layer, const Unit& unit,
                                           const Known<HEAD_DIM>& known, Attending<HEAD_DIM>& shared) {
    const int place = static_cast<int>(threadIdx.x) / kOfSlot;
    const int own = unit.first_query + place;
    const int node = quotient(own, given.per_group);
    const std::uint16_t* const projected = numbers(given.projected) + unit.request * given.num_nodes * given.projected_width;
    rotate<Number, HEAD_DIM>(
        known.of_query,
        projected + node * given.projected_width + (unit.kv_head * given.group + own - node * given.group) * HEAD_DIM,
        own < given.queries, shared.queries[place], nullptr);
#pragma unroll 1
    for (int row = place; row < given.num_nodes; row += kSlots) {  // two at most
        Angles<HEAD_DIM> angles = known.of_row;
        if (row != place) {
            read_angles<HEAD_DIM>(angles, given, unit.request, row);
        }
        std::int64_t slot = -1;  // where there is room, whatever a length says
        if (unit.first_query == 0) {
            slot = static_cast<std::int64_t>(given.cache_lens[unit.request]) + given.node_ids[row];
        }
        const bool keeps = slot >= 0 && slot < given.num_slots;
        const std::int64_t offset = cache_offset(given, unit) + slot * given.stride_cache_slot;
        const std::uint16_t* const key =
            projected + row * given.projected_width + (given.num_heads + unit.kv_head) * HEAD_DIM;
        rotate<Number, HEAD_DIM>(angles, key, true, shared.keys[row],
                                 keeps ? static_cast<std::uint16_t*>(layer.keys) + offset : nullptr);
        const int first = static_cast<int>(threadIdx.x) % kOfSlot * (HEAD_DIM / kOfSlot);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / kOfSlot; i += 4) {
            const uint2 value =
                read_written(reinterpret_cast<const uint2*>(key + given.num_kv_heads * HEAD_DIM + first + i));
            *reinterpret_cast<uint2*>(&shared.values[row][first + i]) = value;
            if (keeps) {
                *reinterpret_cast<uint2*>(static_cast<std::uint16_t*>(layer.values) + offset + first + i) = value;
            }
        }
    }
}

// Of a tile of a cache, the slots that a node sees and that were filled before this launch.
__device__ __forceinline__ std::uint32_t seen_of_cache(
    const FewRows& given, const std::int32_t* mask, int length, int first) {
    const int bit = first - length;
    const auto word = [&](int number) {
        return number < 0 ? 0xffffffffu : number < given.num_words ? static_cast<std::uint32_t>(mask[number]) : 0u;
    };
    const std::uint64_t both = word(bit >> 5) | static_cast<std::uint64_t>(word((bit >> 5) + 1)) << 32;
    return static_cast<std::uint32_t>(both >> (bit & 31)) & kAllSlots;
}

template <typename Number, int HEAD_DIM>
__device__ __forceinline__ void attend(const FewRows& given, const FewRowsLayer& layer, Unit unit, Known<HEAD_DIM> known,
                                       Slots<HEAD_DIM>& slots, std::uint32_t* together, Attending<HEAD_DIM>& shared) {
    const int lane = lane_of_thread();
    const int warp = warp_of_thread();
#pragma unroll 1
    for (int number = static_cast<int>(blockIdx.x); number < units_of(given); number += static_cast<int>(gridDim.x)) {
        const bool is_first = number == static_cast<int>(blockIdx.x);
        if (!is_first) {
            meet();  // the parts of the unit before have been put together
            unit = unit_of(given, number);
        }
        if (units_of(given) > static_cast<int>(gridDim.x)) {
            learn<HEAD_DIM>(known, given, unit, together);  // what is known of the first was written over
        }
        rotate_all<Number, HEAD_DIM>(given, layer, unit, known, shared);
        const int length = length_of(given, unit);
        const int room = given.num_slots - length;
        const int num_tree_slots = given.num_tree_rows < room ? given.num_tree_rows : room;
        const int end = length + num_tree_slots;
        const std::int32_t* masks[2];  // of the lane's queries
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = unit.first_query + half * 8 + (lane >> 2);
            masks[half] = mask_of(given, unit, own < given.queries ? own : 0);
        }
        // Behind the tiles of the cache are those of this launch's rows.
        const int cached_tiles = (end + kSlots - 1) / kSlots;
        const int tiles = cached_tiles + (given.num_nodes + kSlots - 1) / kSlots;
        const SlotRows cached = cached_rows(given, layer, unit);
        const SlotRows fresh{shared.keys[0], shared.values[0], HEAD_DIM + 8, given.num_nodes - 1};
        meet();

        Sums<HEAD_DIM> sums = {};
        sums.largest[0] = sums.largest[1] = -INFINITY;
#pragma unroll 1
        for (int tile = warp; tile < tiles; tile += kWarps) {
            const bool is_fresh = tile >= cached_tiles;
            const int first = (is_fresh ? tile - cached_tiles : tile) * kSlots;
            if (tile != warp || is_fresh || !is_first) {
                read_slots<HEAD_DIM>(slots, is_fresh ? fresh : cached, first);
            }
            std::uint32_t seen[2] = {kAllSlots, kAllSlots};
            if (is_fresh) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    seen[half] = together[half * 8 + (lane >> 2)] >> first & kAllSlots;
                }
            } else if (first + kSlots > length) {
                const int id = lane < given.num_nodes ? given.node_ids[lane] : -1;
                const int place = length + id - first;
                const std::uint32_t written = any_of_warp(id >= 0 && place >= 0 && place < kSlots ? 1u << place : 0u);
                const std::uint32_t inside = end - first < kSlots ? (1u << (end - first)) - 1 : kAllSlots;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    seen[half] = seen_of_cache(given, masks[half], length, first) & inside & ~written;
                }
            }
            take<Number, HEAD_DIM>(sums, shared, slots, given.scale, seen);
        }
        put_together<Number, HEAD_DIM>(given, unit, sums, shared);
    }
}

}  // namespace
}  // namespace sequoia
