// The Philox streams as Python sees them, so that they can be compared with every other implementation.

#include "philox.h"

#include <array>

#include "ops.h"
#include "streams.h"

namespace sequoia {
namespace {

// The words of tokens 0 .. vocab - 1, by the loop that the ops use.
void fill_token_words(std::uint64_t seed, std::uint64_t offset, std::uint32_t tag, std::int64_t vocab,
                      std::uint32_t* out) {
    for (std::int64_t first = 0; first < vocab; first += STRETCH) {
        std::uint32_t words[STRETCH];
        stretch_words(seed, offset, tag, first, words);
        const std::int64_t count = vocab - first < STRETCH ? vocab - first : STRETCH;
        std::memcpy(out + first, words, static_cast<std::size_t>(count) * sizeof(std::uint32_t));
    }
}

}  // namespace

std::array<std::uint32_t, 4> philox_block(const std::array<std::uint32_t, 4>& counter,
                                          const std::array<std::uint32_t, 2>& key) {
    const PhiloxBlock block = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return {block.word[0], block.word[1], block.word[2], block.word[3]};
}

void token_words(std::int64_t seed, std::int64_t offset, std::uint32_t tag, std::int64_t vocab,
                 std::uintptr_t out_ptr) {
    fill_token_words(static_cast<std::uint64_t>(seed), static_cast<std::uint64_t>(offset), tag, vocab,
                     reinterpret_cast<std::uint32_t*>(out_ptr));
}

void token_gumbel(std::uintptr_t seeds_ptr, std::uintptr_t offsets_ptr, std::int64_t num_rows, std::int64_t vocab,
                  std::uint32_t tag, std::uintptr_t out_ptr) {
    std::vector<std::uint32_t> words(static_cast<std::size_t>(vocab));
    auto* out = reinterpret_cast<float*>(out_ptr);
    for (std::int64_t row = 0; row < num_rows; ++row) {
        fill_token_words(reinterpret_cast<const std::uint64_t*>(seeds_ptr)[row],
                         reinterpret_cast<const std::uint64_t*>(offsets_ptr)[row], tag, vocab, words.data());
        for (const std::uint32_t word : words) *out++ = gumbel(word);
    }
}

void node_coins(std::uintptr_t seeds_ptr, std::uintptr_t offsets_ptr, std::int64_t num_rows, std::int64_t num_nodes,
                std::uintptr_t out_ptr) {
    const auto* seeds = reinterpret_cast<const std::uint64_t*>(seeds_ptr);
    const auto* offsets = reinterpret_cast<const std::uint64_t*>(offsets_ptr);
    auto* out = reinterpret_cast<float*>(out_ptr);
    for (std::int64_t row = 0; row < num_rows; ++row) {
        for (std::int64_t node = 0; node < num_nodes; ++node) {
            *out++ = node_coin(seeds[row], offsets[row], static_cast<std::uint32_t>(node));
        }
    }
}

}  // namespace sequoia
