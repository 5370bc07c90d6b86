// Optimal draft trees for an acceptance vector: best-first where that is exact, a dynamic programme for any vector.
//
// Value of a tree: F = sum over its nodes of the product of acceptance[rank] along the path to the node (root: 1).
// A tree is "useful" when no leaf has a rank of acceptance 0: such leaves add nothing. Only useful trees are returned,
// so a result may have fewer nodes than its budget where every further node would be worth nothing.
//
// Source: Sequoia (arXiv 2402.12374), section 3.1, where the recurrence is stated for trees without a level limit
// first and with one second; the number of children is one of its coordinates, so no order of the vector is assumed.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace sequoia {

// Called now and then during long work; may throw to end it (a binding checks for Ctrl-C there).
using Poll = std::function<void()>;

// Nodes per level, and those among them that have children.
struct LevelWidths {
    std::vector<std::int32_t> nodes;
    std::vector<std::int32_t> internal;
};

// parents: breadth-first, parents[0] = -1.
LevelWidths level_widths(const std::vector<std::int32_t>& parents);

// Parents (breadth-first) of a best tree with at most `budget` nodes on at most `max_levels` levels.
// Exact for non-increasing vectors with entries <= 1 only; O(budget log budget).
std::vector<std::int32_t> best_first_tree(const std::vector<double>& acceptance, int budget, int max_levels);

// Values of those trees for all budgets and level limits. values: [max_budget + 1, max_levels + 1], row-major.
void best_first_values(const std::vector<double>& acceptance, int max_budget, int max_levels, double* values,
                       const Poll& poll);

// The solved dynamic programme: values and trees for all budgets and level limits, for any vector.
class TreeTable {
   public:
    // max_levels = 0: no limit on the levels; the table then has the single column `levels = 0`.
    TreeTable(std::vector<double> acceptance, int max_budget, int max_levels, const Poll& poll);

    int max_budget() const { return max_budget_; }
    int max_levels() const { return max_levels_; }

    // values: [max_budget + 1, max_levels + 1], row-major; [n, l] is the best value of at most n nodes on at most l
    // levels, 0 where n or l is 0. Without a limit the only column holds the best value of at most n nodes.
    void values(double* values) const;

    // Parents (breadth-first) of a tree that attains values[budget, levels]; of those the largest.
    std::vector<std::int32_t> tree(int budget, int levels) const;

   private:
    void solve_levels(const Poll& poll);
    void solve_unlimited(const Poll& poll);
    int slot(int levels) const;
    double* partial(int slot, int num_children) { return partial_[slot].data() + num_children * stride_; }
    const double* partial(int slot, int num_children) const { return partial_[slot].data() + num_children * stride_; }

    std::vector<double> acceptance_;  // without trailing zeros
    int max_budget_;
    int max_levels_;
    int num_branches_;
    std::int64_t stride_;
    // Slot s stands for s + 1 levels; the last one also for all higher limits (and alone for "no limit").
    std::vector<std::vector<double>> best_;     // [slot][n]: best value of exactly n nodes, -inf where there is none
    std::vector<std::vector<double>> partial_;  // [slot][b][n]: the same for a root with exactly b children
};

}  // namespace sequoia
