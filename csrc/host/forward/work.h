// One thread's way through a pass.
//
// Phases end at barriers: embedding | projections | norms and rotation of heads, cache rows | attention | output |
// gate and up | down | ... | head. Every thread normalises all rows for itself, which costs less than waiting; a product's
// weight rows are shared out in tiles, and what is done with a tile's products (biases, activations, residuals) is done
// while they lie in the first-level cache. The residual stream and everything between products are float32, also where
// products round what they read.

#pragma once

#include "attention.h"
#include "packed.h"
#include "pairs.h"

namespace sequoia::forward {
namespace {

struct Part {
    i64 begin, end;
};

struct Worker {
    const Pass& pass;
    const Model& model;
    const Call& call;
    const Bench& bench;
    const int thread, threads;
    const bool multiplies_pairs;  // the CPU does, of bfloat16

    Worker(const Pass& shared, int number, bool has_pairs = false)
        : pass(shared), model(*shared.model), call(*shared.call), bench(shared.benches[number]), thread(number),
          threads(shared.num_threads), multiplies_pairs(has_pairs) {}

    Part part(i64 count) const { return {count * thread / threads, count * (thread + 1) / threads}; }
    void wait() const { pass.team->barrier(threads); }

    const char* address(const Matrix& matrix, i64 row) const {
        const char* const data = reinterpret_cast<const char*>(call.tensors[matrix.tensor]);
        row += matrix.first_row;
        switch (matrix.quantised.packing) {
            case Packing::none: break;
            case Packing::int8_rows: return data + row * matrix.columns;
            case Packing::int4_words: return data + row * 4;
            case Packing::int4_blocks:  // of a whole block, whichever row of it
                return data + row / matrix.quantised.block * matrix.columns * matrix.quantised.block / 2;
        }
        return data + row * (matrix.transposed ? 1 : matrix.columns) * bytes_of(matrix.type);
    }
    const void* tensor(int number) const { return reinterpret_cast<const void*>(call.tensors[number]); }
    // Where this thread begins to read a product's weights.
    const char* begin_of(const Linear& linear) const { return address(linear.weight, rows_of(linear).begin); }
    static i64 num_tiles(const Linear& linear) { return (linear.weight.rows + TILE - 1) / TILE; }
    // This thread's rows of a product: whole tiles, or as many as lie together.
    Part rows_of(const Linear& linear) const {
        const i64 rows = linear.weight.rows, unit = linear.weight.quantised.four_bits() ? PACKED_ROWS : TILE;
        const auto [begin, end] = part((rows + unit - 1) / unit);
        return {begin * unit, smaller(end * unit, rows)};
    }

    void widen(const Matrix& matrix, i64 row, float* out) const {
        widen_row(address(matrix, row), 0, matrix.columns, matrix.type, out);
    }

    // ---- norms ----

    // Turns a row of `size` numbers into its normalised form.
    void normalise(const Norm& norm, const float* row, i64 size, float* out) const {
        Float sums = {};
        i64 k = 0;
        float mean = 0.0f;
        if (norm.kind == NormKind::layer) {
            for (; k + W <= size; k += W) sums += load(row + k);
            if (k < size) sums += load_some(row + k, size - k);
            mean = sum_of(sums) / static_cast<float>(size);
            sums = Float{};
        }
        for (k = 0; k + W <= size; k += W) {
            const Float centred = load(row + k) - mean;
            sums += centred * centred;
        }
        float square = sum_of(sums);
        for (; k < size; ++k) square += (row[k] - mean) * (row[k] - mean);
        const float factor = 1.0f / __builtin_sqrtf(square / static_cast<float>(size) + norm.eps);
        for (k = 0; k < size; ++k) out[k] = (row[k] - mean) * factor;
        float* const factors = bench.rows;
        if (norm.weight.given()) {
            widen_row(address(norm.weight, 0), 0, size, norm.weight.type, factors);
            for (k = 0; k < size; ++k) out[k] *= factors[k] + norm.offset;
        }
        if (norm.bias.given()) {
            widen_row(address(norm.bias, 0), 0, size, norm.bias.type, factors);
            for (k = 0; k < size; ++k) out[k] += factors[k];
        }
    }

    float* second_row() const { return bench.rows + pass.stream_stride; }

    // Whether what a product reads is rounded to bfloat16. Its weights decide, never the number of rows: that changes no bit.
    bool takes_pairs(const Linear& linear) const {
        const Matrix& weight = linear.weight;
        return multiplies_pairs && weight.type == ElementType::bfloat16 && !weight.transposed && !weight.packed();
    }
    Form form_for(const Linear& linear) const { return takes_pairs(linear) ? Form::pairs : Form::floats; }
    Form form_for_projections(const Layer& layer) const {
        for (const Linear& linear : layer.projections) {
            if (!takes_pairs(linear)) return Form::floats;
        }
        return Form::pairs;
    }
    Form form_for_mlp(const Layer& layer) const {
        return layer.gate.weight.given() && !takes_pairs(layer.gate) ? Form::floats : form_for(layer.up);
    }

    // Normalised rows as a panel; `rows` lists them, null for all. `rest` takes what rounding takes away.
    Panel normalised(const Norm& norm, i64 count, const std::int32_t* rows, Form form = Form::floats,
                     const Panel* rest = nullptr) const {
        const Panel panel(bench.panel, count, model.width, form);
        for (i64 i = 0; i < count; ++i) {
            const float* const row = pass.stream + (rows == nullptr ? i : rows[i]) * pass.stream_stride;
            if (norm.given()) normalise(norm, row, model.width, second_row());
            const float* const numbers = norm.given() ? second_row() : row;
            panel.put(i, numbers);
            if (rest != nullptr) rest->put_rest(i, numbers);
        }
        return panel;
    }

    // Of the first layer of a model with features: normalised embeddings and features side by side.
    Panel with_features(const Norm& norm, Form form, const Panel* rest) const {
        const Panel panel(bench.panel, pass.num_rows, 2 * model.width, form);
        for (i64 i = 0; i < pass.num_rows; ++i) {
            const float* const feature = pass.stream + i * pass.stream_stride;
            float* const pair = bench.wide;
            normalise(norm, pass.branch + i * pass.stream_stride, model.width, pair);
            if (model.normed_residual) {
                std::memcpy(pair + model.width, feature, static_cast<std::size_t>(model.width) * sizeof(float));
            } else {
                normalise(model.feature_norm, feature, model.width, pair + model.width);
            }
            panel.put(i, pair);
            if (rest != nullptr) rest->put_rest(i, pair);
        }
        return panel;
    }

    Panel arranged(const float* rows, i64 stride, i64 size, Form form) const {
        const Panel panel(bench.panel, pass.num_rows, size, form);
        for (i64 i = 0; i < pass.num_rows; ++i) panel.put(i, rows + i * stride);
        return panel;
    }

    // ---- products ----

    // Of a tile's row of products; nearly all are whole, and a size that the compiler knows takes no call.
    static SEQUOIA_INLINE void copy_products(const float* products, i64 count, float* to) {
        if (count == TILE) {
            std::memcpy(to, products, TILE * sizeof(float));
        } else {
            std::memcpy(to, products, static_cast<std::size_t>(count) * sizeof(float));
        }
    }
    // Adds what `sum` makes of each vector of a tile's row of products and its place.
    template <class Sum>
    static SEQUOIA_INLINE void add_products(i64 count, float* to, const Sum& sum) {
        for (i64 r = 0; r + W <= count; r += W) store(to + r, load(to + r) + sum(r, W));
        const i64 whole = count / W * W, rest = count - whole;
        if (rest == 0) return;
        const Float last = load_some(to + whole, rest) + sum(whole, rest);
        std::memcpy(to + whole, &last, static_cast<std::size_t>(rest) * sizeof(float));
    }

    // Products of a tile with its bias: out[node * TILE + row].
    void multiply_tile(const Linear& linear, i64 tile, const Panel& panel, float* out, Ahead* ahead) const {
        const Matrix& weight = linear.weight;
        const i64 first = tile * TILE, count = smaller(TILE, weight.rows - first);
        const char* const data = address(weight, first);
        const i64 stride = weight.columns;
        if (panel.in_parts()) {
            multiply_parts({reinterpret_cast<const BFloat16*>(data), stride}, count, panel, out, ahead, bench.sums);
        } else if (panel.form == Form::pairs) {
            multiply_pairs({reinterpret_cast<const BFloat16*>(data), stride}, count, panel, out, ahead);
        } else if (weight.quantised.packing == Packing::int8_rows) {
            multiply_rows(MatrixRows<Int8>{reinterpret_cast<const Int8*>(data), stride}, 0, count, panel, out, TILE, ahead,
                          bench.wide);
            float scales[TILE];
            widen_row(tensor(weight.quantised.scales), weight.first_row + first, count, weight.quantised.scales_type, scales);
            for (i64 i = 0; i < panel.count; ++i) {
                for (i64 r = 0; r < count; ++r) out[i * TILE + r] *= scales[r];
            }
        } else if (weight.type == ElementType::float32) {
            multiply_rows(MatrixRows<float>{reinterpret_cast<const float*>(data), stride}, 0, count, panel, out, TILE,
                          ahead, bench.wide);
        } else if (weight.type == ElementType::bfloat16) {
            multiply_rows(MatrixRows<BFloat16>{reinterpret_cast<const BFloat16*>(data), stride}, 0, count, panel, out,
                          TILE, ahead, bench.wide);
        } else {
            multiply_rows(MatrixRows<Float16>{reinterpret_cast<const Float16*>(data), stride}, 0, count, panel, out,
                          TILE, ahead, bench.wide);
        }
        add_bias(linear, first, count, panel.count, out);
    }

    void add_bias(const Linear& linear, i64 first, i64 count, i64 nodes, float* out) const {
        if (!linear.bias.given()) return;
        float bias[TILE];
        widen_row(address(linear.bias, 0), first, count, linear.bias.type, bias);
        for (i64 i = 0; i < nodes; ++i) {
            for (i64 r = 0; r < count; ++r) out[i * TILE + r] += bias[r];
        }
    }

    template <class Element>
    void multiply_strip_of(const Matrix& weight, i64 first, i64 count, i64 rest, const Panel& panel, float* out) const {
        multiply_strip(reinterpret_cast<const Element*>(address(weight, first)), weight.rows, count, rest, panel, out);
    }

    PackedWeight packed_weight(const Matrix& matrix) const {
        const Quantised& form = matrix.quantised;
        PackedWeight weight{&matrix, static_cast<const char*>(tensor(matrix.tensor)), tensor(form.scales), nullptr, nullptr,
                            false};
        if (!weight.in_words()) return weight;
        weight.zeros = static_cast<const std::uint32_t*>(tensor(form.zeros));
        weight.order = static_cast<const std::int32_t*>(tensor(form.order));
        weight.scattered = is_scattered(weight.order, matrix.columns, form.group);
        return weight;
    }

    // Products of up to STRIP rows from `first` on with their bias, as tiles: out[tile][node][TILE]. Of weights of which
    // more than a tile's rows lie together, and of others that are wanted beside such. `rest` rows of the thread follow.
    void multiply_strip_of(const Linear& linear, i64 first, i64 count, i64 rest, const Panel& panel, float* out) const {
        const Matrix& weight = linear.weight;
        const i64 tile_floats = panel.count * TILE;
        if (!in_strips(linear)) {
            for (i64 row = 0; row < count; row += TILE) {
                multiply_tile(linear, (first + row) / TILE, panel, out + row / TILE * tile_floats, nullptr);
            }
            return;
        }
        if (weight.packed()) {
            multiply_packed(packed_weight(weight), weight.first_row + first, count, rest, panel, out,
                            Unpacked(bench.unpacked));
        } else if (weight.type == ElementType::float32) {
            multiply_strip_of<float>(weight, first, count, rest, panel, out);
        } else if (weight.type == ElementType::bfloat16) {
            multiply_strip_of<BFloat16>(weight, first, count, rest, panel, out);
        } else {
            multiply_strip_of<Float16>(weight, first, count, rest, panel, out);
        }
        for (i64 row = 0; row < count; row += TILE) {
            add_bias(linear, first + row, smaller(TILE, count - row), panel.count, out + row / TILE * tile_floats);
        }
    }
    static bool in_strips(const Linear& linear) {
        return linear.weight.transposed || linear.weight.quantised.four_bits();
    }

    // The same as `multiply`, in strips.
    template <class Epilogue>
    void multiply_strips(const Linear& linear, const Panel& panel, const Epilogue& epilogue) const {
        const auto [begin, end] = rows_of(linear);
        for (i64 first = begin; first < end; first += STRIP) {
            const i64 count = smaller(STRIP, end - first);
            multiply_strip_of(linear, first, count, end - first - count, panel, bench.tiles);
            for (i64 row = 0; row < count; row += TILE) {
                epilogue(first + row, smaller(TILE, count - row), bench.tiles + row * panel.count);
            }
        }
    }

    // Requests of tiles [begin, end) of a product, and what this thread reads behind them.
    Ahead ahead_of(const Linear& linear, i64 begin, i64 end, const Panel& panel, const char* then) const {
        const char* const from = address(linear.weight, begin * TILE);
        const char* const to = address(linear.weight, smaller(end * TILE, linear.weight.rows));
        if (!panel.in_parts()) return Ahead(from, to, then);
        const i64 row_bytes = linear.weight.columns * bytes_of(linear.weight.type);
        return Ahead(from, to, then, row_bytes, panel.part_vectors() * W * static_cast<i64>(sizeof(float)));
    }

    // This thread's tiles of a product, each handed over as (first row, rows, products [nodes, TILE]), which may be changed.
    template <class Epilogue>
    void multiply(const Linear& linear, const Panel& panel, const char* then, const Epilogue& epilogue,
                  AttentionAhead* beside = nullptr) const {
        if (in_strips(linear)) return multiply_strips(linear, panel, epilogue);
        const auto [begin, end] = part(num_tiles(linear));
        if (begin == end) return;
        Ahead ahead = ahead_of(linear, begin, end, panel, then);
        for (i64 tile = begin; tile < end; ++tile) {
            if (beside != nullptr) beside->request();
            multiply_tile(linear, tile, panel, bench.tiles, &ahead);
            epilogue(tile * TILE, smaller(TILE, linear.weight.rows - tile * TILE), bench.tiles);
        }
    }

    // ---- phases ----

    void embed() const {
        const auto [begin, end] = part(pass.num_rows);
        for (i64 i = begin; i < end; ++i) {
            float* row = pass.stream + i * pass.stream_stride;
            if (model.has_features) {  // the embedding waits in the branch until the first layer's projections
                const float* const feature = call.features + pass.rows[i] * model.width;
                std::memcpy(row, feature, static_cast<std::size_t>(model.width) * sizeof(float));
                if (model.normed_residual) normalise_in_place(model.feature_norm, model.width, row);
                row = pass.branch + i * pass.stream_stride;
            }
            widen(model.embedding, call.tokens[pass.rows[i]], row);
            if (model.embedding_scale != 1.0f) {
                for (i64 k = 0; k < model.width; ++k) row[k] *= model.embedding_scale;
            }
            if (model.positions.given()) {
                widen(model.positions, pass.positions[i] + model.position_offset, second_row());
                for (i64 k = 0; k < model.width; ++k) row[k] += second_row()[k];
            }
        }
    }

    void keep_hidden(i64 number, const Norm* norm) const {
        if (call.hidden == nullptr || call.hidden[number] == nullptr) return;
        const auto [begin, end] = part(pass.num_rows);
        for (i64 i = begin; i < end; ++i) {
            const float* const row = pass.stream + i * pass.stream_stride;
            float* const out = call.hidden[number] + pass.rows[i] * model.width;
            if (norm != nullptr) {
                normalise(*norm, row, model.width, out);
            } else {
                std::memcpy(out, row, static_cast<std::size_t>(model.width) * sizeof(float));
            }
        }
    }

    // Whether products of a tile, from `row` of all projections on, are keys'.
    static bool holds_keys(const Layer& layer, i64 row, i64 count) {
        const Heads& keys = layer.keys;
        const i64 from = larger(row, keys.first) - keys.first, end = row + count - keys.first;
        if (from >= end || from >= layer.num_kv_heads * keys.stride) return false;
        const i64 in_head = from % keys.stride;
        return in_head < layer.head_dim || (in_head + end - from > keys.stride && from / keys.stride + 1 < layer.num_kv_heads);
    }

    // Adds a tile's products with what rounding took away.
    void add_rest(const Linear& linear, i64 tile, const Panel& rest, float* products) const {
        Linear unbiased = linear;
        unbiased.bias = Matrix();
        float* const more = bench.tiles + MAX_ROWS * TILE;
        multiply_tile(unbiased, tile, rest, more, nullptr);
        for (i64 i = 0; i < rest.count * TILE; i += W) store(products + i, load(products + i) + load(more + i));
    }

    // `rest`: what rounding took away from the panel, null where nothing was. Keys take it as well: they stay in the cache,
    // where every later row meets their errors, and a score's error goes through an exponential.
    void project(const Layer& layer, const Panel& panel, const Panel* rest, AttentionAhead* beside) const {
        i64 first = 0;
        for (std::size_t i = 0; i < layer.projections.size(); ++i) {
            const Linear& linear = layer.projections[i];
            const Linear& next = i + 1 < layer.projections.size() ? layer.projections[i + 1] : layer.output;
            multiply(linear, panel, begin_of(next), [&](i64 row, i64 count, float* products) {
                if (rest != nullptr && holds_keys(layer, first + row, count)) add_rest(linear, row / TILE, *rest, products);
                for (i64 node = 0; node < panel.count; ++node) {
                    copy_products(products + node * TILE, count, pass.projected + node * pass.projected_stride + first + row);
                }
            }, beside);
            first += linear.weight.rows;
        }
    }

    void rotate(const Layer& layer, i64 row, float* head) const {
        if (layer.rotation < 0) return;
        const i64 half = layer.rotated_dims / 2;
        const float* const cosines =
            reinterpret_cast<const float*>(call.rotations[layer.rotation]) + pass.positions[row] * layer.rotated_dims;
        const float* const sines = cosines + half;
        for (i64 k = 0; k < half; ++k) {
            const float a = head[k], b = head[half + k];
            head[k] = a * cosines[k] - b * sines[k];
            head[half + k] = b * cosines[k] + a * sines[k];
        }
    }

    void normalise_in_place(const Norm& norm, i64 size, float* row) const {
        if (norm.given()) normalise(norm, row, size, row);
    }

    // Query heads of key/value heads [begin, end) of a row, and those heads' cache rows.
    void prepare_heads(const Layer& layer, i64 layer_index, i64 row, i64 begin, i64 end) const {
        const i64 d = layer.head_dim, group = layer.group();
        float* const projected = pass.projected + row * pass.projected_stride;
        if (layer.norms_whole_rows) {
            normalise_in_place(layer.query_norm, layer.num_heads * d, projected + layer.queries.first);
            normalise_in_place(layer.key_norm, layer.num_kv_heads * d, projected + layer.keys.first);
        }
        const i64 place = pass.cache_rows[row] * layer.num_kv_heads * d;
        for (i64 head = begin * group; head < end * group; ++head) {
            float* const query = projected + layer.queries.first + head * layer.queries.stride;
            if (!layer.norms_whole_rows) normalise_in_place(layer.query_norm, d, query);
            rotate(layer, row, query);
        }
        for (i64 head = begin; head < end; ++head) {
            float* const key = projected + layer.keys.first + head * layer.keys.stride;
            const float* const value = projected + layer.values.first + head * layer.values.stride;
            if (!layer.norms_whole_rows) normalise_in_place(layer.key_norm, d, key);
            rotate(layer, row, key);
            narrow_row(key, d, layer.cache_type, reinterpret_cast<void*>(call.caches[2 * layer_index]), place + head * d);
            narrow_row(value, d, layer.cache_type, reinterpret_cast<void*>(call.caches[2 * layer_index + 1]),
                       place + head * d);
        }
    }

    void prepare(const Layer& layer, i64 layer_index) const {
        const i64 heads = layer.norms_whole_rows ? 1 : layer.num_kv_heads;  // a unit: a row, or a head of it
        const auto [begin, end] = part(pass.num_rows * heads);
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 head = unit % heads;
            prepare_heads(layer, layer_index, unit / heads, head,
                          layer.norms_whole_rows ? layer.num_kv_heads : head + 1);
        }
    }

    // Units of an attention that are this thread's: blocks of query rows of each key/value head of each segment.
    Part units_of(const Layer& layer) const {
        i64 units = 0;
        for (i64 s = 0; s < pass.num_segments; ++s) units += num_blocks(layer, pass.segments[s]) * layer.num_kv_heads;
        return part(units);
    }

    void attend_all(const Layer& layer, i64 layer_index, AttentionAhead& ahead) const {
        const Columns* const columns = pass.columns + pass.window_of_layer[layer_index] * pass.num_segments;
        const auto [begin, end] = units_of(layer);
        ahead.begin_attention();
        i64 unit = 0;
        for (i64 s = 0; s < pass.num_segments; ++s) {
            const Segment& segment = pass.segments[s];
            const i64 rows = segment.num_nodes * layer.group(), blocks = num_blocks(layer, segment);
            for (i64 head = 0; head < layer.num_kv_heads; ++head) {
                for (i64 block = 0; block < blocks; ++block, ++unit) {
                    if (unit < begin || unit >= end) continue;
                    attend_block(layer, layer_index, segment, columns[s], head, rows * block / blocks,
                                 rows * (block + 1) / blocks, ahead);
                }
            }
        }
    }

    // What this thread reads from memory for the attention and behind it, as far as it was not requested before.
    AttentionAhead ahead_of(const Layer& layer, i64 layer_index) const {
        const auto [first, last] = units_of(layer);
        AttentionAhead ahead(pass, layer, layer_index, first, last);
        i64 left = AttentionAhead::WEIGHT_BYTES, tiles = 0;
        for (const Linear& linear : layer.projections) {
            const auto [begin, end] = part(in_strips(linear) ? 0 : num_tiles(linear));
            tiles += end - begin;
        }
        ahead.begin_projections(tiles);
        const Linear* const linears[3] = {&layer.output, layer.gate.weight.given() ? &layer.gate : &layer.up, &layer.up};
        for (int i = 0; i < (layer.gate.weight.given() ? 3 : 2) && !layer.experts.given(); ++i) {
            const Matrix& weight = linears[i]->weight;
            if (in_strips(*linears[i])) continue;
            const auto [begin, end] = part(num_tiles(*linears[i]));
            const char* const from = address(weight, begin * TILE);
            const i64 bytes = address(weight, smaller(end * TILE, weight.rows)) - from;
            const i64 share = smaller(bytes, i == 0 ? left : left / (3 - i));
            ahead.then(from, share);
            left -= share;
        }
        return ahead;
    }

    void attend_block(const Layer& layer, i64 index, const Segment& segment, const Columns& columns, i64 head,
                      i64 begin, i64 end, AttentionAhead& ahead) const {
        if (layer.cache_type == ElementType::float32) {
            attend<float>(pass, layer, index, segment, columns, head, begin, end, ahead, bench);
        } else if (layer.cache_type == ElementType::bfloat16) {
            attend<BFloat16>(pass, layer, index, segment, columns, head, begin, end, ahead, bench);
        } else {
            attend<Float16>(pass, layer, index, segment, columns, head, begin, end, ahead, bench);
        }
    }

    // A branch's last product, scaled and added to the stream; with `norm` normalised first; with `before` added to what
    // another branch has left there.
    void add_branch(const Linear& linear, const Panel& panel, const Norm& norm, const float* before,
                    const char* then) const {
        const float scale = model.residual_scale;
        if (!norm.given()) {
            multiply(linear, panel, then, [&](i64 row, i64 count, const float* products) {
                for (i64 node = 0; node < panel.count; ++node) {
                    const float* const from = products + node * TILE;
                    const float* const other = before == nullptr ? nullptr : before + node * pass.stream_stride + row;
                    add_products(count, pass.stream + node * pass.stream_stride + row, [&](i64 r, i64 lanes) {
                        const Float product = load(from + r);
                        return (other == nullptr ? product : product + load_some(other + r, lanes)) * scale;
                    });
                }
            });
            return;
        }
        leave_branch(linear, panel, then);
        wait();
        const auto [begin, end] = part(panel.count);
        for (i64 i = begin; i < end; ++i) {
            normalise(norm, pass.branch + i * pass.stream_stride, model.width, second_row());
            float* const to = pass.stream + i * pass.stream_stride;
            for (i64 k = 0; k < model.width; ++k) to[k] += second_row()[k] * scale;
        }
    }

    void leave_branch(const Linear& linear, const Panel& panel, const char* then) const {
        multiply(linear, panel, then, [&](i64 row, i64 count, const float* products) {
            for (i64 node = 0; node < panel.count; ++node) {
                copy_products(products + node * TILE, count, pass.branch + node * pass.stream_stride + row);
            }
        });
    }

    // Activated products, from `gated` on. `then_gate` and `then_up`: what this thread reads behind gates and ups.
    void gate_and_up(const Layer& layer, const Linear& gate, const Linear& up, const Panel& panel, float* gated,
                     i64 stride, const char* then_gate, const char* then_up) const {
        const auto keep_gated = [&](i64 row, i64 count, const float* gates, const float* ups) {
            for (i64 node = 0; node < panel.count; ++node) {
                float activated[TILE];
                for (i64 r = 0; r < TILE; r += W) {
                    const Float value = activate(layer.activation, load(gates + node * TILE + r));
                    store(activated + r, ups == nullptr ? value : value * load(ups + node * TILE + r));
                }
                copy_products(activated, count, gated + node * stride + row);
            }
        };
        if (!gate.weight.given()) {
            multiply(up, panel, then_up,
                     [&](i64 row, i64 count, const float* products) { keep_gated(row, count, products, nullptr); });
            return;
        }
        if (in_strips(gate) || in_strips(up)) {
            const auto [first, end] = rows_of(in_strips(gate) ? gate : up);
            float* const ups = bench.tiles + MAX_ROWS * STRIP;
            for (i64 begin = first; begin < end; begin += STRIP) {
                const i64 count = smaller(STRIP, end - begin), rest = end - begin - count;
                multiply_strip_of(gate, begin, count, rest, panel, bench.tiles);
                multiply_strip_of(up, begin, count, rest, panel, ups);
                for (i64 row = 0; row < count; row += TILE) {
                    keep_gated(begin + row, smaller(TILE, count - row), bench.tiles + row * panel.count,
                               ups + row * panel.count);
                }
            }
            return;
        }
        const auto [begin, end] = part(num_tiles(gate));
        if (begin == end) return;
        Ahead of_gate = ahead_of(gate, begin, end, panel, then_gate), of_up = ahead_of(up, begin, end, panel, then_up);
        float* const ups = bench.tiles + MAX_ROWS * TILE;
        for (i64 tile = begin; tile < end; ++tile) {
            multiply_tile(gate, tile, panel, bench.tiles, &of_gate);
            multiply_tile(up, tile, panel, ups, &of_up);
            keep_gated(tile * TILE, smaller(TILE, gate.weight.rows - tile * TILE), bench.tiles, ups);
        }
    }

    void run_mlp(const Layer& layer, const char* next) const {
        const char* const down = begin_of(layer.down);
        const bool gated = layer.gate.weight.given();
        gate_and_up(layer, layer.gate, layer.up,
                    normalised(layer.mlp_norm, pass.num_rows, nullptr, form_for_mlp(layer)), pass.gated,
                    pass.gated_stride, down, gated ? down + Ahead::BYTES : down);
        wait();
        add_branch(layer.down,
                   arranged(pass.gated, pass.gated_stride, layer.down.weight.columns, form_for(layer.down)),
                   layer.mlp_output_norm, layer.parallel ? pass.branch : nullptr, next);
    }

    // ---- experts ----
    //
    // Every row chooses its experts by itself, and what they give is added up in the order of their numbers, so a row's
    // result does not depend on the rows beside it. An expert's weights are read once for all rows that chose it.

    static Linear of_expert(const Linear& linear, i64 stride, i64 expert) {
        Linear own = linear;
        own.weight.first_row += expert * stride;
        return own;
    }

    // A row's experts and their weights: softmax, then the most probable ones; of equal ones those of lower numbers.
    void choose(const Experts& experts, const float* logits, std::int32_t* ids, float* weights) const {
        const i64 padded = up_to_lanes(experts.count);
        float* const shares = bench.shares;
        std::memcpy(shares, logits, static_cast<std::size_t>(experts.count) * sizeof(float));
        for (i64 e = experts.count; e < padded; ++e) shares[e] = -__builtin_inff();
        Float peaks = load(shares);
        for (i64 e = W; e < padded; e += W) peaks = lanes_max(load(shares + e), peaks);
        const Float peak = all_lanes(max_of(peaks));
        Float totals = {};
        for (i64 e = 0; e < padded; e += W) {
            const Float share = exponential(load(shares + e) - peak);
            totals += share;
            store(shares + e, share);
        }
        float total = sum_of(totals), chosen_total = 0.0f;
        for (i64 rank = 0; rank < experts.chosen; ++rank) {
            i64 best = -1;
            for (i64 e = 0; e < experts.count; ++e) {
                bool taken = false;
                for (i64 before = 0; before < rank; ++before) taken |= ids[before] == e;
                if (!taken && (best < 0 || shares[e] > shares[best])) best = e;  // a NaN is as good as any
            }
            ids[rank] = static_cast<std::int32_t>(best);
            chosen_total += shares[best];
        }
        if (experts.normalised) total = chosen_total;
        for (i64 rank = 0; rank < experts.chosen; ++rank) weights[rank] = shares[ids[rank]] / total;
    }

    // All rows' choices, by each thread for itself.
    void choose_all(const Experts& experts) const {
        const i64 count = pass.num_rows * experts.chosen;
        std::memset(bench.first_choices, 0, static_cast<std::size_t>(experts.count + 1) * sizeof(std::int32_t));
        for (i64 i = 0; i < pass.num_rows; ++i) {
            choose(experts, pass.routes + i * pass.routes_stride, bench.expert_ids + i * experts.chosen,
                   bench.expert_weights + i * experts.chosen);
        }
        for (i64 i = 0; i < count; ++i) ++bench.first_choices[bench.expert_ids[i] + 1];
        for (i64 e = 0; e < experts.count; ++e) bench.first_choices[e + 1] += bench.first_choices[e];
        // Each expert's first choice moves on while its choices are filled in, and is the next one's in the end.
        for (i64 i = 0; i < count; ++i) {
            const std::int32_t place = bench.first_choices[bench.expert_ids[i]]++;
            bench.choice_rows[place] = static_cast<std::int32_t>(i / experts.chosen);
            bench.choice_weights[place] = bench.expert_weights[i];
        }
        for (i64 e = experts.count; e > 0; --e) bench.first_choices[e] = bench.first_choices[e - 1];
        bench.first_choices[0] = 0;
    }

    // The next expert from `expert` on that a row chose, the number of experts behind the last one.
    i64 next_chosen(const Experts& experts, i64 expert) const {
        while (expert < experts.count && bench.first_choices[expert + 1] == bench.first_choices[expert]) ++expert;
        return expert;
    }

    void run_experts(const Layer& layer, const char* next) const {
        const Experts& experts = layer.experts;
        const i64 width = model.width, inner = layer.down.weight.columns, stride = (inner + 15) / 16 * 16;
        const Panel all = normalised(layer.mlp_norm, pass.num_rows, nullptr);
        const auto [first_row, end_row] = part(pass.num_rows);  // for experts to pick from
        for (i64 i = first_row; i < end_row; ++i) {
            float* const to = pass.branch + i * pass.stream_stride;
            std::memcpy(to, pass.stream + i * pass.stream_stride, static_cast<std::size_t>(width) * sizeof(float));
            normalise_in_place(layer.mlp_norm, width, to);
        }
        multiply(experts.router, all, nullptr, [&](i64 row, i64 count, const float* products) {
            for (i64 node = 0; node < all.count; ++node) {
                std::memcpy(pass.routes + node * pass.routes_stride + row, products + node * TILE,
                            static_cast<std::size_t>(count) * sizeof(float));
            }
        });
        wait();
        choose_all(experts);
        const i64 first = next_chosen(experts, 0);
        const char* const first_down = begin_of(of_expert(layer.down, experts.down_stride, first));
        for (i64 expert = first, after; expert < experts.count; expert = after) {
            after = next_chosen(experts, expert + 1);
            const bool last = after == experts.count;
            const i64 begin = bench.first_choices[expert];
            const Panel panel(bench.panel, bench.first_choices[expert + 1] - begin, width);
            for (i64 i = 0; i < panel.count; ++i) {
                panel.put(i, pass.branch + bench.choice_rows[begin + i] * pass.stream_stride);
            }
            gate_and_up(layer, of_expert(layer.gate, experts.gate_stride, expert),
                        of_expert(layer.up, experts.up_stride, expert), panel, pass.gated + begin * stride, stride,
                        last ? first_down : begin_of(of_expert(layer.gate, experts.gate_stride, after)),
                        last ? first_down + Ahead::BYTES : begin_of(of_expert(layer.up, experts.up_stride, after)));
        }
        wait();
        // This thread's columns of what experts give; rows of the branch are no longer needed as they were.
        const auto [begin_tile, end_tile] = part(num_tiles(layer.down));
        const i64 begin_column = begin_tile * TILE, columns = smaller(end_tile * TILE, width) - begin_column;
        if (columns <= 0) return;
        for (i64 i = 0; i < pass.num_rows; ++i) {
            std::memset(pass.branch + i * pass.stream_stride + begin_column, 0,
                        static_cast<std::size_t>(columns) * sizeof(float));
        }
        for (i64 expert = first, after; expert < experts.count; expert = after) {
            after = next_chosen(experts, expert + 1);
            const i64 begin = bench.first_choices[expert];
            const Panel panel(bench.panel, bench.first_choices[expert + 1] - begin, inner);
            for (i64 i = 0; i < panel.count; ++i) panel.put(i, pass.gated + (begin + i) * stride);
            const char* const then =
                after == experts.count ? next : begin_of(of_expert(layer.down, experts.down_stride, after));
            multiply(of_expert(layer.down, experts.down_stride, expert), panel, then,
                     [&](i64 row, i64 count, const float* products) {
                         for (i64 i = 0; i < panel.count; ++i) {
                             const float weight = bench.choice_weights[begin + i];
                             float* const to = pass.branch + bench.choice_rows[begin + i] * pass.stream_stride + row;
                             for (i64 r = 0; r < count; ++r) to[r] += products[i * TILE + r] * weight;
                         }
                     });
        }
        for (i64 i = 0; i < pass.num_rows; ++i) {
            float* const to = pass.stream + i * pass.stream_stride + begin_column;
            const float* const from = pass.branch + i * pass.stream_stride + begin_column;
            for (i64 k = 0; k < columns; ++k) to[k] += from[k] * model.residual_scale;
        }
    }

    void run_layer(i64 index) const {
        const Layer& layer = model.layers[static_cast<std::size_t>(index)];
        const i64 count = pass.num_rows, attended_width = layer.num_heads * layer.head_dim;
        keep_hidden(index, nullptr);
        const Form form = form_for_projections(layer);
        AttentionAhead ahead = ahead_of(layer, index);
        const Panel rest(bench.rest, count, index == 0 && model.has_features ? 2 * model.width : model.width, form);
        const Panel* const taken = form == Form::pairs ? &rest : nullptr;
        project(layer,
                index == 0 && model.has_features ? with_features(layer.input_norm, form, taken)
                                                 : normalised(layer.input_norm, count, nullptr, form, taken),
                taken, &ahead);
        wait();
        prepare(layer, index);
        wait();
        attend_all(layer, index, ahead);
        wait();
        const Panel attended = arranged(pass.attended, pass.attended_stride, attended_width, form_for(layer.output));
        const bool last = static_cast<std::size_t>(index) + 1 == model.layers.size();
        const char* const next =
            begin_of(last ? model.head : model.layers[static_cast<std::size_t>(index) + 1].projections[0]);
        const char* const mlp = begin_of(layer.experts.given()       ? layer.experts.router
                                         : layer.gate.weight.given() ? layer.gate
                                                                     : layer.up);
        if (layer.parallel) {
            leave_branch(layer.output, attended, mlp);
        } else {
            add_branch(layer.output, attended, layer.attended_norm, nullptr, mlp);
            wait();
        }
        if (layer.experts.given()) {
            run_experts(layer, next);
        } else {
            run_mlp(layer, next);
        }
        wait();
    }

    void run_head() const {
        keep_hidden(static_cast<i64>(model.layers.size()), &model.final_norm);
        if (call.outputs != nullptr) {
            const auto [begin, end] = part(pass.num_rows);
            for (i64 i = begin; i < end; ++i) {
                std::memcpy(call.outputs + pass.rows[i] * model.width, pass.stream + i * pass.stream_stride,
                            static_cast<std::size_t>(model.width) * sizeof(float));
            }
        }
        if (pass.num_wanted == 0) return;
        const i64 vocab = model.head.weight.rows;
        const Panel panel = normalised(model.final_norm, pass.num_wanted, pass.wanted, form_for(model.head));
        multiply(model.head, panel, nullptr, [&](i64 row, i64 count, const float* products) {
            for (i64 node = 0; node < panel.count; ++node) {
                float logits[TILE];
                std::memcpy(logits, products + node * TILE, sizeof(logits));
                for (i64 r = 0; r < count; ++r) logits[r] *= model.logit_scale;
                if (model.logit_softcap != 0.0f) {
                    for (i64 r = 0; r < TILE; r += W) {
                        const Float capped = hyperbolic_tangent(load(logits + r) * (1.0f / model.logit_softcap));
                        store(logits + r, capped * model.logit_softcap);
                    }
                }
                narrow_row(logits, count, call.logits_type, call.logits, pass.logit_rows[node] * vocab + row);
            }
        });
    }

    void run() const {
        embed();
        wait();
        for (i64 index = 0; index < static_cast<i64>(model.layers.size()); ++index) run_layer(index);
        run_head();
    }
};

}  // namespace
}  // namespace sequoia::forward
