#include "tree_search.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <queue>
#include <stdexcept>
#include <utility>

// One clone per instruction set, chosen when the module is loaded. Needs ifunc, which glibc has and musl has not.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define SEQUOIA_SIMD_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define SEQUOIA_SIMD_CLONES
#endif

namespace sequoia {
namespace {

constexpr double kInfeasible = -std::numeric_limits<double>::infinity();

// Sizes n that one pass of max_plus holds in registers: 32 doubles are 8 AVX2 registers.
constexpr int kTile = 32;

// A child of acceptance 0 behind the last positive entry is worth nothing and enables nothing.
std::vector<double> without_trailing_zeros(std::vector<double> acceptance) {
    while (!acceptance.empty() && acceptance.back() == 0.0) acceptance.pop_back();
    return acceptance;
}

struct Candidate {
    double value;
    std::int32_t depth;
    std::int32_t parent;  // in the order of choice
    std::int32_t rank;
};

// Ties: shallower first, then the child of the node that was chosen earlier. (parent, rank) is unique, so the order is
// total.
struct TakenLater {
    bool operator()(const Candidate& left, const Candidate& right) const {
        if (left.value != right.value) return left.value < right.value;
        if (left.depth != right.depth) return left.depth > right.depth;
        if (left.parent != right.parent) return left.parent > right.parent;
        return left.rank > right.rank;
    }
};

// Nodes in the order in which best-first takes them; every prefix is a tree.
//
// Why this is exact for a non-increasing vector with entries <= 1, with a level limit too: a node's value is at most
// its parent's and at most its left sibling's. So the n most valuable of all nodes above the limit can be chosen (ties
// towards parents and left siblings) to contain the parent and the left siblings of each member: they are a tree, and
// no n nodes are worth more. The limit removes whole levels, which leaves both inequalities as they are.
std::vector<Candidate> best_first_order(const std::vector<double>& acceptance, int budget, int max_levels) {
    std::vector<Candidate> chosen;
    if (budget < 1 || max_levels < 1) return chosen;
    chosen.reserve(budget);
    std::priority_queue<Candidate, std::vector<Candidate>, TakenLater> frontier;
    frontier.push({1.0, 0, -1, 0});
    while (static_cast<int>(chosen.size()) < budget && !frontier.empty()) {
        const Candidate node = frontier.top();
        frontier.pop();
        const auto index = static_cast<std::int32_t>(chosen.size());
        chosen.push_back(node);
        if (node.parent >= 0 && node.rank + 1 < static_cast<std::int32_t>(acceptance.size())) {
            const double parent_value = chosen[node.parent].value;
            frontier.push({parent_value * acceptance[node.rank + 1], node.depth, node.parent, node.rank + 1});
        }
        if (node.depth + 1 < max_levels && !acceptance.empty()) {
            frontier.push({node.value * acceptance[0], node.depth + 1, index, 0});
        }
    }
    return chosen;
}

// Breadth-first numbering of a tree whose nodes come parents first and siblings in order.
std::vector<std::int32_t> breadth_first_parents(const std::vector<Candidate>& nodes) {
    const std::size_t count = nodes.size();
    std::vector<std::int32_t> first(count + 1, 0);  // children of node i: order[first[i]] .. order[first[i + 1] - 1]
    for (std::size_t i = 1; i < count; ++i) ++first[nodes[i].parent + 1];
    for (std::size_t i = 0; i < count; ++i) first[i + 1] += first[i];
    std::vector<std::int32_t> order(count);
    std::vector<std::int32_t> next(first.begin(), first.end() - 1);
    for (std::size_t i = 1; i < count; ++i) order[next[nodes[i].parent]++] = static_cast<std::int32_t>(i);

    std::vector<std::int32_t> queue{0};
    std::vector<std::int32_t> parents{-1};
    queue.reserve(count);
    parents.reserve(count);
    for (std::size_t head = 0; head < queue.size(); ++head) {
        const std::int32_t node = queue[head];
        for (std::int32_t child = first[node]; child < first[node + 1]; ++child) {
            queue.push_back(order[child]);
            parents.push_back(static_cast<std::int32_t>(head));
        }
    }
    return parents;
}

// result[n] = max over m in [first_size, n) of left[m] + right[n - m], for n in (first_size, max_size].
// right has kTile readable entries of -inf on both sides of [1, max_size].
SEQUOIA_SIMD_CLONES
void max_plus(const double* left, const double* right, int first_size, int max_size, double* result) {
    for (int tile = first_size + 1; tile <= max_size; tile += kTile) {
        double best[kTile];
        for (int j = 0; j < kTile; ++j) best[j] = kInfeasible;
        const int last = std::min(tile + kTile - 1, max_size);
        for (int m = first_size; m < last; ++m) {
            const double head = left[m];
            if (head == kInfeasible) continue;
            const double* tail = right + (tile - m);
            for (int j = 0; j < kTile; ++j) {
                const double value = head + tail[j];
                best[j] = value > best[j] ? value : best[j];
            }
        }
        for (int n = tile; n <= last; ++n) result[n] = best[n - tile];
    }
}

// Limits a poll to about twenty calls a second: taking the interpreter's lock for each row would cost more than the
// row.
class PacedPoll {
   public:
    explicit PacedPoll(const Poll& poll) : poll_(poll), due_(Clock::now() + kInterval) {}
    void operator()() {
        const auto now = Clock::now();
        if (now < due_) return;
        if (poll_) poll_();
        due_ = now + kInterval;
    }

   private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::milliseconds kInterval{50};
    const Poll& poll_;
    Clock::time_point due_;
};

}  // namespace

LevelWidths level_widths(const std::vector<std::int32_t>& parents) {
    LevelWidths widths;
    std::vector<std::int32_t> depths(parents.size(), 0);
    for (std::size_t i = 0; i < parents.size(); ++i) {
        const std::int32_t parent = parents[i];
        if (i > 0) depths[i] = depths[parent] + 1;
        if (static_cast<std::size_t>(depths[i]) == widths.nodes.size()) {
            widths.nodes.push_back(0);
            widths.internal.push_back(0);
        }
        ++widths.nodes[depths[i]];
        // siblings are contiguous: a parent is counted with its first child
        if (i > 0 && parent != parents[i - 1]) ++widths.internal[depths[parent]];
    }
    return widths;
}

std::vector<std::int32_t> best_first_tree(const std::vector<double>& acceptance, int budget, int max_levels) {
    return breadth_first_parents(best_first_order(without_trailing_zeros(acceptance), budget, max_levels));
}

void best_first_values(const std::vector<double>& acceptance, int max_budget, int max_levels, double* values,
                       const Poll& poll) {
    const std::vector<double> useful = without_trailing_zeros(acceptance);
    const std::int64_t columns = max_levels + 1;
    PacedPoll paced(poll);
    std::fill(values, values + (max_budget + 1) * columns, 0.0);
    for (int levels = 1; levels <= max_levels; ++levels) {
        paced();
        const std::vector<Candidate> order = best_first_order(useful, max_budget, levels);
        double sum = 0.0;
        std::int32_t deepest = 0;
        for (int n = 1; n <= max_budget; ++n) {
            if (n <= static_cast<int>(order.size())) {
                sum += order[n - 1].value;
                deepest = std::max(deepest, order[n - 1].depth);
            }
            values[n * columns + levels] = sum;
        }
        if (deepest + 1 < levels) {  // the limit was not felt, so no higher one will be
            for (int n = 1; n <= max_budget; ++n) {
                double* row = values + n * columns;
                std::fill(row + levels + 1, row + columns, row[levels]);
            }
            return;
        }
    }
}

TreeTable::TreeTable(std::vector<double> acceptance, int max_budget, int max_levels, const Poll& poll)
    : acceptance_(without_trailing_zeros(std::move(acceptance))),
      max_budget_(max_budget),
      max_levels_(max_levels),
      num_branches_(std::min(static_cast<int>(acceptance_.size()), max_budget - 1)),
      stride_(max_budget + 1) {
    if (max_budget < 1) throw std::invalid_argument("TreeTable: max_budget must be at least 1");
    if (max_levels < 0) throw std::invalid_argument("TreeTable: max_levels must be at least 0");
    if (max_levels_ == 0) {
        solve_unlimited(poll);
    } else {
        solve_levels(poll);
    }
}

// partial[l][b][n] = max over m of partial[l][b - 1][m] + a[b - 1] * best[l - 1][n - m], best[l][n] = max over b.
// A child of acceptance 0 stays a leaf, and cannot be the last child: either would be useless.
void TreeTable::solve_levels(const Poll& poll) {
    PacedPoll paced(poll);
    const int n_max = max_budget_;
    const std::vector<double> leaf_only = [&] {
        std::vector<double> row(stride_, kInfeasible);
        row[1] = 1.0;
        return row;
    }();
    best_.push_back(leaf_only);
    partial_.push_back(leaf_only);  // one level: no children

    std::vector<double> padded(stride_ + 2 * kTile, kInfeasible);
    double* const scaled = padded.data() + kTile;
    for (int levels = 2; levels <= std::min(max_levels_, n_max); ++levels) {
        const std::vector<double>& below = best_.back();
        std::vector<double> best = leaf_only;
        partial_.emplace_back((num_branches_ + 1) * stride_, kInfeasible);
        const int top = levels - 1;
        std::copy(leaf_only.begin(), leaf_only.end(), partial(top, 0));
        for (int b = 1; b <= num_branches_; ++b) {
            paced();
            const double rate = acceptance_[b - 1];
            double* row = partial(top, b);
            if (rate == 0.0) {
                for (int n = b + 1; n <= n_max; ++n) row[n] = partial(top, b - 1)[n - 1];
                continue;
            }
            for (int n = 1; n <= n_max; ++n) scaled[n] = rate * below[n];
            max_plus(partial(top, b - 1), scaled, b, n_max, row);
            for (int n = b + 1; n <= n_max; ++n) best[n] = std::max(best[n], row[n]);
        }
        // A level limit that changes nothing leaves the recurrence at its fixed point: all higher ones are equal.
        const bool fixed_point = best == below;
        best_.push_back(std::move(best));
        if (fixed_point) break;
    }
}

// Without a limit best[n] depends on smaller n only, so one sweep over n replaces the sweep over levels.
void TreeTable::solve_unlimited(const Poll& poll) {
    PacedPoll paced(poll);
    best_.emplace_back(stride_, kInfeasible);
    partial_.emplace_back((num_branches_ + 1) * stride_, kInfeasible);
    std::vector<double>& best = best_[0];
    best[1] = 1.0;
    partial(0, 0)[1] = 1.0;
    // reversed[b][max_budget - n] = a[b - 1] * best[n], so that the inner loop runs forward in both arrays
    std::vector<double> reversed((num_branches_ + 1) * stride_, kInfeasible);
    for (int n = 1; n <= max_budget_; ++n) {
        paced();
        for (int b = 1; b <= std::min(num_branches_, n - 1); ++b) {
            const double* left = partial(0, b - 1);
            double value = kInfeasible;
            if (acceptance_[b - 1] == 0.0) {
                partial(0, b)[n] = left[n - 1];
                continue;
            }
            const double* right = reversed.data() + b * stride_ + (max_budget_ - n);
            for (int m = b; m < n; ++m) value = std::max(value, left[m] + right[m]);
            partial(0, b)[n] = value;
            best[n] = std::max(best[n], value);
        }
        for (int b = 1; b <= num_branches_; ++b) {
            if (acceptance_[b - 1] > 0.0) reversed[b * stride_ + max_budget_ - n] = acceptance_[b - 1] * best[n];
        }
    }
}

int TreeTable::slot(int levels) const {
    return max_levels_ == 0 ? 0 : std::min(levels, static_cast<int>(best_.size())) - 1;
}

void TreeTable::values(double* values) const {
    const std::int64_t columns = max_levels_ + 1;
    std::fill(values, values + (max_budget_ + 1) * columns, 0.0);
    for (int levels = max_levels_ == 0 ? 0 : 1; levels <= max_levels_; ++levels) {
        const std::vector<double>& exact = best_[slot(levels)];
        double at_most = 0.0;
        for (int n = 1; n <= max_budget_; ++n) {
            at_most = std::max(at_most, exact[n]);
            values[n * columns + levels] = at_most;
        }
    }
}

std::vector<std::int32_t> TreeTable::tree(int budget, int levels) const {
    if (budget < 1 || budget > max_budget_) throw std::invalid_argument("TreeTable.tree: budget is outside the table");
    if (max_levels_ == 0 ? levels != 0 : (levels < 1 || levels > max_levels_)) {
        throw std::invalid_argument("TreeTable.tree: levels is outside the table");
    }
    // More nodes never lower the value, so a tie (a gain below rounding) goes to the larger tree.
    const std::vector<double>& exact = best_[slot(levels)];
    int size = 1;
    for (int n = 2; n <= budget; ++n) {
        if (exact[n] >= exact[size]) size = n;
    }

    struct Subtree {
        std::int32_t size;
        std::int32_t levels;
    };
    std::vector<Subtree> queue{{size, levels}};
    std::vector<std::int32_t> parents{-1};
    std::vector<Subtree> children;
    queue.reserve(size);
    parents.reserve(size);
    for (std::size_t head = 0; head < queue.size(); ++head) {
        const auto [nodes, limit] = queue[head];
        if (nodes == 1) continue;
        const int here = slot(limit);
        const int below_levels = max_levels_ == 0 ? 0 : limit - 1;
        const std::vector<double>& below = best_[slot(below_levels)];

        int num_children = 0;  // ties: fewest children
        double value = kInfeasible;
        for (int b = 1; b <= std::min(num_branches_, nodes - 1); ++b) {
            if (acceptance_[b - 1] > 0.0 && partial(here, b)[nodes] > value) {
                value = partial(here, b)[nodes];
                num_children = b;
            }
        }
        children.assign(num_children, {1, below_levels});
        int remaining = nodes;
        for (int b = num_children; b >= 1; --b) {
            const double rate = acceptance_[b - 1];
            int split = remaining - 1;  // nodes left to the root and its first b - 1 children
            if (rate > 0.0) {
                const double* left = partial(here, b - 1);
                double best = kInfeasible;
                for (int m = remaining - 1; m >= b; --m) {  // ties: smallest last subtree
                    const double scaled = rate * below[remaining - m];
                    if (left[m] + scaled > best) {
                        best = left[m] + scaled;
                        split = m;
                    }
                }
            }
            children[b - 1].size = remaining - split;
            remaining = split;
        }
        for (const Subtree& child : children) {
            queue.push_back(child);
            parents.push_back(static_cast<std::int32_t>(head));
        }
    }
    return parents;
}

}  // namespace sequoia
