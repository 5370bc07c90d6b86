// What a call of tree_attention is given, and which cache rows the query rows of a request see.
//
// Columns are cache rows that some query row sees: a run of the committed prefix, then tree slots. They are laid out once a
// request: where each lies, by runs within a page, and what each row does not see, by words of the mask where every slot
// up to the last one is a column (chunks of prompts, most trees), else bit by bit.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "elements.h"
#include "rows.h"

namespace sequoia {
namespace {

constexpr int WORD_BITS = 32;
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// One argument tensor; strides in elements, the last dimension is contiguous.
struct Rows4d {
    const void* data;
    std::int64_t shape[4];
    std::int64_t strides[4];
};

struct Call {
    Rows4d q;              // [B, N, Hq, D]
    Rows4d keys;           // [B, S, Hkv, D], or pages [P, page, Hkv, D]
    Rows4d values;         // [B, S, Hkv, Dv], or pages
    ElementType type;      // of q, keys, values and out
    const std::uint32_t* tree_mask;  // [B or 1, N, num_words]
    std::int64_t num_words;
    bool mask_per_request;
    const std::int32_t* cache_lens;   // [B]
    const std::int32_t* block_table;  // [B, max_pages], or null
    std::int64_t max_pages;
    const float* sinks;  // [Hq], or null
    float scale;
    float softcap;        // 0 is off
    std::int64_t window;  // huge if off
    void* out;            // [B, N, Hq, Dv], contiguous
    const std::int64_t* first_rows;  // [B]: a request's rows of q and out begin at this one of all; null: at b * N
    float* lse;           // [B, N, Hq], contiguous, or null

    std::int64_t batch_size() const { return q.shape[0]; }
    std::int64_t num_rows() const { return q.shape[1]; }
    std::int64_t out_row(std::int64_t request, std::int64_t node) const {
        return (first_rows == nullptr ? request * num_rows() : first_rows[request]) + node;
    }
    std::int64_t query_offset(std::int64_t request, std::int64_t node) const {
        return (first_rows == nullptr ? request * q.strides[0] : first_rows[request] * q.strides[1]) + node * q.strides[1];
    }
    const std::uint32_t* mask_row(std::int64_t request, std::int64_t row) const {
        return tree_mask + ((mask_per_request ? request * num_rows() : 0) + row) * num_words;
    }
};

int count_bits(std::uint32_t word) { return __builtin_popcount(word); }

// Of a word that is not 0.
int lowest_bit(std::uint32_t word) { return __builtin_ctz(word); }
int highest_bit(std::uint32_t word) { return WORD_BITS - 1 - __builtin_clz(word); }

// Tree slots that a request can see: the highest bit set in any row of its mask, plus 1.
std::int64_t num_tree_slots(const Call& call, std::int64_t b) {
    for (std::int64_t index = call.num_words; index-- > 0;) {
        std::uint32_t any = 0;
        for (std::int64_t row = 0; row < call.num_rows(); ++row) any |= call.mask_row(b, row)[index];
        for (int bit = WORD_BITS; bit-- > 0;) {
            if ((any >> bit & 1u) != 0) return index * WORD_BITS + bit + 1;
        }
    }
    return 0;
}

// Whether every cache row that a request may look at exists: the same rule as in op.py, which words the refusal.
bool values_valid(const Call& call) {
    std::int64_t tree_slots = num_tree_slots(call, 0);
    const std::int64_t block_len = call.keys.shape[1];
    const std::int64_t num_slots = call.block_table == nullptr ? block_len : call.max_pages * block_len;
    for (std::int64_t b = 0; b < call.batch_size(); ++b) {
        if (call.mask_per_request && b > 0) tree_slots = num_tree_slots(call, b);
        const std::int64_t num_used = call.cache_lens[b] + tree_slots;
        if (call.cache_lens[b] < 0 || num_used > num_slots) return false;
        if (call.block_table == nullptr) continue;
        for (std::int64_t page = 0; page * block_len < num_used; ++page) {
            const std::int32_t entry = call.block_table[b * call.max_pages + page];
            if (entry < 0 || entry >= call.keys.shape[0]) return false;
        }
    }
    return true;
}

// The cache rows that the query rows of one request see.
struct Columns {
    std::int64_t count;                       // num_prefix + number of tree slots that some row sees
    std::int64_t num_prefix;                  // cache rows first_prefix .. cache_len - 1
    std::int64_t first_prefix;                // the first that some row sees
    std::int64_t num_tree_padded;             // row length of tree_hidden
    std::vector<std::int64_t> key_offsets;    // [count] in elements, of head 0
    std::vector<std::int64_t> value_offsets;  // [count]
    std::vector<std::int64_t> num_hidden;     // [N] prefix columns in front of the row's window
    std::vector<std::int64_t> num_seen;       // [N] columns up to the last one that the row sees
    std::vector<float> tree_hidden;           // [N, num_tree_padded]: 0 where the row sees the slot, else -inf
    std::vector<std::uint32_t> seen;          // [N, num_words] bits that a row sees, then their union
    std::vector<std::int32_t> column_of_slot;

    void build(const Call& call, std::int64_t b) {
        const std::int64_t num_rows = call.num_rows(), num_words = call.num_words, cache_len = call.cache_lens[b];
        seen.assign(static_cast<std::size_t>((num_rows + 1) * num_words), 0u);
        num_hidden.resize(static_cast<std::size_t>(num_rows));
        std::uint32_t* const seen_by_any = seen.data() + num_rows * num_words;
        first_prefix = cache_len;
        for (std::int64_t i = 0; i < num_rows; ++i) {
            const std::uint32_t* const row = call.mask_row(b, i);
            std::uint32_t* const visible = seen.data() + i * num_words;
            std::int64_t num_bits = 0;
            for (std::int64_t w = 0; w < num_words; ++w) num_bits += count_bits(row[w]);
            const std::int64_t first = std::clamp<std::int64_t>(cache_len + num_bits - call.window, 0, cache_len);
            num_hidden[static_cast<std::size_t>(i)] = first;
            first_prefix = std::min(first_prefix, first);
            std::int64_t num_outside = num_bits - call.window;  // the row's oldest ancestors are beyond its window
            for (std::int64_t w = 0; w < num_words; ++w) {
                std::uint32_t word = row[w];
                for (; num_outside > 0 && word != 0; --num_outside) word &= word - 1;
                visible[w] = word;
                seen_by_any[w] |= word;
            }
        }
        num_prefix = cache_len - first_prefix;
        for (std::int64_t& hidden : num_hidden) hidden -= first_prefix;

        key_offsets.clear();
        value_offsets.clear();
        push_slots(call, b, first_prefix, cache_len);
        std::int64_t num_tree = 0, num_slots = 0;  // slots up to the last one that some row sees
        for (std::int64_t w = 0; w < num_words; ++w) {
            num_tree += count_bits(seen_by_any[w]);
            if (seen_by_any[w] != 0) num_slots = w * WORD_BITS + highest_bit(seen_by_any[w]) + 1;
        }
        count = num_prefix + num_tree;
        num_tree_padded = padded(num_tree);
        tree_hidden.resize(static_cast<std::size_t>(num_rows * num_tree_padded));
        num_seen.resize(static_cast<std::size_t>(num_rows));
        if (num_tree == num_slots) {
            push_slots(call, b, cache_len, cache_len + num_slots);
            for (std::int64_t i = 0; i < num_rows; ++i) hide_slots(i, num_words);
        } else {
            hide_columns(call, b);
        }
    }

    // Columns that some of the rows [begin, end] see, or that lie before such a one.
    std::int64_t count_of(std::int64_t begin, std::int64_t end) const {
        return *std::max_element(num_seen.begin() + begin, num_seen.begin() + end + 1);
    }

  private:
    // Every slot is a column: a row's words are its columns.
    void hide_slots(std::int64_t i, std::int64_t num_words) {
        // A table: without AVX2 lanes cannot be shifted by different numbers.
        static constexpr auto BITS = [] {
            std::array<std::uint32_t, WORD_BITS> bits{};
            for (int bit = 0; bit < WORD_BITS; ++bit) bits[static_cast<std::size_t>(bit)] = 1u << bit;
            return bits;
        }();
        const std::uint32_t* const visible = seen.data() + i * num_words;
        float* const hidden = tree_hidden.data() + i * num_tree_padded;
        std::int64_t last = -1;
        for (std::int64_t w = 0; w < num_words; ++w) {
            const std::uint32_t word = visible[w];
            if (word != 0) last = w * WORD_BITS + highest_bit(word);
            const std::int64_t num_bits = std::min<std::int64_t>(WORD_BITS, num_tree_padded - w * WORD_BITS);
            float* const target = hidden + w * WORD_BITS;
            for (std::int64_t bit = 0; bit < num_bits; ++bit) {
                target[bit] = (word & BITS[static_cast<std::size_t>(bit)]) != 0 ? 0.0f : MINUS_INFINITY;
            }
        }
        num_seen[static_cast<std::size_t>(i)] = num_prefix + last + 1;
    }

    // Only slots that some row sees are columns.
    void hide_columns(const Call& call, std::int64_t b) {
        const std::int64_t num_rows = call.num_rows(), num_words = call.num_words, cache_len = call.cache_lens[b];
        const std::uint32_t* const seen_by_any = seen.data() + num_rows * num_words;
        column_of_slot.resize(static_cast<std::size_t>(num_words * WORD_BITS));
        std::int32_t column = 0;
        for (std::int64_t w = 0; w < num_words; ++w) {
            for (std::uint32_t word = seen_by_any[w]; word != 0; word &= word - 1) {
                const std::int64_t slot = w * WORD_BITS + lowest_bit(word);
                column_of_slot[static_cast<std::size_t>(slot)] = column++;
                push_slots(call, b, cache_len + slot, cache_len + slot + 1);
            }
        }
        std::fill(tree_hidden.begin(), tree_hidden.end(), MINUS_INFINITY);
        for (std::int64_t i = 0; i < num_rows; ++i) {
            float* const hidden = tree_hidden.data() + i * num_tree_padded;
            num_seen[static_cast<std::size_t>(i)] = num_prefix;
            for (std::int64_t w = 0; w < num_words; ++w) {
                for (std::uint32_t word = seen[static_cast<std::size_t>(i * num_words + w)]; word != 0;
                     word &= word - 1) {
                    const std::int32_t seen_column =
                        column_of_slot[static_cast<std::size_t>(w * WORD_BITS + lowest_bit(word))];
                    hidden[seen_column] = 0.0f;
                    num_seen[static_cast<std::size_t>(i)] = num_prefix + seen_column + 1;
                }
            }
        }
    }

    // Cache rows [begin, end) as the next columns.
    void push_slots(const Call& call, std::int64_t b, std::int64_t begin, std::int64_t end) {
        const std::int64_t page_len = call.block_table == nullptr ? std::max<std::int64_t>(end, 1) : call.keys.shape[1];
        std::int64_t page = begin / page_len, row = begin % page_len;
        std::size_t index = key_offsets.size();
        key_offsets.resize(index + static_cast<std::size_t>(end - begin));
        value_offsets.resize(key_offsets.size());
        for (std::int64_t left = end - begin; left > 0; ++page, row = 0) {
            const std::int64_t block = call.block_table == nullptr ? b : call.block_table[b * call.max_pages + page];
            const std::int64_t count_here = std::min(left, page_len - row);
            std::int64_t key = block * call.keys.strides[0] + row * call.keys.strides[1];
            std::int64_t value = block * call.values.strides[0] + row * call.values.strides[1];
            for (std::int64_t i = 0; i < count_here; ++i, ++index) {
                key_offsets[index] = key;
                value_offsets[index] = value;
                key += call.keys.strides[1];
                value += call.values.strides[1];
            }
            left -= count_here;
        }
    }
};

}  // namespace
}  // namespace sequoia
