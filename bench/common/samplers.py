"""Three ways to draft the children of a node and to verify them without loss, on equal terms.

They are told in docs/robustness.md; drawing with replacement is SpecInfer's (arXiv 2305.09781). Each comes in two
forms. `in_loop` puts it into the package's own decoding loop. `acceptance_of_emitted` says what a verification does
with a token that is known to be emitted, for replays of a given text (replay.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sequoia_kernels.drafts import source as drafting
from sequoia_kernels.drafts import unlikely
from sequoia_kernels.ops import SampledTokens, sample_without_replacement
from sequoia_kernels.ops.verify_tree.reference import NodeDecisions
from sequoia_kernels.ops.warping import warped_probs

Draw = Callable[..., SampledTokens]
Decide = Callable[[Tensor, Tensor, Tensor, Tensor], NodeDecisions]

_VERIFIER = sys.modules[NodeDecisions.__module__]


class Sampler(NamedTuple):
    """One way to draft and verify."""

    name: str  # as in the tables
    draw: Draw | None  # in place of `sample_without_replacement`, or None for ours
    decide: Decide | None  # in place of the reference's `node_decisions`, or None for ours
    # see `acceptance_of_emitted`, at temperatures above 0
    emitted: Callable[[Tensor, Tensor, Tensor, int, torch.Generator], Tensor]
    cuts_draft: bool = False  # the draft's logits go through `cut_draft` first

    @contextmanager
    def in_loop(self) -> Iterator[dict[str, object]]:
        """Swap this sampler into the decoding loop; yields the options that `generate` then needs."""
        ours = drafting.sample_without_replacement, _VERIFIER.node_decisions, unlikely.BEHIND
        if not self.cuts_draft:
            unlikely.BEHIND = 0.0
        options: dict[str, object] = {}
        if self.draw is not None and self.decide is not None:
            drafting.sample_without_replacement, _VERIFIER.node_decisions = self.draw, self.decide
            # only the reference asks for decisions node by node; a captured step would keep what was swapped in
            options = {"backend": "reference", "cuda_graphs": False}
        try:
            yield options
        finally:
            drafting.sample_without_replacement, _VERIFIER.node_decisions, unlikely.BEHIND = ours

    def acceptance_of_emitted(
        self,
        target_probs: Tensor,  # the warped target at R contexts. [R, vocab] float64
        draft_logits: Tensor,  # the draft there. [R, vocab] float64
        temperature: float,  # of the draft
        emitted: Tensor,  # token that the target emitted at each. [R] int64
        num_ranks: int,
        generator: torch.Generator,  # for tokens rejected before a rank, where they matter: without replacement
    ) -> Tensor:
        """Give the probability that the child of each rank was the accepted one, once it is known what was emitted.

        A lossless verification emits token y with the target's probability of it, whatever the sampler. What differs
        is how: as the accepted child of rank r, which goes on to that child's node, or from the residual, which ends
        the step. Given y, rank r has probability P(child r is accepted and is y) / target(y), and that does not depend
        on how many children follow. What is drawn is drawn once a context, which leaves the result unbiased.
        [R, num_ranks] float64, each row's sum at most 1.
        """
        if temperature == 0:
            return _emitted_of_top_k(target_probs, draft_logits, emitted, num_ranks, generator)
        return self.emitted(target_probs, draft_logits / temperature, emitted, num_ranks, generator)


# ---- in the loop


def draw_with_replacement(
    logits: Tensor, num_samples: int, temperature: Tensor, seeds: Tensor, offsets: Tensor, backend: str = "auto"
) -> SampledTokens:
    """Independent draws; at temperature 0, where they would all be the same token, the top-k as SpecInfer does."""
    greedy = draw_top_k(logits, num_samples, temperature, seeds, offsets, backend)
    tokens = torch.empty_like(greedy.tokens)
    for rank in range(num_samples):  # every rank has a random stream of its own
        drawn = sample_without_replacement(logits, 1, temperature, seeds ^ (rank << 40), offsets, backend=backend)
        tokens[:, rank] = drawn.tokens[:, 0]
    return SampledTokens(torch.where((temperature == 0)[:, None], greedy.tokens, tokens), greedy.log_normaliser)


def draw_top_k(
    logits: Tensor, num_samples: int, temperature: Tensor, seeds: Tensor, offsets: Tensor, backend: str = "auto"
) -> SampledTokens:
    """The most probable tokens, most probable first, ties by rising id."""
    greedy = torch.zeros_like(temperature)
    return sample_without_replacement(logits, num_samples, greedy, seeds, offsets, backend=backend)


def decide_with_replacement(
    target_probs: Tensor, draft_logits: Tensor, children: Tensor, temperature: Tensor
) -> NodeDecisions:
    """Multi-round verification: after a rejection the residual loses the draft, and the draft stays as it was."""
    greedy = (temperature == 0)[:, None]
    scale = torch.where(greedy, 1.0, temperature[:, None]).to(target_probs.dtype)
    draft = torch.softmax(draft_logits.to(target_probs.dtype) / scale, dim=-1)
    certain = decide_top_k(target_probs, draft_logits, children, temperature)
    sampled = _decide(target_probs, children, lambda token: draft)
    return NodeDecisions(*(torch.where(greedy, *pair) for pair in zip(certain, sampled)))


def decide_top_k(target_probs: Tensor, draft_logits: Tensor, children: Tensor, temperature: Tensor) -> NodeDecisions:
    """Deterministic proposals: accept a child with the residual's probability of it, else remove it from the residual.

    Together that is: draw a token from the target, and go on if it is among the children.
    """
    return _decide(target_probs, children, lambda token: torch.zeros_like(target_probs).scatter(1, token, 1))


def _decide(target_probs: Tensor, children: Tensor, draft_of: Callable[[Tensor], Tensor]) -> NodeDecisions:
    """Go through the children; `draft_of` gives the distribution [R, vocab] that tokens [R, 1] are drawn from."""
    residual_at_child, draft_at_child = (torch.zeros_like(children, dtype=target_probs.dtype) for _ in range(2))
    residual = target_probs
    for rank in range(children.shape[1]):
        is_child = children[:, rank, None] >= 0
        token = children[:, rank, None].clamp(min=0)
        draft = draft_of(token)
        for at_child, probs in ((residual_at_child, residual), (draft_at_child, draft)):
            at_child[:, rank, None] = torch.where(is_child, probs.gather(1, token), 0)
        left, mass = _rejected(residual, draft)
        residual = torch.where(is_child & (mass > 0), left, residual)
    return NodeDecisions(residual_at_child, draft_at_child, residual)


def cut_draft(draft_logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Move the draft's unlikely tokens behind the others, where the target is cut by top-p and the draft is not.

    Kept as they are: the draft's nucleus of mass (1 + top_p) / 2, wider than the target's since the two do not agree.
    The rest is only drawn once the nucleus is used up. Draws and verification see the same changed logits, so this is
    as lossless as any other draft. The decoding loop's bound is a power of 2 near this one (`drafts/unlikely.py`).
    """
    settings = (torch.full((len(draft_logits),), value, device=draft_logits.device) for value in (temperature, top_p))
    rows_temperature, rows_top_p = settings
    kept = warped_probs(draft_logits, rows_temperature, None, (1 + rows_top_p) / 2) > 0
    return torch.where(kept, draft_logits, draft_logits - unlikely.BEHIND * temperature)


_TINY = 1e-30


def _rejected(residual: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """normalise(max(residual - draft, 0)), and the mass it was divided by: the probability of a rejection."""
    left = (residual - draft).clamp(min=0)
    mass = left.sum(dim=1, keepdim=True)
    return left / mass.clamp(min=_TINY), mass


# ---- in a replay
#
# P(child r is accepted and is y) = E[reached * min(residual_r(y), draft_r(y))], the expectation over the tokens drawn
# and rejected before; reached is the product of their rejection probabilities once they are drawn from what is
# rejected, max(draft_r - residual_r, 0).


def _emitted_in_rounds(
    target_probs: Tensor,
    scaled_logits: Tensor,
    emitted: Tensor,
    num_ranks: int,
    generator: torch.Generator,
    replacement: bool,
) -> Tensor:
    token = emitted[:, None]
    of_emitted = target_probs.gather(1, token)
    of_emitted = torch.where(of_emitted > 0, of_emitted, 1)  # where rounding left it none: counts as never accepted
    acceptance = torch.zeros(len(emitted), num_ranks, dtype=target_probs.dtype, device=target_probs.device)
    residual, scaled = target_probs, scaled_logits.clone()
    draft, reached = torch.softmax(scaled, dim=1), torch.ones_like(of_emitted)
    for rank in range(num_ranks):
        acceptance[:, rank, None] = reached * torch.minimum(residual, draft).gather(1, token) / of_emitted
        left, mass = _rejected(residual, draft)
        if not replacement:
            excess = (draft - residual).clamp(min=0)
            mass = torch.where(excess.sum(dim=1, keepdim=True) > 0, mass, 0)
            # the drawn token is out: the draft had more of it
            scaled.scatter_(1, torch.multinomial(excess + _TINY, 1, generator=generator), -torch.inf)
            draft = torch.softmax(scaled, dim=1).nan_to_num(0.0)  # 0 once every token that it can give was drawn
        residual, reached = left, reached * mass
    return acceptance


def _emitted_of_top_k(
    target_probs: Tensor, scaled_logits: Tensor, emitted: Tensor, num_ranks: int, generator: torch.Generator
) -> Tensor:
    acceptance = torch.zeros(len(emitted), num_ranks, dtype=target_probs.dtype, device=target_probs.device)
    # a stable sort breaks ties as the op does
    best = scaled_logits.sort(dim=1, descending=True, stable=True).indices[:, :num_ranks]
    acceptance[:, : best.shape[1]] = (best == emitted[:, None]).to(target_probs.dtype)
    return acceptance


OURS = Sampler("without replacement (ours)", None, None, partial(_emitted_in_rounds, replacement=False))
WITH_REPLACEMENT = Sampler(
    "with replacement (SpecInfer)",
    draw_with_replacement,
    decide_with_replacement,
    partial(_emitted_in_rounds, replacement=True),
)
TOP_K = Sampler("top-k", draw_top_k, decide_top_k, _emitted_of_top_k)
SAMPLERS = (OURS, WITH_REPLACEMENT, TOP_K)
CUT_DRAFT = OURS._replace(name="ours with the draft cut", cuts_draft=True)
