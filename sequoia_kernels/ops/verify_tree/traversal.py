"""Reference of the rule "traversal": the specification, in plain torch on any device.

Sequoia's rule walks from the root, and a rejected node takes its subtree with it. Here a path is accepted as a whole,
with the probability that its tokens deserve together: the deepest node is tested first, and what it fails to use up
goes back to its parent.

Computes, depth first, children in the order in which they were drawn (without replacement, from the draft):
    Every node has a residual, the distribution of the token behind it, and a chance, with which the path to it is
    accepted if no node below it is. At first they are the target's distribution and, at the root, 1.
    Entering a child x:  chance(x) = min(1, chance * residual(x) / draft_i(x)), chance and residual of its parent.
    Leaving a node, its children all tried: a coin below its chance accepts the path to it, and the next token is drawn
        from its residual. Otherwise its parent drops it:
        left = max(chance * residual - draft_i, 0) outside the children tried, mass = sum of left,
        residual <- left / mass,    chance <- mass / (mass + 1 - chance),    draft_{i+1} = normalise(draft_i without x).
    The root's chance stays 1, so that it ends there at the latest. With every chance 1 this is Sequoia's rule; on a
    chain it is block verification.
Order: `traversal_chances` gives all chances and residuals, as they are when their node is left, without any randomness:
    a node is only ever left after every node before it has failed, so the first coin below its chance decides.
Numerics: as in reference.py. Where a chance is within rounding of 1 and nothing is left, its quotient is noise; such a
    node is left with about the probability of that rounding.
Source: Traversal verification (arXiv 2505.12398), for children drawn without replacement; block verification
    (arXiv 2403.10444). Deviations: strict coins, and the corners below.

Corners:
    Not a draw: as in reference.py; such a child is passed over with all that is below it.
    Certain: as in reference.py; all mass of its draft_i is on it.
    Empty residual of a node whose chance is 1: target and draft agree up to rounding. The chance stays 1, and the
        residual becomes that of reference.py, the target without the tokens drawn so far or the target itself.
    Empty residual of a chance below 1: the chance becomes 0. No path through the node is accepted any more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sequoia_kernels.ops.warping import compute_dtype, warped_probs
from sequoia_kernels.rng import RESIDUAL_TAG, node_coins, token_gumbel

from .op import VerifiedPath, VerifyTreeInputs
from .residuals import draft_left, residual_left, with_whole_draft

__all__ = ["TraversalChances", "traversal_chances", "traverse_paths"]


class TraversalChances(NamedTuple):
    """What a traversal comes to at every node.

    Attributes:
        turn: when the node is left: every node of a lower turn has failed by then. Of nodes that are never entered (no
            draws, and what is below them) a number above all others. [B, N] int64.
        chance: probability of accepting the path to the node then; 0 where it is never entered. [B, N].
        residual: the next token's distribution if the path is accepted. [B, N, vocab].
        parents: node above each, 0 for the root and where it is never entered. [B, N] int64.
    """

    turn: torch.Tensor
    chance: torch.Tensor
    residual: torch.Tensor
    parents: torch.Tensor


def traversal_chances(inputs: VerifyTreeInputs) -> TraversalChances:
    """Walk all requests' trees together, one node entered or left at a time; nothing here is random."""
    inputs = with_whole_draft(inputs)
    tokens, target_logits, draft_logits = inputs[:3]
    temperature = inputs.temperature
    batch_size, num_nodes, vocab = target_logits.shape
    device = tokens.device
    assert draft_logits is not None
    dtype = compute_dtype(target_logits.dtype, draft_logits.dtype)
    of_child = temperature[:, None].expand(batch_size, num_nodes)  # 0 where the child is certain
    if inputs.certain is not None:
        of_child = of_child.masked_fill(inputs.certain, 0)
    requests, vocab_ids = torch.arange(batch_size, device=device), torch.arange(vocab, device=device)
    first_child, num_children = (
        part.long().expand(batch_size, -1) for part in (inputs.first_child, inputs.num_children)
    )
    last_turn = 2 * num_nodes
    of_nodes: list[Any] = [None if values is None else values.repeat_interleave(num_nodes)
                           for values in (temperature, inputs.top_k, inputs.top_p)]  # fmt: skip
    target_probs = warped_probs(target_logits.reshape(-1, vocab).to(dtype), *of_nodes).view(target_logits.shape)

    parents = torch.zeros(batch_size, num_nodes, dtype=torch.int64, device=device)
    num_tried = torch.zeros_like(parents)
    turn = torch.full_like(parents, last_turn + 1)
    chance = torch.zeros(batch_size, num_nodes, dtype=dtype, device=device)
    chance[:, 0] = 1
    residual = target_probs.clone()
    drawn = torch.zeros_like(residual, dtype=torch.bool)
    current = torch.zeros(batch_size, dtype=torch.int64, device=device)
    for now in range(last_turn):
        # A request enters the next child of its node or leaves the node; `owner` is the parent in either case.
        enters = num_tried[requests, current] < num_children[requests, current]
        leaves = ~enters & (turn[:, 0] > last_turn)
        turn[requests, current] = torch.where(leaves, now, turn[requests, current])
        owner = torch.where(enters, current, parents[requests, current])
        child = torch.where(enters, first_child[requests, current] + num_tried[requests, current], current)
        num_tried[requests, owner] += enters.long()

        is_child = tokens[requests, child][:, None] == vocab_ids
        owner_drawn, owner_chance = drawn[requests, owner], chance[requests, owner]
        owner_draft = draft_logits[requests, owner].to(dtype)
        draft = draft_left(owner_draft.masked_fill((num_children == 0)[requests, owner, None], 0), owner_drawn,
                           is_child, of_child[requests, child])  # fmt: skip
        draft_of_child = draft.masked_fill(~is_child | owner_drawn, 0).sum(dim=-1)
        wanted = owner_chance * residual[requests, owner].masked_fill(~is_child, 0).sum(dim=-1)

        enters = enters & (draft_of_child > 0)  # what is no draw is passed over
        ratio = wanted / torch.where(draft_of_child > 0, draft_of_child, 1)
        chance[requests, child] = torch.where(enters, ratio.clamp(max=1), chance[requests, child])
        parents[requests, child] = torch.where(enters, owner, parents[requests, child])

        drops = leaves & (current > 0)
        owner_drawn = owner_drawn | (is_child & drops[:, None])
        drawn[requests, owner] = owner_drawn
        weights = owner_chance[:, None] * residual[requests, owner] - draft
        left, mass = residual_left(weights, target_probs[requests, owner], owner_drawn)
        residual[requests, owner] = torch.where(drops[:, None], left, residual[requests, owner])
        total = mass + (1 - owner_chance)
        dropped_chance = torch.where(total > 0, mass / torch.where(total > 0, total, 1), 1)
        chance[requests, owner] = torch.where(drops, dropped_chance, chance[requests, owner])

        current = torch.where(enters, child, torch.where(drops, owner, current))
        if device.type == "cpu" and bool((turn[:, 0] <= last_turn).all()):
            break
    return TraversalChances(turn, chance, residual, parents)


def traverse_paths(inputs: VerifyTreeInputs) -> VerifiedPath:
    """Return the accepted paths and the tokens behind them."""
    batch_size, num_nodes, vocab = inputs.target_logits.shape
    num_levels, device = inputs.num_levels, inputs.tokens.device
    requests = torch.arange(batch_size, device=device)
    turn, chance, residual, parents = traversal_chances(inputs)
    coins = node_coins(inputs.seeds, inputs.offsets, num_nodes).to(chance.dtype)
    # The root's turn is the last, and its chance of 1 is above every coin.
    last = torch.where(coins < chance, turn, 2 * num_nodes + 1).argmin(dim=1)

    upwards = [last]  # from the accepted node to the root, which is its own parent
    for _ in range(num_levels - 1):
        upwards.append(parents[requests, upwards[-1]])
    path = torch.stack(upwards[::-1], dim=1)  # the root stands in front as often as levels are left
    num_accepted = 1 + (path > 0).sum(dim=1, dtype=torch.int32)
    levels = torch.arange(num_levels, device=device)
    place = num_levels - num_accepted[:, None] + levels  # of what belongs on each level
    nodes = path.gather(1, place.clamp(max=num_levels - 1)).masked_fill(place >= num_levels, -1)

    noise = token_gumbel(inputs.seeds, inputs.offsets, vocab, RESIDUAL_TAG).to(chance.dtype)
    next_token = (residual[requests, last].log() + noise).argmax(dim=-1)
    return VerifiedPath(nodes.to(torch.int32), num_accepted, next_token)
