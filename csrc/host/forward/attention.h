// Attention of one key/value head's query rows over the cache rows that they see.
//
// A query row's result is added up over the columns in their order, a column that the row does not see with a weight of
// 0: the same bits whatever other nodes are fed, and in whichever tree slots a node's ancestors lie.

#pragma once

#include "pass.h"
#include "products.h"

namespace sequoia::forward {
namespace {

template <int N>
struct Count {
    static constexpr int value = N;
};

SEQUOIA_INLINE i64 bytes_of(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

// Blocks of query rows of a segment's head.
SEQUOIA_INLINE i64 num_blocks(const Layer& layer, const Segment& segment) {
    return (segment.num_nodes * layer.group() + ROW_BLOCK - 1) / ROW_BLOCK;
}

template <class Element>
struct CacheRows {
    const Element* data;  // of the head
    const std::int32_t* rows;
    i64 stride;
    SEQUOIA_INLINE const Element* row(i64 column) const { return data + rows[column] * stride; }
};

// What a thread reads for an attention and behind it, requested into the second-level cache in the order of its use: cache
// rows of its heads, keys before values, then weights. Memory gives them while the layer's projections are multiplied, and
// then while the attention's own numbers are computed.
class AttentionAhead {
  public:
    static constexpr i64 LINE = 64, NEAR_BYTES = 262144, WEIGHT_BYTES = 131072;

    // Units [begin, end) are this thread's: blocks of query rows of each key/value head of each segment.
    AttentionAhead(const Pass& pass, const Layer& layer, i64 layer_index, i64 begin, i64 end)
        : pass_(pass), layer_(layer), columns_(pass.columns + pass.window_of_layer[layer_index] * pass.num_segments),
          caches_(pass.call->caches + 2 * layer_index), unit_(begin), end_(end) {
        for (i64 s = 0, first = 0; s < pass.num_segments; first += units_of(s++)) {
            const i64 units = smaller(end, first + units_of(s)) - larger(begin, first);
            if (units <= 0) continue;
            lines_ += (units + blocks_of(s) - 1) / blocks_of(s) * 2 * columns_[s].count * lines_of(head_bytes());
            requests_ += units * requests_of(columns_[s].count);
        }
    }

    // Requests in the attention to a block: one a tile of keys, and as many while values are mixed.
    static i64 requests_of(i64 columns) { return 2 * ((columns + TILE - 1) / TILE); }

    // Weights that are read behind the attention.
    void then(const char* weights, i64 bytes) {
        ranges_[num_ranges_++] = {weights, bytes};
        lines_ += lines_of(bytes);
    }

    // The next so many requests are beside the projections, and are for cache rows: as many as the cache has room for.
    void begin_projections(i64 requests) {
        each_ = requests == 0 ? 0 : (smaller(lines_, lines_of(NEAR_BYTES)) + requests - 1) / requests;
    }
    void begin_attention() { each_ = larger(0, lines_) / larger(1, requests_) + 1; }

    void request(i64 times = 1) {
        i64 left = times * each_;
        lines_ -= left;
        while (left > 0) {
            if (column_ == count_ && !next_rows()) return request_weights(left);
            const char* line = starts_[which_] + rows_[column_] * stride_ + byte_;
            const char* const end = line + smaller(bytes_ - byte_, left * LINE);
            left -= lines_of(end - line);
            byte_ += end - line;
            for (; line < end; line += LINE) __builtin_prefetch(line, 0, 2);
            if (byte_ < bytes_) continue;
            byte_ = 0;
            if (++column_ == count_ && which_ == 0) which_ = 1, column_ = 0;
        }
    }

  private:
    struct Range {
        const char* at;
        i64 bytes;
    };

    static i64 lines_of(i64 bytes) { return (bytes + LINE - 1) / LINE; }
    i64 head_bytes() const { return layer_.head_dim * bytes_of(layer_.cache_type); }
    i64 blocks_of(i64 s) const { return num_blocks(layer_, pass_.segments[s]); }
    i64 units_of(i64 s) const { return blocks_of(s) * layer_.num_kv_heads; }

    // Goes on with the heads that come next, as many as the cache has room for: memory gives whole rows sooner than a
    // head's parts of them.
    bool next_rows() {
        i64 s = 0, first = 0;
        while (s < pass_.num_segments && first + units_of(s) <= unit_) first += units_of(s++);
        if (unit_ >= end_ || s == pass_.num_segments || columns_[s].count == 0) return false;
        const i64 blocks = blocks_of(s), head = (unit_ - first) / blocks, count = columns_[s].count;
        const i64 to_come = smaller(layer_.num_kv_heads - head, (end_ - unit_ + blocks - 1) / blocks);
        const i64 heads = smaller(to_come, larger(1, NEAR_BYTES / (2 * count * head_bytes())));
        unit_ = first + (head + heads) * blocks;
        rows_ = columns_[s].rows;
        count_ = count;
        stride_ = layer_.num_kv_heads * head_bytes();
        bytes_ = heads * head_bytes();
        which_ = 0;
        column_ = byte_ = 0;
        for (int i = 0; i < 2; ++i) {
            starts_[i] = reinterpret_cast<const char*>(caches_[i]) + columns_[s].first_row * stride_ + head * head_bytes();
        }
        return true;
    }

    void request_weights(i64 lines) {
        for (; lines > 0 && range_ < num_ranges_;) {
            Range& range = ranges_[range_];
            if (range.bytes <= 0) {
                ++range_;
                continue;
            }
            __builtin_prefetch(range.at, 0, 2);
            range.at += LINE;
            range.bytes -= LINE;
            --lines;
        }
    }

    const Pass& pass_;
    const Layer& layer_;
    const Columns* const columns_;
    const std::uintptr_t* const caches_;
    i64 unit_, end_;                       // units whose rows were not requested yet
    i64 lines_ = 0, requests_ = 0, each_ = 0;  // to come; each request takes so many
    // Heads of a segment that lie side by side.
    const char* starts_[2] = {};  // of keys and values
    const std::int32_t* rows_ = nullptr;
    i64 count_ = 0, stride_ = 0, bytes_ = 0, column_ = 0, byte_ = 0;
    int which_ = 0;
    Range ranges_[3] = {};
    int range_ = 0, num_ranges_ = 0;
};

constexpr i64 FEW_QUERIES = 4;  // for which keys are worth turning

#if defined(__AVX512F__)
// ---- scores of several query rows ----
//
// A lane is a column here, so that nothing is added up across lanes: with heads as short as they are, that took longer than
// the products. Every sum is still made of the W chains that `multiply_block` has in its lanes, which are added up as
// `sums_of` does, and has the same bits.

// turned[k][lane]: keys of W columns from `column` on, of which the last one stands for those that are missing.
template <class Element>
SEQUOIA_INLINE void turn_keys(const CacheRows<Element>& keys, i64 column, i64 count, i64 head_dim, float* turned) {
    const Element* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = keys.row(smaller(column + i, count - 1));
    for (i64 k = 0; k < head_dim; k += W, turned += W * W) {
        Float vectors[W];
        if (k + W <= head_dim) {
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) vectors[i] = load(rows[i] + k);
        } else {
            for (int i = 0; i < W; ++i) vectors[i] = load_some(rows[i] + k, head_dim - k);
        }
        transpose(vectors);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(turned + i * W, vectors[i]);
    }
}

// Chains `lane`, lane + DISTANCE, lane + 2 * DISTANCE and so on of Q queries, added up. Queries are `size` floats apart.
template <int Q, int DISTANCE>
SEQUOIA_INLINE void add_chains(int lane, const float* keys, const float* queries, i64 size, Float (&sums)[Q]) {
    if constexpr (DISTANCE == W) {
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) sums[q] = Float{};
        for (i64 k = lane; k < size; k += W) {
            Float key = load(keys + k * W);
            if (Q > 1) keep(key);
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) sums[q] += key * all_lanes(queries[q * size + k]);
        }
    } else {
        Float others[Q];
        add_chains<Q, 2 * DISTANCE>(lane, keys, queries, size, sums);
        add_chains<Q, 2 * DISTANCE>(lane + DISTANCE, keys, queries, size, others);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) sums[q] += others[q];
    }
}

// Scores of queries [first, count), Q at a time, for W columns: out[query * out_stride + lane]. How many are done then.
template <int Q>
SEQUOIA_INLINE i64 score_queries(const float* keys, const float* queries, i64 first, i64 count, i64 size, float* out,
                                 i64 out_stride) {
    for (; first + Q <= count; first += Q) {
        Float sums[Q];
        add_chains<Q, 1>(0, keys, queries + first * size, size, sums);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) store(out + (first + q) * out_stride, sums[q]);
    }
    return first;
}

SEQUOIA_INLINE void score_columns(const float* keys, const float* queries, i64 count, i64 size, float* out,
                                  i64 out_stride) {
    i64 done = score_queries<4>(keys, queries, 0, count, size, out, out_stride);
    done = score_queries<2>(keys, queries, done, count, size, out, out_stride);
    score_queries<1>(keys, queries, done, count, size, out, out_stride);
}
#endif

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
    for (; d + 2 * W <= head_dim; d += 2 * W) {
        mix_rows<M, 2>(weights, weights_stride, values, count, d, head_dim, out, out_stride);
    }
    for (; d < head_dim; d += W) {
        mix_rows<M, 1>(weights, weights_stride, values, count, d, head_dim, out, out_stride);
    }
}

// Query rows [begin, end) of a segment's head, of nodes times the head's group of query heads.
template <class Element>
void attend(const Pass& pass, const Layer& layer, i64 layer_index, const Segment& segment, const Columns& columns,
            i64 head, i64 begin, i64 end, AttentionAhead& ahead, const Bench& bench) {
    const Call& call = *pass.call;
    const i64 d = layer.head_dim, group = layer.group(), stride = layer.num_kv_heads * d;
    const i64 first = columns.first_row * stride + head * d;
    const CacheRows<Element> keys{reinterpret_cast<const Element*>(call.caches[2 * layer_index]) + first,
                                  columns.rows, stride};
    const CacheRows<Element> values{reinterpret_cast<const Element*>(call.caches[2 * layer_index + 1]) + first,
                                    columns.rows, stride};
    const auto query = [&](i64 r) {
        const i64 row = segment.first_row + r / group, query_head = head * group + r % group;
        return pass.projected + row * pass.projected_stride + layer.queries.first + query_head * layer.queries.stride;
    };
    if (W >= 16 && end - begin >= FEW_QUERIES) {
#if defined(__AVX512F__)
        const i64 size = up_to_lanes(d);
        for (i64 r = begin; r < end; ++r) {
            float* const to = bench.queries + (r - begin) * size;
            std::memset(to, 0, static_cast<std::size_t>(size) * sizeof(float));
            std::memcpy(to, query(r), static_cast<std::size_t>(d) * sizeof(float));
        }
        for (i64 column = 0; column < columns.count; column += W) {
            ahead.request();
            turn_keys(keys, column, columns.count, d, bench.keys);
            score_columns(bench.keys, bench.queries, end - begin, size, bench.scores + column, pass.scores_stride);
        }
#endif
    } else {
        const Panel queries(bench.queries, end - begin, d);
        for (i64 r = begin; r < end; ++r) queries.put(r - begin, query(r));
        for (i64 column = 0; column < columns.count; column += 2 * TILE) {
            ahead.request(2);
            multiply_rows(keys, column, smaller(2 * TILE, columns.count - column), queries, bench.scores + column,
                          pass.scores_stride, static_cast<Ahead*>(nullptr), bench.wide);
        }
    }
    for (i64 r = begin; r < end; ++r) {
        weigh_row(layer, columns, r / group, bench.scores + (r - begin) * pass.scores_stride);
    }
    const i64 count = end - begin, out_stride = up_to_lanes(d), requests = AttentionAhead::requests_of(columns.count) / 2;
    i64 r = 0, requested = 0;
    const auto mix = [&](auto rows) {
        constexpr int M = decltype(rows)::value;
        for (; r + M <= count; r += M) {
            const i64 due = requests * (r + M) / count;
            ahead.request(due - requested);
            requested = due;
            mix_heads<M>(bench.scores + r * pass.scores_stride, pass.scores_stride, values, columns.count, d,
                         bench.mixed + r * out_stride, out_stride);
        }
    };
    if (W >= 16) mix(Count<4>{});
    mix(Count<2>{});
    mix(Count<1>{});
    for (r = begin; r < end; ++r) {
        const i64 row = segment.first_row + r / group, query_head = head * group + r % group;
        std::memcpy(pass.attended + row * pass.attended_stride + query_head * d, bench.mixed + (r - begin) * out_stride,
                    static_cast<std::size_t>(d) * sizeof(float));
    }
}

}  // namespace
}  // namespace sequoia::forward
