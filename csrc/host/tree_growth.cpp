// The draft's part of a decoding step in one call: a forward and a draw for every level of a tree.
//
// Computes    for each level whose nodes have children: the draft's logits at these nodes, kept for the verification;
//             children drawn from them without replacement; their tokens. What `Drafting.grow` of a model computes.
//             Where the target is cut by top-p, unlikely tokens go behind the others first (set_back_unlikely.cpp).
//             A shaped tree gives its children out level by level (level_shape.h), maybe by what the draft foretells at the
//             nodes (foretold_level.h). A token that is proposed for the first
//             child of a level's first node is put before the draws, from which it is left out.
//             Where a draft has scored all depths beforehand, a level's rows are its depth's row, as it is or through a
//             forward of the level's own whose head has it as its bias, or to which it is added (a Markov head, see
//             markov_level.h).
// Plan        The forwards are bound to their memory beforehand (forward/bound.h), and so is everything else: a level
//             takes no allocation and nothing of Python, whose caches the target's weights have emptied by then.
//             Requests that have ended are left out.
// Memory      Logits go straight to where they are kept, if the nodes' rows lie there side by side.
// Numerics    Those of the forward and of sample_without_replacement.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "active.h"
#include "buffers.h"
#include "foretold_level.h"
#include "forward/bound.h"
#include "level_shape.h"
#include "markov_level.h"
#include "ops.h"
#include "rows.h"

namespace py = pybind11;

namespace sequoia {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point begin, Clock::time_point end) {
    return std::chrono::duration<double>(end - begin).count();
}

template <class Element>
Element* pointer_of(const py::dict& source, const char* name) {
    return reinterpret_cast<Element*>(address_of(source, name));
}

// One level.
struct GrowthLevel {
    forward::BoundForward* forward;  // null: the level's rows are copies of `row`
    const std::uintptr_t* weights;   // of this forward alone; null: those of the run
    const char* row;                 // of the first request; those of the others lie `row_stride` bytes behind
    std::int64_t row_stride;
    bool adds_row;                   // `row` is added to what the forward gives, float32; it has all nodes as one request's
    MarkovLevel markov;              // what the forward reads, where that depends on more than tokens
    ForetoldLevel foretold;          // what is known of the nodes before their children are drawn
    bool before_root;           // the forward feeds the last committed token before the root
    std::int64_t* fed;          // [B, W], or [B, 2] where it feeds a token before the root: what the forward reads
    const std::int64_t* nodes;  // [W]
    std::int64_t width;         // W
    bool adjacent;              // the nodes follow one another
    std::int64_t num_samples, first_child, num_children;
    const std::int64_t* drawn;  // [C], or [B, C]: each child's place in the request's draw [W * num_samples]
    bool drawn_per_request;
    std::int64_t num_with_proposal;     // children of the first node, if the first of them may be proposed; else 0
    std::unique_ptr<LevelShape> shape;  // gives the children out, and writes `drawn`; null where they are fixed
};

ShapedTreeMemory shaped_memory(const py::dict& source) {
    ShapedTreeMemory tree{};
    tree.num_nodes = number_of(source, "num_nodes");
    tree.num_words = number_of(source, "num_words");
    tree.max_children = number_of(source, "max_children");
    tree.parents = pointer_of<std::int32_t>(source, "parents");
    tree.ranks = pointer_of<std::int32_t>(source, "ranks");
    tree.first_child = pointer_of<std::int32_t>(source, "first_child");
    tree.num_children = pointer_of<std::int32_t>(source, "num_children");
    tree.ancestor_mask = pointer_of<std::uint32_t>(source, "ancestor_mask");
    tree.reach = pointer_of<float>(source, "reach");
    tree.drawn = pointer_of<float>(source, "drawn");
    tree.undrawn = pointer_of<float>(source, "undrawn");
    tree.edges = pointer_of<float>(source, "edges");
    tree.foretold = pointer_of<float>(source, "foretold");
    tree.num_ranks = number_of(source, "num_ranks");
    tree.num_edges = number_of(source, "num_edges");
    return tree;
}

MarkovLevel markov_level(const py::dict& source) {
    MarkovLevel level{};
    level.rank = number_of(source, "rank");
    level.hands_states = source["hands_states"].cast<bool>();
    level.table = pointer_of<char>(source, "table");
    level.type = static_cast<ElementType>(number_of(source, "type"));
    level.num_tokens = number_of(source, "num_tokens");
    level.mixing = source["mixing"].cast<forward::BoundForward*>();
    level.mixing_weights = pointer_of<std::uintptr_t>(source, "mixing_weights");
    level.inputs = pointer_of<float>(source, "inputs");
    level.mixed = pointer_of<float>(source, "mixed");
    level.outputs = pointer_of<float>(source, "outputs");
    level.slot = pointer_of<float>(source, "slot");
    level.slot_stride = number_of(source, "slot_stride");
    level.states = pointer_of<float>(source, "states");
    level.parents = pointer_of<std::int32_t>(source, "parents");
    level.parents_stride = number_of(source, "parents_stride");
    return level;
}

ForetoldLevel foretold_level(const py::dict& source) {
    ForetoldLevel level{};
    level.rank = number_of(source, "rank");
    level.table = pointer_of<char>(source, "table");
    level.type = static_cast<ElementType>(number_of(source, "type"));
    level.num_tokens = number_of(source, "num_tokens");
    level.weight = pointer_of<float>(source, "weight");
    level.embedded = pointer_of<float>(source, "embedded");
    level.slot = pointer_of<float>(source, "slot");
    level.slot_stride = number_of(source, "slot_stride");
    level.out = pointer_of<float>(source, "out");
    return level;
}

class TreeGrowth {
  public:
    explicit TreeGrowth(const py::dict& source)
        : batch_size_(number_of(source, "batch_size")),
          num_nodes_(number_of(source, "num_nodes")),
          vocab_(number_of(source, "vocab")),
          tokens_(pointer_of<std::int64_t>(source, "tokens")),
          draft_logits_(pointer_of<char>(source, "draft_logits")),
          proposed_(pointer_of<std::int64_t>(source, "proposed")),
          last_tokens_(pointer_of<std::int64_t>(source, "last_tokens")),
          root_tokens_(pointer_of<std::int64_t>(source, "root_tokens")),
          active_(pointer_of<std::int32_t>(source, "active")),
          draft_lens_(pointer_of<std::int32_t>(source, "draft_lens")),
          first_lens_(pointer_of<std::int32_t>(source, "first_lens")),
          temperature_(pointer_of<float>(source, "temperature")),
          top_p_(pointer_of<float>(source, "top_p")),
          seeds_(pointer_of<std::int64_t>(source, "seeds")),
          offsets_(pointer_of<std::int64_t>(source, "offsets")),
          own_ids_(pointer_of<std::int64_t>(source, "own_ids")),
          target_ids_(pointer_of<std::int64_t>(source, "target_ids")),
          fed_ids_(pointer_of<std::int64_t>(source, "fed_ids")),
          num_fed_(number_of(source, "num_fed")),
          drafted_(number_of(source, "drafted")),
          type_(static_cast<ElementType>(number_of(source, "logits_type"))) {
        std::int64_t widest = 0, most_samples = 0;
        for (const py::handle entry : source["levels"]) {
            const py::dict fields = py::reinterpret_borrow<py::dict>(entry);
            GrowthLevel level{};
            level.forward = fields["forward"].is_none() ? nullptr : fields["forward"].cast<forward::BoundForward*>();
            level.weights = pointer_of<std::uintptr_t>(fields, "weights");
            level.row = pointer_of<char>(fields, "row");
            level.row_stride = number_of(fields, "row_stride");
            level.adds_row = fields["adds_row"].cast<bool>();
            if (!fields["markov"].is_none()) {
                level.markov = markov_level(py::reinterpret_borrow<py::dict>(fields["markov"]));
            }
            if (!fields["foretold"].is_none()) {
                level.foretold = foretold_level(py::reinterpret_borrow<py::dict>(fields["foretold"]));
            }
            level.before_root = fields["before_root"].cast<bool>();
            level.fed = pointer_of<std::int64_t>(fields, "fed");
            level.nodes = pointer_of<std::int64_t>(fields, "nodes");
            level.width = number_of(fields, "width");
            level.adjacent = fields["adjacent"].cast<bool>();
            level.num_samples = number_of(fields, "num_samples");
            level.first_child = number_of(fields, "first_child");
            level.num_children = number_of(fields, "num_children");
            level.drawn = pointer_of<std::int64_t>(fields, "drawn");
            level.drawn_per_request = fields["drawn_per_request"].cast<bool>();
            level.num_with_proposal = proposed_ == nullptr ? 0 : number_of(fields, "num_with_proposal");
            if (!fields["shape"].is_none()) {
                const auto shape = py::reinterpret_borrow<py::dict>(fields["shape"]);
                level.shape = std::make_unique<LevelShape>(
                    shaped_memory(shape), number_of(shape, "first"), level.width, level.num_children,
                    pointer_of<std::int64_t>(fields, "drawn"), pointer_of<std::uint32_t>(shape, "own_mask"));
            }
            const std::int64_t fed = level.before_root ? 2 : level.width;
            if (level.adds_row && (level.row == nullptr || type_ == ElementType::float64)) {
                throw std::invalid_argument("TreeGrowth: a row that is added must be given, and not be of float64");
            }
            const ElementType given = level.adds_row ? ElementType::float32 : type_;
            if (level.forward == nullptr) {
                if (level.row == nullptr) throw std::invalid_argument("TreeGrowth: a level must have a forward or a row");
            } else if (level.forward->num_requests() != (level.adds_row ? 1 : batch_size_) ||
                       level.forward->num_nodes() != (level.adds_row ? batch_size_ * fed : fed) ||
                       level.forward->vocab() != drafted_ || level.forward->logits_type() != given) {
                throw std::invalid_argument("TreeGrowth: a level's forward must feed the level's nodes of all requests");
            }
            widest = std::max(widest, level.width);
            most_samples = std::max(most_samples, level.width * level.num_samples);
            levels_.push_back(std::move(level));
        }
        if (levels_.empty()) throw std::invalid_argument("TreeGrowth: levels must have entries");
        const auto rows = static_cast<std::size_t>(batch_size_ * widest);
        temperatures_.resize(rows);
        row_seeds_.resize(rows);
        row_offsets_.resize(rows);
        log_normalisers_.resize(rows);
        draws_.resize(static_cast<std::size_t>(batch_size_ * most_samples));
    }

    // Returns false where a draw's input or a length is out of range: tokens and logits are then of no use.
    // behind: as for set_back_unlikely.
    bool run(const std::uintptr_t* weights, int num_threads, float behind) {
        forward_seconds_ = draw_seconds_ = 0;
        find_active_runs(active_, batch_size_, runs_);
        for (std::size_t index = 0; index < levels_.size(); ++index) {
            const GrowthLevel& level = levels_[index];
            const Clock::time_point begin = Clock::now();
            char* const logits = score(level, weights, num_threads);
            if (logits == nullptr) return false;
            const Clock::time_point scored = Clock::now();
            forward_seconds_ += seconds_between(begin, scored);
            if (own_ids_ != nullptr) cut(level, logits);
            const std::int64_t row_width = own_ids_ != nullptr ? vocab_ : drafted_;
            const std::int64_t request_bytes = level.width * row_width * element_bytes(type_);
            for (const ActiveRun& run : runs_) {
                if (top_p_ == nullptr) break;
                set_back_unlikely(address(logits + run.first * request_bytes), static_cast<int>(type_),
                                  address(temperature_ + run.first), address(top_p_ + run.first), behind, run.count,
                                  level.width, std::min(row_width, vocab_), row_width);
            }
            if (!in_place(level)) keep(level, logits, row_width * element_bytes(type_));
            for (const ActiveRun& run : runs_) {
                if (!draw(level, run, logits, row_width)) return false;
            }
            draw_seconds_ += seconds_between(scored, Clock::now());
        }
        return true;
    }

    // What a run does for one level before its draws. Returns false as run does, or where there is no such level.
    bool score_level(std::int64_t index, const std::uintptr_t* weights, int num_threads) {
        if (index < 0 || index >= static_cast<std::int64_t>(levels_.size())) return false;
        find_active_runs(active_, batch_size_, runs_);
        return score(levels_[static_cast<std::size_t>(index)], weights, num_threads) != nullptr;
    }

    double forward_seconds() const { return forward_seconds_; }
    double draw_seconds() const { return draw_seconds_; }

  private:
    static std::uintptr_t address(const void* data) { return reinterpret_cast<std::uintptr_t>(data); }

    char* kept_row(std::int64_t request, std::int64_t node) const {
        return draft_logits_ + (request * num_nodes_ + node) * vocab_ * element_bytes(type_);
    }

    // Whether a level's logits are written where they are kept.
    bool in_place(const GrowthLevel& level) const {
        return level.adjacent && batch_size_ == 1 && drafted_ == vocab_ && own_ids_ == nullptr;
    }

    // Gives the logits of a level's nodes, [B, W, drafted]; null where a length is out of range.
    char* score(const GrowthLevel& level, const std::uintptr_t* weights, int num_threads) {
        if (level.forward != nullptr || level.foretold.reads_tokens()) feed(level);
        if (level.foretold.out != nullptr) {
            for_each_active([&](std::int64_t b) {
                level.foretold.run(b, level.fed + b * level.width, level.nodes, level.width, num_nodes_);
            });
        }
        const std::int64_t row_bytes = drafted_ * element_bytes(type_);
        char* const logits = in_place(level) ? kept_row(0, level.nodes[0])
                                             : scratch_.reserve(batch_size_ * level.width * row_bytes);
        if (level.markov.reads_slots() &&
            !level.markov.run(level.fed, level.nodes, batch_size_, level.width, num_nodes_, num_threads)) {
            return nullptr;
        }
        if (level.forward == nullptr) {
            copy_row(level, logits, row_bytes);
            return logits;
        }
        const bool rounds = level.adds_row && type_ != ElementType::float32;
        void* const given = rounds ? static_cast<void*>(sums_.reserve(batch_size_ * level.width * drafted_)) : logits;
        if (!level.forward->run(level.weights == nullptr ? weights : level.weights, given, num_threads)) return nullptr;
        if (level.adds_row) add_row(level, static_cast<const float*>(given), logits, row_bytes);
        return logits;
    }

    template <class Visit>
    void for_each_active(const Visit& visit) const {
        for (const ActiveRun& run : runs_) {
            for (std::int64_t b = run.first; b < run.first + run.count; ++b) visit(b);
        }
    }

    void copy_row(const GrowthLevel& level, char* logits, std::int64_t row_bytes) const {
        for_each_active([&](std::int64_t b) {
            for (std::int64_t i = 0; i < level.width; ++i) {
                std::memcpy(logits + (b * level.width + i) * row_bytes, level.row + b * level.row_stride,
                            static_cast<std::size_t>(row_bytes));
            }
        });
    }

    void add_row(const GrowthLevel& level, const float* sums, char* logits, std::int64_t row_bytes) const {
        for_each_active([&](std::int64_t b) {
            for (std::int64_t i = b * level.width; i < (b + 1) * level.width; ++i) {
                add_to_row(sums + i * drafted_, level.row + b * level.row_stride, type_, drafted_, logits + i * row_bytes);
            }
        });
    }

    void feed(const GrowthLevel& level) {
        for_each_active([&](std::int64_t b) {
            if (level.before_root) {
                level.fed[2 * b] = fed(last_tokens_[b]);
                level.fed[2 * b + 1] = fed(root_tokens_[b]);
                first_lens_[b] = draft_lens_[b] - 1;
                return;
            }
            for (std::int64_t i = 0; i < level.width; ++i) {
                level.fed[b * level.width + i] = fed(tokens_[b * num_nodes_ + level.nodes[i]]);
            }
        });
    }

    // What the draft is fed for a token of the target.
    std::int64_t fed(std::int64_t token) const {
        return fed_ids_ == nullptr ? token : fed_ids_[std::clamp<std::int64_t>(token, 0, num_fed_ - 1)];
    }

    // Leave the common tokens of each row, the rows one behind the other.
    void cut(const GrowthLevel& level, char* logits) {
        switch (element_bytes(type_)) {
            case 2: return cut_rows(level, reinterpret_cast<std::uint16_t*>(logits));
            case 4: return cut_rows(level, reinterpret_cast<std::uint32_t*>(logits));
            default: return cut_rows(level, reinterpret_cast<std::uint64_t*>(logits));
        }
    }

    // By way of a row, since the draft's ids need not rise.
    template <class Bits>
    void cut_rows(const GrowthLevel& level, Bits* logits) {
        Bits* const row = reinterpret_cast<Bits*>(cut_row_.reserve(vocab_ * static_cast<std::int64_t>(sizeof(Bits))));
        for_each_active([&](std::int64_t b) {  // in their order: rows move to the front
            for (std::int64_t i = b * level.width; i < (b + 1) * level.width; ++i) {
                const Bits* const whole = logits + i * drafted_;
                for (std::int64_t token = 0; token < vocab_; ++token) row[token] = whole[own_ids_[token]];
                std::copy(row, row + vocab_, logits + i * vocab_);
            }
        });
    }

    // Where the draft knows more tokens than the target, those are left out.
    void keep(const GrowthLevel& level, const char* logits, std::int64_t row_bytes) const {
        const auto bytes = static_cast<std::size_t>(std::min(drafted_, vocab_) * element_bytes(type_));
        for_each_active([&](std::int64_t b) {
            for (std::int64_t i = 0; i < level.width; ++i) {
                std::memcpy(kept_row(b, level.nodes[i]), logits + (b * level.width + i) * row_bytes, bytes);
            }
        });
    }

    // width: elements between rows.
    bool draw(const GrowthLevel& level, const ActiveRun& run, const char* all_logits, std::int64_t width) {
        const std::int64_t end = run.first + run.count, row_bytes = width * element_bytes(type_);
        const char* const logits = all_logits + run.first * level.width * row_bytes;
        std::size_t row = 0;
        for (std::int64_t b = run.first; b < end; ++b) {
            for (std::int64_t i = 0; i < level.width; ++i, ++row) {
                temperatures_[row] = temperature_[b];
                row_seeds_[row] = seeds_[b];
                row_offsets_[row] = offsets_[b] + level.nodes[i];
            }
        }
        const std::int64_t draws = level.width * level.num_samples;
        if (!sample_without_replacement(address(logits), static_cast<int>(type_), address(temperatures_.data()),
                                        address(row_seeds_.data()), address(row_offsets_.data()), address(draws_.data()),
                                        address(log_normalisers_.data()), run.count * level.width,
                                        std::min(width, vocab_), width, level.num_samples, true)) {
            return false;
        }
        const LogitRows rows{logits, type_, row_bytes, std::min(width, vocab_)};
        for (std::int64_t b = run.first; b < end; ++b) {
            const std::int64_t first_row = (b - run.first) * level.width;
            // After the draw, but by nothing that was drawn in it.
            if (level.shape) level.shape->give_out(b, rows.rows_from(first_row), temperature_[b]);
            const std::int64_t* const places = level.drawn + (level.drawn_per_request ? b * level.num_children : 0);
            for (std::int64_t child = 0; child < level.num_children; ++child) {
                tokens_[b * num_nodes_ + level.first_child + child] = draws_[static_cast<std::size_t>((b - run.first) * draws + places[child])];
            }
            if (level.shape) level.shape->note_draws(b, rows.rows_from(first_row), tokens_ + b * num_nodes_);
            std::int64_t* const children = tokens_ + b * num_nodes_ + level.first_child;
            if (target_ids_ != nullptr) {
                for (std::int64_t child = 0; child < level.num_children; ++child) {  // until here they were places in a row
                    if (children[child] >= 0) children[child] = target_ids_[children[child]];
                }
            }
            if (level.num_with_proposal == 0) continue;
            put_first(proposed_[b * num_nodes_ + level.first_child], children, level.num_with_proposal);
        }
        return true;
    }

    // As `put_first` of sequoia_kernels/drafts/source.py.
    static void put_first(std::int64_t proposed, std::int64_t* children, std::int64_t count) {
        if (proposed < 0) return;
        std::int64_t* const drawn = std::find(children, children + count, proposed);
        std::copy_backward(children, std::min(drawn, children + count - 1), std::min(drawn, children + count - 1) + 1);
        children[0] = proposed;
    }

    std::int64_t batch_size_, num_nodes_, vocab_;  // vocab: the target's, or the tokens in common with it
    std::int64_t* tokens_;                         // [B, N]
    char* draft_logits_;                           // [B, N, vocab]
    const std::int64_t* proposed_;                 // [B, N], or null; -1 for none
    const std::int64_t *last_tokens_, *root_tokens_;  // [B]
    const std::int32_t* active_;                      // [B]: nothing is drawn for a request with 0
    const std::int32_t* draft_lens_;                  // [B]
    std::int32_t* first_lens_;                        // [B], what the first level's forward reads: one less
    const float *temperature_, *top_p_;               // [B]; top_p null where it is off for all
    const std::int64_t *seeds_, *offsets_;            // [B]
    // Of a draft with other tokens, else null: its ids of the common ones, the target's, and what it is fed for a token.
    const std::int64_t *own_ids_, *target_ids_, *fed_ids_;
    std::int64_t num_fed_;
    std::int64_t drafted_;  // the draft's vocabulary
    ElementType type_;
    std::vector<GrowthLevel> levels_;
    std::vector<ActiveRun> runs_;
    Scratch<char> scratch_, cut_row_;
    Scratch<float> sums_;  // of levels whose row is added, before they are rounded
    // Of the rows of a draw.
    std::vector<float> temperatures_;
    std::vector<std::int64_t> row_seeds_, row_offsets_, draws_;
    std::vector<double> log_normalisers_;  // room for both types
    double forward_seconds_ = 0, draw_seconds_ = 0;
};

}  // namespace
}  // namespace sequoia

void bind_tree_growth(py::module_& module) {
    using sequoia::TreeGrowth;
    py::class_<TreeGrowth>(module, "TreeGrowth", "Draws a tree's tokens from a draft, level by level; see tree_growth.cpp.")
        .def(py::init<const py::dict&>(), py::arg("buffers"), py::keep_alive<1, 2>())
        .def("run", [](TreeGrowth& growth, std::uintptr_t weights, int num_threads, float behind) {
            const py::gil_scoped_release release;
            return growth.run(reinterpret_cast<const std::uintptr_t*>(weights), num_threads, behind);
        }, py::arg("weights"), py::arg("num_threads"), py::arg("behind"), "Grow the tree; False, and the tree is of no use, if a value is out of range.")
        .def("score_level", [](TreeGrowth& growth, std::int64_t index, std::uintptr_t weights, int num_threads) {
            const py::gil_scoped_release release;
            return growth.score_level(index, reinterpret_cast<const std::uintptr_t*>(weights), num_threads);
        }, py::arg("index"), py::arg("weights"), py::arg("num_threads"), "Do what `run` does for one level before its draws: what a level is timed by. False as there.")
        .def_property_readonly("forward_seconds", &TreeGrowth::forward_seconds)
        .def_property_readonly("draw_seconds", &TreeGrowth::draw_seconds);
}
