"""Prompt lookup: what stood behind the same two tokens earlier in the text is proposed as certain; no draft.

python examples/lookup.py
"""

from __future__ import annotations

import torch
from toy_model import ToyModel

from sequoia_kernels import TokenTree, verify_tree


def looked_up(text, count):
    """What followed the newest earlier place that ends as the text does; -1 where there is nothing (more)."""
    for end in range(len(text) - 1, 1, -1):
        if text[end - 2 : end] == text[-2:]:
            found = text[end : end + count]
            return [*found, *[-1] * (count - len(found))]
    return [-1] * count


@torch.inference_mode()
def decode(target, prompts, num_drafted, num_tokens, temperature, seeds):
    """Continue prompts [B, L], of two tokens at least, by num_tokens each. seeds: one a request, [B] int64."""
    device, (batch_size, length) = prompts.device, prompts.shape
    tree = TokenTree.chain(1 + num_drafted)  # the root and what is looked up behind it
    chain, nodes = tree.tensors(device), torch.arange(tree.num_nodes, device=device)
    certain = nodes > 0  # no node but the root was drawn, and none was chosen by a draw

    cache = target.new_cache(batch_size, length + num_tokens + tree.num_levels + tree.num_nodes)
    cache_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
    prompt, places = TokenTree.chain(length - 1).tensors(device), torch.arange(length - 1, device=device)
    target.forward(prompts[:, :-1], prompt, places, cache_lens, cache)
    cache_lens += length - 1

    offsets = torch.zeros(batch_size, dtype=torch.int64, device=device)
    texts = prompts.tolist()
    while min(map(len, texts)) < length + num_tokens:
        rows = [[text[-1], *looked_up(text, num_drafted)] for text in texts]
        tokens = torch.tensor(rows, device=device)
        target_logits = target.forward(tokens.clamp(min=0), chain, nodes, cache_lens, cache)
        path = verify_tree(tokens, target_logits, None, tree, temperature, seeds, offsets, certain=certain)
        going_on = torch.tensor([len(text) < length + num_tokens for text in texts], device=device)
        cache_lens += path.num_accepted * going_on
        offsets += tree.num_nodes
        for text, count, row, bonus in zip(texts, path.num_accepted.tolist(), rows, path.next_token.tolist()):
            text.extend([*row[1:count], bonus])
    return torch.tensor([text[length : length + num_tokens] for text in texts])


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = ToyModel(vocab=50).to(device)
    prompts = torch.tensor([[7, 3, 11, 7, 3], [2, 40, 5, 2, 40]], device=device)
    seeds = torch.tensor([1, 2], device=device)
    for temperature in (0.0, 1.0):
        print(temperature, decode(target, prompts, 4, 16, temperature, seeds).tolist())
