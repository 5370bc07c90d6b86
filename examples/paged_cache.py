"""The loop with paged caches: a block table for the target and one for the draft, ragged prompts, a tree a request.

python examples/paged_cache.py
"""

from __future__ import annotations

from itertools import pairwise

import torch
from toy_model import ToyModel

from sequoia_kernels import (
    CacheTable,
    TokenTree,
    Topology,
    compact_kv_cache_,
    sample_without_replacement,
    verify_tree,
)

PAGE_SIZE = 4


class PagedCache:
    """Pages of keys and values, and which of them belong to whom. Page 0 is nobody's: padding is written there."""

    def __init__(self, model, row_counts, device):
        counts = [-(-rows // PAGE_SIZE) for rows in row_counts]
        free = (1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))).tolist()
        self.pages = model.new_cache(1 + sum(counts), PAGE_SIZE)
        self.block_table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for request, count in enumerate(counts):
            self.block_table[request, :count] = torch.tensor([free.pop() for _ in range(count)])
        self.block_table = self.block_table.to(device)
        self.table = CacheTable(self.pages, paged=True)  # addresses and strides, checked once


@torch.inference_mode()
def decode(target, draft, prompts, trees, num_tokens, temperature, seeds):
    """Continue each of a list of prompts, of two tokens at least, with its own tree.

    The trees have equally many nodes on every level. temperature: [B] float32; seeds: [B] int64.
    """
    device, batch_size = seeds.device, len(prompts)
    widths, num_nodes = trees[0].widths, trees[0].num_nodes
    topology = Topology.stack([tree.tensors(device) for tree in trees])
    nodes = torch.arange(num_nodes, device=device)

    # Each request has as many pages as it needs, in both caches.
    row_counts = [len(prompt) + num_tokens + len(widths) + num_nodes for prompt in prompts]
    target_cache, draft_cache = (PagedCache(model, row_counts, device) for model in (target, draft))
    caches = (target, target_cache), (draft, draft_cache)

    # Ragged prompts, padded on the right: what is written behind a prompt's end is overwritten before it is seen.
    lens = torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int32, device=device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt[:-1]) for prompt in prompts], batch_first=True)
    chain, places = TokenTree.chain(padded.shape[1]).tensors(device), torch.arange(padded.shape[1], device=device)
    for model, cache in caches:
        model.forward(padded.to(device), chain, places, torch.zeros_like(lens), cache.pages, cache.block_table)
    cache_lens = lens
    last, root = (torch.tensor([prompt[place] for prompt in prompts], device=device) for place in (-2, -1))

    offsets = torch.zeros(batch_size, dtype=torch.int64, device=device)
    emitted = [[] for _ in range(batch_size)]
    while min(map(len, emitted)) < num_tokens:
        state = last, root, cache_lens, temperature, seeds, offsets
        tokens, draft_logits = grow(draft, draft_cache, topology, widths, *state)
        target_logits = target.forward(
            tokens, topology, nodes, cache_lens, target_cache.pages, target_cache.block_table
        )
        path = verify_tree(tokens, target_logits, draft_logits, topology, temperature, seeds, offsets)
        going_on = torch.tensor([len(text) < num_tokens for text in emitted], device=device)
        # Both caches in one call, for they share cache_lens, which it advances.
        compact_kv_cache_(
            [target_cache.table, draft_cache.table],
            path.nodes,
            path.num_accepted * going_on,
            cache_lens,
            block_table=[target_cache.block_table, draft_cache.block_table],
        )
        accepted = tokens.gather(1, path.nodes.clamp(min=0).long())
        last, root = accepted.gather(1, path.num_accepted[:, None].long() - 1)[:, 0], path.next_token
        offsets += num_nodes
        for text, count, row, bonus in zip(emitted, path.num_accepted.tolist(), accepted.tolist(), root.tolist()):
            text.extend([*row[1:count], bonus])
    return torch.tensor([text[:num_tokens] for text in emitted])


def grow(draft, cache, topology, widths, last, root, cache_lens, temperature, seeds, offsets):
    """Draw a tree for each request. Whose nodes have children differs, so whole levels are fed but for the last."""
    device, batch_size = root.device, len(root)
    pair = TokenTree.chain(2).tensors(device)
    tokens = torch.empty(batch_size, topology.num_nodes, dtype=torch.int64, device=device)
    tokens[:, 0] = root
    fed, both = torch.stack((last, root), dim=1), torch.arange(2, device=device)
    logits = draft.forward(fed, pair, both, cache_lens - 1, cache.pages, cache.block_table)[:, 1:]
    draft_logits = logits.new_empty(batch_size, topology.num_nodes, logits.shape[2])
    first = 0
    for width, next_width in pairwise(widths):
        nodes = torch.arange(first, first + width, device=device)
        if first > 0:
            logits = draft.forward(tokens[:, nodes], topology, nodes, cache_lens, cache.pages, cache.block_table)
        draft_logits[:, nodes] = logits
        drawn = sample_without_replacement(
            logits.flatten(0, 1),
            topology.max_branching,
            temperature.repeat_interleave(width),
            seeds.repeat_interleave(width),
            (offsets[:, None] + nodes).flatten(),
        ).tokens.view(batch_size, -1)
        # Each child takes the draw of its rank in its parent's row.
        children = slice(first + width, first + width + next_width)
        rows, ranks = topology.parents[:, children] - first, topology.ranks[:, children]
        tokens[:, children] = drawn.gather(1, (rows * topology.max_branching + ranks).long())
        first += width
    return tokens, draft_logits


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = ToyModel(vocab=50).to(device)
    prompts = [[7, 3, 11], [2, 40], [5, 5, 9, 30, 21, 8]]
    trees = [TokenTree(parents) for parents in ([-1, 0, 0, 1, 1, 2, 3], [-1, 0, 0, 1, 2, 2, 5], [-1, 0, 0, 1, 1, 1, 4])]
    temperature = torch.tensor([0.0, 0.7, 1.0], device=device)
    seeds = torch.tensor([1, 2, 3], device=device)
    print(decode(target, target.noisy(0.1), prompts, trees, 16, temperature, seeds).tolist())
