// sequoia_kernels._host: the part of the package that always has native code behind it.
//
// Functions take raw pointers, sizes and strides; nothing here knows torch, so one build serves every torch version and
// building needs none. They are bound here, and their own files do not know pybind11: each file that does takes the
// compiler longer than most of what it binds.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "buffers.h"
#include "cache_entry.h"
#include "lookup_choice.h"
#include "ops.h"
#include "text_index.h"
#include "tree_search.h"

namespace py = pybind11;

// Rooms of their own: what they do is described in dictionaries.
void bind_forward(py::module_& module);
void bind_tree_growth(py::module_& module);
void bind_tree_commit(py::module_& module);
void bind_paged_layer(py::module_& module);

namespace sequoia {
namespace {

// ---- ops ----

Layout4d layout_of(const py::tuple& shape, const py::tuple& strides) {
    if (shape.size() != 4 || strides.size() != 4) {
        throw std::invalid_argument("tree_attention: q and the caches must have 4 dimensions, got " +
                                    std::to_string(shape.size()));
    }
    Layout4d layout{};
    for (std::size_t i = 0; i < 4; ++i) {
        layout.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), static_cast<Py_ssize_t>(i)));
        layout.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), static_cast<Py_ssize_t>(i)));
    }
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return layout;
}

bool attend_tree(std::uintptr_t q_ptr, const py::tuple& q_shape, const py::tuple& q_strides, std::uintptr_t keys_ptr,
                 const py::tuple& keys_shape, const py::tuple& keys_strides, std::uintptr_t values_ptr,
                 const py::tuple& values_shape, const py::tuple& values_strides, int type, std::uintptr_t mask_ptr,
                 std::int64_t num_words, bool mask_per_request, std::uintptr_t cache_lens_ptr, double scale,
                 double softcap, std::int64_t sliding_window, std::uintptr_t sinks_ptr, std::uintptr_t block_table_ptr,
                 std::int64_t max_pages, std::uintptr_t out_ptr, std::uintptr_t lse_ptr, int num_threads) {
    const Layout4d q = layout_of(q_shape, q_strides), keys = layout_of(keys_shape, keys_strides),
                   values = layout_of(values_shape, values_strides);
    const py::gil_scoped_release release;
    return tree_attention(q_ptr, q, keys_ptr, keys, values_ptr, values, type, mask_ptr, num_words, mask_per_request,
                          cache_lens_ptr, scale, softcap, sliding_window, sinks_ptr, block_table_ptr, max_pages, out_ptr,
                          lse_ptr, num_threads);
}

void bind_ops(py::module_& module) {
    const py::call_guard<py::gil_scoped_release> release_gil;
    py::dict offsets;  // in bytes, in the order of the fields
    offsets["base"] = offsetof(CacheEntry, base);
    offsets["stride_outer"] = offsetof(CacheEntry, stride_outer);
    offsets["stride_slot"] = offsetof(CacheEntry, stride_slot);
    offsets["stride_head"] = offsetof(CacheEntry, stride_head);
    offsets["num_heads"] = offsetof(CacheEntry, num_heads);
    offsets["head_bytes"] = offsetof(CacheEntry, head_bytes);
    offsets["extent"] = offsetof(CacheEntry, extent);
    module.attr("cache_entry_offsets") = offsets;
    module.def("compact_kv_cache", &compact_kv_cache, release_gil, py::arg("table_ptr"), py::arg("num_caches"),
               py::arg("accepted_nodes_ptr"), py::arg("nodes_stride_request"), py::arg("nodes_stride_level"),
               py::arg("num_accepted_ptr"), py::arg("num_accepted_stride"), py::arg("cache_lens_ptr"),
               py::arg("cache_lens_stride"), py::arg("batch_size"), py::arg("block_table_ptr"),
               py::arg("table_stride_request"), py::arg("table_stride_page"), py::arg("page_size"),
               "Move accepted rows behind the committed prefix of all caches; see compact_kv_cache.cpp.");
    module.def("expand_tree_mask", &expand_tree_mask, release_gil, py::arg("packed"), py::arg("num_words"),
               py::arg("num_rows"), py::arg("cache_lens"), py::arg("sliding_window"), py::arg("out_ptr"),
               py::arg("type"), py::arg("num_slots"),
               "Expand a packed tree mask to the dense mask of attention libraries; see expand_tree_mask.cpp. Returns "
               "(every row sees every slot, a request has a slot that none of its rows sees).");
    module.def("sample_without_replacement", &sample_without_replacement, release_gil, py::arg("logits_ptr"),
               py::arg("type"), py::arg("temperature_ptr"), py::arg("seeds_ptr"), py::arg("offsets_ptr"),
               py::arg("tokens_ptr"), py::arg("log_normaliser_ptr"), py::arg("num_rows"), py::arg("vocab"),
               py::arg("row_stride"), py::arg("num_samples"), py::arg("check_values"),
               "Draw tokens without replacement from rows of logits; see sample_without_replacement.cpp.");
    module.def("set_back_unlikely", &set_back_unlikely, release_gil, py::arg("logits_ptr"), py::arg("type"),
               py::arg("temperature_ptr"), py::arg("top_p_ptr"), py::arg("behind"), py::arg("batch_size"),
               py::arg("rows_per_request"), py::arg("vocab"), py::arg("row_stride"),
               "Move a draft's unlikely tokens behind the others; see set_back_unlikely.cpp.");
    module.def("tree_attention", &attend_tree, py::arg("q_ptr"), py::arg("q_shape"), py::arg("q_strides"),
               py::arg("keys_ptr"), py::arg("keys_shape"), py::arg("keys_strides"), py::arg("values_ptr"),
               py::arg("values_shape"), py::arg("values_strides"), py::arg("type"), py::arg("mask_ptr"),
               py::arg("num_words"), py::arg("mask_per_request"), py::arg("cache_lens_ptr"), py::arg("scale"),
               py::arg("softcap"), py::arg("sliding_window"), py::arg("sinks_ptr"), py::arg("block_table_ptr"),
               py::arg("max_pages"), py::arg("out_ptr"), py::arg("lse_ptr"), py::arg("num_threads"),
               "Attend along a packed tree mask; see tree_attention.cpp. Returns False, and has written nothing, if a "
               "length or page lies outside the cache.");
    module.def("verify_tree", &verify_tree, release_gil, py::arg("tokens_ptr"), py::arg("target_ptr"),
               py::arg("target_type"), py::arg("draft_ptr"), py::arg("draft_type"),
               py::arg("target_to_draft_ptr"), py::arg("certain_ptr"), py::arg("first_child_ptr"),
               py::arg("num_children_ptr"), py::arg("max_branching"), py::arg("temperature_ptr"), py::arg("seeds_ptr"),
               py::arg("offsets_ptr"), py::arg("top_k_ptr"), py::arg("top_p_ptr"), py::arg("nodes_ptr"),
               py::arg("num_accepted_ptr"), py::arg("next_token_ptr"), py::arg("batch_size"), py::arg("num_nodes"),
               py::arg("num_levels"), py::arg("vocab"), py::arg("draft_vocab"), py::arg("topology_stride"),
               py::arg("certain_stride"), py::arg("tokens_stride"),
               py::arg("target_batch_stride"), py::arg("target_node_stride"), py::arg("draft_batch_stride"),
               py::arg("draft_node_stride"), py::arg("rule_code"), py::arg("check_values"),
               "Decide which paths of token trees are accepted; see verify_tree.cpp.");
    module.def("warped_logsumexp", &warped_logsumexp, release_gil, py::arg("logits_ptr"), py::arg("type"),
               py::arg("temperature_ptr"), py::arg("top_k_ptr"), py::arg("top_p_ptr"), py::arg("log_normaliser_ptr"),
               py::arg("cut_ptr"), py::arg("num_rows"), py::arg("vocab"), py::arg("row_stride"), py::arg("check_values"),
               "Normalise rows of logits warped by temperature, top-k and top-p; see warped_logsumexp.cpp.");
}

// ---- Philox streams ----

void bind_philox(py::module_& module) {
    const py::call_guard<py::gil_scoped_release> release_gil;
    module.def("philox4x32", &philox_block, py::arg("counter"), py::arg("key"),
               "Compute one Philox4x32-10 block: four words from four counter words and two key words.");
    module.def("token_words", &token_words, release_gil, py::arg("seed"), py::arg("offset"), py::arg("tag"),
               py::arg("vocab"), py::arg("out_ptr"), "Write the words of a token stream. out: [vocab] uint32.");
    module.def("token_gumbel", &token_gumbel, release_gil, py::arg("seeds_ptr"), py::arg("offsets_ptr"),
               py::arg("num_rows"), py::arg("vocab"), py::arg("tag"), py::arg("out_ptr"),
               "Write the Gumbel noise of token streams. seeds, offsets: [R] int64; out: [R, vocab] float32.");
    module.def("node_coins", &node_coins, release_gil, py::arg("seeds_ptr"), py::arg("offsets_ptr"),
               py::arg("num_rows"), py::arg("num_nodes"), py::arg("out_ptr"),
               "Write the acceptance coins of tree nodes. seeds, offsets: [B] int64; out: [B, N] float32.");
}

// ---- lookup ----

void bind_text_index(py::module_& module) {
    py::class_<TextIndex>(module, "TextIndex", "Finds where the newest tokens of a text stood before; see text_index.h.")
        .def(py::init<std::int64_t, std::int64_t>(), py::arg("least_match"), py::arg("most_match"))
        .def("__len__", &TextIndex::size)
        .def("append", &TextIndex::append, py::arg("tokens"), "Add tokens to the end of the text.")
        .def("propose", [](const TextIndex& index, std::int64_t count) {
            TextIndex::Proposal proposal = index.propose(count);
            return std::make_pair(proposal.match, std::move(proposal.tokens));
        }, py::arg("count"), "Give how many of the newest tokens agree with an earlier place, and what followed there.");
}

void bind_lookup_choice(py::module_& module) {
    using Step = LookupChoice::Step;
    py::class_<LookupChoice> choice(module, "LookupChoice", "Chooses steps' trees where texts are looked up; see lookup_choice.h.");
    choice
        .def(py::init([](const py::dict& source, const std::vector<std::tuple<std::int64_t, std::int64_t, double>>& trees) {
            const auto number = [&](const char* name) { return source[name].cast<double>(); };
            LookupSettings settings{};
            settings.num_requests = number_of(source, "num_requests");
            settings.least_match = number_of(source, "least_match");
            settings.most_match = number_of(source, "most_match");
            settings.longest_path = number_of(source, "longest_path");
            settings.known_tokens = number_of(source, "known_tokens");
            settings.bin_of = source["bin_of"].cast<std::vector<std::int64_t>>();
            settings.prior_chances = source["prior_chances"].cast<std::vector<double>>();
            settings.prior_weight = number("prior_weight");
            settings.base_weight = number("base_weight");
            settings.agreed_weight = number("agreed_weight");
            settings.merged_weight = number("merged_weight");
            settings.doubt = number("doubt");
            settings.sibling_chance = number("sibling_chance");
            settings.set_up_ms = number("set_up_ms");
            std::vector<LookupRow> rows;
            for (const auto& [length, siblings, rate] : trees) rows.push_back({length, siblings, rate});
            return LookupChoice(settings, std::move(rows));
        }), py::arg("settings"), py::arg("trees"))
        .def("add_base", [](LookupChoice& self, double step_ms, double tokens, bool drafts,
                            std::vector<std::pair<double, double>> merging) {
            return self.add_base({step_ms, tokens, drafts, std::move(merging)});
        }, py::arg("step_ms"), py::arg("tokens"), py::arg("drafts"), py::arg("merging"), "Take a tree of the draft in; gives its number.")
        .def("choose", &LookupChoice::choose, py::arg("base"), py::arg("active"),
             "Look texts up; give BASE, MERGED or the place of a lookup tree. -1: the draft's tree takes no proposals.")
        .def("proposed", &LookupChoice::proposed, "Give what the step proposes, by request.")
        .def("propose", &LookupChoice::propose, py::arg("paths"), "Say what the step proposes of what was found, by request.")
        .def("found", [](const LookupChoice& self) {
            std::vector<std::pair<std::int64_t, std::vector<std::int64_t>>> found;
            for (TextIndex::Proposal& proposal : self.found()) found.emplace_back(proposal.match, std::move(proposal.tokens));
            return found;
        }, "Give how many tokens agree, and what followed, of the newest look at each request's text.")
        .def("take", [](LookupChoice& self, std::int64_t request, const std::vector<std::int64_t>& tokens, int step) {
            self.take(request, tokens, static_cast<Step>(step));
        }, py::arg("request"), py::arg("tokens"), py::arg("step"), "Take in what a step, of one of the kinds, added to a text.")
        .def("note_sibling", &LookupChoice::note_sibling, py::arg("accepted"),
             "Take in a step whose proposed path ended early, and whether a sibling was accepted there.");
    choice.attr("BASE") = LookupChoice::BASE;
    choice.attr("PROMPT") = static_cast<int>(Step::PROMPT);
    choice.attr("MERGED") = LookupChoice::MERGED;
    choice.attr("AFTER_OTHER") = static_cast<int>(Step::OTHER);
    choice.attr("AFTER_DRAFTED") = static_cast<int>(Step::DRAFTED);
    choice.attr("AFTER_MERGED") = static_cast<int>(Step::MERGED);
}

// ---- tree search ----

void raise_pending_signal() {
    py::gil_scoped_acquire lock;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::array_t<double> empty_table(int max_budget, int max_levels) {
    return py::array_t<double>({static_cast<py::ssize_t>(max_budget) + 1, static_cast<py::ssize_t>(max_levels) + 1});
}

void bind_tree_search(py::module_& module) {
    module.def(
        "level_widths",
        [](const std::vector<std::int32_t>& parents) {
            for (std::size_t i = 1; i < parents.size(); ++i) {
                if (parents[i] < 0 || parents[i] >= static_cast<std::int32_t>(i) || parents[i] < parents[i - 1]) {
                    throw std::invalid_argument("level_widths: parents must be breadth-first");
                }
            }
            LevelWidths widths = sequoia::level_widths(parents);
            return std::make_pair(std::move(widths.nodes), std::move(widths.internal));
        },
        py::arg("parents"), "Nodes per level, and internal nodes per level, of a breadth-first tree.");

    module.def(
        "best_first_tree",
        [](const std::vector<double>& acceptance, int budget, int max_levels) {
            if (budget < 1 || max_levels < 1) {
                throw std::invalid_argument("best_first_tree: budget and max_levels must be at least 1");
            }
            py::gil_scoped_release unlocked;
            return sequoia::best_first_tree(acceptance, budget, max_levels);
        },
        py::arg("acceptance"), py::arg("budget"), py::arg("max_levels"),
        "Parents of an optimal tree for a non-increasing acceptance vector.");

    module.def(
        "best_first_values",
        [](const std::vector<double>& acceptance, int max_budget, int max_levels) {
            if (max_budget < 0 || max_levels < 0) {
                throw std::invalid_argument("best_first_values: max_budget and max_levels must be at least 0");
            }
            py::array_t<double> values = empty_table(max_budget, max_levels);
            double* data = values.mutable_data();
            {
                py::gil_scoped_release unlocked;
                sequoia::best_first_values(acceptance, max_budget, max_levels, data, raise_pending_signal);
            }
            return values;
        },
        py::arg("acceptance"), py::arg("max_budget"), py::arg("max_levels"),
        "Optimal values [max_budget + 1, max_levels + 1] for a non-increasing acceptance vector.");

    py::class_<TreeTable>(module, "TreeTable", "Solved dynamic programme over (nodes, levels, children), any vector.")
        .def(py::init([](std::vector<double> acceptance, int max_budget, int max_levels) {
                 py::gil_scoped_release unlocked;
                 return std::make_unique<TreeTable>(std::move(acceptance), max_budget, max_levels,
                                                    raise_pending_signal);
             }),
             py::arg("acceptance"), py::arg("max_budget"), py::arg("max_levels"))
        .def("values",
             [](const TreeTable& table) {
                 py::array_t<double> values = empty_table(table.max_budget(), table.max_levels());
                 table.values(values.mutable_data());
                 return values;
             })
        .def("tree", &TreeTable::tree, py::arg("budget"), py::arg("levels"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace
}  // namespace sequoia

PYBIND11_MODULE(_host, module) {
    module.doc() = "Host code of sequoia-kernels: tree search, Philox streams and the CPU backends of the ops.";
    sequoia::bind_tree_search(module);
    sequoia::bind_philox(module);
    sequoia::bind_ops(module);
    bind_forward(module);
    bind_tree_growth(module);
    sequoia::bind_text_index(module);
    sequoia::bind_lookup_choice(module);
    bind_tree_commit(module);
    bind_paged_layer(module);
}
