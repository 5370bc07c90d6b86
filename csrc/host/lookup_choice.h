// What a step decodes with where texts are looked up: chosen before it, learnt from behind it.
//
// Computes    of each request what stood behind its newest tokens before (text_index.h); of these proposals and the
//             draft's tree, what promises the most tokens a millisecond: the draft's tree, the same with proposals in
//             it, or a lookup tree. sequoia_kernels/planner/lookup.py is the specification, class by class.
// Plan        One call before a step and one for each request behind it, with everything that they read side by side:
//             they run when a target's weights have just emptied the caches, in every step, also where nothing repeats.
// Numerics    float64, in the specification's order: equal choices.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "text_index.h"

namespace sequoia {

// Numbers of the specification, by its names.
struct LookupSettings {
    std::int64_t num_requests, least_match, most_match, longest_path;
    std::int64_t known_tokens;  // tokens from here on are never proposed
    std::vector<std::int64_t> bin_of;  // of each number of tokens that agree
    std::vector<double> prior_chances;
    double prior_weight, base_weight, agreed_weight, merged_weight, doubt, sibling_chance;
    double set_up_ms;  // of trees with proposals in them, once
};

// A lookup tree to choose.
struct LookupRow {
    std::int64_t length, siblings;
    double rate;  // 1 / milliseconds of a step
};

// A tree of the draft.
struct LookupBase {
    double step_ms, tokens;
    bool drafts;                                     // has more than one node
    std::vector<std::pair<double, double>> merging;  // `MergedValue`: below each node of the path, and without its first child
};

class LookupChoice {
  public:
    static constexpr std::int64_t BASE = -1, MERGED = -2;

    LookupChoice(const LookupSettings& settings, std::vector<LookupRow> rows);

    // Returns the tree's number.
    std::int64_t add_base(const LookupBase& base);

    // Looks all active requests' texts up. Returns BASE, MERGED or the place of a lookup tree among the rows.
    // base: the number of the draft's tree; -1 for one that takes no proposals, and then BASE.
    std::int64_t choose(std::int64_t base, const std::vector<bool>& active);

    // What the step proposes to each request. By `choose`; or by whoever chose something else.
    std::vector<std::vector<std::int64_t>> proposed() const;
    void propose(const std::vector<std::vector<std::int64_t>>& paths);

    // What was found last: tokens that agree, and what followed.
    std::vector<TextIndex::Proposal> found() const { return found_; }

    // What a step, or a prompt, added to a text.
    enum class Step : std::int64_t { PROMPT, OTHER, DRAFTED, MERGED };
    void take(std::int64_t request, const std::vector<std::int64_t>& tokens, Step step);
    void note_sibling(bool accepted);

  private:
    struct Counts {
        double tokens = 0, steps = 0;
    };

    double tokens_to_beat(const LookupBase& base, std::int64_t match) const;
    double merged_tokens(const LookupBase& base, std::int64_t match, std::int64_t length) const;
    double chance(std::int64_t agreed) const {
        const auto bin = bin_of(agreed);
        return right_[bin] / tried_[bin];
    }
    std::size_t bin_of(std::int64_t agreed) const;
    // Whether proposals that save so many milliseconds are taken: from when on they pay for being set up.
    bool pays(double saved_ms);
    std::size_t count_of(std::int64_t match) const { return match == 0 ? 0 : 1 + bin_of(match); }

    LookupSettings settings_;
    std::vector<LookupRow> rows_;
    std::vector<LookupBase> bases_;
    double promised_ms_ = 0;  // saved by all proposals, as long as they do not pay
    std::vector<TextIndex> texts_;
    std::vector<TextIndex::Proposal> found_;  // for the step to come
    std::vector<std::int64_t> lengths_;       // what of it the step has
    std::vector<double> tried_, right_;
    double siblings_tried_, siblings_right_;
    Counts all_;
    std::vector<Counts> agreed_, merged_;
    std::vector<double> own_, with_proposal_, expected_, below_;  // of a choice
};

}  // namespace sequoia
