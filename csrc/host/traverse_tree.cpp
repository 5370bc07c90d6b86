// The rule "traversal" of verify_tree on the CPU, for one request at a temperature above 0.
//
// Computes    as sequoia_kernels/ops/verify_tree/traversal.py: depth first; a node whose children have all failed
//             accepts the path to it by its coin, or is dropped by its parent.
// Plan        one thread. What fails for certain is not visited: a child with a chance of 0 is dropped at once, with
//             all that is below it, and a node whose chance has become 0 tries no further children.
// Memory      two rows of logits per node that is entered and has children, one per accepted leaf; one pass over the
//             two rows of weights per drop. Weights of the path are kept as far as MOST_WEIGHTS go; beyond it a node
//             that is come back to loads its rows again.
// Numerics    as verify_tree.cpp.

#include <algorithm>
#include <memory>
#include <vector>

#include "philox.h"
#include "tried_node.h"

namespace sequoia {
namespace {

constexpr std::int64_t MOST_WEIGHTS = std::int64_t{8} << 20;  // 32 MiB of float32

// A node on the path that is being tried.
template <class Real>
struct Entry {
    TriedNode<Real> tried;
    std::int32_t next_rank = 0;
    double chance = 1;
};

template <class Real>
struct Workspace {
    std::vector<Entry<Real>> path;     // kept for the memory of its entries
    std::vector<NodeRows<Real>> rows;  // of the path's nodes, in turn
};

template <class Real>
class Traversal {
  public:
    Traversal(const VerifyRequest& request, Workspace<Real>& workspace) : request_(request), workspace_(workspace) {
        const std::int64_t levels = request.tree.num_levels;
        const std::int64_t fitting = MOST_WEIGHTS / (2 * request.target.vocab);
        num_rows_ = static_cast<std::size_t>(std::clamp<std::int64_t>(fitting, 1, levels));
        if (workspace.path.size() < static_cast<std::size_t>(levels)) workspace.path.resize(levels);
        if (workspace.rows.size() < num_rows_) workspace.rows.resize(num_rows_);
        for (NodeRows<Real>& rows : workspace.rows) rows.node = -1;  // another request's
    }

    void run(Emitted& emitted) {
        enter(0, 1.0);
        while (true) {
            const std::int32_t leaf = try_children();
            if (leaf == ENTERED) continue;
            if (leaf != NONE) {
                enter(leaf, 1.0);  // accepted: its chance plays no role any more
                break;
            }
            Entry<Real>& last = path(depth_);
            if (depth_ == 0 || coin_of(last.tried.node()) < last.chance) break;
            const std::int32_t failed = last.tried.node();
            --depth_;
            drop(path(depth_), failed);
        }
        for (std::int64_t level = 0; level <= depth_; ++level) emitted.nodes[level] = path(level).tried.node();
        emitted.num_accepted = static_cast<std::int32_t>(depth_ + 1);
        Entry<Real>& last = path(depth_);
        last.tried.reopen(request_, rows(depth_));
        emitted.next_token = last.tried.draw_next(request_);
    }

  private:
    static constexpr std::int32_t ENTERED = -2, NONE = -1;

    Entry<Real>& path(std::int64_t level) { return workspace_.path[static_cast<std::size_t>(level)]; }
    NodeRows<Real>& rows(std::int64_t level) { return workspace_.rows[static_cast<std::size_t>(level) % num_rows_]; }

    double coin_of(std::int32_t node) const {
        return node_coin(request_.stream.seed, request_.stream.offset, static_cast<std::uint32_t>(node));
    }

    void enter(std::int32_t node, double chance) {
        ++depth_;
        Entry<Real>& entry = path(depth_);
        entry.tried.open(request_, node, rows(depth_));
        entry.next_rank = 0;
        entry.chance = chance;
    }

    void drop(Entry<Real>& entry, std::int32_t child) {
        entry.tried.reopen(request_, rows(depth_));
        entry.chance = entry.tried.drop(request_, child, entry.chance);
    }

    // Try the children of the last node that are left: until one with children of its own is entered, or a leaf is
    // accepted, whose node is returned, or all have failed.
    std::int32_t try_children() {
        const Tree& tree = request_.tree;
        Entry<Real>& entry = path(depth_);
        const std::int32_t node = entry.tried.node();
        while (entry.next_rank < tree.num_children[node] && entry.chance > 0) {
            const std::int32_t child = tree.first_child[node] + entry.next_rank++;
            if (!entry.tried.is_draw(request_, child)) continue;
            const double wanted = entry.chance * entry.tried.residual_at(request_.tokens[child]);
            const double chance = std::min(1.0, wanted / entry.tried.draft_at(request_, child));
            if (chance > 0) {
                if (tree.num_children[child] > 0) {
                    enter(child, chance);
                    return ENTERED;
                }
                if (coin_of(child) < chance) return child;
            }
            drop(entry, child);
        }
        return NONE;
    }

    const VerifyRequest& request_;
    Workspace<Real>& workspace_;
    std::size_t num_rows_;
    std::int64_t depth_ = -1;  // of the path's last node
};

}  // namespace

template <class Real>
void traverse(const VerifyRequest& request, Emitted& emitted) {
    static thread_local Workspace<Real> workspace;
    std::fill(emitted.nodes, emitted.nodes + request.tree.num_levels, -1);
    Traversal<Real>(request, workspace).run(emitted);
}

template void traverse<float>(const VerifyRequest&, Emitted&);
template void traverse<double>(const VerifyRequest&, Emitted&);

}  // namespace sequoia
