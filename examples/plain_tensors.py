"""Tree speculative decoding in a loop of one's own: plain tensors, contiguous caches, one tree for all requests.

python examples/plain_tensors.py
"""

from __future__ import annotations

import torch
from toy_model import ToyModel

from sequoia_kernels import TokenTree, compact_kv_cache_, sample_without_replacement, verify_tree


@torch.inference_mode()
def decode(target, draft, prompts, tree, num_tokens, temperature, seeds):
    """Continue prompts [B, L], of two tokens at least, by num_tokens each. seeds: one a request, [B] int64."""
    device, (batch_size, length) = prompts.device, prompts.shape
    topology = tree.tensors(device)
    nodes = torch.arange(tree.num_nodes, device=device)

    # Rows for what is committed, which the last step overshoots, and for a tree behind it. All but the prompts' last
    # token is committed at once.
    num_rows = length + num_tokens + tree.num_levels + tree.num_nodes
    target_cache, draft_cache = target.new_cache(batch_size, num_rows), draft.new_cache(batch_size, num_rows)
    cache_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
    chain, places = TokenTree.chain(length - 1).tensors(device), torch.arange(length - 1, device=device)
    target.forward(prompts[:, :-1], chain, places, cache_lens, target_cache)
    draft.forward(prompts[:, :-1], chain, places, cache_lens, draft_cache)
    cache_lens += length - 1
    last, root = prompts[:, -2], prompts[:, -1]  # the last committed token, and the one behind it

    offsets = torch.zeros(batch_size, dtype=torch.int64, device=device)
    emitted = [[] for _ in range(batch_size)]
    while min(map(len, emitted)) < num_tokens:
        # Draft: the tree's tokens, and the logits that each node's children were drawn from.
        tokens, draft_logits = grow(draft, draft_cache, tree, last, root, cache_lens, temperature, seeds, offsets)
        # Verify: one forward of the target over all nodes, one decision from the logits of both.
        target_logits = target.forward(tokens, topology, nodes, cache_lens, target_cache)
        path = verify_tree(tokens, target_logits, draft_logits, tree, temperature, seeds, offsets)
        # Commit: move the accepted rows of both caches behind the committed ones; a finished request commits nothing.
        going_on = torch.tensor([len(text) < num_tokens for text in emitted], device=device)
        compact_kv_cache_([*target_cache, *draft_cache], path.nodes, path.num_accepted * going_on, cache_lens)
        accepted = tokens.gather(1, path.nodes.clamp(min=0).long())
        last, root = accepted.gather(1, path.num_accepted[:, None].long() - 1)[:, 0], path.next_token
        offsets += tree.num_nodes  # every node had an offset
        # A step emits the accepted tokens below the root, which is an old one, and then the bonus token.
        for text, count, row, bonus in zip(emitted, path.num_accepted.tolist(), accepted.tolist(), root.tolist()):
            text.extend([*row[1:count], bonus])
    return torch.tensor([text[:num_tokens] for text in emitted])


def grow(draft, cache, tree, last, root, cache_lens, temperature, seeds, offsets):
    """Draw a tree for each request, level by level; leaves are never fed."""
    device, batch_size = root.device, len(root)
    topology, pair = tree.tensors(device), TokenTree.chain(2).tensors(device)
    tokens = torch.empty(batch_size, tree.num_nodes, dtype=torch.int64, device=device)
    tokens[:, 0] = root
    draft_logits = None
    for level in range(tree.num_levels - 1):
        parents = tree.internal_nodes(level)
        nodes = torch.tensor(parents, device=device)
        if level == 0:
            # The last committed token may be a leaf that the draft never saw: it is fed again, in front of the root.
            fed, both = torch.stack((last, root), dim=1), torch.arange(2, device=device)
            logits = draft.forward(fed, pair, both, cache_lens - 1, cache)[:, 1:]
            draft_logits = logits.new_empty(batch_size, tree.num_nodes, logits.shape[2])
        else:
            logits = draft.forward(tokens[:, nodes], topology, nodes, cache_lens, cache)
        draft_logits[:, nodes] = logits
        # One row a node, and one offset a node.
        most = max(tree.num_children[parent] for parent in parents)
        row_seeds = seeds.repeat_interleave(len(parents))
        row_offsets = (offsets[:, None] + nodes).flatten()
        drawn = sample_without_replacement(logits.flatten(0, 1), most, temperature, row_seeds, row_offsets).tokens
        drawn = drawn.view(batch_size, len(parents), most)
        for row, parent in enumerate(parents):
            tokens[:, tree.children(parent)] = drawn[:, row, : tree.num_children[parent]]
    return tokens, draft_logits


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = ToyModel(vocab=50).to(device)
    prompts = torch.tensor([[7, 3, 11], [2, 40, 5]], device=device)
    seeds = torch.tensor([1, 2], device=device)
    tree = TokenTree([-1, 0, 0, 1, 1, 2, 3])
    for temperature in (0.0, 1.0):
        print(temperature, decode(target, target.noisy(0.1), prompts, tree, 16, temperature, seeds).tolist())
