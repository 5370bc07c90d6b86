// Attention of one key/value head's query rows over the cache rows that they see.
//
// A query row's result is added up over the columns in their order, a column that the row does not see with a weight of
// 0: the same bits whatever other nodes are fed, and in whichever tree slots a node's ancestors lie.

#pragma once

#include "pass.h"
#include "products.h"

namespace sequoia::forward {
namespace {

template <class Element>
struct CacheRows {
    const Element* data;  // of the head
    const std::int32_t* rows;
    i64 stride;
    SEQUOIA_INLINE const Element* row(i64 column) const { return data + rows[column] * stride; }
};

// Requests `count` columns from `first` on, `size` elements of each.
template <class Element>
SEQUOIA_INLINE void prefetch_columns(const CacheRows<Element>& rows, i64 first, i64 count, i64 num_columns, i64 size) {
    for (i64 column = first; column < smaller(first + count, num_columns); ++column) {
        const char* const row = reinterpret_cast<const char*>(rows.row(column));
        for (i64 byte = 0; byte < size * static_cast<i64>(sizeof(Element)); byte += 64) __builtin_prefetch(row + byte);
    }
}

// Weights that are read behind the attention, requested while its numbers are computed from rows that have come already.
struct Later {
    static constexpr i64 LINE = 64;
    struct Range {
        const char* at;
        i64 bytes;
    };
    Range ranges[3] = {};
    int next = 0;
    i64 lines = 0;  // of each request

    SEQUOIA_INLINE void request(i64 times) {
        for (i64 left = times * lines; left > 0 && next < 3;) {
            Range& range = ranges[next];
            if (range.bytes <= 0) {
                ++next;
                continue;
            }
            __builtin_prefetch(range.at, 0, 2);
            range.at += LINE;
            range.bytes -= LINE;
            --left;
        }
    }
};

// Scores to weights, not yet divided by their sum.
SEQUOIA_INLINE void weigh_row(const Layer& layer, const Columns& columns, i64 node, float* row) {
    const float minus_infinity = -__builtin_inff();
    const i64 padded = up_to_lanes(columns.count);
    for (i64 column = columns.count; column < padded; ++column) row[column] = minus_infinity;
    const Float scale = all_lanes(layer.scale);
    if (layer.softcap == 0.0f) {
        for (i64 column = 0; column < padded; column += W) store(row + column, load(row + column) * scale);
    } else {
        const Float inverse = all_lanes(layer.scale / layer.softcap), cap = all_lanes(layer.softcap);
        for (i64 column = 0; column < padded; column += W) {
            store(row + column, hyperbolic_tangent(load(row + column) * inverse) * cap);
        }
        for (i64 column = columns.count; column < padded; ++column) row[column] = minus_infinity;
    }
    for (i64 column = 0; column < columns.num_hidden[node]; ++column) row[column] = minus_infinity;
    const float* const hidden = columns.tree_hidden + node * columns.tree_stride;
    for (i64 column = columns.num_prefix; column < columns.count; ++column) {  // not added: a hidden score may be NaN
        row[column] = hidden[column - columns.num_prefix] == 0.0f ? row[column] : minus_infinity;
    }
    Float peaks[4];  // one alone would wait for itself in every step
    for (Float& peak : peaks) peak = all_lanes(minus_infinity);
    i64 from = 0;
    for (; from + 4 * W <= padded; from += 4 * W) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) peaks[i] = lanes_max(load(row + from + i * W), peaks[i]);
    }
    for (; from < padded; from += W) peaks[0] = lanes_max(load(row + from), peaks[0]);
    const float most = max_of(lanes_max(lanes_max(peaks[0], peaks[1]), lanes_max(peaks[2], peaks[3])));
    const Float peak = all_lanes(most == minus_infinity ? 0.0f : most);
    for (i64 column = 0; column < padded; column += W) store(row + column, exponential(load(row + column) - peak));
}

// CHUNKS vectors from dimension d on of M rows: the weighted sum of all values, by the sum of the weights.
template <int M, int CHUNKS, class Element>
SEQUOIA_INLINE void mix_rows(const float* weights, i64 weights_stride, const CacheRows<Element>& values, i64 count,
                             i64 d, i64 head_dim, float* out, i64 out_stride) {
    Float sums[M][CHUNKS], totals[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        totals[m] = Float{};
#pragma GCC unroll 8
        for (int c = 0; c < CHUNKS; ++c) sums[m][c] = Float{};
    }
    const bool whole = d + CHUNKS * W <= head_dim;
    for (i64 column = 0; column < count; ++column) {
        const Element* const row = values.row(column) + d;
        Float chunks[CHUNKS];
#pragma GCC unroll 8
        for (int c = 0; c < CHUNKS; ++c) {
            chunks[c] = whole ? load(row + c * W) : load_some(row + c * W, larger(0, smaller(W, head_dim - d - c * W)));
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Float weight = all_lanes(weights[m * weights_stride + column]);
            totals[m] += weight;
#pragma GCC unroll 8
            for (int c = 0; c < CHUNKS; ++c) sums[m][c] += weight * chunks[c];
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        // Nothing seen leaves zeros; a NaN stays visible.
        const Float inverse = totals[m] == 0.0f ? all_lanes(0.0f) : 1.0f / totals[m];
#pragma GCC unroll 8
        for (int c = 0; c < CHUNKS; ++c) store(out + m * out_stride + d + c * W, sums[m][c] * inverse);
    }
}

template <int M, class Element>
SEQUOIA_INLINE void mix_heads(const float* weights, i64 weights_stride, const CacheRows<Element>& values, i64 count,
                              i64 head_dim, float* out, i64 out_stride) {
    i64 d = 0;
    for (; d + 4 * W <= head_dim; d += 4 * W) {
        mix_rows<M, 4>(weights, weights_stride, values, count, d, head_dim, out, out_stride);
    }
    for (; d < head_dim; d += W) {
        mix_rows<M, 1>(weights, weights_stride, values, count, d, head_dim, out, out_stride);
    }
}

// Query rows [begin, end) of a segment's head, of nodes times the head's group of query heads. `heads` from this one on
// are requested from memory; `later` what comes behind all of them.
template <class Element>
void attend(const Pass& pass, const Layer& layer, i64 layer_index, const Segment& segment, const Columns& columns,
            i64 head, i64 heads, i64 begin, i64 end, Later* later, const Bench& bench) {
    const Call& call = *pass.call;
    const i64 d = layer.head_dim, group = layer.group(), stride = layer.num_kv_heads * d;
    const i64 first = columns.first_row * stride + head * d;
    const CacheRows<Element> keys{reinterpret_cast<const Element*>(call.caches[2 * layer_index]) + first,
                                  columns.rows, stride};
    const CacheRows<Element> values{reinterpret_cast<const Element*>(call.caches[2 * layer_index + 1]) + first,
                                    columns.rows, stride};
    const Panel queries(bench.queries, end - begin, d);
    for (i64 r = begin; r < end; ++r) {
        const i64 row = segment.first_row + r / group, query_head = head * group + r % group;
        queries.put(r - begin, pass.projected + row * pass.projected_stride + layer.queries.first +
                                   query_head * layer.queries.stride);
    }
    constexpr i64 NEAR = 2 * TILE;
    prefetch_columns(keys, 0, NEAR, columns.count, heads * d);
    for (i64 column = 0; column < columns.count; column += TILE) {
        prefetch_columns(keys, column + NEAR, TILE, columns.count, heads * d);
        prefetch_columns(values, column, TILE, columns.count, heads * d);
        if (later != nullptr) later->request(1);
        multiply_rows(keys, column, smaller(TILE, columns.count - column), queries, bench.scores + column,
                      pass.scores_stride, static_cast<Ahead*>(nullptr), bench.wide);
    }
    for (i64 r = begin; r < end; ++r) {
        weigh_row(layer, columns, r / group, bench.scores + (r - begin) * pass.scores_stride);
    }
    const i64 count = end - begin, out_stride = up_to_lanes(d);
    i64 r = 0;
    for (; r + 2 <= count; r += 2) {
        if (later != nullptr) later->request(larger(1, 2 * columns.count / (TILE * count)));
        mix_heads<2>(bench.scores + r * pass.scores_stride, pass.scores_stride, values, columns.count, d,
                     bench.mixed + r * out_stride, out_stride);
    }
    if (r < count) {
        mix_heads<1>(bench.scores + r * pass.scores_stride, pass.scores_stride, values, columns.count, d,
                     bench.mixed + r * out_stride, out_stride);
    }
    for (r = begin; r < end; ++r) {
        const i64 row = segment.first_row + r / group, query_head = head * group + r % group;
        std::memcpy(pass.attended + row * pass.attended_stride + query_head * d, bench.mixed + (r - begin) * out_stride,
                    static_cast<std::size_t>(d) * sizeof(float));
    }
}

}  // namespace
}  // namespace sequoia::forward
