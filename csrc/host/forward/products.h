// Products of weight rows with the activations of some nodes.
//
// The sum of a row and a node runs over k in order, in as many lanes as the CPU has, which are then added up in one order:
// it does not depend on which other rows and nodes are multiplied beside it, nor on the number of threads.
//
// Weights stay where the model has them and are read once for all nodes, so activations are what is arranged: nodes in
// blocks, within a block a vector of each node after the other. R rows times C nodes are summed in registers: four rows
// times up to NODES, or two rows times more, where all nodes then are one block and a weight is widened once. The rows lie
// in the first-level cache while the blocks of nodes pass.

#pragma once

#include "lanes.h"
#include "pass.h"

namespace sequoia::forward {
namespace {

constexpr int NODES = W >= 16 ? 6 : 3;  // of a block: with 4 rows 24 of 32 registers, or 12 of 16
constexpr int MOST_NODES = 6;           // of a block that is the only one

// CASE(C) for every size that a block may have, and for those up to NODES.
#define SEQUOIA_FOR_BLOCKS(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if SEQUOIA_LANES >= 16
#define SEQUOIA_FOR_PARTS(CASE) SEQUOIA_FOR_BLOCKS(CASE)
#else
#define SEQUOIA_FOR_PARTS(CASE) CASE(1) CASE(2) CASE(3)
#endif

// How activations lie in a panel.
enum class Form {
    floats,
    pairs,  // rounded to bfloat16, two in a float's place
};

// Activations of `count` nodes, [count, size], `size` padded to whole vectors by zeros.
struct Panel {
    float* data = nullptr;
    i64 count = 0, size = 0;
    Form form = Form::floats;
    i64 padded = 0;  // floats of a row

    Panel(float* data_, i64 count_, i64 size_, Form form_ = Form::floats)
        : data(data_), count(count_), size(size_), form(form_),
          padded(up_to_lanes(form_ == Form::floats ? size_ : (size_ + 1) / 2)) {}

    // Blocks of equal sizes, those with one row more in front.
    i64 num_blocks() const { return count <= MOST_NODES ? 1 : (count + NODES - 1) / NODES; }
    i64 block_begin(i64 block) const { return block * (count / num_blocks()) + smaller(block, count % num_blocks()); }

    i64 bytes() const { return count * padded * static_cast<i64>(sizeof(float)); }
    // Vectors of a row that are multiplied at a time: all, or as many as the first-level cache holds of all nodes.
    i64 part_vectors() const {
        constexpr i64 NEAR_BYTES = 24576, PART_BYTES = 12288;
        const i64 vectors = padded / W;
        if (form != Form::pairs || count > PARTED_ROWS || bytes() <= NEAR_BYTES) return vectors;
        const i64 parts = (bytes() + PART_BYTES - 1) / PART_BYTES;
        return (vectors + parts - 1) / parts;
    }
    bool in_parts() const { return part_vectors() < padded / W; }

    struct Place {
        float* first;
        i64 step;  // floats between a row's vectors
    };
    Place place(i64 row) const {
        const i64 blocks = num_blocks(), few = count / blocks, more = count % blocks;
        const i64 block = row < more * (few + 1) ? row / (few + 1) : more + (row - more * (few + 1)) / few;
        const i64 begin = block_begin(block), together = block_begin(block + 1) - begin;
        return {data + begin * padded + (row - begin) * W, together * W};
    }
    // Arranges a node's row.
    void put(i64 node, const float* row) const {
        auto [to, step] = place(node);
        if (form == Form::pairs) return put_pairs(to, step, row, [](Float, Halves rounded) { return rounded; });
        i64 k = 0;
        for (; k + W <= size; k += W, to += step) store(to, load(row + k));
        if (k < size) store(to, load_some(row + k, size - k));
    }

    // Arranges what rounding takes away from a node's row, itself rounded.
    void put_rest(i64 node, const float* row) const {
        auto [to, step] = place(node);
        put_pairs(to, step, row, [](Float lanes, Halves rounded) {
            const Float rest = lanes - (Float)(__builtin_convertvector(rounded, Bits) << 16);
            // What is infinite, or was rounded to infinity, has none: it stays what it is.
            return rounded_to_bfloat16(rest - rest == 0.0f ? rest : Float{});
        });
    }

  private:
    template <class Choose>
    void put_pairs(float* to, i64 step, const float* row, const Choose& choose) const {
        for (i64 k = 0; k < size; k += 2 * W, to += step) {
            for (i64 half = 0; half < 2; ++half) {
                const i64 from = k + half * W;
                const Float lanes = from + W <= size ? load(row + from)
                                    : from < size    ? load_some(row + from, size - from)
                                                     : Float{};
                const Halves rounded = choose(lanes, rounded_to_bfloat16(lanes));
                std::memcpy(to + half * W / 2, &rounded, sizeof(rounded));
            }
        }
    }
};

// Requests weights some way ahead of their use, into the second-level cache, in the order of their use; behind the end of
// what a thread reads of one matrix it goes on with what it reads next. Requests are spread over all blocks of nodes, or
// memory would be idle half of the time, evenly over a block's steps, and are as many as what is read: those that ran
// ahead would push out what is still to be read.
struct Ahead {
    static constexpr i64 BYTES = 32768, LINE = 64;
    const char *at = nullptr, *end = nullptr, *then = nullptr;
    i64 lines = 0;                        // of a step
    i64 due = 0, read = 0, share = LINE;  // bytes: a line is requested for every `share` that steps of `read` make up

    Ahead() = default;
    // Rows one behind the other, whose first BYTES are requested already.
    Ahead(const void* begin_, const void* end_, const void* then_)
        : at(static_cast<const char*>(begin_) + BYTES), end(static_cast<const char*>(end_)),
          then(static_cast<const char*>(then_)) {
        turn();
    }
    // Tiles of rows, of which each is read in parts: the first part of all its rows, then the next one.
    Ahead(const void* begin_, const void* end_, const void* then_, i64 row_bytes, i64 part_bytes)
        : at(static_cast<const char*>(begin_)), end(at + part_bytes), then(static_cast<const char*>(then_)), tile_(at),
          rows_end_(static_cast<const char*>(end_)), row_bytes_(row_bytes), part_bytes_(part_bytes) {
        for (i64 line = 0; line < TILE * part_bytes / LINE; ++line, at += LINE) {
            if (at >= end) turn();
            __builtin_prefetch(at, 0, 2);
        }
    }
    // A step reads so many bytes, again for each of the blocks of nodes: either its lines are shared out to the blocks, or
    // all blocks count bytes.
    SEQUOIA_INLINE void pace(i64 bytes, i64 block, i64 blocks) {
        const i64 all = bytes / LINE;
        lines = all * (block + 1) / blocks - all * block / blocks;
        read = bytes;
        share = LINE * blocks;
    }
    void turn() {
        if (row_bytes_ != 0 && next_row()) return;
        if (at < end || then == nullptr) return;
        at = then + (at - end);
        end = at + (i64{1} << 40);
        then = nullptr;
    }

  private:
    bool next_row() {
        const i64 over = at - end;
        if (++row_ == TILE || tile_ + row_ * row_bytes_ >= rows_end_) {
            row_ = 0;
            done_ += part_bytes_;
            if (done_ >= row_bytes_) {
                done_ = 0;
                tile_ += TILE * row_bytes_;
            }
        }
        const char* const first = tile_ + row_ * row_bytes_ + done_;
        if (tile_ < rows_end_) {
            end = first + smaller(part_bytes_, row_bytes_ - done_);
            at = first + over;
            return true;
        }
        row_bytes_ = 0;
        return false;
    }

    // Of parts.
    const char *tile_ = nullptr, *rows_end_ = nullptr;
    i64 row_bytes_ = 0, part_bytes_ = 0, row_ = 0, done_ = 0;
};

// The requests of one block of nodes, in registers while it is summed.
class Requests {
  public:
    explicit Requests(Ahead* ahead) : ahead_(ahead) {
        if (ahead == nullptr) return;
        at_ = ahead->at, end_ = ahead->end, lines_ = ahead->lines;
        due_ = ahead->due, read_ = ahead->read, share_ = ahead->share;
    }
    // Of steps that read whole lines.
    SEQUOIA_INLINE void request_lines() {
        for (i64 line = 0; line < lines_; ++line, at_ += Ahead::LINE) __builtin_prefetch(at_, 0, 2);
        turn();
    }
    SEQUOIA_INLINE void request() {
        for (due_ += read_; due_ >= share_; due_ -= share_, at_ += Ahead::LINE) __builtin_prefetch(at_, 0, 2);
        turn();
    }
    SEQUOIA_INLINE void leave() { ahead_->at = at_, ahead_->due = due_; }

  private:
    SEQUOIA_INLINE void turn() {
        if (at_ >= end_) at_ = turned(ahead_, at_), end_ = ahead_->end;
    }
    static __attribute__((noinline)) const char* turned(Ahead* ahead, const char* at) {
        ahead->at = at;
        ahead->turn();
        return ahead->at;
    }

    Ahead* ahead_;
    const char *at_ = nullptr, *end_ = nullptr;
    i64 lines_ = 0, due_ = 0, read_ = 0, share_ = 0;
};

// Rows of a matrix.
template <class Element>
struct MatrixRows {
    const Element* data;
    i64 stride;
    SEQUOIA_INLINE const Element* row(i64 index) const { return data + index * stride; }
};

// Adds up the lanes of R rows and C nodes: out[c * out_stride + r].
template <int R, int C>
SEQUOIA_INLINE void leave_sums(const Float (&sums)[C][R], float* out, i64 out_stride) {
    if constexpr (R == 2 && C % 2 == 0) {
#pragma GCC unroll 8
        for (int c = 0; c < C; c += 2) {
            const Float4 four = sums_of(sums[c][0], sums[c][1], sums[c + 1][0], sums[c + 1][1]);
            std::memcpy(out + c * out_stride, &four, 8);
            std::memcpy(out + (c + 1) * out_stride, reinterpret_cast<const char*>(&four) + 8, 8);
        }
        return;
    }
#if defined(__AVX512F__)
    if constexpr (R == 8 && C == 1) {
        const Float rows[4][2] = {{sums[0][0], sums[0][4]}, {sums[0][1], sums[0][5]}, {sums[0][2], sums[0][6]}, {sums[0][3], sums[0][7]}};
        return sums_of_eight(rows, out, out + 4);
    }
    if constexpr (R == 4 && C > 1) {
        constexpr int SIXTEEN = C / 4 * 4;
#pragma GCC unroll 2
        for (int c = 0; c < SIXTEEN; c += 4) {
            Float rows[4][4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) rows[r][i] = sums[c + i][r];
            }
            float* const to = out + c * out_stride;
            sums_of_sixteen(rows, {to, to + out_stride, to + 2 * out_stride, to + 3 * out_stride});
        }
        if constexpr (C - SIXTEEN >= 2) {
            Float rows[4][2];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) rows[r][0] = sums[SIXTEEN][r], rows[r][1] = sums[SIXTEEN + 1][r];
            sums_of_eight(rows, out + SIXTEEN * out_stride, out + (SIXTEEN + 1) * out_stride);
        }
        if constexpr (C % 2 == 1) {
            store_four(out + (C - 1) * out_stride, sums_of(sums[C - 1][0], sums[C - 1][1], sums[C - 1][2], sums[C - 1][3]));
        }
        return;
    }
#endif
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
        if constexpr (R % 4 == 0) {
#pragma GCC unroll 2
            for (int r = 0; r < R; r += 4) {
                store_four(out + c * out_stride + r, sums_of(sums[c][r], sums[c][r + 1], sums[c][r + 2], sums[c][r + 3]));
            }
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) out[c * out_stride + r] = sum_of(sums[c][r]);
        }
    }
}

// out[c * out_stride + r] of R rows and a block of C nodes.
template <int R, int C, class Rows>
SEQUOIA_INLINE void multiply_block(const Rows& rows, i64 first, const float* nodes, i64 size, float* out,
                                   i64 out_stride, Ahead* ahead) {
    auto* base = rows.row(first);
    decltype(base) row[R];
    for (int r = 0; r < R; ++r) row[r] = rows.row(first + r);
    Float sums[C][R];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {  // not by an initialiser: GCC would clear memory, by an instruction that takes long
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[c][r] = Float{};
    }
    const i64 whole = size / W;
    Requests requests(ahead);
    for (i64 step = 0; step < whole; ++step) {
        if (ahead != nullptr) requests.request();
        if constexpr (C > R) {  // the fewer ones wait in registers for the others to pass
            Float weight[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                weight[r] = load(row[r] + step * W);
                keep(weight[r]);
            }
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                Float node = load(nodes + (step * C + c) * W);
                if (R > 1) keep(node);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sums[c][r] += weight[r] * node;
            }
        } else {
            Float node[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                node[c] = load(nodes + (step * C + c) * W);
                if (R > 1) keep(node[c]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                Float weight = load(row[r] + step * W);
                if (C > 1) keep(weight);
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) sums[c][r] += weight * node[c];
            }
        }
    }
    if (ahead != nullptr) requests.leave();
    if (whole * W < size) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Float weight = load_some(row[r] + whole * W, size - whole * W);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sums[c][r] += weight * load(nodes + (whole * C + c) * W);
        }
    }
    leave_sums<R, C>(sums, out, out_stride);
}

// Rows that are multiplied together with a block of so many nodes.
constexpr int rows_beside(i64 nodes) { return nodes > NODES ? 2 : 4; }

// One row from `first` on, or as many as are multiplied together, times all nodes of a panel. A step reads `step_bytes` from
// memory.
template <class Rows>
SEQUOIA_INLINE void multiply_blocks(const Rows& rows, i64 first, bool one, const Panel& panel, float* out, i64 out_stride,
                                    Ahead* ahead, i64 step_bytes) {
    const i64 blocks = panel.num_blocks();
    i64 begin = 0;
    for (i64 block = 0; block < blocks; ++block) {
        const i64 end = panel.block_begin(block + 1);
        if (ahead != nullptr) ahead->pace(step_bytes, block, blocks);
        const float* const nodes = panel.data + begin * panel.padded;
        float* const to = out + begin * out_stride;
#define SEQUOIA_BLOCK(C)                                                                                      \
    case C:                                                                                                   \
        if (one) {                                                                                            \
            multiply_block<1, C>(rows, first, nodes, panel.size, to, out_stride, ahead);                      \
        } else {                                                                                              \
            multiply_block<rows_beside(C), C>(rows, first, nodes, panel.size, to, out_stride, ahead);         \
        }                                                                                                     \
        break;
        switch (end - begin) {
            SEQUOIA_FOR_BLOCKS(SEQUOIA_BLOCK)
        }
#undef SEQUOIA_BLOCK
        begin = end;
    }
}

// `count` rows from `first` on times all nodes of a panel: out[node * out_stride + row - first]. `wide` has room for four
// rows: narrow weights that meet several blocks of nodes are widened once, not for each block.
// Not inlined: it is large, and called from many places.
template <class Rows>
__attribute__((noinline)) void multiply_rows(const Rows& rows, i64 first, i64 count, const Panel& panel, float* out,
                                             i64 out_stride, Ahead* ahead, float* wide) {
    constexpr i64 element_bytes = static_cast<i64>(sizeof(*rows.row(0)));
    const i64 blocks = panel.num_blocks();
    i64 done = 0;
    if (panel.count == 1) {  // more rows at a time, for want of nodes
        if (ahead != nullptr) ahead->pace(8 * W * element_bytes, 0, 1);
        for (; done + 8 <= count; done += 8) {
            multiply_block<8, 1>(rows, first + done, panel.data, panel.size, out + done, out_stride, ahead);
        }
    }
    const i64 together = rows_beside(blocks > 1 ? 1 : panel.count);
    while (done < count) {
        const i64 next = done + together <= count ? together : 1;
        if (element_bytes < 4 && blocks > 1) {
            for (i64 r = 0; r < next; ++r) widen_row(rows.row(first + done + r), panel.size, wide + r * panel.padded);
            multiply_blocks(MatrixRows<float>{wide, panel.padded}, 0, next == 1, panel, out + done, out_stride, ahead,
                            next * W * element_bytes);
        } else {
            multiply_blocks(rows, first + done, next == 1, panel, out + done, out_stride, ahead, next * W * element_bytes);
        }
        done += next;
    }
}

// ---- weights that lie transposed ----
//
// Lanes are outputs here, and the sum of an output and a node is one chain over k. A strip of outputs is gone through in
// blocks of DEPTH steps of k, whose rows are read side by side; between blocks the sums wait in memory.

constexpr i64 DEPTH = 64;
constexpr int VECTORS = 4;                // outputs that are summed in registers, with a block of nodes
constexpr i64 COLUMNS = VECTORS * W;

// Requests a strip's part of the rows of k that come next.
struct RowsAhead {
    const char* at = nullptr;
    i64 row_bytes = 0, bytes = 0, rows = 0;

    SEQUOIA_INLINE void request(i64 count) {
        for (; count > 0 && rows > 0; --count, --rows, at += row_bytes) {
            for (i64 byte = 0; byte < bytes; byte += Ahead::LINE) __builtin_prefetch(at + byte, 0, 2);
        }
    }
};

// Adds rows [0, depth) of k, `stride` apart, times C nodes of a block to sums[tile][node][TILE] of up to COLUMNS outputs;
// `step` floats lie between a node's vectors.
template <int C, bool WHOLE, class Element>
SEQUOIA_INLINE void accumulate_block(const Element* weights, i64 stride, i64 columns, const float* nodes, i64 step,
                                     i64 depth, float* sums, i64 tile_floats, RowsAhead& ahead, i64 ahead_rows) {
    const auto place = [&](int c, int v) { return sums + v * W / TILE * tile_floats + c * TILE + v * W % TILE; };
    const auto width = [&](int v) { return larger(0, smaller(W, columns - v * W)); };
    Float chains[C][VECTORS];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) chains[c][v] = WHOLE || width(v) > 0 ? load(place(c, v)) : Float{};
    }
    for (i64 k = 0; k < depth; nodes += step) {
        ahead.request(ahead_rows);
        const i64 end = smaller(depth, k + W);
        for (const float* node = nodes; k < end; ++k, ++node, weights += stride) {
            Float lanes[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                lanes[v] = WHOLE ? load(weights + v * W) : load_some(weights + smaller(v * W, columns), width(v));
                if (C > 1) keep(lanes[v]);
            }
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                const Float value = all_lanes(node[c * W]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) chains[c][v] += lanes[v] * value;
            }
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            if (WHOLE || width(v) > 0) store(place(c, v), chains[c][v]);
        }
    }
}

// `count` outputs of a strip times all nodes of a panel, as tiles: sums[tile][node][TILE]. `weights` is the strip's part
// of row 0 of k; `rest` outputs of the thread follow it.
template <class Element>
__attribute__((noinline)) void multiply_strip(const Element* weights, i64 stride, i64 count, i64 rest,
                                              const Panel& panel, float* sums) {
    const i64 tile_floats = panel.count * TILE, blocks = panel.num_blocks();
    std::memset(sums, 0, static_cast<std::size_t>((count + TILE - 1) / TILE * tile_floats) * sizeof(float));
    for (i64 k = 0; k < panel.size; k += DEPTH) {
        const i64 depth = smaller(DEPTH, panel.size - k);
        // The next block of this strip, or the first one of the thread's next strip.
        const bool last = k + DEPTH >= panel.size;
        const Element* const next = last ? weights + count : weights + (k + DEPTH) * stride;
        const i64 next_rows = last ? smaller(DEPTH, panel.size) : smaller(DEPTH, panel.size - k - DEPTH);
        for (i64 column = 0; column < count; column += COLUMNS) {
            const i64 columns = smaller(COLUMNS, count - column);
            const Element* const here = weights + k * stride + column;
            const i64 wanted = last ? larger(0, smaller(COLUMNS, rest - column)) : columns;
            const i64 size = static_cast<i64>(sizeof(Element));
            for (i64 block = 0; block < blocks; ++block) {  // each requests its share of the rows
                const i64 begin = panel.block_begin(block), nodes = panel.block_begin(block + 1) - begin;
                const i64 first = next_rows * block / blocks;
                RowsAhead ahead{reinterpret_cast<const char*>(next + first * stride + column), stride * size,
                                wanted * size, next_rows * (block + 1) / blocks - first};
                const i64 ahead_rows = (W + blocks - 1) / blocks;
                const float* const values = panel.data + begin * panel.padded + k * nodes;
                float* const to = sums + column / TILE * tile_floats + begin * TILE;
                for (i64 part = 0; part < nodes; part += NODES) {
                    const i64 step = nodes * W;
                    const float* const these = values + part * W;
                    float* const out = to + part * TILE;
#define SEQUOIA_PART(C)                                                                                              \
    case C:                                                                                                          \
        if (columns == COLUMNS) {                                                                                    \
            accumulate_block<C, true>(here, stride, columns, these, step, depth, out, tile_floats, ahead, ahead_rows); \
        } else {                                                                                                     \
            accumulate_block<C, false>(here, stride, columns, these, step, depth, out, tile_floats, ahead,           \
                                       ahead_rows);                                                                  \
        }                                                                                                            \
        break;
                    switch (smaller(NODES, nodes - part)) {
                        SEQUOIA_FOR_PARTS(SEQUOIA_PART)
                    }
#undef SEQUOIA_PART
                }
            }
        }
    }
}

}  // namespace
}  // namespace sequoia::forward
