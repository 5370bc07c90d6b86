"""Which steps decode with proposals from the requests' own texts, and which with the draft's tree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import sequoia_kernels._host as _host
from sequoia_kernels.decoding.request import Request
from sequoia_kernels.drafts import LookupDrafting, StepTree
from sequoia_kernels.planner.lookup import LEAST_MATCH, MOST_MATCH, BaseEvidence, LookupCosts, LookupEvidence
from sequoia_kernels.tree import LookupTree, TokenTree

__all__ = ["LookupSteps"]


class LookupSteps:
    """Follows the texts of a batch, and chooses a tree before every step.

    What is chosen follows from the texts and from the costs, not from the clock: equal calls decode alike.

    Args:
        drafting: takes the proposals.
        prompts: of the requests.
        costs: what steps take.

    Attributes:
        num_proposed: steps that decoded with proposals.
        num_copied: tokens that were accepted as proposed.
    """

    def __init__(self, drafting: LookupDrafting, prompts: Sequence[Sequence[int]], costs: LookupCosts) -> None:
        self.drafting, self.costs = drafting, costs
        self.longest = costs.longest
        drafting.reserve(self.longest)
        self.evidence = LookupEvidence()
        self.num_proposed = self.num_copied = 0
        self._texts = [_host.TextIndex(LEAST_MATCH, MOST_MATCH) for _ in prompts]
        for text, prompt in zip(self._texts, prompts, strict=True):
            text.append(list(prompt))
        # Prompts may hold tokens that the target's head does not know: they are never proposed.
        limit = drafting.source.target_vocab_size
        self._limit = limit if any(token >= limit for prompt in prompts for token in prompt) else None
        self._proposed: list[tuple[int, list[int]]] = [(0, []) for _ in prompts]  # of the step to come
        self._base = BaseEvidence(costs)
        self._missed = [0] * len(self._texts)  # newest committed tokens that the draft has not read

    def tree(self, base: StepTree, requests: Sequence[Request]) -> StepTree:
        """Choose the next step's tree: `base`, or a lookup tree, whose proposals are handed over.

        A draft that is asked again reads what it missed first.
        """
        tree = self._chosen(base, requests)
        if any(self._missed) and self.drafting.reads(tree):
            # One more: the last token before may have been a leaf, which nobody fed.
            self.drafting.catch_up([request.committed for request in requests], max(self._missed) + 1)
            self._missed = [0] * len(self._missed)
        return tree

    def forget(self, lanes: Sequence[int]) -> None:
        """Take notice that the draft's context of some requests was begun anew, with all that it may see."""
        for lane in lanes:
            self._missed[lane] = 0

    def _chosen(self, base: StepTree, requests: Sequence[Request]) -> StepTree:
        self._proposed = [
            self._found(text) if request.is_active else (0, [])
            for text, request in zip(self._texts, requests, strict=True)
        ]
        reaches = [
            self.evidence.reach(match, len(path)) if path else None
            for (match, path), request in zip(self._proposed, requests, strict=True)
            if request.is_active
        ]
        if not isinstance(base, TokenTree) or all(reach is None for reach in reaches):
            return base
        # A draft that is not asked any more is not asked for siblings either.
        pick = self.costs.fastest(reaches, self.evidence.sibling_chance, read=base.num_nodes > 1)
        active = [match for (match, _), request in zip(self._proposed, requests, strict=True) if request.is_active]
        if pick is None or pick.speed <= self._base.speed(base, active):
            return base
        self.drafting.propose([path[: pick.tree.length] for _, path in self._proposed])
        self.num_proposed += 1
        return pick.tree

    def _found(self, text: _host.TextIndex) -> tuple[int, list[int]]:
        match, path = text.propose(self.longest)
        if self._limit is not None:
            path = list(takewhile(lambda token: token < self._limit, path))
        return (match, path) if path else (0, [])

    def take(
        self, index: int, tokens: Sequence[int], tree: StepTree | None = None, path: Sequence[int] = (),
        num_taken: int = 0,
    ) -> None:  # fmt: skip
        """See what a step, or the prefill, emitted for a request.

        Args:
            index: which request.
            tokens: all that it emitted.
            tree: what it decoded with, None for the prefill.
            path: the accepted nodes.
            num_taken: how many of the tokens came before the request's end.
        """
        match, proposed = self._proposed[index]
        if tree is not None:
            if not self.drafting.reads(tree):
                self._missed[index] += len(tokens)
            self.evidence.note(match, proposed, tokens)
            if isinstance(tree, LookupTree):
                self.num_copied += sum(node in tree.path for node in path[:num_taken])
                if tree.siblings and (not path or path[-1] != tree.path[-1]):
                    self.evidence.note_sibling(bool(path) and path[-1] not in tree.path)
            elif isinstance(tree, TokenTree) and tree.num_nodes > 1:
                self._base.note(match, len(tokens))
        self._texts[index].append(list(tokens))
