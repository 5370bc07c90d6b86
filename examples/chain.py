"""A chain only: ordinary speculative decoding through the same ops.

python examples/chain.py
"""

from __future__ import annotations

import torch
from toy_model import ToyModel

from sequoia_kernels import TokenTree, sample_without_replacement, verify_tree


@torch.inference_mode()
def decode(target, draft, prompts, num_drafted, num_tokens, temperature, seeds):
    """Continue prompts [B, L], of two tokens at least, by num_tokens each. seeds: one a request, [B] int64."""
    device, (batch_size, length) = prompts.device, prompts.shape
    tree = TokenTree.chain(1 + num_drafted)  # the root and what is drafted behind it
    chain, nodes = tree.tensors(device), torch.arange(tree.num_nodes, device=device)

    num_rows = length + num_tokens + tree.num_levels + tree.num_nodes
    target_cache, draft_cache = target.new_cache(batch_size, num_rows), draft.new_cache(batch_size, num_rows)
    cache_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
    prompt, places = TokenTree.chain(length - 1).tensors(device), torch.arange(length - 1, device=device)
    target.forward(prompts[:, :-1], prompt, places, cache_lens, target_cache)
    draft.forward(prompts[:, :-1], prompt, places, cache_lens, draft_cache)
    cache_lens += length - 1
    last, root = prompts[:, -2], prompts[:, -1]

    offsets = torch.zeros(batch_size, dtype=torch.int64, device=device)
    emitted = [[] for _ in range(batch_size)]
    while min(map(len, emitted)) < num_tokens:
        tokens, rows = root[:, None], []
        # The last committed token may never have been fed to the draft: where everything was accepted, it was a leaf.
        logits = draft.forward(torch.stack((last, root), 1), chain, nodes[:2], cache_lens - 1, draft_cache)[:, 1]
        for node in range(num_drafted):
            if node > 0:
                logits = draft.forward(tokens[:, -1:], chain, nodes[node : node + 1], cache_lens, draft_cache)[:, 0]
            drawn = sample_without_replacement(logits, 1, temperature, seeds, offsets + node).tokens
            tokens, rows = torch.cat((tokens, drawn), dim=1), [*rows, logits]
        draft_logits = torch.stack([*rows, rows[-1]], dim=1)  # the last node has no child: its row is not read
        target_logits = target.forward(tokens, chain, nodes, cache_lens, target_cache)
        path = verify_tree(tokens, target_logits, draft_logits, tree, temperature, seeds, offsets)
        # The accepted rows of a chain lie behind the committed ones already: only the lengths advance.
        going_on = torch.tensor([len(text) < num_tokens for text in emitted], device=device)
        cache_lens += path.num_accepted * going_on
        last, root = tokens.gather(1, path.num_accepted[:, None].long() - 1)[:, 0], path.next_token
        offsets += tree.num_nodes
        for text, count, row, bonus in zip(emitted, path.num_accepted.tolist(), tokens.tolist(), root.tolist()):
            text.extend([*row[1:count], bonus])
    return torch.tensor([text[:num_tokens] for text in emitted])


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = ToyModel(vocab=50).to(device)
    prompts = torch.tensor([[7, 3, 11], [2, 40, 5]], device=device)
    seeds = torch.tensor([1, 2], device=device)
    for temperature in (0.0, 1.0):
        print(temperature, decode(target, target.noisy(0.1), prompts, 4, 16, temperature, seeds).tolist())
