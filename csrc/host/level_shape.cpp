// Children of a level given out by confidence.
//
// Computes    as sequoia_kernels/drafts/shaping.py: the places of the largest worths, ties to the lower one, and what
//             follows from them in the topology; the chances of the children once they are drawn.
// Plan        A row of logits is read once for its peak and once for its mass; what is left is as small as the tree.
// Numerics    Chances in float32. Where they lie within rounding of an edge between bins, another backend may take the
//             other bin: another tree, which is as exact.

#include "level_shape.h"

#include <algorithm>

namespace sequoia {
namespace {

constexpr float LEAST_REACH = 1e-20f;  // as in drafts/shaping.py

}  // namespace

LevelShape::LevelShape(const ShapedTreeMemory& tree, std::int64_t first, std::int64_t width, std::int64_t num_children,
                       std::int64_t* places, std::uint32_t* own_mask)
    : tree_(tree), first_(first), width_(width), num_children_(num_children), places_(places), own_mask_(own_mask) {
    weighings_.resize(static_cast<std::size_t>(width));
    masses_.resize(static_cast<std::size_t>(width));
    worths_.resize(static_cast<std::size_t>(width * tree.max_children));
    order_.resize(worths_.size());
}

std::int64_t LevelShape::bin_of(float probability) const {
    return std::upper_bound(tree_.edges, tree_.edges + tree_.num_edges, probability) - tree_.edges;
}

void LevelShape::give_out(std::int64_t request, const LogitRows& logits, float temperature) {
    const std::int64_t nodes = request * tree_.num_nodes, most = tree_.max_children;
    for (std::int64_t i = 0; i < width_; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const double peak = row_peak(logits.row(i), logits.type, logits.vocab).logit;
        weighings_[at] = Weighing<float>::of(peak, temperature == 0 ? 1 : temperature);
        masses_[at] = weigh_row(logits.row(i), logits.type, logits.vocab, weighings_[at], nullptr) / Weighing<float>::PEAK_WEIGHT;
        const float largest = static_cast<float>(1 / masses_[at]);
        const std::int64_t bin = bin_of(tree_.foretold == nullptr ? largest : tree_.foretold[nodes + first_ + i]);
        for (std::int64_t rank = 0; rank < most; ++rank) {
            const float undrawn = tree_.undrawn[rank * (tree_.num_edges + 1) + bin];
            worths_[static_cast<std::size_t>(i * most + rank)] = tree_.reach[nodes + first_ + i] * undrawn;
        }
    }
    for (std::size_t place = 0; place < order_.size(); ++place) order_[place] = static_cast<std::int64_t>(place);
    const auto chosen_end = order_.begin() + num_children_;
    std::partial_sort(order_.begin(), chosen_end, order_.end(), [this](std::int64_t left, std::int64_t right) {
        const float own = worths_[static_cast<std::size_t>(left)], other = worths_[static_cast<std::size_t>(right)];
        return own != other ? own > other : left < right;
    });
    std::sort(order_.begin(), chosen_end);

    const std::int64_t first_child = first_ + width_, words = tree_.num_words;
    for (std::int64_t i = 0; i < width_; ++i) {
        tree_.num_children[nodes + first_ + i] = 0;
        tree_.first_child[nodes + first_ + i] = -1;
    }
    for (std::int64_t c = 0; c < num_children_; ++c) {
        const std::int64_t place = order_[static_cast<std::size_t>(c)], node = first_child + c;
        const std::int64_t parent = first_ + place / most;
        places_[request * num_children_ + c] = place;
        tree_.parents[nodes + node] = static_cast<std::int32_t>(parent);
        tree_.ranks[nodes + node] = static_cast<std::int32_t>(place % most);
        if (tree_.num_children[nodes + parent]++ == 0) tree_.first_child[nodes + parent] = static_cast<std::int32_t>(node);
        std::uint32_t* const row = tree_.ancestor_mask + (nodes + node) * words;
        std::copy_n(tree_.ancestor_mask + (nodes + parent) * words, words, row);
        row[node / 32] |= std::uint32_t{1} << (node % 32);
        if (own_mask_ != nullptr) std::copy_n(row, words, own_mask_ + (request * num_children_ + c) * words);
    }
}

void LevelShape::note_draws(std::int64_t request, const LogitRows& logits, const std::int64_t* tokens) {
    const std::int64_t nodes = request * tree_.num_nodes, most = tree_.max_children;
    for (std::int64_t c = 0; c < num_children_; ++c) {
        const std::int64_t place = places_[request * num_children_ + c], row = place / most;
        const std::int64_t node = first_ + width_ + c, token = tokens[node];
        float chance = 0;
        if (token >= 0) {
            const auto at = static_cast<std::size_t>(row);
            const double logit = logit_at(logits.row(row), logits.type, token);
            chance = static_cast<float>(weighings_[at].relative(logit) / masses_[at]);
        }
        const std::int64_t rank = std::min(place % most, tree_.num_ranks - 1);
        const float drawn = tree_.drawn[rank * (tree_.num_edges + 1) + bin_of(chance)];
        tree_.reach[nodes + node] = std::max(tree_.reach[nodes + first_ + row] * drawn, LEAST_REACH);
    }
}

}  // namespace sequoia
