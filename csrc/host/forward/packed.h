// Products of weights of four bits with the activations of some nodes.
//
// Lanes are outputs, as of weights that lie transposed. Within up to CHUNK columns of a group the numbers that the bits
// stand for are multiplied as they are, in one chain over k. The chain times the group's scale, and the sum of the node's
// activations times the group's offset, are then added to what the chunks before have left in memory:
//
//     sum of (number * scale + offset) * node  =  scale * (sum of number * node) + offset * (sum of node)
//
// So an output's sum has one order, whatever other outputs and nodes are multiplied beside it. Bits are converted where
// they lie in their word or byte, without a shift, and something else is that much smaller: activations in words, where
// every column has a place of its own, scales in blocks, where every output has. Powers of 2 round nothing.
//
// Where the columns of a group are scattered (GPTQ's order by activations), every number has its own factors instead.

#pragma once

#include "products.h"

namespace sequoia::forward {
namespace {

constexpr i64 CHUNK = W >= 16 ? 64 : 128;  // of which the weights of COLUMNS outputs fill half of the first-level cache
constexpr int FEW = 2;                     // nodes for which bits are converted in registers
constexpr i64 WORD = 8;  // columns of a word

// One thread's memory for a strip.
struct Unpacked {
    float* scales;     // [STRIP], of a group
    float* offsets;    // [STRIP]
    float* totals;     // [MAX_ROWS]
    float* values;     // [MAX_ROWS, CHUNK], of a chunk
    float* weights;    // [CHUNK, COLUMNS]
    float* scattered;  // [groups, 2, COLUMNS]

    explicit Unpacked(float* floats)
        : scales(floats), offsets(scales + STRIP), totals(offsets + STRIP), values(totals + MAX_ROWS),
          weights(values + MAX_ROWS * CHUNK), scattered(weights + CHUNK * COLUMNS) {
        static_assert(2 * STRIP + MAX_ROWS * (1 + CHUNK) + CHUNK * COLUMNS <= PACKED_FLOATS, "memory of a strip");
    }
};

// A matrix of four bits.
struct PackedWeight {
    const Matrix* matrix;
    const char* data;
    const void* scales;
    const std::uint32_t* zeros;
    const std::int32_t* order;
    bool scattered;

    const Quantised& form() const { return matrix->quantised; }
    bool in_words() const { return form().packing == Packing::int4_words; }
    // Bytes of the tensor before column k of outputs from `row` on.
    i64 offset(i64 row, i64 k) const {
        return in_words() ? (k / WORD * form().whole_rows + row) * 4
                          : row / form().block * matrix->columns * form().block / 2 + k * row_bytes();
    }
    i64 row_bytes() const { return in_words() ? form().whole_rows * 4 : form().block / 2; }  // of a word, or a column
};

SEQUOIA_INLINE bool is_scattered(const std::int32_t* order, i64 columns, i64 group) {
    std::int32_t wrong = 0;
    for (i64 k = 0, index = 0; k < columns; ++index) {
        for (const i64 end = smaller(columns, k + group); k < end; ++k) {
            wrong |= order[k] ^ static_cast<std::int32_t>(index);
        }
    }
    return wrong != 0;
}

// Factors of one group for `count` outputs from `first` on: weight = number * scale + offset, in blocks number * 16 for
// the high bits.
SEQUOIA_INLINE void factors_of(const PackedWeight& weight, i64 group, i64 first, i64 count, float* scales,
                               float* offsets) {
    const Quantised& form = weight.form();
    const i64 place = group * form.whole_rows + first;
    if (weight.in_words()) {
        typedef std::uint32_t Bits8 __attribute__((vector_size(32)));
        typedef float Float8 __attribute__((vector_size(32)));
        widen_row(weight.scales, place, count, form.scales_type, scales);
        const Bits8 shifts = {0, 4, 8, 12, 16, 20, 24, 28};
        for (i64 n = 0; n < count; n += 8) {
            const Bits8 zeros = ((Bits8{} + weight.zeros[(place + n) / 8]) >> shifts) & 15u;
            Float8 scale;
            std::memcpy(&scale, scales + n, sizeof(scale));
            typedef std::int32_t Ints8 __attribute__((vector_size(32)));
            const Float8 offset = (__builtin_convertvector((Ints8)zeros, Float8) + form.zero_shift) * -scale;
            std::memcpy(offsets + n, &offset, sizeof(offset));
        }
        return;
    }
    const i64 half = form.block / 2;
    for (i64 n = 0; n < count; n += half) {
        float pairs[2 * PACKED_ROWS];
        const i64 some = smaller(half, count - n);
        widen_row(weight.scales, (place + n) * 2, some * 2, form.scales_type, pairs);
        const float smaller_by = n / half % 2 == 0 ? 1.0f : 1.0f / 16.0f;
        for (i64 i = 0; i < some; ++i) {
            scales[n + i] = pairs[2 * i] * smaller_by;
            offsets[n + i] = pairs[2 * i + 1] - pairs[2 * i] * 8.0f;
        }
    }
}

// VECTORS vectors of outputs: where their numbers lie, for a chunk, and which outputs of the strip they are.
struct Outputs {
    const char* at[2];
    i64 row_bytes;
    i64 first[VECTORS];
};

// Numbers of the columns of a chunk, handed over with their place: a column and a vector of outputs.
template <class Take>
SEQUOIA_INLINE void each_of_words(const Outputs& outputs, i64 depth, RowsAhead& ahead, const Take& take) {
    const char* data = outputs.at[0];
    const i64 row_bytes = outputs.row_bytes;
    for (i64 k = 0; k < depth; k += WORD, data += row_bytes) {
        ahead.request(1);
        const std::uint32_t* const words = reinterpret_cast<const std::uint32_t*>(data);
#pragma GCC unroll 8
        for (int j = 0; j < WORD; ++j) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                const Bits bits = load_words(words + v * W);
                // The highest bits would be a sign, so they alone are shifted.
                take(k + j, v, to_float(j == WORD - 1 ? bits >> 28 : bits & (15u << 4 * j)));
            }
        }
    }
}

template <class Take>
SEQUOIA_INLINE void each_of_blocks(const Outputs& outputs, i64 depth, RowsAhead& ahead, const Take& take) {
    const std::uint8_t* runs[2];
    for (int u = 0; u < 2; ++u) runs[u] = reinterpret_cast<const std::uint8_t*>(outputs.at[u]);
    const i64 row_bytes = outputs.row_bytes;
    for (i64 k = 0; k < depth; k += 4) {
        ahead.request(1);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
            for (int u = 0; u < 2; ++u) {
                const Bits bytes = load_bytes(runs[u]);
                take(k + j, 2 * u, to_float(bytes & 15u));
                take(k + j, 2 * u + 1, to_float(bytes & 240u));
                runs[u] += row_bytes;
            }
        }
    }
}

// Chains of C nodes over up to CHUNK columns.
template <int C>
struct Chains {
    Float of[C][VECTORS];

    Chains() {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) of[c][v] = Float{};
        }
    }

    // Weights of a column times the nodes' values of it, which lie CHUNK apart.
    SEQUOIA_INLINE void add(int v, Float weights, const float* values) {
        if (C > 1) keep(weights);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) of[c][v] += weights * all_lanes(values[c * CHUNK]);
    }
    // The same of columns that lie as floats, [depth, COLUMNS].
    SEQUOIA_INLINE void add_all(const float* weights, i64 depth, const float* values) {
        for (i64 k = 0; k < depth; ++k, weights += COLUMNS) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) add(v, load(weights + v * W), values + k);
        }
    }
};

// The product of one matrix and a panel.
struct PackedProduct {
    const PackedWeight& weight;
    const Panel& panel;
    i64 first, count, rest;  // outputs of the strip, of the tensor; of the thread behind it
    float* sums;
    const Unpacked& memory;
    i64 tile_floats = panel.count * TILE;
    std::uint32_t spare[CHUNK / WORD * COLUMNS] = {};  // a chunk of outputs that fill no vectors, or lie in another way

    i64 columns() const { return weight.matrix->columns; }
    // Of a last block all outputs are gone through: those that it has lie anywhere in it.
    i64 end_of_outputs() const {
        return weight.in_words() ? count : (count + PACKED_ROWS - 1) / PACKED_ROWS * PACKED_ROWS;
    }
    float* place(i64 begin, int c, i64 output) const {
        return sums + output / TILE * tile_floats + (begin + c) * TILE + output % TILE;
    }

    // The outputs from `output` of the strip on, for columns [k, k + depth).
    Outputs outputs_of(i64 output, i64 k, i64 depth) {
        Outputs outputs{{}, weight.row_bytes(), {}};
        if (weight.in_words()) {
            outputs.at[0] = weight.data + weight.offset(first + output, k);
            for (int v = 0; v < VECTORS; ++v) outputs.first[v] = output + v * W;
            if (output + COLUMNS > count) {
                copy_words(outputs.at[0], depth, count - output);
                outputs.at[0] = reinterpret_cast<const char*>(spare);
                outputs.row_bytes = COLUMNS * 4;
            }
            return outputs;
        }
        const i64 block = weight.form().block, half = block / 2;
        for (int u = 0; u < 2; ++u) {  // runs of W bytes: as many outputs in the low bits, and in the high bits
            const i64 run = output / 2 + u * W, base = run / half * block, byte = run % half;
            const i64 left = weight.form().whole_rows - (first + base);
            outputs.at[u] = weight.data + weight.offset(first + base, k) + byte;
            if (left < block) {
                if (left > 0) copy_block(weight.data + weight.offset(first + base, 0) + k * left / 2, depth, left);
                outputs.at[u] = reinterpret_cast<const char*>(spare) + byte;
            }
            outputs.first[2 * u] = base + byte;
            outputs.first[2 * u + 1] = base + half + byte;
        }
        return outputs;
    }
    void copy_words(const char* from, i64 depth, i64 outputs) {
        std::memset(spare, 0, sizeof(spare));
        for (i64 row = 0; row < depth / WORD; ++row, from += weight.row_bytes()) {
            std::memcpy(spare + row * COLUMNS, from, static_cast<std::size_t>(outputs) * 4);
        }
    }
    // Of a last block, whose bytes have two neighbours.
    void copy_block(const char* from, i64 depth, i64 outputs) {
        std::memset(spare, 0, sizeof(spare));
        const i64 half = weight.form().block / 2;
        std::uint8_t* to = reinterpret_cast<std::uint8_t*>(spare);
        const std::uint8_t* bytes = reinterpret_cast<const std::uint8_t*>(from);
        for (i64 k = 0; k < depth; ++k, to += half) {
            for (i64 output = 0; output < outputs; output += 2, ++bytes) {
                for (int i = 0; i < 2; ++i) {
                    const std::uint32_t number = *bytes >> 4 * i & 15u;
                    to[(output + i) % half] |= static_cast<std::uint8_t>(output + i < half ? number : number << 4);
                }
            }
        }
    }

    // Requests for these outputs' next chunk, or for the first one of the next strip's.
    RowsAhead ahead_of(i64 output, i64 k, i64 depth) const {
        const bool last = k + depth >= columns();
        if (last && output >= rest) return {};
        const i64 next_k = last ? 0 : k + depth, next_depth = smaller(CHUNK, columns() - next_k);
        const i64 row = first + output + (last ? count : 0);
        if (weight.in_words()) {
            return {weight.data + weight.offset(row, next_k), weight.row_bytes(), COLUMNS * 4, next_depth / WORD};
        }
        if (row % weight.form().block != 0) return {};  // the block's first outputs have requested it all
        return {weight.data + weight.offset(row, next_k), 4 * weight.row_bytes(), 4 * weight.row_bytes(), next_depth / 4};
    }

    // All nodes' values of a chunk, [nodes, CHUNK], in words those that multiply the bits where they lie; and their sums.
    void arrange_values(i64 k, i64 depth) {
        constexpr float PLACES[16] = {1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f,
                                      1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f};
        const bool scaled = weight.in_words() && !weight.scattered;
        float* to = memory.values;
        for (i64 node = 0; node < panel.count; ++node, to += CHUNK) {
            const auto [first_vector, step] = panel.place(node);
            const float* from = first_vector + k / W * step;
            Float total = {};
            for (i64 i = 0; i < depth; i += W, from += step) {
                const Float value = load(from);
                total += value;
                store(to + i, scaled ? value * load(PLACES + i % WORD) : value);
            }
            memory.totals[node] = sum_of(total);
        }
    }

    // Chains of a block of nodes, scaled and added to their sums.
    template <int C>
    SEQUOIA_INLINE void leave(const Chains<C>& chains, const Outputs& outputs, i64 begin) const {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const Float scale = load(memory.scales + outputs.first[v]), offset = load(memory.offsets + outputs.first[v]);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                float* const to = place(begin, c, outputs.first[v]);
                const Float total = all_lanes(memory.totals[begin + c]);
                store(to, load(to) + scale * chains.of[c][v] + offset * total);
            }
        }
    }

    template <int C>
    void add_chunk(const Outputs& outputs, i64 depth, RowsAhead& ahead) const {
        Chains<C> chains;
        const float* const values = memory.values;
        const auto take = [&](i64 k, int v, Float numbers) { chains.add(v, numbers, values + k); };
        if (weight.in_words()) {
            each_of_words(outputs, depth, ahead, take);
        } else {
            each_of_blocks(outputs, depth, ahead, take);
        }
        leave(chains, outputs, 0);
    }

    void unpack_chunk(const Outputs& outputs, i64 depth, RowsAhead& ahead) const {
        float* const to = memory.weights;  // by a name of its own: what is stored might be the pointer
        const auto take = [to](i64 k, int v, Float numbers) { store(to + k * COLUMNS + v * W, numbers); };
        if (weight.in_words()) {
            each_of_words(outputs, depth, ahead, take);
        } else {
            each_of_blocks(outputs, depth, ahead, take);
        }
    }
    // Of words with factors of their own: [groups, 2, COLUMNS], of these outputs.
    void unpack_scattered_chunk(const Outputs& outputs, i64 k, i64 depth, RowsAhead& ahead) const {
        const char* data = outputs.at[0];
        const i64 last_group = weight.matrix->num_groups() - 1, row_bytes = outputs.row_bytes;
        const std::int32_t* groups = weight.order + k;
        const float* const all_scales = memory.scattered;
        float* to = memory.weights;
        for (i64 i = 0; i < depth; i += WORD, data += row_bytes, groups += WORD) {
            ahead.request(1);
            const std::uint32_t* const words = reinterpret_cast<const std::uint32_t*>(data);
            for (i64 j = 0; j < WORD; ++j, to += COLUMNS) {
                const i64 group = static_cast<std::uint32_t>(groups[j]);  // one that is none reads another's
                const float* const scales = all_scales + smaller(group, last_group) * 2 * COLUMNS;
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) {
                    const Float numbers = to_float(load_words(words + v * W) >> static_cast<std::uint32_t>(4 * j) & 15u);
                    store(to + v * W, numbers * load(scales + v * W) + load(scales + COLUMNS + v * W));
                }
            }
        }
    }

    void add_unpacked(const Outputs& outputs, i64 depth) const {
        for (i64 begin = 0; begin < panel.count; begin += NODES) {
            const float* const values = memory.values + begin * CHUNK;
#define SEQUOIA_PART(C)                                \
    case C: {                                          \
        Chains<C> chains;                              \
        chains.add_all(memory.weights, depth, values); \
        leave(chains, outputs, begin);                 \
        break;                                         \
    }
            switch (smaller(NODES, panel.count - begin)) { SEQUOIA_FOR_PARTS(SEQUOIA_PART) }
#undef SEQUOIA_PART
        }
    }

    void run_chunk(i64 output, i64 k, i64 depth) {
        const Outputs outputs = outputs_of(output, k, depth);
        RowsAhead ahead = ahead_of(output, k, depth);
        if (weight.scattered) {
            unpack_scattered_chunk(outputs, k, depth, ahead);
        } else if (panel.count == 1) {
            return add_chunk<1>(outputs, depth, ahead);
        } else if (panel.count == FEW) {
            return add_chunk<FEW>(outputs, depth, ahead);
        } else {
            unpack_chunk(outputs, depth, ahead);
        }
        add_unpacked(outputs, depth);
    }

    void run_grouped() {
        std::memset(memory.scales, 0, STRIP * sizeof(float));
        std::memset(memory.offsets, 0, STRIP * sizeof(float));
        const i64 group = weight.form().group;
        for (i64 from = 0, index = 0; from < columns(); from += group, ++index) {
            const i64 end = smaller(columns(), from + group);
            factors_of(weight, index, first, count, memory.scales, memory.offsets);
            for (i64 k = from; k < end; k += CHUNK) {
                const i64 depth = smaller(CHUNK, end - k);
                arrange_values(k, depth);
                for (i64 output = 0; output < end_of_outputs(); output += COLUMNS) run_chunk(output, k, depth);
            }
        }
    }

    void run_scattered() {
        for (i64 i = 0; i < STRIP; ++i) {
            memory.scales[i] = 1.0f;
            memory.offsets[i] = 0.0f;
        }
        for (i64 output = 0; output < count; output += COLUMNS) {
            for (i64 group = 0; group < weight.matrix->num_groups(); ++group) {
                float* const scales = memory.scattered + group * 2 * COLUMNS;
                std::memset(scales, 0, 2 * COLUMNS * sizeof(float));
                factors_of(weight, group, first + output, smaller(COLUMNS, count - output), scales, scales + COLUMNS);
            }
            for (i64 k = 0; k < columns(); k += CHUNK) {
                const i64 depth = smaller(CHUNK, columns() - k);
                arrange_values(k, depth);
                run_chunk(output, k, depth);
            }
        }
    }
};

// `count` outputs from `first` on times all nodes of a panel, as tiles: sums[tile][node][TILE], up to PACKED_ROWS of them
// at a time. `first` is a multiple of PACKED_ROWS; `rest` outputs of the thread follow.
__attribute__((noinline)) void multiply_packed(const PackedWeight& weight, i64 first, i64 count, i64 rest,
                                               const Panel& panel, float* sums, const Unpacked& memory) {
    PackedProduct product{weight, panel, first, count, rest, sums, memory};
    const i64 tiles = (count + PACKED_ROWS - 1) / PACKED_ROWS * PACKED_ROWS / TILE;
    std::memset(sums, 0, static_cast<std::size_t>(tiles * product.tile_floats) * sizeof(float));
    if (weight.scattered) return product.run_scattered();
    product.run_grouped();
}

}  // namespace
}  // namespace sequoia::forward
