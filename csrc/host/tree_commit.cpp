// The end of a decoding step: verification of a scored tree, and what is kept of it.
//
// Computes    verify: the accepted path and the next token, as verify_tree does.
//             commit: the emitted tokens; accepted rows of all caches move behind the committed ones, as
//             compact_kv_cache does; the batch's state advances. Requests that have ended are left as they are.
// Plan        Everything but the target's logits lies in memory that is known beforehand.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "active.h"
#include "buffers.h"
#include "ops.h"
#include "rows.h"

namespace py = pybind11;

namespace sequoia {
namespace {

// Caches that share their lengths.
struct CacheGroup {
    std::uintptr_t table;  // [num_caches, 7]
    std::int64_t num_caches;
    std::uintptr_t cache_lens;  // [B] int32
    std::int64_t num_slots;     // of each cache
};

class TreeCommit {
  public:
    explicit TreeCommit(const py::dict& source) : source_(source) {
        const auto at = [&](const char* name) { return address_of(source, name); };
        batch_size_ = number_of(source, "batch_size");
        num_nodes_ = number_of(source, "num_nodes");
        num_levels_ = number_of(source, "num_levels");
        vocab_ = number_of(source, "vocab");
        draft_vocab_ = number_of(source, "draft_vocab");
        max_branching_ = number_of(source, "max_branching");
        topology_stride_ = number_of(source, "topology_stride");
        draft_type_ = static_cast<int>(number_of(source, "draft_type"));
        rule_code_ = static_cast<int>(number_of(source, "rule_code"));
        tokens_ = at("tokens"), draft_logits_ = at("draft_logits");
        target_to_draft_ = at("target_to_draft"), certain_ = at("certain");
        first_child_ = at("first_child"), num_children_ = at("num_children");
        temperature_ = at("temperature"), seeds_ = at("seeds"), offsets_ = at("offsets");
        top_k_ = at("top_k"), top_p_ = at("top_p");
        active_ = at("active"), last_tokens_ = at("last_tokens"), root_tokens_ = at("root_tokens");
        nodes_ = at("nodes"), num_accepted_ = at("num_accepted"), next_token_ = at("next_token");
        emitted_ = at("emitted"), num_emitted_ = at("num_emitted");
        for (const py::handle entry : source["caches"]) {
            const auto fields = py::reinterpret_borrow<py::object>(entry).cast<std::vector<std::int64_t>>();
            caches_.push_back({static_cast<std::uintptr_t>(fields.at(0)), fields.at(1),
                               static_cast<std::uintptr_t>(fields.at(2)), fields.at(3)});
        }
    }

    // Decides for the requests that are active. Returns false if a value is out of range: paths are then of no use.
    bool verify(std::uintptr_t target_logits, int target_type, std::int64_t batch_stride, std::int64_t node_stride) {
        find_active_runs(reinterpret_cast<const std::int32_t*>(active_), batch_size_, runs_);
        const std::int64_t target_bytes = batch_stride * element_bytes(static_cast<ElementType>(target_type));
        const std::int64_t draft_bytes = num_nodes_ * draft_vocab_ * element_bytes(static_cast<ElementType>(draft_type_));
        for (const ActiveRun& run : runs_) {
            const auto at = [&](std::uintptr_t address, std::int64_t bytes) {  // of the first request's values
                return address == 0 ? address : address + static_cast<std::uintptr_t>(run.first * bytes);
            };
            if (!verify_tree(at(tokens_, 8 * num_nodes_), at(target_logits, target_bytes), target_type,
                             at(draft_logits_, draft_bytes), draft_type_, target_to_draft_, at(certain_, num_nodes_),
                             at(first_child_, 4 * topology_stride_), at(num_children_, 4 * topology_stride_),
                             max_branching_, at(temperature_, 4), at(seeds_, 8), at(offsets_, 8), at(top_k_, 4),
                             at(top_p_, 4), at(nodes_, 4 * num_levels_), at(num_accepted_, 4), at(next_token_, 8),
                             run.count, num_nodes_, num_levels_, vocab_, draft_vocab_, topology_stride_, num_nodes_,
                             num_nodes_, batch_stride, node_stride, num_nodes_ * draft_vocab_, draft_vocab_, rule_code_,
                             true)) {
                return false;
            }
        }
        return true;
    }

    // Returns false, and has written nothing, if a tree does not fit behind a cache's committed rows.
    bool commit() {
        const auto* const nodes = reinterpret_cast<const std::int32_t*>(nodes_);
        const auto* const num_accepted = reinterpret_cast<const std::int32_t*>(num_accepted_);
        const auto* const next_token = reinterpret_cast<const std::int64_t*>(next_token_);
        const auto* const tokens = reinterpret_cast<const std::int64_t*>(tokens_);
        const auto* const active = reinterpret_cast<const std::int32_t*>(active_);
        auto* const emitted = reinterpret_cast<std::int64_t*>(emitted_);
        auto* const num_emitted = reinterpret_cast<std::int32_t*>(num_emitted_);
        for (const CacheGroup& group : caches_) {
            const auto* const lens = reinterpret_cast<const std::int32_t*>(group.cache_lens);
            for (std::int64_t b = 0; b < batch_size_; ++b) {
                if (active[b] != 0 && (lens[b] < 0 || lens[b] + num_nodes_ > group.num_slots)) return false;
            }
        }
        for (std::int64_t b = 0; b < batch_size_; ++b) {
            const std::int32_t* const path = nodes + b * num_levels_;
            const std::int64_t* const drawn = tokens + b * num_nodes_;
            std::int64_t* const out = emitted + b * num_levels_;
            if (active[b] == 0) {
                std::fill(out, out + num_levels_, -1);
                num_emitted[b] = 0;
                continue;
            }
            const std::int64_t last = num_accepted[b] - 1;
            for (std::int64_t level = 0; level < num_levels_; ++level) {
                out[level] = level < last ? drawn[path[level + 1]] : level == last ? next_token[b] : -1;
            }
            num_emitted[b] = num_accepted[b];
            reinterpret_cast<std::int64_t*>(last_tokens_)[b] = drawn[path[last]];
            reinterpret_cast<std::int64_t*>(root_tokens_)[b] = next_token[b];
            reinterpret_cast<std::int64_t*>(offsets_)[b] += num_nodes_;
        }
        for (const CacheGroup& group : caches_) {
            compact_kv_cache(group.table, group.num_caches, nodes_, num_levels_, 1, num_emitted_, 1, group.cache_lens, 1,
                             batch_size_, 0, 0, 0, 1);
        }
        return true;
    }

  private:
    py::dict source_;  // holds what the caller put beside the addresses
    std::int64_t batch_size_, num_nodes_, num_levels_, vocab_, draft_vocab_, max_branching_, topology_stride_;
    int draft_type_, rule_code_;
    std::uintptr_t tokens_, draft_logits_;      // [B, N] int64, [B, N, draft_vocab]
    std::uintptr_t target_to_draft_, certain_;  // [vocab] int32 and [B, N] bool, or 0
    std::uintptr_t first_child_, num_children_;  // [N] or [B, N] int32
    std::uintptr_t temperature_, seeds_, offsets_, top_k_, top_p_, active_, last_tokens_, root_tokens_;  // [B]
    std::uintptr_t nodes_, num_accepted_, next_token_;  // [B, L] int32, [B] int32, [B] int64
    std::uintptr_t emitted_, num_emitted_;              // [B, L] int64, [B] int32
    std::vector<CacheGroup> caches_;
    std::vector<ActiveRun> runs_;
};

}  // namespace
}  // namespace sequoia

void bind_tree_commit(py::module_& module) {
    using sequoia::TreeCommit;
    py::class_<TreeCommit>(module, "TreeCommit", "Verifies and commits a scored tree; see tree_commit.cpp.")
        .def(py::init<const py::dict&>(), py::arg("buffers"))
        .def("verify", &TreeCommit::verify, py::arg("target_logits"), py::arg("target_type"), py::arg("batch_stride"),
             py::arg("node_stride"), py::call_guard<py::gil_scoped_release>(),
             "Decide the paths of active requests; False, and they are of no use, if a value is out of range.")
        .def("commit", &TreeCommit::commit, py::call_guard<py::gil_scoped_release>(),
             "Emit the path and advance caches and state; False, and nothing is written, if a cache is too short.");
}
