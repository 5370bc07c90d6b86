// Attention of tree nodes over the committed prefix and, under a packed mask, over the tree's own cache rows.
//
// Computes    out and log-sum-exp of every query row and head; the definition is in the op's reference.py. Soft-cap, sinks,
//             sliding window by depth, pages and grouped heads included.
// Plan        A request's columns are the cache rows that any of its query rows sees: a run of the prefix, then the tree
//             slots whose bits are set somewhere. For ROW_BLOCK query rows at a time (nodes times query heads, of one or
//             more key/value heads): all scores, their softmax, then the weighted values. Threads share out the blocks.
// Memory      Reads each visible cache row in place once for every ROW_BLOCK query rows, and the mask; writes out and lse.
//             Between two forwards a layer's cache has left the CPU's caches, so rows some way ahead are prefetched, a line
//             between two loads: many at once would fill the queue of misses, and arithmetic would wait for memory and
//             memory for arithmetic. Rows that nobody sees are not read. Scratch: ROW_BLOCK rows of scores, kept from call
//             to call.
// Numerics    float32 throughout, one maximum and one sum a row. For more than a few query rows a block of keys is
//             transposed in registers, so that a score is summed over d in order and no lane is ever reduced; for few
//             rows the lanes are folded. Products and sums are fused where the CPU can (see CMakeLists.txt), so the last
//             bits depend on the CPU, as those of the model's own products do, and on how many rows a call has.

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "elements.h"
#include "forward/team.h"
#include "ops.h"
#include "rows.h"
#include "tree_attention_columns.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SEQUOIA_HAS_SHUFFLES 1
#endif
#endif

namespace sequoia {
namespace {

constexpr std::int64_t ROW_BLOCK = 32;
constexpr std::int64_t VALUE_COLUMNS = 32;    // whose values are added at a time
constexpr std::int64_t PREFETCH = 16;         // columns between a key's prefetch and its use
constexpr std::int64_t KEPT_BYTES = 1 << 19;  // of values that are prefetched with the keys: they wait in the L2 cache

// ---- vectors of W lanes ----

template <int W>
struct Vector {
    typedef float Float __attribute__((vector_size(4 * W)));
    typedef std::uint32_t Bits __attribute__((vector_size(4 * W)));
    typedef std::uint16_t Halves __attribute__((vector_size(2 * W)));
};
template <int W>
using Float = typename Vector<W>::Float;

template <int W>
SEQUOIA_INLINE Float<W> load(const float* source) {
    Float<W> lanes;
    std::memcpy(&lanes, source, sizeof(lanes));
    return lanes;
}

template <int W>
SEQUOIA_INLINE typename Vector<W>::Bits load_halves(const void* source) {
    typename Vector<W>::Halves halves;
    std::memcpy(&halves, source, sizeof(halves));
    return __builtin_convertvector(halves, typename Vector<W>::Bits);
}

template <int W>
SEQUOIA_INLINE Float<W> load(const BFloat16* source) {
    return (Float<W>)(load_halves<W>(source) << 16);
}

// Exponent and mantissa move to their float32 places, where the value is 2^112 too small; subnormals come out right.
template <int W>
SEQUOIA_INLINE Float<W> load(const Float16* source) {
    typedef typename Vector<W>::Bits Bits;
    const Bits halves = load_halves<W>(source);
    const Float<W> scaled = (Float<W>)((halves & 0x7fffu) << 13) * 0x1p112f;
    const Bits special = (Bits)((halves & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinity and NaN
    return (Float<W>)((Bits)scaled | special | ((halves & 0x8000u) << 16));
}

// The first `count` lanes from memory, 0 in the others.
template <int W, class Element>
SEQUOIA_INLINE Float<W> load_some(const Element* source, std::int64_t count) {
    if (count >= W) return load<W>(source);
    Element elements[W] = {};
    std::memcpy(elements, source, static_cast<std::size_t>(count) * sizeof(Element));
    return load<W>(elements);
}

template <int W>
SEQUOIA_INLINE void store(float* target, Float<W> lanes) {
    std::memcpy(target, &lanes, sizeof(lanes));
}

// Transpose W vectors of W lanes: blocks of 1, 2, 4, ... lanes change places across the diagonal.
#ifdef SEQUOIA_HAS_SHUFFLES
template <int W, int SIZE, int... LANE>
SEQUOIA_INLINE void exchange_blocks(Float<W>* rows, std::integer_sequence<int, LANE...>) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        if ((i & SIZE) != 0) continue;
        const Float<W> upper = rows[i], lower = rows[i + SIZE];
        rows[i] = __builtin_shufflevector(upper, lower, ((LANE & SIZE) == 0 ? LANE : W + LANE - SIZE)...);
        rows[i + SIZE] = __builtin_shufflevector(upper, lower, ((LANE & SIZE) == 0 ? LANE + SIZE : W + LANE)...);
    }
}

template <int W>
SEQUOIA_INLINE void transpose(Float<W>* rows) {
    constexpr auto lanes = std::make_integer_sequence<int, W>();
    if constexpr (W >= 16) exchange_blocks<W, 8>(rows, lanes);
    if constexpr (W >= 8) exchange_blocks<W, 4>(rows, lanes);
    exchange_blocks<W, 2>(rows, lanes);
    exchange_blocks<W, 1>(rows, lanes);
}
#else
template <int W>
SEQUOIA_INLINE void transpose(Float<W>* rows) {
    float copy[W][W];
    std::memcpy(copy, rows, sizeof(copy));
    for (int i = 0; i < W; ++i) {
        for (int j = 0; j < W; ++j) rows[i][j] = copy[j][i];
    }
}
#endif

// Query rows of a head up to which each key is multiplied by them as it lies, and the W products of W keys folded into one
// vector: to turn the keys costs some 64 shuffles for every W dimensions, to fold some 30 and another look at them a row.
template <int W>
SEQUOIA_INLINE std::int64_t most_folded(std::int64_t head_dim) {
    return std::max<std::int64_t>(1, head_dim / (4 * W));
}

// Lane j: the sum over all lanes of rows[j]. Overwrites the rows.
#ifdef SEQUOIA_HAS_SHUFFLES
template <int W, int SIZE, int... LANE>
SEQUOIA_INLINE void fold_blocks(Float<W>* rows, std::integer_sequence<int, LANE...>) {
#pragma GCC unroll 16
    for (int i = 0; i < SIZE; ++i) {
        const Float<W> upper = rows[i], lower = rows[i + SIZE];
        rows[i] = __builtin_shufflevector(upper, lower, ((LANE & SIZE) == 0 ? LANE : W + LANE - SIZE)...) +
                  __builtin_shufflevector(upper, lower, ((LANE & SIZE) == 0 ? LANE + SIZE : W + LANE)...);
    }
}

template <int W>
SEQUOIA_INLINE Float<W> fold(Float<W>* rows) {
    constexpr auto lanes = std::make_integer_sequence<int, W>();
    if constexpr (W >= 16) fold_blocks<W, 8>(rows, lanes);
    if constexpr (W >= 8) fold_blocks<W, 4>(rows, lanes);
    fold_blocks<W, 2>(rows, lanes);
    fold_blocks<W, 1>(rows, lanes);
    return rows[0];
}
#else
template <int W>
SEQUOIA_INLINE Float<W> fold(Float<W>* rows) {
    transpose<W>(rows);
    Float<W> sum = rows[0];
    for (int i = 1; i < W; ++i) sum += rows[i];
    return sum;
}
#endif

// What is asked of memory while a block of W columns is worked on: keys further ahead, and maybe their values.
template <int W, class Element>
struct Ahead {
    const Element* keys[W];
    const Element* values[W];
    bool has_values;

    // The line that begins at dimension d of each; W dimensions are a line or a part of one.
    SEQUOIA_INLINE void prefetch(std::int64_t d) const {
        constexpr std::int64_t LINE = 64 / static_cast<std::int64_t>(sizeof(Element));
        if (d % LINE != 0) return;
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) __builtin_prefetch(keys[j] + d, 0, 2);
        if (!has_values) return;
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) __builtin_prefetch(values[j] + d, 0, 2);
    }
};

// Lane j: the product of a query and the key at rows[j].
template <int W, class Element>
SEQUOIA_INLINE Float<W> fold_products(const float* query, const Element* const* rows, const Ahead<W, Element>* ahead,
                                      std::int64_t head_dim) {
    Float<W> sums[W] = {};
    std::int64_t d = 0;
    for (; d + W <= head_dim; d += W) {
        const Float<W> factor = load<W>(query + d);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) sums[j] += factor * load<W>(rows[j] + d);
        if (ahead != nullptr) ahead->prefetch(d);
    }
    if (d < head_dim) {
        const Float<W> factor = load_some<W>(query + d, head_dim - d);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) sums[j] += factor * load_some<W>(rows[j] + d, head_dim - d);
        if (ahead != nullptr) ahead->prefetch(d);
    }
    return fold<W>(sums);
}

// target[d, j] = dimension d of the key at rows[j].
template <int W, class Element>
SEQUOIA_INLINE void turn_keys(const Element* const* rows, const Ahead<W, Element>& ahead, std::int64_t head_dim,
                              float* target) {
    Float<W> lanes[W];
    std::int64_t d = 0;
    for (; d + W <= head_dim; d += W) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) lanes[j] = load<W>(rows[j] + d);
        ahead.prefetch(d);
        transpose<W>(lanes);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) store<W>(target + (d + j) * W, lanes[j]);
    }
    if (d < head_dim) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) lanes[j] = load_some<W>(rows[j] + d, head_dim - d);
        ahead.prefetch(d);
        transpose<W>(lanes);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) store<W>(target + (d + j) * W, lanes[j]);
    }
}

// Rows of a tile of accumulators. With fewer rows each sum runs in several parts, to hide the latency of the additions.
template <int W>
constexpr int TILE_ROWS = W >= 16 ? 8 : 4;

// scores[r, lane] = sum over d of queries[r, d] * keys[d, lane]
template <int W, int NUM_ROWS>
SEQUOIA_INLINE void score_tile(const float* queries,  // [NUM_ROWS, head_dim]
                               const float* keys,     // [head_dim, W]
                               std::int64_t head_dim, float* scores, std::int64_t scores_stride) {
    constexpr int PARTS = TILE_ROWS<W> / NUM_ROWS;
    Float<W> sums[PARTS][NUM_ROWS] = {};
    std::int64_t d = 0;
    for (; d + PARTS <= head_dim; d += PARTS) {
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; ++part) {
            const Float<W> key = load<W>(keys + (d + part) * W);
#pragma GCC unroll 8
            for (int r = 0; r < NUM_ROWS; ++r) sums[part][r] += queries[r * head_dim + d + part] * key;
        }
    }
    for (; d < head_dim; ++d) {
        const Float<W> key = load<W>(keys + d * W);
        for (int r = 0; r < NUM_ROWS; ++r) sums[0][r] += queries[r * head_dim + d] * key;
    }
#pragma GCC unroll 8
    for (int r = 0; r < NUM_ROWS; ++r) {
        Float<W> sum = sums[0][r];
#pragma GCC unroll 8
        for (int part = 1; part < PARTS; ++part) sum += sums[part][r];
        store<W>(scores + r * scores_stride, sum);
    }
}

// sums[r] += weights[r] * row, for CHUNKS vectors of the row, of the last one `num_lanes` lanes.
template <int W, int NUM_ROWS, int CHUNKS, class Element>
SEQUOIA_INLINE void add_weighted(const float* weights, std::int64_t weights_stride, const Element* row,
                                 std::int64_t num_lanes, Float<W> (*sums)[CHUNKS]) {
    Float<W> chunks[CHUNKS];
#pragma GCC unroll 2
    for (int c = 0; c < CHUNKS; ++c) {
        chunks[c] = c + 1 < CHUNKS ? load<W>(row + c * W) : load_some<W>(row + c * W, num_lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < NUM_ROWS; ++r) {
        const float weight = weights[r * weights_stride];
#pragma GCC unroll 2
        for (int c = 0; c < CHUNKS; ++c) sums[r][c] += weight * chunks[c];
    }
}

// mixed[r, 0:CHUNKS W] += sum over columns of weights[r, column] * values[column]
template <int W, int NUM_ROWS, int CHUNKS, class Element>
SEQUOIA_INLINE void value_tile(const float* weights, std::int64_t weights_stride, const Element* values,
                               const std::int64_t* offsets, std::int64_t num_columns, std::int64_t num_lanes,
                               float* mixed, std::int64_t mixed_stride) {
    constexpr int PARTS = TILE_ROWS<W> / NUM_ROWS;
    Float<W> sums[PARTS][NUM_ROWS][CHUNKS] = {};
    std::int64_t column = 0;
    for (; column + PARTS <= num_columns; column += PARTS) {
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; ++part) {
            add_weighted<W, NUM_ROWS, CHUNKS>(weights + column + part, weights_stride,
                                              values + offsets[column + part], num_lanes, sums[part]);
        }
    }
    for (; column < num_columns; ++column) {
        add_weighted<W, NUM_ROWS, CHUNKS>(weights + column, weights_stride, values + offsets[column], num_lanes,
                                          sums[0]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < NUM_ROWS; ++r) {
#pragma GCC unroll 2
        for (int c = 0; c < CHUNKS; ++c) {
            Float<W> sum = sums[0][r][c];
#pragma GCC unroll 8
            for (int part = 1; part < PARTS; ++part) sum += sums[part][r][c];
            float* const target = mixed + r * mixed_stride + c * W;
            store<W>(target, load<W>(target) + sum);
        }
    }
}

// tanh(x): a series near 0, where 1 - exp would cancel, else from exp(-2 |x|).
SEQUOIA_INLINE float tanh_of(float x) {
    const float square = x * x;
    float series = -1382.0f / 155925.0f;
    series = series * square + 62.0f / 2835.0f;
    series = series * square - 17.0f / 315.0f;
    series = series * square + 2.0f / 15.0f;
    series = series * square - 1.0f / 3.0f;
    series = series * square * x + x;
    const float magnitude = x < 0.0f ? -x : x;
    const float power = exp_nonpositive(-2.0f * magnitude);
    const float ratio = (1.0f - power) / (1.0f + power);
    return magnitude < 0.25f ? series : (x < 0.0f ? -ratio : ratio);
}

// Scores of one row to weights exp(score - peak); returns (peak, sum of the weights and the sink's).
template <int W>
SEQUOIA_INLINE std::pair<float, float> softmax_row_inline(const Call& call, const Columns& columns, std::int64_t count,
                                                          std::int64_t row, std::int64_t head, std::int64_t stride,
                                                          float* scores) {
    if (call.softcap > 0.0f) {
        const float softcap = call.softcap;
        for (std::int64_t c = 0; c < stride; ++c) scores[c] = softcap * tanh_of(scores[c] / softcap);
    }
    std::fill_n(scores, columns.num_hidden[static_cast<std::size_t>(row)], MINUS_INFINITY);
    const float* const hidden = columns.tree_hidden.data() + row * columns.num_tree_padded;
    float* const tree_scores = scores + columns.num_prefix;
    const std::int64_t num_tree = count - columns.num_prefix;
    for (std::int64_t t = 0; t < num_tree; ++t) {
        tree_scores[t] = hidden[t] < 0.0f ? MINUS_INFINITY : tree_scores[t];
    }
    std::fill(scores + count, scores + stride, MINUS_INFINITY);

    const float sink = call.sinks == nullptr ? MINUS_INFINITY : call.sinks[head];
    Float<W> peaks = Float<W>{} + MINUS_INFINITY;
    for (std::int64_t c = 0; c < stride; c += W) {
        const Float<W> lanes = load<W>(scores + c);
        peaks = lanes > peaks ? lanes : peaks;
    }
    float peak = sink;
    for (int lane = 0; lane < W; ++lane) peak = peaks[lane] > peak ? peaks[lane] : peak;
    if (peak == MINUS_INFINITY) {
        // Nothing is seen, or what is seen is NaN, which no comparison above let through.
        const bool any_nan = std::any_of(scores, scores + stride, [](float score) { return score != score; });
        const float weight = any_nan ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
        std::fill_n(scores, stride, weight);
        return {any_nan ? weight : peak, weight};
    }
    for (std::int64_t c = 0; c < stride; ++c) scores[c] = exp_nonpositive(scores[c] - peak);
    Float<W> sums = {};
    for (std::int64_t c = 0; c < stride; c += W) sums += load<W>(scores + c);
    float sum = call.sinks == nullptr ? 0.0f : exp_nonpositive(sink - peak);
    for (int lane = 0; lane < W; ++lane) sum += sums[lane];
    return {peak, sum};
}

// Run `TILE<NUM_ROWS>` over `num_rows` rows, as many at a time as make a tile, then by halves.
#define SEQUOIA_FOR_TILES(NUM_ROWS_OF_ALL, TILE)                      \
    do {                                                              \
        std::int64_t tile_row = 0;                                    \
        const std::int64_t all = (NUM_ROWS_OF_ALL);                   \
        if constexpr (TILE_ROWS<W> >= 8) {                            \
            for (; tile_row + 8 <= all; tile_row += 8) TILE(8);       \
        }                                                             \
        for (; tile_row + 4 <= all; tile_row += 4) TILE(4);           \
        for (; tile_row + 2 <= all; tile_row += 2) TILE(2);           \
        for (; tile_row < all; ++tile_row) TILE(1);                   \
    } while (false)

// ---- functions of their own ----
//
// One for each width of vectors, and for each type of element where that matters: in one function of all tiles the
// compiler would take several times as long, and find nothing more. Those at the end of this section set the CPU's
// instructions, which a template cannot.

template <int W>
SEQUOIA_INLINE void score_rows_inline(const float* queries,  // [num_rows, head_dim]
                                      std::int64_t num_rows, const float* keys, std::int64_t head_dim, float* scores,
                                      std::int64_t stride) {
#define SEQUOIA_SCORE_TILE(ROWS) \
    score_tile<W, ROWS>(queries + tile_row * head_dim, keys, head_dim, scores + tile_row * stride, stride)
    SEQUOIA_FOR_TILES(num_rows, SEQUOIA_SCORE_TILE);
#undef SEQUOIA_SCORE_TILE
}

// mixed[r, :] += the weighted values of `num_columns` columns, for all rows of a head.
template <int W, class Element>
SEQUOIA_INLINE void mix_rows_inline(const float* weights, std::int64_t stride, std::int64_t num_rows,
                                    const Element* values, const std::int64_t* offsets, std::int64_t num_columns,
                                    std::int64_t value_dim, float* mixed, std::int64_t mixed_stride) {
    for (std::int64_t d = 0; d < value_dim;) {
        const bool two_chunks = value_dim - d > W;
        const std::int64_t num_lanes = two_chunks ? value_dim - d - W : value_dim - d;
#define SEQUOIA_VALUE_TILE(ROWS)                                                                                        \
    (two_chunks ? value_tile<W, ROWS, 2>(weights + tile_row * stride, stride, values + d, offsets, num_columns,         \
                                         num_lanes, mixed + tile_row * mixed_stride + d, mixed_stride)                  \
                : value_tile<W, ROWS, 1>(weights + tile_row * stride, stride, values + d, offsets, num_columns,         \
                                         num_lanes, mixed + tile_row * mixed_stride + d, mixed_stride))
        SEQUOIA_FOR_TILES(num_rows, SEQUOIA_VALUE_TILE);
#undef SEQUOIA_VALUE_TILE
        d += two_chunks ? 2 * W : W;
    }
}

template <int W>
void score_rows(const float* queries, std::int64_t num_rows, const float* keys, std::int64_t head_dim, float* scores,
                std::int64_t stride);
template <int W>
std::pair<float, float> softmax_row(const Call& call, const Columns& columns, std::int64_t count, std::int64_t row,
                                    std::int64_t head, std::int64_t stride, float* scores);
template <int W, class Element>
void mix_rows(const float* weights, std::int64_t stride, std::int64_t num_rows, const Element* values,
              const std::int64_t* offsets, std::int64_t num_columns, std::int64_t value_dim, float* mixed,
              std::int64_t mixed_stride);

#define SEQUOIA_MIX_ROWS(WIDTH, TARGET, ELEMENT)                                                                      \
    template <>                                                                                                       \
    TARGET void mix_rows<WIDTH, ELEMENT>(const float* weights, std::int64_t stride, std::int64_t num_rows,            \
                                         const ELEMENT* values, const std::int64_t* offsets, std::int64_t num_columns, \
                                         std::int64_t value_dim, float* mixed, std::int64_t mixed_stride) {           \
        mix_rows_inline<WIDTH>(weights, stride, num_rows, values, offsets, num_columns, value_dim, mixed,             \
                               mixed_stride);                                                                         \
    }
#define SEQUOIA_FUNCTIONS(WIDTH, TARGET)                                                                             \
    template <>                                                                                                      \
    TARGET void score_rows<WIDTH>(const float* queries, std::int64_t num_rows, const float* keys,                    \
                                  std::int64_t head_dim, float* scores, std::int64_t stride) {                       \
        score_rows_inline<WIDTH>(queries, num_rows, keys, head_dim, scores, stride);                                 \
    }                                                                                                                \
    template <>                                                                                                      \
    TARGET std::pair<float, float> softmax_row<WIDTH>(const Call& call, const Columns& columns, std::int64_t count,  \
                                                      std::int64_t row, std::int64_t head, std::int64_t stride,      \
                                                      float* scores) {                                               \
        return softmax_row_inline<WIDTH>(call, columns, count, row, head, stride, scores);                           \
    }                                                                                                                \
    SEQUOIA_MIX_ROWS(WIDTH, TARGET, float)                                                                           \
    SEQUOIA_MIX_ROWS(WIDTH, TARGET, BFloat16)                                                                        \
    SEQUOIA_MIX_ROWS(WIDTH, TARGET, Float16)

#if defined(__x86_64__) && defined(__GNUC__)
#define SEQUOIA_AVX2 __attribute__((target("avx2,fma")))
#define SEQUOIA_AVX512 __attribute__((target("avx512f")))
SEQUOIA_FUNCTIONS(8, SEQUOIA_AVX2)
SEQUOIA_FUNCTIONS(16, SEQUOIA_AVX512)
#endif
SEQUOIA_FUNCTIONS(4, )
#undef SEQUOIA_FUNCTIONS
#undef SEQUOIA_MIX_ROWS

// ---- blocks ----

struct Workspace {
    Columns columns;
    Scratch<float> queries, keys, scores, mixed;
    float sums[ROW_BLOCK];
};

// What is attended at a time: `num_rows` query rows (node times group plus query head of the group) of each of
// `num_heads` key/value heads of a request, at most ROW_BLOCK together.
struct Block {
    std::int64_t request, first_head, num_heads, first_row, num_rows;
};

// Ask for the next rows of a cache while the present ones are worked on: heads lie side by side in a row, so one head
// walks in strides that the hardware does not foresee.
template <class Element>
SEQUOIA_INLINE void prefetch_rows(const Element* cache, const std::vector<std::int64_t>& offsets, std::int64_t begin,
                                  std::int64_t end, std::int64_t num_elements) {
    constexpr std::int64_t LINE = 64 / static_cast<std::int64_t>(sizeof(Element));
    end = std::min(end, static_cast<std::int64_t>(offsets.size()));
    for (std::int64_t column = begin; column < end; ++column) {
        const Element* const row = cache + offsets[static_cast<std::size_t>(column)];
        for (std::int64_t d = 0; d < num_elements; d += LINE) __builtin_prefetch(row + d, 0, 2);
    }
}

template <int W, class Element>
SEQUOIA_INLINE void attend_block(const Call& call, Workspace& work, const Block& block) {
    const Columns& columns = work.columns;
    const std::int64_t head_dim = call.q.shape[3], value_dim = call.values.shape[3], num_q_heads = call.q.shape[2];
    const std::int64_t group = num_q_heads / call.keys.shape[2];
    const std::int64_t padded_value_dim = padded(value_dim);
    const std::int64_t num_rows = block.num_rows;  // of each head
    const std::int64_t count = columns.count_of(block.first_row / group, (block.first_row + num_rows - 1) / group);
    const std::int64_t stride = padded(count);
    float* const queries = work.queries.reserve(ROW_BLOCK * head_dim);
    float* const key_block = work.keys.reserve(padded(head_dim) * W);
    float* const scores = work.scores.reserve(ROW_BLOCK * stride);
    float* const mixed = work.mixed.reserve(ROW_BLOCK * padded_value_dim);
    const auto node_of = [&](std::int64_t r) { return (block.first_row + r % num_rows) / group; };
    const auto head_of = [&](std::int64_t r) {
        return (block.first_head + r / num_rows) * group + (block.first_row + r % num_rows) % group;
    };
    const std::int64_t total_rows = block.num_heads * num_rows;

    for (std::int64_t r = 0; r < total_rows; ++r) {
        const Element* const query = static_cast<const Element*>(call.q.data) +
                                     call.query_offset(block.request, node_of(r)) + head_of(r) * call.q.strides[2];
        float* const target = queries + r * head_dim;
        std::int64_t d = 0;
        for (; d + W <= head_dim; d += W) store<W>(target + d, load<W>(query + d) * call.scale);
        if (d < head_dim) {
            const Float<W> rest = load_some<W>(query + d, head_dim - d) * call.scale;
            std::memcpy(target + d, &rest, static_cast<std::size_t>(head_dim - d) * sizeof(float));
        }
    }

    const Element* const keys = static_cast<const Element*>(call.keys.data) + block.first_head * call.keys.strides[2];
    const std::int64_t key_span = (block.num_heads - 1) * call.keys.strides[2] + head_dim;
    const Element* const values =
        static_cast<const Element*>(call.values.data) + block.first_head * call.values.strides[2];
    const std::int64_t value_span = (block.num_heads - 1) * call.values.strides[2] + value_dim;
    const bool transposes = num_rows > most_folded<W>(head_dim);
    // A column's values lie near its keys in many caches: asked for together they come as one stream.
    const std::int64_t value_bytes = count * block.num_heads * value_dim * static_cast<std::int64_t>(sizeof(Element));
    const bool values_follow = value_bytes <= KEPT_BYTES;
    prefetch_rows(keys, columns.key_offsets, 0, std::min(PREFETCH, count), key_span);
    if (values_follow) prefetch_rows(values, columns.value_offsets, 0, std::min(PREFETCH, count), value_span);
    for (std::int64_t column = 0; column < count; column += W) {
        // Behind the last column the last one again: softmax_row blanks what comes of it.
        const auto offset = [&](const std::vector<std::int64_t>& offsets, std::int64_t of_column) {
            return offsets[static_cast<std::size_t>(std::min(of_column, count - 1))];
        };
        const Element* rows[W];
        Ahead<W, Element> ahead{{}, {}, values_follow};
        for (int j = 0; j < W; ++j) {
            rows[j] = keys + offset(columns.key_offsets, column + j);
            ahead.keys[j] = keys + offset(columns.key_offsets, column + PREFETCH + j);
            ahead.values[j] = values + offset(columns.value_offsets, column + PREFETCH + j);
        }
        for (std::int64_t head = 0; head < block.num_heads; ++head) {
            float* const head_scores = scores + head * num_rows * stride + column;
            if (transposes) {
                turn_keys<W>(rows, ahead, head_dim, key_block);
                score_rows<W>(queries + head * num_rows * head_dim, num_rows, key_block, head_dim, head_scores, stride);
            } else {
                for (std::int64_t r = 0; r < num_rows; ++r) {
                    store<W>(head_scores + r * stride, fold_products<W>(queries + (head * num_rows + r) * head_dim, rows,
                                                                        r == 0 ? &ahead : nullptr, head_dim));
                }
            }
            for (int j = 0; j < W; ++j) {
                rows[j] += call.keys.strides[2];
                ahead.keys[j] += call.keys.strides[2];
                ahead.values[j] += call.values.strides[2];
            }
        }
    }

    if (!values_follow) {
        prefetch_rows(values, columns.value_offsets, 0, std::min(VALUE_COLUMNS, count), value_span);
    }
    for (std::int64_t r = 0; r < total_rows; ++r) {
        const auto [peak, sum] = softmax_row<W>(call, columns, count, node_of(r), head_of(r), stride, scores + r * stride);
        work.sums[r] = sum;
        if (call.lse != nullptr) {
            call.lse[(block.request * call.num_rows() + node_of(r)) * num_q_heads + head_of(r)] =
                sum == 0.0f ? peak : peak + std::log(sum);
        }
    }

    std::fill_n(mixed, total_rows * padded_value_dim, 0.0f);
    for (std::int64_t column = 0; column < count; column += VALUE_COLUMNS) {
        const std::int64_t num_columns = std::min(VALUE_COLUMNS, count - column);
        const std::int64_t* const offsets = columns.value_offsets.data() + column;
        for (std::int64_t head = 0; head < block.num_heads; ++head) {
            const Element* const head_values = values + head * call.values.strides[2];
            if (!values_follow) {
                prefetch_rows(head_values, columns.value_offsets, column + VALUE_COLUMNS,
                              std::min(column + 2 * VALUE_COLUMNS, count), value_dim);
            }
            mix_rows<W>(scores + head * num_rows * stride + column, stride, num_rows, head_values, offsets, num_columns,
                        value_dim, mixed + head * num_rows * padded_value_dim, padded_value_dim);
        }
    }

    for (std::int64_t r = 0; r < total_rows; ++r) {
        Element* const target =
            static_cast<Element*>(call.out) +
            (call.out_row(block.request, node_of(r)) * num_q_heads + head_of(r)) * value_dim;
        const float factor = work.sums[r] == 0.0f ? 0.0f : 1.0f / work.sums[r];  // NaN stays visible
        const float* const row = mixed + r * padded_value_dim;
        for (std::int64_t d = 0; d < value_dim; ++d) narrow(row[d] * factor, target + d);
    }
}

// How the query rows of all requests are cut into blocks.
struct Blocks {
    std::int64_t rows_per_head, block_rows, block_heads, num_row_blocks, num_head_blocks;

    explicit Blocks(const Call& call) {
        const std::int64_t num_kv_heads = call.keys.shape[2];
        rows_per_head = call.num_rows() * (call.q.shape[2] / num_kv_heads);
        block_rows = std::min(ROW_BLOCK, rows_per_head);
        block_heads = ROW_BLOCK / block_rows;
        num_row_blocks = (rows_per_head + block_rows - 1) / block_rows;
        num_head_blocks = (num_kv_heads + block_heads - 1) / block_heads;
    }
    std::int64_t of_request() const { return num_head_blocks * num_row_blocks; }
};

// Blocks [begin, end) of all.
template <int W, class Element>
SEQUOIA_INLINE void attend(const Call& call, const Blocks& blocks, std::int64_t begin, std::int64_t end,
                           Workspace& work) {
    const std::int64_t num_kv_heads = call.keys.shape[2];
    std::int64_t built = -1;
    for (std::int64_t index = begin; index < end; ++index) {
        const std::int64_t b = index / blocks.of_request(), within = index % blocks.of_request();
        if (b != built) work.columns.build(call, built = b);
        const std::int64_t head = within / blocks.num_row_blocks * blocks.block_heads;
        const std::int64_t row = within % blocks.num_row_blocks * blocks.block_rows;
        attend_block<W, Element>(call, work,
                                 {b, head, std::min(blocks.block_heads, num_kv_heads - head), row,
                                  std::min(blocks.block_rows, blocks.rows_per_head - row)});
    }
}

template <int W>
SEQUOIA_INLINE void attend_any_type(const Call& call, const Blocks& blocks, std::int64_t begin, std::int64_t end,
                                    Workspace& work) {
    if (call.type == ElementType::bfloat16) return attend<W, BFloat16>(call, blocks, begin, end, work);
    if (call.type == ElementType::float16) return attend<W, Float16>(call, blocks, begin, end, work);
    attend<W, float>(call, blocks, begin, end, work);
}

// Templates on the width of the CPU's vectors, so not function clones: a tile must fit the registers there are.
using Attend = void (*)(const Call&, const Blocks&, std::int64_t, std::int64_t, Workspace&);
void attend_baseline(const Call& call, const Blocks& blocks, std::int64_t begin, std::int64_t end, Workspace& work) {
    attend_any_type<4>(call, blocks, begin, end, work);
}
#if defined(__x86_64__) && defined(__GNUC__)
SEQUOIA_AVX2 void attend_avx2(const Call& call, const Blocks& blocks, std::int64_t begin, std::int64_t end,
                              Workspace& work) {
    attend_any_type<8>(call, blocks, begin, end, work);
}
SEQUOIA_AVX512 void attend_avx512(const Call& call, const Blocks& blocks, std::int64_t begin, std::int64_t end,
                                  Workspace& work) {
    attend_any_type<16>(call, blocks, begin, end, work);
}
Attend fastest_attend() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return attend_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return attend_avx2;
    return attend_baseline;
}
#else
Attend fastest_attend() { return attend_baseline; }
#endif

// Threads that a call is worth: each is to have some microseconds of multiply-adds.
int num_threads_for(const Call& call, const Blocks& blocks, int most) {
    constexpr std::int64_t PRODUCTS_A_THREAD = 1 << 19;
    std::int64_t columns = 0;
    for (std::int64_t b = 0; b < call.batch_size(); ++b) columns += std::min<std::int64_t>(call.cache_lens[b], call.window);
    columns += call.batch_size() * call.num_rows();
    const std::int64_t products = columns * call.num_rows() * call.q.shape[2] * (call.q.shape[3] + call.values.shape[3]);
    const std::int64_t wanted = std::min(products / PRODUCTS_A_THREAD, call.batch_size() * blocks.of_request());
    return static_cast<int>(std::clamp<std::int64_t>(wanted, 1, most));
}

Rows4d rows_of(std::uintptr_t data, const Layout4d& layout) {
    Rows4d rows{reinterpret_cast<const void*>(data), {}, {}};
    std::copy_n(layout.shape, 4, rows.shape);
    std::copy_n(layout.strides, 4, rows.strides);
    return rows;
}

}  // namespace

bool tree_attention(std::uintptr_t q_ptr, const Layout4d& q_layout, std::uintptr_t keys_ptr, const Layout4d& keys_layout,
                    std::uintptr_t values_ptr, const Layout4d& values_layout, int type, std::uintptr_t mask_ptr,
                    std::int64_t num_words, bool mask_per_request, std::uintptr_t cache_lens_ptr, double scale,
                    double softcap, std::int64_t sliding_window, std::uintptr_t sinks_ptr,
                    std::uintptr_t block_table_ptr, std::int64_t max_pages, std::uintptr_t out_ptr,
                    std::uintptr_t lse_ptr, int num_threads, const std::int64_t* first_rows) {
    Call call{};
    call.q = rows_of(q_ptr, q_layout);
    call.keys = rows_of(keys_ptr, keys_layout);
    call.values = rows_of(values_ptr, values_layout);
    call.type = static_cast<ElementType>(type);
    if (call.type != ElementType::float32 && call.type != ElementType::bfloat16 && call.type != ElementType::float16) {
        throw std::invalid_argument("tree_attention: type must be 0, 2 or 3, got " + std::to_string(type));
    }
    call.tree_mask = reinterpret_cast<const std::uint32_t*>(mask_ptr);
    call.num_words = num_words;
    call.mask_per_request = mask_per_request;
    call.cache_lens = reinterpret_cast<const std::int32_t*>(cache_lens_ptr);
    call.block_table = reinterpret_cast<const std::int32_t*>(block_table_ptr);
    call.max_pages = max_pages;
    call.sinks = reinterpret_cast<const float*>(sinks_ptr);
    call.scale = static_cast<float>(scale);
    call.softcap = static_cast<float>(softcap);
    // Half of the range: no slot is further away, and adding to it cannot overflow.
    call.window = sliding_window > 0 ? sliding_window : std::numeric_limits<std::int64_t>::max() / 2;
    call.out = reinterpret_cast<void*>(out_ptr);
    call.lse = reinterpret_cast<float*>(lse_ptr);
    call.first_rows = first_rows;

    if (!values_valid(call)) return false;
    static const Attend attend_fastest = fastest_attend();
    struct Job {
        const Call& call;
        const Blocks blocks;
        std::int64_t count;
        int size;
    } job{call, Blocks(call), 0, 1};
    if (call.num_rows() == 0 || call.batch_size() == 0) return true;
    job.count = call.batch_size() * job.blocks.of_request();
    job.size = num_threads_for(call, job.blocks, num_threads);
    forward::run_in_team(
        job.size,
        [](void* argument, int thread) {
            static thread_local Workspace workspace;
            const Job& mine = *static_cast<const Job*>(argument);
            attend_fastest(mine.call, mine.blocks, mine.count * thread / mine.size, mine.count * (thread + 1) / mine.size,
                           workspace);
        },
        &job);
    return true;
}

}  // namespace sequoia
