#include "lookup_choice.h"

#include <algorithm>
#include <stdexcept>

namespace sequoia {

LookupChoice::LookupChoice(const LookupSettings& settings, std::vector<LookupRow> rows)
    : settings_(settings),
      rows_(std::move(rows)),
      found_(static_cast<std::size_t>(settings.num_requests)),
      lengths_(static_cast<std::size_t>(settings.num_requests), 0),
      tried_(settings.prior_chances.size(), settings.prior_weight),
      siblings_tried_(settings.prior_weight),
      siblings_right_(settings.prior_weight * settings.sibling_chance),
      agreed_(settings.prior_chances.size() + 1),
      merged_(settings.prior_chances.size() + 1),
      own_(found_.size()),
      with_proposal_(found_.size()),
      expected_(rows_.size()) {
    for (std::int64_t request = 0; request < settings.num_requests; ++request) {
        texts_.emplace_back(settings.least_match, settings.most_match);
    }
    for (const double chance : settings.prior_chances) right_.push_back(chance * settings.prior_weight);
}

std::size_t LookupChoice::bin_of(std::int64_t agreed) const {
    const auto last = static_cast<std::int64_t>(settings_.bin_of.size()) - 1;
    return static_cast<std::size_t>(settings_.bin_of[static_cast<std::size_t>(std::min(agreed, last))]);
}

std::int64_t LookupChoice::add_base(const LookupBase& base) {
    bases_.push_back(base);
    return static_cast<std::int64_t>(bases_.size()) - 1;
}

double LookupChoice::tokens_to_beat(const LookupBase& base, std::int64_t match) const {
    if (!base.drafts) return 1.0;
    const double usual =
        (base.tokens * settings_.base_weight + all_.tokens) / (settings_.base_weight + all_.steps);
    const Counts& counts = agreed_[count_of(match)];
    const double own =
        (usual * settings_.agreed_weight + counts.tokens) / (settings_.agreed_weight + counts.steps);
    const double doubt = match == 0 ? 0.0 : settings_.doubt / (1.0 + counts.steps / settings_.agreed_weight);
    return own * (1.0 + doubt);
}

double LookupChoice::merged_tokens(const LookupBase& base, std::int64_t match, std::int64_t proposed) const {
    const std::int64_t length = std::min(proposed, static_cast<std::int64_t>(base.merging.size()) - 1);
    double value = base.merging[static_cast<std::size_t>(length)].first;
    for (std::int64_t node = length - 1; node >= 0; --node) {
        const double accepted = chance(match + node);
        value = accepted * (1.0 + value) + (1.0 - accepted) * base.merging[static_cast<std::size_t>(node)].second;
    }
    const Counts& counts = merged_[count_of(match)];
    return ((1.0 + value) * settings_.merged_weight + counts.tokens) / (settings_.merged_weight + counts.steps);
}

bool LookupChoice::pays(double saved_ms) {
    if (promised_ms_ < settings_.set_up_ms) promised_ms_ += saved_ms;
    return promised_ms_ >= settings_.set_up_ms;
}

std::int64_t LookupChoice::choose(std::int64_t base_number, const std::vector<bool>& active) {
    if (active.size() != texts_.size()) throw std::invalid_argument("LookupChoice: active must have an entry a request");
    bool any = false;
    for (std::size_t request = 0; request < texts_.size(); ++request) {
        TextIndex::Proposal& found = found_[request];
        lengths_[request] = 0;
        found = active[request] ? texts_[request].propose(settings_.longest_path) : TextIndex::Proposal{};
        const auto unknown = std::find_if(found.tokens.begin(), found.tokens.end(), [&](std::int64_t token) {
            return token >= settings_.known_tokens;
        });
        found.tokens.erase(unknown, found.tokens.end());
        if (found.tokens.empty()) found.match = 0;
        any |= !found.tokens.empty();
    }
    if (!any || base_number < 0) return BASE;
    const LookupBase& base = bases_.at(static_cast<std::size_t>(base_number));
    const double saved = siblings_right_ / siblings_tried_;
    std::fill(expected_.begin(), expected_.end(), 0.0);
    double best = 0, plainly = 0, gained = 0;
    for (std::size_t request = 0; request < texts_.size(); ++request) {
        own_[request] = with_proposal_[request] = 0;
        if (!active[request]) continue;
        const TextIndex::Proposal& found = found_[request];
        const auto known = static_cast<std::int64_t>(found.tokens.size());
        own_[request] = tokens_to_beat(base, found.match);
        if (known > 0 && base.drafts) with_proposal_[request] = merged_tokens(base, found.match, known);
        best += std::max(own_[request], with_proposal_[request]);
        plainly += own_[request];
        gained += std::max(with_proposal_[request] - own_[request], 0.0);
        below_.assign(1, 0.0);  // tokens, by length
        double through = 1;
        for (std::int64_t length = 1; length <= known; ++length) {
            through *= chance(found.match + length - 1);
            below_.push_back(below_.back() + through);
        }
        for (std::size_t row = 0; row < rows_.size(); ++row) {
            const std::int64_t length = rows_[row].length;
            expected_[row] += 1.0 + below_[static_cast<std::size_t>(std::min(length, known))];
            if (rows_[row].siblings == 0) continue;
            // Sums of products: what is left of the difference is the chance of the whole path.
            double whole = length <= known ? 1.0 : 0.0;
            for (std::int64_t place = 0; place < length && whole > 0; ++place) whole *= chance(found.match + place);
            expected_[row] += (1.0 - whole) * saved;
        }
    }
    best /= base.step_ms;
    const double ms_per_token = base.step_ms / plainly;
    std::int64_t pick = -1;
    double speed = 0;
    for (std::size_t row = 0; row < rows_.size(); ++row) {
        if (rows_[row].siblings > 0 && !base.drafts) continue;  // a draft that is not asked is not asked for siblings
        if (pick >= 0 && expected_[row] * rows_[row].rate <= speed) continue;
        pick = static_cast<std::int64_t>(row);
        speed = expected_[row] * rows_[row].rate;
    }
    if (pick >= 0 && speed > best) {
        if (!pays((speed * ms_per_token - 1.0) / rows_[static_cast<std::size_t>(pick)].rate)) return BASE;
        const std::int64_t length = rows_[static_cast<std::size_t>(pick)].length;
        for (std::size_t request = 0; request < texts_.size(); ++request) {
            lengths_[request] = std::min(length, static_cast<std::int64_t>(found_[request].tokens.size()));
        }
        return pick;
    }
    if (!(gained > 0) || !pays(gained * ms_per_token)) return BASE;
    for (std::size_t request = 0; request < texts_.size(); ++request) {
        if (!(with_proposal_[request] > own_[request])) continue;
        const auto room = static_cast<std::int64_t>(base.merging.size()) - 1;
        lengths_[request] = std::min(room, static_cast<std::int64_t>(found_[request].tokens.size()));
    }
    return MERGED;
}

std::vector<std::vector<std::int64_t>> LookupChoice::proposed() const {
    std::vector<std::vector<std::int64_t>> paths;
    for (std::size_t request = 0; request < texts_.size(); ++request) {
        const std::vector<std::int64_t>& tokens = found_[request].tokens;
        paths.emplace_back(tokens.begin(), tokens.begin() + lengths_[request]);
    }
    return paths;
}

void LookupChoice::propose(const std::vector<std::vector<std::int64_t>>& paths) {
    if (paths.size() != texts_.size()) throw std::invalid_argument("LookupChoice: paths must have an entry a request");
    for (std::size_t request = 0; request < texts_.size(); ++request) {
        const auto known = static_cast<std::int64_t>(found_[request].tokens.size());
        lengths_[request] = std::min(known, static_cast<std::int64_t>(paths[request].size()));
    }
}

void LookupChoice::take(std::int64_t request, const std::vector<std::int64_t>& tokens, Step step) {
    TextIndex::Proposal& found = found_.at(static_cast<std::size_t>(request));
    if (step != Step::PROMPT) {
        const std::size_t compared = std::min(found.tokens.size(), tokens.size());
        for (std::size_t place = 0; place < compared; ++place) {
            const std::size_t bin = bin_of(found.match + static_cast<std::int64_t>(place));
            tried_[bin] += 1;
            if (found.tokens[place] != tokens[place]) break;
            right_[bin] += 1;
        }
        const auto count = static_cast<double>(tokens.size());
        Counts* counts = nullptr;
        if (step == Step::MERGED && lengths_[static_cast<std::size_t>(request)] > 0) {
            counts = &merged_[count_of(found.match)];
        } else if (step == Step::DRAFTED || step == Step::MERGED) {
            all_.tokens += count;
            all_.steps += 1;
            counts = &agreed_[count_of(found.match)];
        }
        if (counts != nullptr) {
            counts->tokens += count;
            counts->steps += 1;
        }
    }
    texts_[static_cast<std::size_t>(request)].append(tokens);
}

void LookupChoice::note_sibling(bool accepted) {
    siblings_tried_ += 1;
    siblings_right_ += accepted ? 1 : 0;
}

}  // namespace sequoia
