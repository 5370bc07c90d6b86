// Whole forwards of a decoder on a CPU, in one call and on the model's own weights.
//
// Computes    the logits of B x N rows (tree nodes, or a chunk of a prompt) behind what each request has committed, and
//             writes their keys and values into the cache: embedding, norms, projections, rotary embedding, attention,
//             MLP, head. What a model is made of is a description (model.h), so families are data.
// Plan        Rows go through all layers in passes of up to MAX_ROWS: row-major weights are read once a pass, where they
//             lie. A team of threads (team.h) shares out weight rows and heads; phases end at barriers (work.h).
// Memory      Reads every weight once a pass, the visible cache rows once for ROW_BLOCK query rows; writes the rows' keys
//             and values, and the logits. Scratch: a few rows of activations a thread.
// Numerics    Sums in float32; weights and cache rows are widened, activations are never rounded between products. Only
//             where the CPU multiplies pairs of bfloat16 (pairs.h), bfloat16 weights meet rounded activations, those of
//             keys also what rounding took away. A row's numbers are added in one order, whatever rows are fed beside it
//             and however many threads there are: a node's logits are the bits that feeding its path alone gives. The
//             order depends on the CPU's vectors.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bound.h"
#include "pass.h"
#include "peaks.h"

namespace py = pybind11;

namespace sequoia::forward {

void work_portable(const Pass& pass, int thread);
void work_avx2(const Pass& pass, int thread);
void work_avx512(const Pass& pass, int thread);
void work_avx512_bf16(const Pass& pass, int thread);
void measure_portable(const Peak& peak, int thread);
void measure_avx2(const Peak& peak, int thread);
void measure_avx512(const Peak& peak, int thread);

namespace {

constexpr std::int64_t MAX_HEAD_DIM = 512;
constexpr int WORD_BITS = 32;
// How many threads share a pass. n of them take 1/n of its products' time and n times what a thread adds to a barrier, so
// the best n is the root of products by barriers and of what is multiplied in that time (0.2 us, taken long).
constexpr double PRODUCTS_A_BARRIER = 2000.0;
constexpr std::size_t BARRIERS_A_LAYER = 7, OTHER_BARRIERS = 4;

// ---- instruction sets ----

struct InstructionSet {
    const char* name;
    Work work;
    MeasurePeak measure;
    int lanes;   // of floats
    bool pairs;  // of bfloat16 are multiplied
    bool available;
};

std::vector<InstructionSet> instruction_sets() {  // the best first
    std::vector<InstructionSet> sets;
#if defined(SEQUOIA_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool halves = __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && halves && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(SEQUOIA_AVX512_BF16)
    sets.push_back({"avx512_bf16", work_avx512_bf16, measure_avx512, 16, true,
                    avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
    sets.push_back({"avx512", work_avx512, measure_avx512, 16, false, avx512});
    sets.push_back({"avx2", work_avx2, measure_avx2, 8, false, avx2 && halves});
#endif
    sets.push_back({"portable", work_portable, measure_portable, 4, false, true});
    return sets;
}

// The one that is named, or the best that the CPU has.
InstructionSet choose_instruction_set(const std::string& name) {
    std::string known;
    for (const InstructionSet& set : instruction_sets()) {
        if (set.available && (name.empty() || name == set.name)) return set;
        if (name == set.name) {
            throw std::invalid_argument("SEQUOIA_HOST_ISA: " + name + " is not what this CPU has");
        }
        known += (known.empty() ? "" : ", ") + std::string(set.name);
    }
    throw std::invalid_argument("SEQUOIA_HOST_ISA must be one of " + known + ", got " + name);
}

// ---- peaks ----

// Seconds of one measurement by a team of threads.
double seconds_of(const InstructionSet& set, const float* data, bool pairs, std::int64_t count, int num_threads) {
    if (num_threads < 1 || count < 0) throw std::invalid_argument("forward: a peak needs threads and a count");
    struct Job {
        Peak peak;
        MeasurePeak measure;
    };
    std::vector<float> sums(static_cast<std::size_t>(num_threads) * 16);
    Job job{{data, pairs, count, num_threads, sums.data()}, set.measure};
    const auto begin = std::chrono::steady_clock::now();
    run_in_team(
        num_threads,
        [](void* argument, int thread) {
            const Job& shared = *static_cast<const Job*>(argument);
            shared.measure(shared.peak, thread);
        },
        &job);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double read_seconds(const std::string& instruction_set, std::uintptr_t data, std::int64_t num_bytes, int num_threads) {
    const InstructionSet set = choose_instruction_set(instruction_set);
    return seconds_of(set, reinterpret_cast<const float*>(data), false, num_bytes / 4, num_threads);
}

// Multiply-adds a second, of single floats or of bfloat16.
double multiply_add_rate(const std::string& instruction_set, std::int64_t steps, int num_threads, bool pairs) {
    const InstructionSet set = choose_instruction_set(instruction_set);
    if (pairs && !set.pairs) throw std::invalid_argument("forward: " + std::string(set.name) + " multiplies no pairs");
    const double count = static_cast<double>(steps * PEAK_CHAINS * set.lanes * (pairs ? 2 : 1) * num_threads);
    return count / seconds_of(set, nullptr, pairs, steps, num_threads);
}

// ---- descriptions ----

ElementType element_type(int code) {
    const ElementType type = static_cast<ElementType>(code);
    if (type != ElementType::float32 && type != ElementType::bfloat16 && type != ElementType::float16) {
        throw std::invalid_argument("forward: element type must be 0, 2 or 3, got " + std::to_string(code));
    }
    return type;
}

void require(bool holds, const std::string& rule) {
    if (!holds) throw std::invalid_argument("forward: " + rule);
}

// (packing, scales, their element type, zeros, order, columns of a group, the tensor's rows, block, zero shift)
Quantised quantised_of(const std::vector<std::int64_t>& fields, const Matrix& matrix) {
    require(fields.size() == 9, "a matrix of few bits must have 9 fields more");
    Quantised form;
    require(fields[0] >= 1 && fields[0] <= 3, "packing must be in 1..3");
    form.packing = static_cast<Packing>(fields[0]);
    form.scales = static_cast<int>(fields[1]);
    form.scales_type = element_type(static_cast<int>(fields[2]));
    form.zeros = static_cast<int>(fields[3]);
    form.order = static_cast<int>(fields[4]);
    form.group = fields[5];
    form.whole_rows = fields[6];
    form.block = fields[7];
    form.zero_shift = static_cast<float>(fields[8]);
    require(form.scales >= 0 && !matrix.transposed && matrix.first_row + matrix.rows <= form.whole_rows,
            "a matrix of few bits must have scales, and rows of its tensor");
    if (!form.four_bits()) return form;
    require(form.group >= 1 && (form.group % 16 == 0 || form.group >= matrix.columns), "a group must be of a multiple of 16 columns");
    require(matrix.first_row % PACKED_ROWS == 0 && matrix.columns % 8 == 0,
            "a matrix of 4 bits must have a multiple of 8 columns, and begin at a multiple of 64 rows");
    if (form.packing == Packing::int4_words) {
        require(form.zeros >= 0 && form.order >= 0 && form.whole_rows % 8 == 0 && matrix.rows % 8 == 0,
                "words must have zeros, an order, and a multiple of 8 rows");
    } else {
        require((form.block == 32 || form.block == 64) && form.whole_rows % 16 == 0 && matrix.rows % 16 == 0,
                "blocks must be of 32 or 64 rows, and have a multiple of 16 rows together");
    }
    return form;
}

// (tensor, first row, rows, columns, element type, transposed) and what quantised_of takes, if anything; or None
Matrix matrix_of(const py::object& source) {
    Matrix matrix;
    if (source.is_none()) return matrix;
    const auto fields = source.cast<std::vector<std::int64_t>>();
    require(fields.size() >= 6, "a matrix must have 6 fields");
    matrix.tensor = static_cast<int>(fields[0]);
    matrix.first_row = fields[1];
    matrix.rows = fields[2];
    matrix.columns = fields[3];
    matrix.type = element_type(static_cast<int>(fields[4]));
    matrix.transposed = fields[5] != 0;
    if (fields.size() > 6) matrix.quantised = quantised_of({fields.begin() + 6, fields.end()}, matrix);
    return matrix;
}

// (weight, bias), or None
Linear linear_of(const py::object& source) {
    Linear linear;
    if (source.is_none()) return linear;
    const py::tuple fields = source;
    linear.weight = matrix_of(fields[0]);
    linear.bias = matrix_of(fields[1]);
    return linear;
}

// (kind, weight, bias, eps, offset), or None
Norm norm_of(const py::object& source) {
    Norm norm;
    if (source.is_none()) return norm;
    const py::tuple fields = source;
    norm.kind = static_cast<NormKind>(fields[0].cast<int>());
    norm.weight = matrix_of(fields[1]);
    norm.bias = matrix_of(fields[2]);
    norm.eps = fields[3].cast<float>();
    norm.offset = fields[4].cast<float>();
    return norm;
}

Heads heads_of(const py::object& source) {
    const py::tuple fields = source;
    return {fields[0].cast<std::int64_t>(), fields[1].cast<std::int64_t>()};
}

// (router, count, chosen, normalised, strides of gate, up and down), or None
Experts experts_of(const py::object& source) {
    Experts experts;
    if (source.is_none()) return experts;
    const py::tuple fields = source;
    experts.router = linear_of(fields[0]);
    experts.count = fields[1].cast<std::int64_t>();
    experts.chosen = fields[2].cast<std::int64_t>();
    experts.normalised = fields[3].cast<bool>();
    experts.gate_stride = fields[4].cast<std::int64_t>();
    experts.up_stride = fields[5].cast<std::int64_t>();
    experts.down_stride = fields[6].cast<std::int64_t>();
    return experts;
}

Layer layer_of(const py::dict& source) {
    Layer layer;
    layer.num_heads = source["num_heads"].cast<std::int64_t>();
    layer.num_kv_heads = source["num_kv_heads"].cast<std::int64_t>();
    layer.head_dim = source["head_dim"].cast<std::int64_t>();
    layer.scale = source["scale"].cast<float>();
    layer.softcap = source["softcap"].cast<float>();
    layer.window = source["window"].cast<std::int64_t>();
    layer.rotation = source["rotation"].cast<int>();
    layer.rotated_dims = source["rotated_dims"].cast<std::int64_t>();
    layer.parallel = source["parallel"].cast<bool>();
    layer.norms_whole_rows = source["norms_whole_rows"].cast<bool>();
    layer.input_norm = norm_of(source["input_norm"]);
    layer.query_norm = norm_of(source["query_norm"]);
    layer.key_norm = norm_of(source["key_norm"]);
    layer.attended_norm = norm_of(source["attended_norm"]);
    layer.mlp_norm = norm_of(source["mlp_norm"]);
    layer.mlp_output_norm = norm_of(source["mlp_output_norm"]);
    for (const py::handle linear : source["projections"]) {
        layer.projections.push_back(linear_of(py::reinterpret_borrow<py::object>(linear)));
    }
    layer.queries = heads_of(source["queries"]);
    layer.keys = heads_of(source["keys"]);
    layer.values = heads_of(source["values"]);
    layer.output = linear_of(source["output"]);
    layer.gate = linear_of(source["gate"]);
    layer.up = linear_of(source["up"]);
    layer.down = linear_of(source["down"]);
    layer.experts = experts_of(source["experts"]);
    layer.activation = static_cast<Activation>(source["activation"].cast<int>());
    layer.cache_type = element_type(source["cache_type"].cast<int>());
    return layer;
}

void check_norm(const Norm& norm, std::int64_t size, const char* name) {
    require(norm.kind == NormKind::none || norm.kind == NormKind::rms || norm.kind == NormKind::layer,
            std::string(name) + " must have kind 0, 1 or 2");
    require(!norm.weight.given() || norm.weight.columns == size, std::string(name) + " must have a weight of its row's size");
    require(!norm.bias.given() || norm.bias.columns == size, std::string(name) + " must have a bias of its row's size");
    require(!norm.weight.packed() && !norm.bias.packed(), std::string(name) + " must not be of few bits");
}

void check_linear(const Linear& linear, std::int64_t rows, std::int64_t columns, const char* name) {
    require(linear.weight.given() && linear.weight.rows == rows && linear.weight.columns == columns,
            std::string(name) + " must have a weight of [" + std::to_string(rows) + ", " + std::to_string(columns) +
                "], got [" + std::to_string(linear.weight.rows) + ", " + std::to_string(linear.weight.columns) + "]");
    require(!linear.weight.transposed || linear.weight.first_row == 0, std::string(name) + " must be whole if transposed");
    require(!linear.bias.given() || (linear.bias.columns == rows && !linear.bias.packed()),
            std::string(name) + " must have a bias of its rows");
}

void check_experts(const Layer& layer, std::int64_t width) {
    const Experts& experts = layer.experts;
    check_linear(experts.router, experts.count, width, "router");
    require(experts.chosen >= 1 && experts.chosen <= experts.count, "chosen experts must be in 1..their number");
    require(layer.gate.weight.given() && !layer.gate.bias.given() && !layer.up.bias.given() && !layer.down.bias.given() &&
                !layer.down.weight.transposed && !layer.gate.weight.packed() && !layer.up.weight.packed() &&
                !layer.down.weight.packed() && !experts.router.weight.packed(),
            "experts must have gates, and neither biases nor weights that are transposed or of few bits");
    require(experts.gate_stride >= layer.gate.weight.rows && experts.up_stride >= layer.up.weight.rows &&
                experts.down_stride >= width,
            "an expert's weights must lie behind those of the one before");
    require(!layer.parallel && !layer.mlp_output_norm.given(),
            "layers with experts must not be parallel, nor have a norm behind them");
}

void check_layer(const Layer& layer, const Model& model) {
    const std::int64_t d = layer.head_dim, width = model.width;
    require(d > 0 && d <= MAX_HEAD_DIM, "head_dim must be in 1.." + std::to_string(MAX_HEAD_DIM));
    require(layer.num_kv_heads > 0 && layer.num_heads > 0 && layer.num_heads % layer.num_kv_heads == 0,
            "num_heads must be a multiple of num_kv_heads");
    require(!layer.projections.empty(), "a layer must have projections");
    std::int64_t projected = 0;
    const std::int64_t inputs = model.has_features && &layer == &model.layers.front() ? 2 * width : width;
    for (const Linear& linear : layer.projections) {
        check_linear(linear, linear.weight.rows, inputs, "projections");
        projected += linear.weight.rows;
    }
    const auto fits = [&](const Heads& heads, std::int64_t count) {
        return heads.first >= 0 && heads.stride >= 0 && heads.first + (count - 1) * heads.stride + d <= projected;
    };
    require(fits(layer.queries, layer.num_heads) && fits(layer.keys, layer.num_kv_heads) &&
                fits(layer.values, layer.num_kv_heads),
            "heads must lie in the projections");
    require(layer.rotation < static_cast<int>(model.rotation_dims.size()), "rotation must be one of the tables");
    require(layer.rotation < 0 || (layer.rotated_dims >= 0 && layer.rotated_dims <= d && layer.rotated_dims % 2 == 0 &&
                                   layer.rotated_dims == model.rotation_dims[static_cast<std::size_t>(layer.rotation)]),
            "rotated_dims must be even, at most head_dim, and those of the table");
    const std::int64_t heads = layer.norms_whole_rows ? layer.num_heads : 1;
    const std::int64_t kv_heads = layer.norms_whole_rows ? layer.num_kv_heads : 1;
    require(!layer.norms_whole_rows || (layer.queries.stride == d && layer.keys.stride == d),
            "norms over all heads need heads that lie side by side");
    check_norm(layer.input_norm, width, "input_norm");
    check_norm(layer.query_norm, heads * d, "query_norm");
    check_norm(layer.key_norm, kv_heads * d, "key_norm");
    check_norm(layer.attended_norm, width, "attended_norm");
    check_norm(layer.mlp_norm, width, "mlp_norm");
    check_norm(layer.mlp_output_norm, width, "mlp_output_norm");
    require(!layer.parallel || !(layer.attended_norm.given() || layer.mlp_output_norm.given()),
            "parallel layers have no norms behind their branches");
    check_linear(layer.output, width, layer.num_heads * d, "output");
    const std::int64_t inner = layer.up.weight.rows;
    check_linear(layer.up, inner, width, "up");
    if (layer.gate.weight.given()) {
        check_linear(layer.gate, inner, width, "gate");
        require(!layer.gate.weight.transposed && !layer.up.weight.transposed, "a gate and its up must not be transposed");
    }
    check_linear(layer.down, width, inner, "down");
    if (layer.experts.given()) check_experts(layer, width);
    require(static_cast<int>(layer.activation) >= 0 && static_cast<int>(layer.activation) <= 4,
            "activation must be in 0..4");
}

Model model_of(const py::dict& source) {
    Model model;
    model.width = source["width"].cast<std::int64_t>();
    model.embedding = matrix_of(source["embedding"]);
    model.positions = matrix_of(source["positions"]);
    model.position_offset = source["position_offset"].cast<std::int64_t>();
    model.embedding_scale = source["embedding_scale"].cast<float>();
    model.residual_scale = source["residual_scale"].cast<float>();
    model.final_norm = norm_of(source["final_norm"]);
    model.head = linear_of(source["head"]);
    model.logit_scale = source["logit_scale"].cast<float>();
    model.logit_softcap = source["logit_softcap"].cast<float>();
    model.rotation_dims = source["rotation_dims"].cast<std::vector<std::int64_t>>();
    for (const py::handle layer : source["layers"]) {
        model.layers.push_back(layer_of(py::reinterpret_borrow<py::dict>(layer)));
    }
    require(model.width > 0, "a model must have a width");  // without layers it is a linear layer on an embedding
    require(model.embedding.given() && model.embedding.columns == model.width, "embedding must be as wide as the stream");
    require(!model.positions.given() || model.positions.columns == model.width,
            "positions must be as wide as the stream");
    require(!model.embedding.packed() && !model.positions.packed(), "embedding and positions must not be of few bits");
    require(model.position_offset >= 0, "position_offset must not be negative");
    check_norm(model.final_norm, model.width, "final_norm");
    check_linear(model.head, model.head.weight.rows, model.width, "head");
    if (source.contains("feature_norm")) {
        model.has_features = true;
        model.feature_norm = norm_of(source["feature_norm"]);
        model.normed_residual = source["normed_residual"].cast<bool>();
        check_norm(model.feature_norm, model.width, "feature_norm");
    }
    for (const Layer& layer : model.layers) check_layer(layer, model);
    return model;
}

// ---- passes ----

// A vector that grows and is aligned to a cache line.
class Floats {
  public:
    float* reserve(std::int64_t size) {
        if (size > size_) {
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>((size * 4 + 63) / 64 * 64))));
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = size;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    std::int64_t size_ = 0;
};

// Where a row of a request lies in the caches.
std::int64_t row_of(const Call& call, std::int64_t request, std::int64_t row) {
    if (!call.paged()) return request * call.cache_rows + row;
    const std::int64_t page = call.block_table[request * (call.cache_rows / call.page_size) + row / call.page_size];
    return page * call.page_size + row % call.page_size;
}

std::int64_t first_row_of(const Call& call, std::int64_t request) {
    return call.paged() ? 0 : request * call.cache_rows;
}

// Appends where rows [begin, end) of a request lie, behind `first_row_of`.
void append_rows(const Call& call, std::int64_t request, std::int64_t begin, std::int64_t end,
                 std::vector<std::int32_t>& rows) {
    const std::int64_t first = first_row_of(call, request), run = call.paged() ? call.page_size : end;
    while (begin < end) {  // stretches that lie side by side
        const std::int64_t stop = std::min(end, (begin / run + 1) * run);
        std::int64_t row = row_of(call, request, begin) - first;
        for (; begin < stop; ++begin, ++row) rows.push_back(static_cast<std::int32_t>(row));
    }
}

// Columns of the segments of a pass under one window.
struct ColumnsMemory {
    std::vector<std::int32_t> rows, num_hidden;
    std::vector<float> tree_hidden;
    std::vector<std::uint32_t> seen;

    Columns build(const Call& call, const Segment& segment, std::int64_t window) {
        const std::int64_t cache_len = call.cache_lens[segment.request], num_words = call.num_words;
        const std::int64_t span = window > 0 ? window : std::numeric_limits<std::int64_t>::max() / 2;
        rows.clear();
        num_hidden.clear();
        seen.assign(static_cast<std::size_t>((segment.num_nodes + 1) * num_words), 0u);
        std::uint32_t* const by_any = seen.data() + segment.num_nodes * num_words;
        std::int64_t first_prefix = cache_len;
        for (std::int64_t i = 0; i < segment.num_nodes; ++i) {
            const std::int64_t row = (call.mask_per_request ? segment.request * call.num_nodes : 0) + segment.first_node + i;
            const std::uint32_t* const mask = call.tree_mask + row * num_words;
            std::uint32_t* const visible = seen.data() + i * num_words;
            std::int64_t num_bits = 0;
            for (std::int64_t w = 0; w < num_words; ++w) num_bits += __builtin_popcount(mask[w]);
            const std::int64_t hidden = std::clamp<std::int64_t>(cache_len + num_bits - span, 0, cache_len);
            num_hidden.push_back(static_cast<std::int32_t>(hidden));
            first_prefix = std::min(first_prefix, hidden);
            std::int64_t num_outside = num_bits - span;  // the row's oldest ancestors are beyond its window
            for (std::int64_t w = 0; w < num_words; ++w) {
                std::uint32_t word = mask[w];
                for (; num_outside > 0 && word != 0; --num_outside) word &= word - 1;
                visible[w] = word;
                by_any[w] |= word;
            }
        }
        for (std::int32_t& hidden : num_hidden) hidden -= static_cast<std::int32_t>(first_prefix);
        append_rows(call, segment.request, first_prefix, cache_len, rows);
        const std::int64_t num_prefix = cache_len - first_prefix;
        std::vector<std::int64_t> slots;
        for (std::int64_t slot = 0; slot < num_words * WORD_BITS; ++slot) {
            if ((by_any[slot / WORD_BITS] >> (slot % WORD_BITS) & 1u) == 0) continue;
            slots.push_back(slot);
            append_rows(call, segment.request, cache_len + slot, cache_len + slot + 1, rows);
        }
        const std::int64_t num_tree = static_cast<std::int64_t>(slots.size());
        tree_hidden.assign(static_cast<std::size_t>(segment.num_nodes * num_tree), -std::numeric_limits<float>::infinity());
        for (std::int64_t i = 0; i < segment.num_nodes; ++i) {
            for (std::int64_t column = 0; column < num_tree; ++column) {
                const std::int64_t slot = slots[static_cast<std::size_t>(column)];
                const std::uint32_t word = seen[static_cast<std::size_t>(i * num_words + slot / WORD_BITS)];
                if ((word >> (slot % WORD_BITS) & 1u) != 0) tree_hidden[static_cast<std::size_t>(i * num_tree + column)] = 0.0f;
            }
        }
        return {num_prefix + num_tree, num_prefix, first_row_of(call, segment.request), rows.data(), num_hidden.data(),
                tree_hidden.data(), num_tree};
    }
};

std::int64_t whole_vectors(std::int64_t size) { return (size + 15) / 16 * 16; }

// Floats from a row to the next. An odd number of cache lines: the same columns of many rows, which a tile's products are
// added to, would otherwise meet in few sets of the first-level cache.
std::int64_t row_stride(std::int64_t size) { return ((size + 15) / 16 | 1) * 16; }

class Forward : public Runner {
  public:
    Forward(const py::dict& description, const std::string& instruction_set)
        : model_(model_of(description)), set_(choose_instruction_set(instruction_set)) {
        std::int64_t projected = 0, attended = 0, inner = 0, experts = 0;
        for (const Layer& layer : model_.layers) {
            std::int64_t rows = 0;
            for (const Linear& linear : layer.projections) rows += linear.weight.rows;
            projected = std::max(projected, rows);
            attended = std::max(attended, layer.num_heads * layer.head_dim);
            inner = std::max(inner, layer.down.weight.columns);
            const std::int64_t chosen = std::max<std::int64_t>(layer.experts.chosen, 1);
            const std::int64_t of_mlp = (layer.gate.weight.given() ? 3 : 2) * layer.down.weight.columns;
            num_weights_ += (rows + layer.num_heads * layer.head_dim + of_mlp * chosen) * model_.width;
            gated_floats_ = std::max(gated_floats_, whole_vectors(layer.down.weight.columns) * chosen);
            experts = std::max(experts, layer.experts.count);
            chosen_ = std::max(chosen_, layer.experts.chosen);
            head_dim_ = std::max(head_dim_, layer.head_dim);
            const auto known = std::find(windows_.begin(), windows_.end(), layer.window);
            window_of_layer_.push_back(static_cast<int>(known - windows_.begin()));
            if (known == windows_.end()) windows_.push_back(layer.window);
        }
        num_weights_ += model_.head.weight.rows * model_.width;
        for_each_linear([this](const Linear& linear) {
            if (!linear.weight.quantised.four_bits()) return;
            packed_floats_ = std::max(packed_floats_, PACKED_FLOATS + linear.weight.num_groups() * 2 * PACKED_ROWS);
        });
        stream_stride_ = row_stride(std::max({model_.width, attended, projected}));
        projected_stride_ = row_stride(projected);
        attended_stride_ = row_stride(attended);
        gated_stride_ = row_stride(inner);
        gated_floats_ = std::max(gated_floats_, gated_stride_);
        routes_stride_ = whole_vectors(experts);
        widest_ = std::max({stream_stride_, projected_stride_, attended_stride_, gated_stride_});
        if (model_.has_features) widest_ = std::max(widest_, whole_vectors(2 * model_.width));
        widest_ = (widest_ + 31) / 32 * 32;  // of pairs as well
    }

    const char* instruction_set() const { return set_.name; }
    std::int64_t num_embeddings() const override { return model_.embedding.rows; }
    std::int64_t vocab() const override { return model_.head.weight.rows; }
    bool accepts(const Call& call) const override { return refusal(call).empty(); }

    // What is wrong with a call's numbers, empty where nothing is. Nothing has been written then.
    std::string refusal(const Call& call) const {
        if (model_.positions.given() && call.max_position + model_.position_offset >= model_.positions.rows) {
            return "max_position must be in the table of " + std::to_string(model_.positions.rows) + " positions, got " +
                   std::to_string(call.max_position + model_.position_offset);
        }
        if (model_.has_features != (call.features != nullptr)) {
            return std::string("features must ") + (model_.has_features ? "come with the rows" : "be none");
        }
        for (std::int64_t i = 0; i < call.num_rows(); ++i) {
            const bool known = call.tokens[i] >= 0 && call.tokens[i] < model_.embedding.rows;
            if (!known && call.is_active(i / call.num_nodes)) {
                return "input_ids must be in 0.." + std::to_string(model_.embedding.rows - 1) + ", got " +
                       std::to_string(call.tokens[i]);
            }
        }
        for (std::int64_t b = 0; b < call.num_requests; ++b) {
            if (!call.is_active(b)) continue;
            std::int64_t rows_in_use = call.cache_lens[b];
            for (std::int64_t i = 0; i < call.num_nodes; ++i) {
                const std::int64_t slot = std::int64_t{call.cache_lens[b]} + call.node_ids[i];
                if (call.cache_lens[b] < 0 || call.node_ids[i] < 0 || slot >= call.cache_rows) {
                    return "cache_lens must leave room for the nodes in a cache of " + std::to_string(call.cache_rows) +
                           " rows, got row " + std::to_string(slot);
                }
                rows_in_use = std::max(rows_in_use, slot + 1);
                const std::int64_t position = std::int64_t{call.cache_lens[b]} + call.depths[i];
                if (call.depths[i] < 0 || position >= call.cache_rows) {  // where the tables of positions may end
                    return "depths must be positions of the cache's rows, got depth " + std::to_string(call.depths[i]);
                }
                const std::uint32_t* const mask =
                    call.tree_mask + ((call.mask_per_request ? b * call.num_nodes : 0) + i) * call.num_words;
                for (std::int64_t w = call.num_words; w-- > 0;) {
                    if (mask[w] == 0) continue;
                    const std::int64_t highest = w * WORD_BITS + 31 - __builtin_clz(mask[w]);
                    if (call.cache_lens[b] + highest >= call.cache_rows) {
                        return "tree_mask must show rows of the cache, got slot " + std::to_string(highest);
                    }
                    rows_in_use = std::max(rows_in_use, call.cache_lens[b] + highest + 1);
                    break;
                }
            }
            for (std::int64_t page = 0; call.paged() && page * call.page_size < rows_in_use; ++page) {
                const std::int32_t number = call.block_table[b * (call.cache_rows / call.page_size) + page];
                if (number >= 0 && number < call.num_pages) continue;
                return "block_table must have pages in 0.." + std::to_string(call.num_pages - 1) + " for " +
                       std::to_string(rows_in_use) + " rows of request " + std::to_string(b) + ", got " +
                       std::to_string(number) + " in place " + std::to_string(page);
            }
            for (std::int64_t k = 0; call.wanted_nodes != nullptr && k < call.num_wanted; ++k) {
                const std::int64_t node = call.wanted_nodes[b * call.num_wanted + k];
                if (node >= 0 && node < call.num_nodes) continue;
                return "last_row must be in 0.." + std::to_string(call.num_nodes - 1) + ", got " + std::to_string(node);
            }
        }
        return {};
    }

    void run(const Call& call, int num_threads) override {
        const std::lock_guard<std::mutex> lock(busy_.get());
        rows_.clear();
        for (std::int64_t row = 0; row < call.num_rows(); ++row) {
            if (call.is_active(row / call.num_nodes)) rows_.push_back(row);
        }
        const auto count = static_cast<std::int64_t>(rows_.size());
        num_threads = threads_for(count, num_threads);
        for (std::int64_t first = 0; first < count; first += MAX_ROWS) {
            run_pass(call, rows_.data() + first, std::min(MAX_ROWS, count - first), num_threads);
        }
    }

    // How many of these threads share a pass over so many rows.
    int threads_for(std::int64_t num_rows, int num_threads) const {
        const double products = static_cast<double>(std::clamp<std::int64_t>(num_rows, 0, MAX_ROWS) * num_weights_);
        const std::size_t barriers = BARRIERS_A_LAYER * model_.layers.size() + OTHER_BARRIERS;
        const double best = std::sqrt(products / (PRODUCTS_A_BARRIER * static_cast<double>(barriers)));
        return static_cast<int>(std::clamp(best, 1.0, std::max(1.0, static_cast<double>(num_threads))));
    }

  private:
    void run_pass(const Call& call, const std::int64_t* rows, std::int64_t num_rows, int num_threads) {
        Pass pass{};
        pass.model = &model_;
        pass.call = &call;
        pass.rows = rows;
        pass.num_rows = num_rows;

        segments_.clear();
        positions_.clear();
        cache_rows_.clear();
        wanted_.clear();
        logit_rows_.clear();
        for (std::int64_t i = 0; i < num_rows; ++i) {
            const std::int64_t request = rows[i] / call.num_nodes, node = rows[i] % call.num_nodes;
            if (i == 0 || node == 0) segments_.push_back({request, node, 0, i});
            ++segments_.back().num_nodes;
            const std::int64_t slot = std::int64_t{call.cache_lens[request]} + call.node_ids[node];
            cache_rows_.push_back(row_of(call, request, slot));
            const std::int64_t position = std::int64_t{call.cache_lens[request]} + call.depths[node];
            positions_.push_back(static_cast<std::int32_t>(std::clamp<std::int64_t>(position, 0, call.max_position)));
            if (call.wanted_nodes == nullptr) {
                wanted_.push_back(static_cast<std::int32_t>(i));
                logit_rows_.push_back(rows[i]);
                continue;
            }
            for (std::int64_t k = request * call.num_wanted; k < (request + 1) * call.num_wanted; ++k) {
                if (call.wanted_nodes[k] != node) continue;
                wanted_.push_back(static_cast<std::int32_t>(i));
                logit_rows_.push_back(k);
                break;  // MAX_ROWS of a pass
            }
        }
        const std::size_t num_columns = windows_.size() * segments_.size();
        if (columns_memory_.size() < num_columns) columns_memory_.resize(num_columns);
        columns_.clear();
        std::int64_t longest = 0;
        for (const std::int64_t window : windows_) {
            for (const Segment& segment : segments_) {
                columns_.push_back(columns_memory_[columns_.size()].build(call, segment, window));
                longest = std::max(longest, columns_.back().count);
            }
        }
        pass.segments = segments_.data();
        pass.num_segments = static_cast<std::int64_t>(segments_.size());
        pass.columns = columns_.data();
        pass.window_of_layer = window_of_layer_.data();
        pass.positions = positions_.data();
        pass.cache_rows = cache_rows_.data();
        pass.wanted = wanted_.data();
        pass.logit_rows = logit_rows_.data();
        pass.num_wanted = static_cast<std::int64_t>(wanted_.size());

        pass.stream_stride = stream_stride_;
        pass.projected_stride = projected_stride_;
        pass.attended_stride = attended_stride_;
        pass.gated_stride = gated_stride_;
        pass.scores_stride = row_stride(longest);
        pass.stream = stream_.reserve(num_rows * stream_stride_);
        pass.branch = branch_.reserve(num_rows * stream_stride_);
        pass.projected = projected_.reserve(num_rows * projected_stride_);
        pass.attended = attended_.reserve(num_rows * attended_stride_);
        pass.gated = gated_.reserve(num_rows * gated_floats_);
        pass.routes_stride = routes_stride_;
        pass.routes = routes_.reserve(num_rows * routes_stride_);
        if (memory_.size() < static_cast<std::size_t>(num_threads)) memory_.resize(static_cast<std::size_t>(num_threads));
        benches_.clear();
        for (int thread = 0; thread < num_threads; ++thread) {
            BenchMemory& memory = memory_[static_cast<std::size_t>(thread)];
            benches_.push_back({memory.panel.reserve(num_rows * widest_), memory.rest.reserve(num_rows * widest_),
                                memory.tiles.reserve(2 * MAX_ROWS * STRIP),
                                memory.unpacked.reserve(packed_floats_),
                                memory.rows.reserve(2 * stream_stride_), memory.wide.reserve(4 * widest_),
                                memory.sums.reserve(TILE * PARTED_ROWS * whole_vectors(1)),
                                memory.queries.reserve(ROW_BLOCK * whole_vectors(head_dim_)),
                                memory.keys.reserve(whole_vectors(head_dim_) * whole_vectors(1)),
                                memory.scores.reserve(ROW_BLOCK * pass.scores_stride),
                                memory.mixed.reserve(ROW_BLOCK * whole_vectors(head_dim_)),
                                memory.shares.reserve(routes_stride_), memory.expert_ids.reserve(num_rows * chosen_),
                                memory.expert_weights.reserve(num_rows * chosen_),
                                memory.first_choices.reserve(routes_stride_ + 1),
                                memory.choice_rows.reserve(num_rows * chosen_),
                                memory.choice_weights.reserve(num_rows * chosen_)});
        }
        pass.benches = benches_.data();
        pass.num_threads = num_threads;
        pass.team = &shared_team();
        struct Argument {
            const Pass* pass;
            Work work;
        } argument{&pass, set_.work};
        run_in_team(
            num_threads,
            [](void* given, int thread) {
                const Argument& here = *static_cast<const Argument*>(given);
                here.work(*here.pass, thread);
            },
            &argument);
    }

    template <class Visit>
    void for_each_linear(const Visit& visit) const {
        for (const Layer& layer : model_.layers) {
            for (const Linear& linear : layer.projections) visit(linear);
            for (const Linear* linear : {&layer.output, &layer.gate, &layer.up, &layer.down}) visit(*linear);
        }
        visit(model_.head);
    }

    struct BenchMemory {
        Floats panel, rest, tiles, unpacked, rows, wide, sums, queries, keys, scores, mixed, shares, expert_weights, choice_weights;
        Scratch<std::int32_t> expert_ids, first_choices, choice_rows;
    };

    Model model_;
    InstructionSet set_;
    ForkedLock busy_;
    std::vector<std::int64_t> windows_;
    std::vector<int> window_of_layer_;
    std::int64_t head_dim_ = 0, stream_stride_ = 0, projected_stride_ = 0, attended_stride_ = 0, gated_stride_ = 0;
    std::int64_t widest_ = 0, num_weights_ = 0;  // about
    std::int64_t gated_floats_ = 0, routes_stride_ = 0, chosen_ = 0, packed_floats_ = 0;
    Floats stream_, branch_, projected_, attended_, gated_, routes_;
    std::vector<BenchMemory> memory_;
    std::vector<Bench> benches_;
    std::vector<Segment> segments_;
    std::vector<ColumnsMemory> columns_memory_;
    std::vector<Columns> columns_;
    std::vector<std::int32_t> positions_, wanted_;
    std::vector<std::int64_t> rows_, cache_rows_, logit_rows_;
};

template <class Element>
const Element* at(std::uintptr_t address) {
    return reinterpret_cast<const Element*>(address);
}

// A call but for its tensors and logits.
Call call_of(const py::dict& source) {
    const auto number = [&](const char* name) { return source[name].cast<std::int64_t>(); };
    const auto address = [&](const char* name) { return source[name].cast<std::uintptr_t>(); };
    Call call{};
    call.tokens = at<std::int64_t>(address("tokens"));
    call.depths = at<std::int32_t>(address("depths"));
    call.node_ids = at<std::int32_t>(address("node_ids"));
    call.tree_mask = at<std::uint32_t>(address("tree_mask"));
    call.cache_lens = at<std::int32_t>(address("cache_lens"));
    if (source.contains("active")) call.active = at<std::int32_t>(address("active"));
    call.num_requests = number("num_requests");
    call.num_nodes = number("num_nodes");
    call.num_words = number("num_words");
    call.mask_per_request = source["mask_per_request"].cast<bool>();
    call.max_position = number("max_position");
    call.caches = at<std::uintptr_t>(address("caches"));
    call.cache_rows = number("cache_rows");
    if (source.contains("block_table")) {
        call.block_table = at<std::int32_t>(address("block_table"));
        call.page_size = number("page_size");
        call.num_pages = number("num_pages");
        require(call.page_size >= 1 && call.num_pages >= 1 &&
                    call.num_pages <= std::numeric_limits<std::int32_t>::max() / call.page_size &&
                    call.cache_rows % call.page_size == 0,
                "pages must have rows, fewer than 2^31 in all, and a request's rows be whole pages");
    }
    call.rotations = at<std::uintptr_t>(address("rotations"));
    call.wanted_nodes = at<std::int64_t>(address("wanted_nodes"));
    call.num_wanted = source.contains("num_wanted") ? number("num_wanted") : 1;
    if (source.contains("features")) {
        call.features = at<float>(address("features"));
        call.outputs = reinterpret_cast<float*>(address("outputs"));
    }
    call.logits_type = element_type(static_cast<int>(number("logits_type")));
    return call;
}

void check_num_threads(int num_threads) {
    require(num_threads >= 1 && num_threads <= 1024, "num_threads must be in 1..1024");
}

void run_forward(Forward& forward, const py::dict& source, std::uintptr_t tensors, std::uintptr_t logits,
                 std::uintptr_t hidden, int num_threads) {
    Call call = call_of(source);
    call.tensors = at<std::uintptr_t>(tensors);
    call.logits = reinterpret_cast<void*>(logits);
    call.hidden = reinterpret_cast<float* const*>(hidden);
    check_num_threads(num_threads);
    std::string refusal;
    {
        const py::gil_scoped_release release;
        refusal = forward.refusal(call);
        if (refusal.empty()) forward.run(call, num_threads);
    }
    if (!refusal.empty()) throw py::index_error("forward: " + refusal);
}

bool run_bound(BoundForward& bound, std::uintptr_t tensors, std::uintptr_t logits, int num_threads,
               std::uintptr_t hidden) {
    check_num_threads(num_threads);
    const py::gil_scoped_release release;
    return bound.run(at<std::uintptr_t>(tensors), reinterpret_cast<void*>(logits), num_threads,
                     reinterpret_cast<float* const*>(hidden));
}

}  // namespace
}  // namespace sequoia::forward

void bind_forward(py::module_& module) {
    using sequoia::forward::BoundForward;
    using sequoia::forward::Forward;
    py::class_<Forward>(module, "Forward", "A model's forward on its own weights; see csrc/host/forward.")
        .def(py::init<const py::dict&, const std::string&>(), py::arg("description"), py::arg("instruction_set"))
        .def_property_readonly("instruction_set", &Forward::instruction_set)
        .def("threads_for", &Forward::threads_for, py::arg("num_rows"), py::arg("num_threads"),
             "How many of so many threads share a pass over so many rows.")
        .def("run", &sequoia::forward::run_forward, py::arg("call"), py::arg("tensors"), py::arg("logits"),
             py::arg("hidden"), py::arg("num_threads"),
             "Score rows and store their keys and values. IndexError, and nothing is written, if a number is out of range.");
    py::class_<BoundForward>(module, "BoundForward", "A forward on memory that is known beforehand.")
        .def(py::init([](Forward& forward, const py::dict& call) {
                 return std::make_unique<BoundForward>(forward, sequoia::forward::call_of(call));
             }), py::arg("forward"), py::arg("call"), py::keep_alive<1, 2>())
        .def("run", &sequoia::forward::run_bound, py::arg("tensors"), py::arg("logits"), py::arg("num_threads"),
             py::arg("hidden") = 0,
             "Score what lies there now. False, and nothing is written, if a length is out of range.");
    module.def("forward_instruction_sets", [](bool pairs) {
        std::vector<std::string> names;
        for (const auto& set : sequoia::forward::instruction_sets()) {
            if (set.available && (set.pairs || !pairs)) names.emplace_back(set.name);
        }
        return names;
    }, py::arg("pairs") = false,
               "Names of the instruction sets that this CPU can run, the best first; or of those that multiply pairs of bfloat16.");
    module.def("forward_instruction_set", [](const std::string& name) {
        return std::string(sequoia::forward::choose_instruction_set(name).name);
    }, py::arg("name"), "The one that forwards use: the named one, or the best for an empty name. ValueError if it is none.");
    module.def("read_seconds", &sequoia::forward::read_seconds, py::call_guard<py::gil_scoped_release>(),
               py::arg("instruction_set"), py::arg("data"), py::arg("num_bytes"), py::arg("num_threads"),
               "Read memory once, each thread its part, with the vectors of a named instruction set; returns the seconds.");
    module.def("multiply_add_rate", &sequoia::forward::multiply_add_rate, py::call_guard<py::gil_scoped_release>(),
               py::arg("instruction_set"), py::arg("steps"), py::arg("num_threads"), py::arg("pairs") = false,
               "Multiply-adds of single floats a second that threads make in registers, in `steps` steps; or of pairs of bfloat16.");
    module.def("use_openmp_threads", &sequoia::forward::use_openmp, py::arg("wanted"),
               "Let the threads of the OpenMP library that torch loaded run the jobs, or the team's own again. Whether they do.");
    module.def("stop_forward_threads", [] { sequoia::forward::stop_team(); }, py::call_guard<py::gil_scoped_release>(),
               "End the threads of forwards; the next forward starts them again.");
}
