"""Reference of verify_tree: the specification, in plain torch on any device. Inputs and outputs as in op.py.

Here is the rule "sequoia"; the rule "traversal" is in traversal.py.

Computes, at one node whose children x_1 .. x_k were drawn in this order from the draft without replacement:
    residual_1 = target, draft_1 = draft, and for i = 1 .. k
        accept x_i with probability min(1, residual_i(x_i) / draft_i(x_i)); once rejected,
        residual_{i+1} = normalise(max(residual_i - draft_i, 0)),
        draft_{i+1} = normalise(draft_i without x_i);
    when every child is rejected, the next token is drawn from residual_{k+1}. Either way the token that is emitted is
    distributed as the target, so a path from the root gives the target's distribution of the whole sequence.
Order: `node_decisions` gives those numbers without any randomness; `verify_paths` compares them with the coins and
    walks all requests down their trees together, one level at a time.
Numerics: float32, or float64 where either of the logits is. draft_i is the softmax of the logits that are left, not a
    division by leftover mass, so it is exact also where the first token holds all mass that float32 can see.
Source: Sequoia (arXiv 2402.12374), section 3.2, tree sampling and verification. Deviations: coins are compared
    strictly, so that a token of probability 0 is never accepted; the corners below, which the paper leaves open, are
    defined.

Corners:
    Not a draw: a child with draft_i(x_i) = 0 (token -1, a token outside the vocabulary, a repeat of an earlier sibling,
        a token that the draft masks) cannot have been drawn. It is passed over as if it were not there: never accepted,
        and neither distribution changes.
    Empty residual: target and draft agree up to rounding, and max(residual_i - draft_i, 0) is 0 everywhere. The next
        residual is the target without the tokens drawn so far; where the target has no mass there, it is the target
        itself. So no branch divides by zero, and none can emit a token that the target gives probability 0.
    Empty draft: all tokens that the draft can give were drawn. draft_{k+1} is 0; no further child can be a draw.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sequoia_kernels.ops.warping import compute_dtype, warped_probs
from sequoia_kernels.rng import RESIDUAL_TAG, node_coins, token_gumbel

from .op import VerifiedPath, VerifyTreeInputs, rule_reason
from .residuals import draft_left, residual_left, with_whole_draft
from .traversal import traverse_paths

__all__ = ["NodeDecisions", "node_decisions", "run", "supports", "verify_paths"]


def supports(inputs: VerifyTreeInputs) -> str | None:
    """Every call of its rules that passes the op's checks runs here."""
    return rule_reason(inputs, ("sequoia", "traversal"))


def run(inputs: VerifyTreeInputs, outputs: VerifiedPath) -> None:
    """Write the outputs."""
    decide = traverse_paths if inputs.rule == "traversal" else verify_paths
    for output, result in zip(outputs, decide(inputs)):
        output.copy_(result)


class NodeDecisions(NamedTuple):
    """What happens at a node, for R nodes with up to K children each.

    Attributes:
        residual_at_child: residual_i(x_i), the residual's probability of each child once its earlier siblings were
            rejected; 0 where the child cannot be a draw. [R, K].
        draft_at_child: draft_i(x_i), the probability with which the draft gave it then. [R, K].
        residual: the distribution of the next token once every child was rejected. [R, vocab].
    """

    residual_at_child: torch.Tensor
    draft_at_child: torch.Tensor
    residual: torch.Tensor

    def acceptance(self) -> torch.Tensor:
        """Return the probability of accepting each child once its earlier siblings were rejected. [R, K]."""
        drawable = self.draft_at_child > 0
        ratio = self.residual_at_child / torch.where(drawable, self.draft_at_child, 1)
        return torch.where(drawable, ratio.clamp(max=1), 0)


def node_decisions(
    target_probs: torch.Tensor,  # [R, vocab]
    draft_logits: torch.Tensor,  # [R, vocab]
    children: torch.Tensor,  # [R, K] int64 tokens in draw order, -1 for none
    temperature: torch.Tensor,  # [R]
    certain: torch.Tensor | None = None,  # [R, K] bool
) -> NodeDecisions:
    """Return the exact decision probabilities at R nodes; nothing here is random.

    At temperature 0 the draft proposes each child with certainty, which makes the greedy rule (accept the target's
    largest logit) a case of the general one.
    """
    dtype = target_probs.dtype
    vocab_ids = torch.arange(target_probs.shape[1], device=target_probs.device)
    draft_logits = draft_logits.to(dtype)

    residual = target_probs
    drawn = torch.zeros_like(target_probs, dtype=torch.bool)
    residual_at_child = torch.zeros(children.shape, dtype=dtype, device=children.device)
    draft_at_child = torch.zeros_like(residual_at_child)
    for rank in range(children.shape[1]):
        is_child = children[:, rank, None] == vocab_ids  # [R, vocab], at most one per row
        of_child = temperature if certain is None else temperature.masked_fill(certain[:, rank], 0)
        draft = draft_left(draft_logits, drawn, is_child, of_child)
        draft_of_child = draft.masked_fill(~is_child | drawn, 0).sum(dim=-1)
        is_draw = draft_of_child > 0
        draft_at_child[:, rank] = draft_of_child
        residual_at_child[:, rank] = residual.masked_fill(~(is_child & is_draw[:, None]), 0).sum(dim=-1)
        drawn = drawn | (is_child & is_draw[:, None])
        rejected, _ = residual_left(residual - draft, target_probs, drawn)
        residual = torch.where(is_draw[:, None], rejected, residual)
    return NodeDecisions(residual_at_child, draft_at_child, residual)


def verify_paths(inputs: VerifyTreeInputs) -> VerifiedPath:
    """Return the accepted paths and the tokens behind them."""
    inputs = with_whole_draft(inputs)
    tokens, target_logits, draft_logits = inputs[:3]
    temperature, seeds, offsets, top_k, top_p = inputs[7:12]
    batch_size, num_nodes, vocab = target_logits.shape
    num_levels, device = inputs.num_levels, tokens.device
    assert draft_logits is not None
    dtype = compute_dtype(target_logits.dtype, draft_logits.dtype)
    certain = None if inputs.certain is None else inputs.certain.expand(batch_size, num_nodes)
    requests = torch.arange(batch_size, device=device)
    # One tree for all requests is every request's own.
    first_child, num_children = (
        part.long().expand(batch_size, -1) for part in (inputs.first_child, inputs.num_children)
    )
    coins = node_coins(seeds, offsets, num_nodes).to(dtype)

    nodes = torch.full((batch_size, num_levels), -1, dtype=torch.int32, device=device)
    nodes[:, 0] = 0
    current = torch.zeros(batch_size, dtype=torch.int64, device=device)
    walking = torch.ones(batch_size, dtype=torch.bool, device=device)
    residual = torch.zeros(batch_size, vocab, dtype=dtype, device=device)
    for level in range(num_levels):
        # The children of every request's node, padded to as many as the widest has. Reading that number is free on a
        # CPU and would make a GPU wait, so there the widest node of the tree stands in for it.
        on_cpu = device.type == "cpu" and batch_size > 0
        num_own = num_children[requests, current][:, None]
        width = int(num_own.max()) if on_cpu else inputs.max_branching
        ranks = torch.arange(max(width, 1), device=device)
        is_child = ranks < num_own
        child_nodes = torch.where(is_child, first_child[requests, current][:, None] + ranks, 0)
        children = tokens.gather(1, child_nodes).masked_fill(~is_child, -1)

        target_probs = warped_probs(target_logits[requests, current].to(dtype), temperature, top_k, top_p)
        node_draft = draft_logits[requests, current].masked_fill(num_own == 0, 0)
        of_children = () if certain is None else (certain.gather(1, child_nodes),)
        decisions = node_decisions(target_probs, node_draft, children, temperature, *of_children)

        accepted = coins.gather(1, child_nodes) * decisions.draft_at_child < decisions.residual_at_child
        any_accepted = accepted.any(dim=1)
        stops = walking & ~any_accepted
        residual = torch.where(stops[:, None], decisions.residual, residual)
        walking = walking & any_accepted
        if level + 1 < num_levels:
            # argmax gives the first accepted child; the index is unused where there is none
            first = accepted.to(torch.int32).argmax(dim=1, keepdim=True)
            current = torch.where(walking, child_nodes.gather(1, first)[:, 0], current)
            nodes[:, level + 1] = torch.where(walking, current, -1)
        if on_cpu and not bool(walking.any()):
            break

    noise = token_gumbel(seeds, offsets, vocab, RESIDUAL_TAG).to(dtype)
    next_token = (residual.log() + noise).argmax(dim=-1)
    num_accepted = (nodes >= 0).sum(dim=1, dtype=torch.int32)
    return VerifiedPath(nodes, num_accepted, next_token)
