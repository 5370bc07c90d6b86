"""verify_tree once more, one request at a time in plain Python: an oracle that shares no decision with the package."""

from __future__ import annotations

import torch
from support.closed_form import closed_form_decisions
from support.toy_models import plain_probs

from sequoia_kernels import TokenTree
from sequoia_kernels.rng import RESIDUAL_TAG, node_coins, token_gumbel

__all__ = ["plain_verify"]


def plain_verify(
    tokens: torch.Tensor,
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tree: TokenTree,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    offsets: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (nodes, num_accepted, next_token) as verify_tree does. Arguments are tensors of a value a request."""
    vocab = target_logits.shape[2]
    coins = node_coins(seeds, offsets, tree.num_nodes).double()
    noise = token_gumbel(seeds, offsets, vocab, RESIDUAL_TAG).double()
    paths, next_tokens = [], []
    for request in range(len(tokens)):
        warp = (
            float(temperature[request]),
            None if top_k is None else int(top_k[request]),
            None if top_p is None else float(top_p[request]),
        )
        path = [0]
        while True:
            node = path[-1]
            children = tree.children(node)
            target_probs = plain_probs(target_logits[request, node, None], *warp)[0]
            drafted = [int(tokens[request, child]) for child in children]
            if warp[0] == 0:
                best = int(target_probs.argmax())
                accepted = [child for child, token in zip(children, drafted, strict=True) if token == best]
                residual = target_probs
            else:
                acceptance, residual = [], target_probs
                if children:
                    node_draft = draft_logits[request, node].double()
                    acceptance, residual = closed_form_decisions(target_probs, node_draft, drafted, warp[0])
                accepted = [
                    child for child, chance in zip(children, acceptance, strict=True) if coins[request, child] < chance
                ]
            if not accepted:
                break
            path.append(accepted[0])
        paths.append(path + [-1] * (tree.num_levels - len(path)))
        next_tokens.append(int((residual.log() + noise[request]).argmax()))
    nodes = torch.tensor(paths, dtype=torch.int32)
    return nodes, (nodes >= 0).sum(dim=1, dtype=torch.int32), torch.tensor(next_tokens)
