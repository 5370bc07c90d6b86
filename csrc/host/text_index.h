// An index of one text that finds where its newest tokens stood before, and so what may come next.
//
// Computes    of all earlier places where the last `least_match` tokens end, the one behind which the longest run of the
//             newest tokens agrees, the newest of equals; and the tokens that followed there. Where these reach the end
//             of the text they go on with themselves: a text that repeats is one.
// Plan        Every place is linked to the one before it with the same last `least_match` tokens (by a hash; agreement is
//             always looked at). A search walks MOST_PLACES links at most.
// Memory      16 bytes a token for text and links, and a table entry for each distinct run.

#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace sequoia {

class TextIndex {
  public:
    TextIndex(std::int64_t least_match, std::int64_t most_match);

    void append(const std::vector<std::int64_t>& tokens);

    // What followed the best place: up to `count` tokens, none where no place agrees.
    struct Proposal {
        std::int64_t match = 0;  // tokens that agree, `most_match` at most
        std::vector<std::int64_t> tokens;
    };
    Proposal propose(std::int64_t count) const;

    std::int64_t size() const { return static_cast<std::int64_t>(tokens_.size()); }

  private:
    std::int64_t match_at(std::int64_t place) const;

    std::int64_t least_match_, most_match_;
    std::vector<std::int64_t> tokens_;
    std::vector<std::int64_t> before_;  // of each place, the place before it with the same hash; -1 for none
    std::unordered_map<std::uint64_t, std::int64_t> newest_;
};

}  // namespace sequoia
