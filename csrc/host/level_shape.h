// Children of a level given out by confidence; the specification is sequoia_kernels/drafts/shaping.py.

#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace sequoia {

// Where a shaped tree's topology and what its steps know of it lie: N nodes a request, written in place.
struct ShapedTreeMemory {
    std::int64_t num_nodes, num_words, max_children;
    std::int32_t *parents, *ranks, *first_child, *num_children;  // [B, N]
    std::uint32_t* ancestor_mask;                                // [B, N, num_words]
    float* reach;                                                // [B, N]
    const float *drawn, *undrawn;                                // [num_ranks, num_edges + 1], [max_children, num_edges + 1]
    const float* edges;                                          // [num_edges]
    const float* foretold;  // [B, N], what `undrawn` goes by in place of the draft's largest probability; or null
    std::int64_t num_ranks, num_edges;
};

class LevelShape {
  public:
    // A level of `width` nodes from `first` on, and its `num_children` children behind it.
    // places: [B, num_children], each child's place among the [width, max_children] that there could be. own_mask: the
    // children's rows in the draft's next forward, [B, num_children, num_words], or null.
    LevelShape(const ShapedTreeMemory& tree, std::int64_t first, std::int64_t width, std::int64_t num_children,
               std::int64_t* places, std::uint32_t* own_mask);

    // Decide which nodes of a request get how many children. `logits` are those of its nodes.
    void give_out(std::int64_t request, const LogitRows& logits, float temperature);

    // Estimate the children's chances from the tokens that they drew, -1 for none. tokens: [N]. Behind give_out.
    void note_draws(std::int64_t request, const LogitRows& logits, const std::int64_t* tokens);

  private:
    std::int64_t bin_of(float probability) const;

    ShapedTreeMemory tree_;
    std::int64_t first_, width_, num_children_;
    std::int64_t* places_;
    std::uint32_t* own_mask_;
    std::vector<Weighing<float>> weighings_;  // of the nodes' rows
    std::vector<double> masses_;
    std::vector<float> worths_;
    std::vector<std::int64_t> order_;
};

}  // namespace sequoia
