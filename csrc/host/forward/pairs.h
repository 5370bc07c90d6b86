// Products of bfloat16 weights with activations that are rounded to bfloat16, by the CPU's dot products of pairs.
//
// A lane adds the two products of a pair to its sum, one after the other. That is twice the rate of single floats, and no
// weight is widened. Rows, blocks of nodes and the sums across lanes are those of products.h; here as well the sum of a
// row and a node runs over k in one order, whatever is multiplied beside it. Numbers below 2^-126 are read as 0.
//
// What limits it is the first-level cache, whose misses wait for memory's answers to what is requested ahead. So where all
// nodes' activations do not fit in it, rows are multiplied in parts, a tile's first parts with all nodes before the next
// ones, and a group of rows requests those of the next group from the second level.

#pragma once

#include "products.h"

#if defined(__AVX512F__) && defined(SEQUOIA_AVX512_BF16)

namespace sequoia::forward {
namespace {

SEQUOIA_INLINE SEQUOIA_AVX512_BF16 Float add_pairs(Float sums, Bits weights, Bits nodes) {
    return (Float)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)nodes);
}

SEQUOIA_INLINE Bits load_pairs(const void* source) {
    Bits pairs;
    std::memcpy(&pairs, source, sizeof(pairs));
    return pairs;
}

template <int R, int C>
SEQUOIA_INLINE void clear(Float (&sums)[C][R]) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[c][r] = Float{};
    }
}

// Adds R rows, from `weights` on, times a block of C nodes, lane by lane. With NEAR the R rows behind them are requested
// into the first-level cache.
template <int R, int C, bool NEAR = false>
SEQUOIA_INLINE SEQUOIA_AVX512_BF16 void add_rows(const BFloat16* weights, i64 stride, const float* nodes, i64 size,
                                                 Float (&sums)[C][R], Ahead* ahead, const BFloat16* following = nullptr) {
    const i64 whole = size / (2 * W), rest = size % (2 * W);
    Requests requests(ahead);
    for (i64 step = 0; step < whole; ++step, nodes += C * W) {
        if (ahead != nullptr) requests.request_lines();
        if (NEAR) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) __builtin_prefetch(following + r * stride + step * 2 * W, 0, 3);
        }
        Bits weight[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            weight[r] = load_pairs(weights + r * stride + step * 2 * W);
            if (C > 1) keep(weight[r]);
        }
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            Bits node = load_pairs(nodes + c * W);
            if (R > 1) keep(node);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[c][r] = add_pairs(sums[c][r], weight[r], node);
        }
    }
    if (ahead != nullptr) requests.leave();
    if (rest == 0) return;
    const __mmask32 given = (__mmask32{1} << rest) - 1;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const Bits weight = (Bits)_mm512_maskz_loadu_epi16(given, weights + r * stride + whole * 2 * W);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[c][r] = add_pairs(sums[c][r], weight, load_pairs(nodes + c * W));
    }
}

enum class RowOrder { side_by_side, in_turn };

// With few nodes memory is what is waited for, and gives one row after the other sooner than several side by side, as
// long as the nodes leave room for them in the first-level cache. A short row is over before its sums have followed one
// another; then several at once hide that.
SEQUOIA_INLINE RowOrder row_order(const Panel& panel) {
    constexpr i64 FEW_NODES = 5, NEAR_BYTES = 28672, LONG_ROW = 512;
    return panel.count <= FEW_NODES && panel.bytes() <= NEAR_BYTES && panel.size >= LONG_ROW ? RowOrder::in_turn : RowOrder::side_by_side;
}

// As `multiply_block`, of four rows in an order: out[c * TILE + r].
template <int C>
SEQUOIA_INLINE SEQUOIA_AVX512_BF16 void multiply_four(RowOrder order, const BFloat16* weights, i64 stride, const float* nodes,
                                                      i64 size, float* out, Ahead* ahead, bool near) {
    Float sums[C][4];
    if (order == RowOrder::side_by_side) {
        clear<4, C>(sums);
        if (near) {
            add_rows<4, C, true>(weights, stride, nodes, size, sums, ahead, weights + 4 * stride);
        } else {
            add_rows<4, C>(weights, stride, nodes, size, sums, ahead);
        }
        return leave_sums<4, C>(sums, out, TILE);
    }
    Float kept[C][4];  // in memory; those above are in registers
    for (int r = 0; r < 4; ++r) {
        Float one[C][1];
        clear<1, C>(one);
        add_rows<1, C>(weights + r * stride, stride, nodes, size, one, ahead);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) kept[c][r] = one[c][0];
    }
    leave_sums<4, C>(kept, out, TILE);
}
template <int C>
SEQUOIA_INLINE SEQUOIA_AVX512_BF16 void multiply_one(const BFloat16* weights, const float* nodes, i64 size, float* out,
                                                     Ahead* ahead) {
    Float sums[C][1];
    clear<1, C>(sums);
    add_rows<1, C>(weights, 0, nodes, size, sums, ahead);
    leave_sums<1, C>(sums, out, TILE);
}

// Part of a product in parts; `kept`, [C, R, W], is where sums wait between them.
struct PartOfRows {
    i64 begin, size;  // of k
    bool first, last;
    float* kept;
};

template <int R, int C>
SEQUOIA_INLINE SEQUOIA_AVX512_BF16 void multiply_part(const PartOfRows& part, const BFloat16* weights, i64 stride,
                                                      const float* nodes, float* out, Ahead* ahead,
                                                      const BFloat16* following) {
    Float sums[C][R];
    if (part.first) {
        clear<R, C>(sums);
    } else {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[c][r] = load(part.kept + (c * R + r) * W);
        }
    }
    if (following != nullptr) {
        add_rows<R, C, true>(weights, stride, nodes, part.size, sums, ahead, following);
    } else {
        add_rows<R, C>(weights, stride, nodes, part.size, sums, ahead);
    }
    if (part.last) return leave_sums<R, C>(sums, out, TILE);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(part.kept + (c * R + r) * W, sums[c][r]);
    }
}

constexpr i64 PAIR_BYTES = 2 * W * static_cast<i64>(sizeof(BFloat16));  // of a row's step

// As `multiply_pairs`, in parts; `kept` has room for a tile's sums of all nodes, lane by lane.
__attribute__((noinline)) SEQUOIA_AVX512_BF16 void multiply_parts(const MatrixRows<BFloat16>& rows, i64 count,
                                                                  const Panel& panel, float* out, Ahead* ahead, float* kept) {
    const i64 blocks = panel.num_blocks(), vectors = panel.part_vectors(), part_size = vectors * 2 * W;
    for (i64 from = 0; from < panel.size; from += part_size) {
        const bool last = from + part_size >= panel.size;
        for (i64 done = 0; done < count;) {
            const i64 next = done + 4 <= count ? 4 : 1;
            for (i64 block = 0; block < blocks; ++block) {
                if (ahead != nullptr) ahead->pace(next * PAIR_BYTES, block, blocks);
                const i64 begin = panel.block_begin(block), together = panel.block_begin(block + 1) - begin;
                const PartOfRows part{from, smaller(part_size, panel.size - from), from == 0, last,
                                      kept + (done * panel.count + next * begin) * W};
                const BFloat16* const weights = rows.row(done) + from;
                const BFloat16* const following = block + 1 < blocks   ? nullptr
                                                  : done + 4 < count ? weights + 4 * rows.stride
                                                  : last             ? rows.row(count)
                                                                     : rows.row(0) + from + part_size;
                const float* const nodes = panel.data + begin * panel.padded + from / 2 * together;
                float* const to = out + begin * TILE + done;
#define SEQUOIA_BLOCK(C)                                                                    \
    case C:                                                                                 \
        if (next == 1) {                                                                    \
            multiply_part<1, C>(part, weights, rows.stride, nodes, to, ahead, nullptr);     \
        } else {                                                                            \
            multiply_part<4, C>(part, weights, rows.stride, nodes, to, ahead, following);   \
        }                                                                                   \
        break;
                switch (together) { SEQUOIA_FOR_BLOCKS(SEQUOIA_BLOCK) }
#undef SEQUOIA_BLOCK
            }
            done += next;
        }
    }
}

// `count` rows times all nodes of a panel of pairs: out[node * TILE + row].
__attribute__((noinline)) SEQUOIA_AVX512_BF16 void multiply_pairs(const MatrixRows<BFloat16>& rows, i64 count,
                                                                  const Panel& panel, float* out, Ahead* ahead) {
    // Of more blocks memory is not what is waited for, and longer rows would push out what lies there.
    constexpr i64 FEW_BLOCKS = 4, LONGEST_ROW = 1536;
    const i64 blocks = panel.num_blocks();
    const RowOrder order = row_order(panel);
    for (i64 done = 0; done < count;) {
        const i64 next = done + 4 <= count ? 4 : 1, side_by_side = order == RowOrder::in_turn ? 1 : next;
        for (i64 block = 0; block < blocks; ++block) {
            if (ahead != nullptr) ahead->pace(side_by_side * PAIR_BYTES, block, blocks);
            const i64 begin = panel.block_begin(block);
            const BFloat16* const weights = rows.row(done);
            const float* const nodes = panel.data + begin * panel.padded;
            float* const to = out + begin * TILE + done;
            const bool near = block + 1 == blocks && blocks <= FEW_BLOCKS && panel.size <= LONGEST_ROW;
#define SEQUOIA_BLOCK(C)                                                                       \
    case C:                                                                                    \
        if (next == 1) {                                                                       \
            multiply_one<C>(weights, nodes, panel.size, to, ahead);                            \
        } else {                                                                               \
            multiply_four<C>(order, weights, rows.stride, nodes, panel.size, to, ahead, near); \
        }                                                                                      \
        break;
            switch (panel.block_begin(block + 1) - begin) { SEQUOIA_FOR_BLOCKS(SEQUOIA_BLOCK) }
#undef SEQUOIA_BLOCK
        }
        done += next;
    }
}

}  // namespace
}  // namespace sequoia::forward

#else

namespace sequoia::forward {
namespace {

// Never called: where the CPU multiplies no pairs, no panel is in pairs.
SEQUOIA_INLINE void multiply_pairs(const MatrixRows<BFloat16>&, i64, const Panel&, float*, Ahead*) {}
SEQUOIA_INLINE void multiply_parts(const MatrixRows<BFloat16>&, i64, const Panel&, float*, Ahead*, float*) {}

}  // namespace
}  // namespace sequoia::forward

#endif
