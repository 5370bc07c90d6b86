#include "text_index.h"

#include <algorithm>
#include <stdexcept>

namespace sequoia {
namespace {

constexpr std::int64_t MOST_PLACES = 64;

std::uint64_t mixed(std::uint64_t hash, std::uint64_t token) {
    hash ^= token + 0x9E3779B97F4A7C15u + (hash << 6) + (hash >> 2);
    return (hash ^ (hash >> 31)) * 0xBF58476D1CE4E5B9u;
}

}  // namespace

TextIndex::TextIndex(std::int64_t least_match, std::int64_t most_match)
    : least_match_(least_match), most_match_(most_match) {
    if (least_match < 1 || most_match < least_match) {
        throw std::invalid_argument("TextIndex: least_match must be at least 1, and most_match no less");
    }
}

void TextIndex::append(const std::vector<std::int64_t>& tokens) {
    for (const std::int64_t token : tokens) {
        tokens_.push_back(token);
        before_.push_back(-1);
        if (size() < least_match_) continue;
        std::uint64_t hash = 0;
        for (std::int64_t i = size() - least_match_; i < size(); ++i) {
            hash = mixed(hash, static_cast<std::uint64_t>(tokens_[static_cast<std::size_t>(i)]));
        }
        const auto [entry, is_new] = newest_.try_emplace(hash, size() - 1);
        if (!is_new) {
            before_.back() = entry->second;
            entry->second = size() - 1;
        }
    }
}

// How many tokens up to a place agree with the newest ones.
std::int64_t TextIndex::match_at(std::int64_t place) const {
    const std::int64_t last = size() - 1, most = std::min(most_match_, place + 1);
    std::int64_t match = 0;
    while (match < most && tokens_[static_cast<std::size_t>(place - match)] == tokens_[static_cast<std::size_t>(last - match)]) {
        ++match;
    }
    return match;
}

TextIndex::Proposal TextIndex::propose(std::int64_t count) const {
    Proposal proposal;
    if (tokens_.empty()) return proposal;
    std::int64_t best = -1, place = before_.back();
    for (std::int64_t seen = 0; place >= 0 && seen < MOST_PLACES && proposal.match < most_match_; ++seen) {
        const std::int64_t match = match_at(place);
        if (match >= least_match_ && match > proposal.match) {
            proposal.match = match;
            best = place;
        }
        place = before_[static_cast<std::size_t>(place)];
    }
    if (best < 0) return proposal;
    const std::int64_t left = size() - 1 - best;  // tokens between the place and the end
    for (std::int64_t i = 0; i < count; ++i) {
        proposal.tokens.push_back(i < left ? tokens_[static_cast<std::size_t>(best + 1 + i)]
                                           : proposal.tokens[static_cast<std::size_t>(i - left)]);
    }
    return proposal;
}

}  // namespace sequoia
