// Products of bfloat16 weights with activations that are rounded to bfloat16, by the CPU's dot products of pairs.
//
// A lane adds the two products of a pair to its sum, one after the other. That is twice the rate of single floats, and no
// weight is widened. Rows, blocks of nodes and the sums across lanes are those of products.h; here as well the sum of a
// row and a node runs over k in one order, whatever is multiplied beside it; of a panel that is split there are two, which
// are added at last. Numbers below 2^-126 are read as 0.

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

// Sums of R rows, from `weights` on, and a block of C nodes, lane by lane.
template <int R, int C>
SEQUOIA_INLINE SEQUOIA_AVX512_BF16 void add_rows(const BFloat16* weights, i64 stride, const float* nodes, i64 size,
                                                 Float (&sums)[C][R], Ahead* ahead) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[c][r] = Float{};
    }
    const i64 whole = size / (2 * W), rest = size % (2 * W);
    Ahead requests;
    if (ahead != nullptr) requests = *ahead;
    for (i64 step = 0; step < whole; ++step, nodes += C * W) {
        if (ahead != nullptr) requests.request();
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
    if (ahead != nullptr) *ahead = requests;
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

// As `multiply_block`: out[c * TILE + r].
template <int R, int C>
SEQUOIA_INLINE SEQUOIA_AVX512_BF16 void multiply_pairs_block(RowOrder order, const BFloat16* weights, i64 stride,
                                                             const float* nodes, i64 size, float* out, Ahead* ahead) {
    if (order == RowOrder::side_by_side) {
        Float sums[C][R];  // in registers; those below wait in memory
        add_rows<R, C>(weights, stride, nodes, size, sums, ahead);
        return leave_sums<R, C>(sums, out, TILE);
    }
    Float sums[C][R];
    for (int r = 0; r < R; ++r) {
        Float one[C][1];
        add_rows<1, C>(weights + r * stride, stride, nodes, size, one, ahead);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[c][r] = one[c][0];
    }
    leave_sums<R, C>(sums, out, TILE);
}

// With few nodes memory is what is waited for, and gives one row after the other sooner than several side by side, as
// long as the nodes leave room for them in the first-level cache. A short row is over before its sums have followed one
// another; then several at once hide that.
SEQUOIA_INLINE RowOrder row_order(const Panel& panel) {
    constexpr i64 FEW_NODES = 5, NEAR_BYTES = 28672, LONG_ROW = 512;
    const i64 bytes = panel.rows * panel.padded * static_cast<i64>(sizeof(float));
    return panel.rows <= FEW_NODES && bytes <= NEAR_BYTES && panel.size >= LONG_ROW ? RowOrder::in_turn : RowOrder::side_by_side;
}

// Adds up both products of each node: [rows, TILE] become [count, TILE].
SEQUOIA_INLINE void join_split(const Panel& panel, float* out) {
    for (i64 node = 0; node < panel.count; ++node) {
        const float* const from = out + 2 * node * TILE;
        for (i64 r = 0; r < TILE; r += W) store(out + node * TILE + r, load(from + r) + load(from + TILE + r));
    }
}

// `count` rows times all nodes of a panel of pairs: out[node * TILE + row]. `out` has room for all rows of the panel.
__attribute__((noinline)) SEQUOIA_AVX512_BF16 void multiply_pairs(const MatrixRows<BFloat16>& rows, i64 count,
                                                                  const Panel& panel, float* out, Ahead* ahead) {
    const i64 blocks = panel.num_blocks();
    const RowOrder order = row_order(panel);
    for (i64 done = 0; done < count;) {
        const i64 next = done + 4 <= count ? 4 : 1, side_by_side = order == RowOrder::in_turn ? 1 : next;
        if (ahead != nullptr) ahead->pace(side_by_side * 2 * W * static_cast<i64>(sizeof(BFloat16)), blocks);
        for (i64 block = 0; block < blocks; ++block) {
            const i64 begin = panel.block_begin(block);
            const BFloat16* const weights = rows.row(done);
            const float* const nodes = panel.data + begin * panel.padded;
            float* const to = out + begin * TILE + done;
#define SEQUOIA_BLOCK(C)                                                                           \
    case C:                                                                                        \
        if (next == 1) {                                                                           \
            multiply_pairs_block<1, C>(order, weights, rows.stride, nodes, panel.size, to, ahead); \
        } else {                                                                                   \
            multiply_pairs_block<4, C>(order, weights, rows.stride, nodes, panel.size, to, ahead); \
        }                                                                                          \
        break;
            switch (panel.block_begin(block + 1) - begin) { SEQUOIA_FOR_BLOCKS(SEQUOIA_BLOCK) }
#undef SEQUOIA_BLOCK
        }
        done += next;
    }
    if (panel.form == Form::split_pairs) join_split(panel, out);
}

}  // namespace
}  // namespace sequoia::forward

#else

namespace sequoia::forward {
namespace {

// Never called: where the CPU multiplies no pairs, no panel is in pairs.
SEQUOIA_INLINE void multiply_pairs(const MatrixRows<BFloat16>&, i64, const Panel&, float*, Ahead*) {}

}  // namespace
}  // namespace sequoia::forward

#endif
