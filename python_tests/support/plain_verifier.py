"""verify_tree once more, one request at a time in plain Python: an oracle that shares no decision with the package."""

from __future__ import annotations

import math
from typing import NamedTuple

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
    rule: str = "sequoia",
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
        step = _Step(
            tree,
            tokens[request].tolist(),
            [plain_probs(target_logits[request, node, None], *warp)[0] for node in range(tree.num_nodes)],
            None if draft_logits is None else draft_logits[request].double(),
            warp[0],
            coins[request].tolist(),
        )
        last, residual = _walk(step) if rule == "sequoia" or warp[0] == 0 else _traverse(step)
        path = [last]
        while path[0] > 0:
            path.insert(0, tree.parents[path[0]])
        paths.append(path + [-1] * (tree.num_levels - len(path)))
        next_tokens.append(int((residual.log() + noise[request]).argmax()))
    nodes = torch.tensor(paths, dtype=torch.int32)
    return nodes, (nodes >= 0).sum(dim=1, dtype=torch.int32), torch.tensor(next_tokens)


class _Step(NamedTuple):
    """One request."""

    tree: TokenTree
    tokens: list[int]
    target_probs: list[torch.Tensor]  # of each node, [vocab] float64
    draft_logits: torch.Tensor | None  # [N, vocab] float64
    temperature: float
    coins: list[float]


def _walk(step: _Step) -> tuple[int, torch.Tensor]:
    """The rule "sequoia": from the root down. Return the last accepted node and the next token's distribution."""
    node = 0
    while True:
        children = step.tree.children(node)
        residual = step.target_probs[node]
        drafted = [step.tokens[child] for child in children]
        if step.temperature == 0:
            best = int(residual.argmax())
            accepted = [child for child, token in zip(children, drafted, strict=True) if token == best]
        else:
            acceptance: list[float] = []
            if children and step.draft_logits is not None:
                node_draft = step.draft_logits[node]
                acceptance, residual = closed_form_decisions(residual, node_draft, drafted, step.temperature)
            accepted = [child for child, chance in zip(children, acceptance, strict=True) if step.coins[child] < chance]
        if not accepted:
            return node, residual
        node = accepted[0]


def _traverse(step: _Step) -> tuple[int, torch.Tensor]:
    """The rule "traversal" above temperature 0, in closed form: a node is three scalars and what it has tried.

    Entered with (a, c, p), at first (1, 0, p), a node's residual is max(a target - c draft, 0) outside the tokens
    tried, where draft is normalised over those that are left. A child x enters with
    p' = min(1, p residual(x) / draft(x)). Where it fails, with S the tokens tried and x,

        Z = sum outside S of max(p a target - (p c + 1) draft, 0)
        p <- Z / (Z + 1 - p),    a <- p a / Z,    c <- (p c + 1) / Z * exp(log_left' - log_left)     with the old p.
    """

    def descend(node: int, p: float) -> tuple[int, torch.Tensor] | None:
        """The accepted node at or below this one and its residual; None if all fail."""
        children, target = step.tree.children(node), step.target_probs[node]
        outside = torch.ones_like(target, dtype=torch.bool)
        a, c, draft, log_left, scaled = 1.0, 0.0, torch.zeros_like(target), 0.0, target
        if children:
            assert step.draft_logits is not None
            scaled = (step.draft_logits[node] - step.draft_logits[node].max()) / step.temperature
            log_left = float(scaled.logsumexp(0))
        for child in children:
            token = step.tokens[child]
            if token < 0 or not outside[token] or scaled[token] == -math.inf:
                continue
            draft = torch.exp(scaled - log_left)
            residual_at_child = max(a * float(target[token]) - c * float(draft[token]), 0.0)
            accepted = descend(child, min(1.0, p * residual_at_child / float(draft[token])))
            if accepted is not None:
                return accepted
            outside[token] = False
            mass = float((p * a * target - (p * c + 1) * draft).clamp(min=0)[outside].sum())
            log_left_after = float(scaled[outside].logsumexp(0)) if bool(outside.any()) else -math.inf
            if mass > 0:
                a, c = p * a / mass, (p * c + 1) / mass * math.exp(log_left_after - log_left)
                p = mass / (mass + 1 - p)
            else:
                undrawn_mass = float(target[outside].sum())
                a, c = (1 / undrawn_mass if undrawn_mass > 0 else 0.0), 0.0
                p = 1.0 if p == 1 else 0.0
            log_left = log_left_after
        if not step.coins[node] < p:
            return None
        if a == 0:
            return node, target
        draft = torch.exp(scaled - log_left) if children and log_left > -math.inf else torch.zeros_like(target)
        return node, (a * target - c * draft).clamp(min=0).masked_fill(~outside, 0)

    accepted = descend(0, 1.0)
    assert accepted is not None  # the root's p stays 1
    return accepted
