// A layer of a server's model: its step's keys and values go to their pages, then every row attends.
//
// Computes    the same as index_copy_ into the pages and one call of tree_attention for each group of requests, with all
//             that does not change from step to step, or from layer to layer, known beforehand: so that a layer pays little
//             more than the arithmetic. A group is requests with equally many rows under one mask.
// Memory      keys and values are read once and written to their pages; for the attention see tree_attention.cpp.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "elements.h"
#include "ops.h"

namespace py = pybind11;

namespace sequoia {
namespace {

// Requests of a step that go through one call.
struct RowGroup {
    std::uintptr_t first_rows, tree_mask, cache_lens, block_table;  // [B] int64, [N, words], [B], [B, max_pages] int32
    std::int64_t num_requests, num_rows, num_words, max_pages;
};

// What layers that share a block table know of a step. Holds addresses only.
class PagedStep {
  public:
    PagedStep(const py::list& groups, std::uintptr_t slots, std::int64_t num_tokens)
        : slots(reinterpret_cast<const std::int64_t*>(slots)), num_tokens(num_tokens) {
        for (const py::handle entry : groups) {
            const auto number = [&](const char* name) { return entry[name].cast<std::int64_t>(); };
            const auto address = [&](const char* name) { return entry[name].cast<std::uintptr_t>(); };
            all.push_back({address("first_rows"), address("tree_mask"), address("cache_lens"), address("block_table"),
                           number("num_requests"), number("num_rows"), number("num_words"), number("max_pages")});
        }
    }

    std::vector<RowGroup> all;
    const std::int64_t* slots;  // cache row of each token. [tokens]
    std::int64_t num_tokens;
};

class PagedLayer {
  public:
    explicit PagedLayer(const py::dict& source)
        : keys_(source["keys"].cast<std::uintptr_t>()), values_(source["values"].cast<std::uintptr_t>()),
          pages_(layout(source["pages"])), type_(source["type"].cast<int>()), scale_(source["scale"].cast<double>()),
          softcap_(source["softcap"].cast<double>()), window_(source["sliding_window"].cast<std::int64_t>()),
          sinks_(source["sinks"].cast<std::uintptr_t>()), num_heads_(source["num_heads"].cast<std::int64_t>()),
          stores_(source["stores"].cast<bool>()) {}

    // Returns false where a slot, a length or a page lies outside the cache; nothing outside of it is read or written.
    // Queries, keys and values are rows of so many elements, heads side by side in each.
    bool attend(const PagedStep& step, std::uintptr_t queries, std::int64_t queries_stride, std::uintptr_t keys,
                std::int64_t keys_stride, std::uintptr_t values, std::int64_t values_stride, std::uintptr_t out,
                int num_threads) const {
        const py::gil_scoped_release release;
        if (stores_) {
            const std::int64_t num_slots = pages_.shape[0] * pages_.shape[1];
            for (std::int64_t t = 0; t < step.num_tokens; ++t) {
                if (step.slots[t] < 0 || step.slots[t] >= num_slots) return false;
            }
            store(step, keys, keys_stride, keys_);
            store(step, values, values_stride, values_);
        }
        const std::int64_t head_dim = pages_.shape[3];
        for (const RowGroup& group : step.all) {
            const Layout4d rows{{group.num_requests, group.num_rows, num_heads_, head_dim}, {0, queries_stride, head_dim, 1}};
            if (!tree_attention(queries, rows, keys_, pages_, values_, pages_, type_, group.tree_mask, group.num_words, false,
                                group.cache_lens, scale_, softcap_, window_, sinks_, group.block_table, group.max_pages,
                                out, 0, num_threads, reinterpret_cast<const std::int64_t*>(group.first_rows))) {
                return false;
            }
        }
        return true;
    }

  private:
    static Layout4d layout(const py::handle& source) {
        Layout4d layout{};
        for (int i = 0; i < 4; ++i) {
            layout.shape[i] = source[py::int_(0)][py::int_(i)].cast<std::int64_t>();
            layout.strides[i] = source[py::int_(1)][py::int_(i)].cast<std::int64_t>();
        }
        return layout;
    }

    void store(const PagedStep& step, std::uintptr_t rows, std::int64_t rows_stride, std::uintptr_t cache) const {
        const std::int64_t width = type_ == static_cast<int>(ElementType::float32) ? 4 : 2;
        const std::int64_t page = pages_.shape[1], heads = pages_.shape[2], bytes = pages_.shape[3] * width;
        for (std::int64_t t = 0; t < step.num_tokens; ++t) {
            const std::int64_t slot = step.slots[t];
            const char* source = reinterpret_cast<const char*>(rows) + t * rows_stride * width;
            char* target = reinterpret_cast<char*>(cache) +
                           (slot / page * pages_.strides[0] + slot % page * pages_.strides[1]) * width;
            for (std::int64_t head = 0; head < heads; ++head, source += bytes, target += pages_.strides[2] * width) {
                std::memcpy(target, source, static_cast<std::size_t>(bytes));
            }
        }
    }

    std::uintptr_t keys_, values_;  // [pages, page, Hkv, D], of one layout
    Layout4d pages_;
    int type_;
    double scale_, softcap_;
    std::int64_t window_;
    std::uintptr_t sinks_;
    std::int64_t num_heads_;
    bool stores_;
};

}  // namespace
}  // namespace sequoia

void bind_paged_layer(py::module_& module) {
    using sequoia::PagedLayer;
    using sequoia::PagedStep;
    py::class_<PagedStep>(module, "PagedStep", "What layers that share a block table know of a step; see paged_layer.cpp.")
        .def(py::init<const py::list&, std::uintptr_t, std::int64_t>(), py::arg("groups"), py::arg("slots"),
             py::arg("num_tokens"));
    py::class_<PagedLayer>(module, "PagedLayer", "Attention of a layer on pages; see paged_layer.cpp.")
        .def(py::init<const py::dict&>(), py::arg("description"))
        .def("attend", &PagedLayer::attend, py::arg("step"), py::arg("queries"), py::arg("queries_stride"),
             py::arg("keys"), py::arg("keys_stride"), py::arg("values"), py::arg("values_stride"), py::arg("out"),
             py::arg("num_threads"),
             "Store keys and values and attend. False if a slot, length or page lies outside the cache.");
}
