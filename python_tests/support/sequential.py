"""What plain sequential decoding says about a token tree: the oracle for tree forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from sequoia_kernels.models.families import cache_argument


def ancestors(parents: Sequence[int], node: int) -> list[int]:
    """Return the path from the root to a node, both included."""
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def depths(parents: Sequence[int]) -> list[int]:
    """Return every node's distance from the root."""
    return [len(ancestors(parents, node)) - 1 for node in range(len(parents))]


def packed_mask(parents: Sequence[int]) -> torch.Tensor:
    """Return the ancestor mask, written bit by bit. [N, ceil(N / 32)] int32."""
    num_nodes = len(parents)
    words = [[0] * ((num_nodes + 31) // 32) for _ in range(num_nodes)]
    for node in range(num_nodes):
        for seen in ancestors(parents, node):
            words[node][seen // 32] |= 1 << (seen % 32)
    signed = [[word - (1 << 32) if word >= 1 << 31 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32)


@torch.no_grad()
def tree_logits(model: Any, prefix: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
    """Return each node's logits when its path is decoded behind the prefix, one token at a time. [N, vocab].

    The model runs as it is, with its own attention and a `DynamicCache`; the batch holds one path for each leaf.
    """
    leaves = sorted(set(range(len(parents))) - set(parents))
    paths = [ancestors(parents, leaf) for leaf in leaves]
    longest = max(len(path) for path in paths)
    cache = DynamicCache(config=model.config)
    if len(prefix) > 0:
        prompt = torch.tensor([list(prefix)] * len(paths))
        model(input_ids=prompt, use_cache=True, **{cache_argument(model): cache})
    logits: list[torch.Tensor | None] = [None] * len(parents)
    for depth in range(longest):
        nodes = [path[min(depth, len(path) - 1)] for path in paths]  # shorter paths repeat their leaf; not looked at
        step = torch.tensor([[tokens[node]] for node in nodes])
        scored = model(input_ids=step, use_cache=True, **{cache_argument(model): cache}).logits[:, -1]
        for path, node, row in zip(paths, nodes, scored, strict=True):
            if depth < len(path):
                logits[node] = row
    return torch.stack([row for row in logits if row is not None])


@torch.no_grad()
def last_logits(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    """Return the logits behind a prompt's last token, from one plain forward. [vocab]."""
    return model(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
