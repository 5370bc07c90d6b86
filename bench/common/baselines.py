"""The usual ways to do the ops' work in plain torch, as decoding loops outside this package do it.

Written for this comparison, in the style of such loops: probabilities in place of logits, a Python loop over children,
one gather and one copy a layer. Where a function draws random numbers, they can be given instead, so that its result
can be compared with the package's reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sequoia_kernels.ops import VerifiedPath
from sequoia_kernels.tree import TokenTree


def exponential_race(logits: Tensor, num_samples: int, temperature: Tensor, race: Tensor | None = None) -> Tensor:
    """Draw without replacement: softmax, divide by exponential noise, take the largest, in draw order.

    Logits [R, vocab], temperature [R], all positive; race [R, vocab] float32, drawn here if None. Gives tokens
    [R, num_samples] int64.
    """
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    if race is None:
        race = torch.empty_like(probs).exponential_()
    return torch.topk(probs / race, num_samples, dim=-1).indices


def sort_and_mask(
    logits: Tensor, temperature: Tensor, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """Warp logits as generation libraries do: mask below the k-th largest, sort, sum up, mask again.

    Logits [R, vocab], temperature [R], all positive. Tokens of equal logits are told apart by the order of the sort.
    Gives (log-sum-exp of the kept logits / T [R], smallest kept logit [R]), float32.
    """
    logits = logits.float()
    scaled = logits / temperature[:, None]
    if top_k is not None:
        smallest = torch.topk(scaled, min(top_k, scaled.shape[-1]), dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    if top_p is not None:
        ascending, order = torch.sort(scaled, dim=-1)
        mass = torch.softmax(ascending, dim=-1).cumsum(dim=-1)
        removed = mass <= 1 - top_p
        removed[:, -1] = False
        scaled = scaled.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    cut = logits.masked_fill(scaled == -torch.inf, torch.inf).amin(dim=-1)
    return scaled.logsumexp(dim=-1), cut


def verify_child_by_child(
    tokens: Tensor,  # [B, N] int64
    target_logits: Tensor,  # [B, N, vocab]
    draft_logits: Tensor,  # [B, N, vocab]
    tree: TokenTree,
    temperature: float,  # 0 is greedy
    uniforms: Tensor | None = None,  # coins of the nodes; drawn here if None. [B, N] float32
    race: Tensor | None = None,  # exponential noise of the next token; drawn here if None. [B, vocab] float32
) -> VerifiedPath:
    """Walk down the tree on the host, deciding one child at a time on probabilities.

    Every decision waits for the device. A residual that is empty up to rounding is not cared for, as is usual.
    """
    if temperature == 0:
        return _follow_largest(tokens, target_logits.argmax(dim=-1), tree)
    batch_size, num_nodes, vocab = target_logits.shape
    device = tokens.device
    target_probs = torch.softmax(target_logits.float() / temperature, dim=-1)
    draft_probs = torch.softmax(draft_logits.float() / temperature, dim=-1)
    if uniforms is None:
        uniforms = torch.rand(batch_size, num_nodes, device=device)
    if race is None:
        race = torch.empty(batch_size, vocab, device=device).exponential_()

    paths, next_tokens = [], []
    for request in range(batch_size):
        node, path = 0, [0]
        while node is not None:
            residual, draft = target_probs[request, node], draft_probs[request, node]
            accepted = None
            for child in tree.children(node):
                token = tokens[request, child].item()
                if (uniforms[request, child] * draft[token] < residual[token]).item():
                    accepted = child
                    break
                residual = torch.relu(residual - draft)
                residual = residual / residual.sum()
                draft = draft.clone()
                draft[token] = 0
                draft = draft / draft.sum()
            if accepted is not None:
                path.append(accepted)
            node = accepted
        paths.append(path)
        next_tokens.append((residual / race[request]).argmax())
    return _verified(paths, torch.stack(next_tokens), tree)


def _follow_largest(tokens: Tensor, best: Tensor, tree: TokenTree) -> VerifiedPath:
    """The greedy walk: to the child that holds the target's largest logit. `best` is [B, N]."""
    paths, next_tokens = [], []
    for request in range(len(tokens)):
        node, path = 0, [0]
        while node is not None:
            next_token = best[request, node]
            node = next((child for child in tree.children(node) if (tokens[request, child] == next_token).item()), None)
            if node is not None:
                path.append(node)
        paths.append(path)
        next_tokens.append(next_token)
    return _verified(paths, torch.stack(next_tokens), tree)


def _verified(paths: list[list[int]], next_tokens: Tensor, tree: TokenTree) -> VerifiedPath:
    padded = [path + [-1] * (tree.num_levels - len(path)) for path in paths]
    nodes = torch.tensor(padded, dtype=torch.int32, device=next_tokens.device)
    return VerifiedPath(nodes, (nodes >= 0).sum(dim=1, dtype=torch.int32), next_tokens)


def compact_layer_by_layer(
    caches: Sequence[Tensor],  # K and V of every layer. Each [B, S, H, D]
    accepted_nodes: Tensor,  # [B, L] int32
    num_accepted: Tensor,  # [B] int32
    cache_lens: Tensor,  # advanced in place. [B] int32
) -> None:
    """Read the path on the host, then gather and copy the accepted rows of each cache."""
    counts, starts = num_accepted.tolist(), cache_lens.tolist()
    for request, (count, start) in enumerate(zip(counts, starts)):
        rows = start + accepted_nodes[request, :count]
        for cache in caches:
            move_rows(cache[request], rows, start)
    cache_lens += num_accepted


def move_rows(cache: Tensor, rows: Tensor, start: int) -> None:
    """Gather rows of one request's cache [S, H, D] and write them from `start` on."""
    cache[start : start + len(rows)] = cache.index_select(0, rows)
