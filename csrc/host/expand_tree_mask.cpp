// The dense mask that attention libraries take, from the packed tree mask.
//
// Computes    out[b, 0, i, s]: does query row i of request b see cache slot s? The committed prefix (s < cache_len)
//             within the sliding window counted by depth, and behind it the tree slots whose bits are set, of which a
//             window w leaves the last w. Boolean, or additive (0 where seen, -inf elsewhere).
// Returns     whether every row sees every slot, and whether a request has a slot that none of its rows sees.
// Memory      writes every element of out once, and the tree's part of it twice. The mask comes as bytes and the
//             lengths as numbers, not as addresses: they are also what a cache of masks is keyed by.

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ops.h"
#include "rows.h"

namespace sequoia {
namespace {

constexpr int BOOLEAN = 4;  // beside the codes of ElementType
constexpr int WORD_BITS = 32;

int count_bits(std::uint32_t word) {
    int count = 0;
    for (; word != 0; word &= word - 1) ++count;
    return count;
}

// Query rows of one request or of all; the words of a row are adjacent.
struct PackedMask {
    const char* bytes;  // [B or 1, N, num_words] int32, of no particular alignment
    std::int64_t num_words;

    std::uint32_t word(std::int64_t row, std::int64_t index) const {
        std::uint32_t bits;
        std::memcpy(&bits, bytes + (row * num_words + index) * static_cast<std::int64_t>(sizeof(bits)), sizeof(bits));
        return bits;
    }
};

struct Coverage {
    bool all_seen;         // by every row
    bool has_unseen_slot;  // a request has a slot that none of its rows sees
};

// Bits: an unsigned integer of the element's size; seen and hidden are the patterns of the two values.
template <class Bits>
Coverage expand(const PackedMask& mask, bool mask_per_request, const std::vector<std::int64_t>& cache_lens,
                std::int64_t num_rows, std::int64_t num_slots, std::int64_t window, Bits seen, Bits hidden, Bits* out) {
    Coverage coverage{true, false};
    std::vector<std::uint32_t> seen_words(static_cast<std::size_t>(mask.num_words));  // by any row of the request
    for (std::size_t b = 0; b < cache_lens.size(); ++b) {
        std::fill(seen_words.begin(), seen_words.end(), 0u);
        std::int64_t first_seen_by_any = num_slots;
        const std::int64_t cache_len = std::clamp<std::int64_t>(cache_lens[b], 0, num_slots);
        const std::int64_t num_tree_slots = std::min(num_slots - cache_len, mask.num_words * WORD_BITS);
        for (std::int64_t i = 0; i < num_rows; ++i, out += num_slots) {
            const std::int64_t row = mask_per_request ? static_cast<std::int64_t>(b) * num_rows + i : i;
            std::int64_t num_seen = 0;
            for (std::int64_t word = 0; word < mask.num_words; ++word) num_seen += count_bits(mask.word(row, word));
            const std::int64_t depth = num_seen - 1;
            const std::int64_t first_seen = std::clamp<std::int64_t>(cache_len + depth - window + 1, 0, cache_len);
            std::int64_t num_outside = std::max<std::int64_t>(num_seen - window, 0);  // ancestors beyond the window

            std::fill(out, out + first_seen, hidden);
            std::fill(out + first_seen, out + cache_len, seen);
            std::fill(out + cache_len, out + num_slots, hidden);
            for (std::int64_t j = 0; j < num_tree_slots; ++j) {
                if ((mask.word(row, j / WORD_BITS) >> (j % WORD_BITS) & 1u) == 0) continue;
                if (num_outside-- > 0) continue;
                out[cache_len + j] = seen;
                seen_words[static_cast<std::size_t>(j / WORD_BITS)] |= 1u << (j % WORD_BITS);
            }
            first_seen_by_any = std::min(first_seen_by_any, first_seen);
            const std::int64_t num_unmasked = cache_len - first_seen + std::min(num_seen, window);
            coverage.all_seen = coverage.all_seen && num_unmasked == num_slots;
        }
        std::int64_t num_tree_slots_seen = 0;
        for (const std::uint32_t word : seen_words) num_tree_slots_seen += count_bits(word);
        coverage.has_unseen_slot |= first_seen_by_any > 0 || cache_len + num_tree_slots_seen < num_slots;
    }
    return coverage;
}

std::int64_t rows_of(std::string_view packed, std::int64_t num_words) {
    const std::int64_t row_bytes = num_words * static_cast<std::int64_t>(sizeof(std::uint32_t));
    if (num_words < 1 || static_cast<std::int64_t>(packed.size()) % row_bytes != 0) {
        throw std::invalid_argument("expand_tree_mask: packed must hold rows of " + std::to_string(num_words) +
                                    " words, got " + std::to_string(packed.size()) + " bytes");
    }
    return static_cast<std::int64_t>(packed.size()) / row_bytes;
}

}  // namespace

std::pair<bool, bool> expand_tree_mask(std::string_view packed, std::int64_t num_words, std::int64_t num_rows,
                                       const std::vector<std::int64_t>& cache_lens, std::int64_t sliding_window,
                                       std::uintptr_t out_ptr, int type, std::int64_t num_slots) {
    const std::int64_t total_rows = rows_of(packed, num_words);
    const bool mask_per_request = total_rows != num_rows;
    if (mask_per_request && total_rows != num_rows * static_cast<std::int64_t>(cache_lens.size())) {
        throw std::invalid_argument("expand_tree_mask: packed must hold " + std::to_string(num_rows) +
                                    " rows, or as many for each request, got " + std::to_string(total_rows));
    }
    const PackedMask mask{packed.data(), num_words};
    // Half of the range: no slot is further away, and adding to it cannot overflow.
    const std::int64_t window = sliding_window > 0 ? sliding_window : std::numeric_limits<std::int64_t>::max() / 2;
    const auto expand_as = [&](auto seen, auto hidden) {
        const Coverage coverage = expand(mask, mask_per_request, cache_lens, num_rows, num_slots, window, seen, hidden,
                                         reinterpret_cast<decltype(seen)*>(out_ptr));
        return std::pair(coverage.all_seen, coverage.has_unseen_slot);
    };
    switch (type) {
        case static_cast<int>(ElementType::float32): return expand_as(std::uint32_t{0}, std::uint32_t{0xff800000u});
        case static_cast<int>(ElementType::float64): return expand_as(std::uint64_t{0}, std::uint64_t{0xfffull << 52});
        case static_cast<int>(ElementType::bfloat16): return expand_as(std::uint16_t{0}, std::uint16_t{0xff80u});
        case static_cast<int>(ElementType::float16): return expand_as(std::uint16_t{0}, std::uint16_t{0xfc00u});
        case BOOLEAN: return expand_as(std::uint8_t{1}, std::uint8_t{0});
        default: throw std::invalid_argument("expand_tree_mask: type must be in 0..4, got " + std::to_string(type));
    }
}

}  // namespace sequoia
