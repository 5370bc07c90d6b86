"""Which steps decode with proposals from the requests' own texts, and which with the draft's tree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from sequoia_kernels.decoding.request import Request
from sequoia_kernels.drafts import LookupDrafting, StepTree
from sequoia_kernels.host_module import host as _host
from sequoia_kernels.planner.lookup import LEAST_MATCH, MOST_MATCH, BaseEvidence, LookupCosts, LookupEvidence
from sequoia_kernels.tree import LONGEST_PATH, LookupTree, MergedTree, TokenTree

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
        self.evidence = LookupEvidence()
        self.num_proposed = self.num_copied = 0
        self._texts = [_host.TextIndex(LEAST_MATCH, MOST_MATCH) for _ in prompts]
        for text, prompt in zip(self._texts, prompts, strict=True):
            text.append(list(prompt))
        # Prompts may hold tokens that the target's head does not know: they are never proposed.
        limit = drafting.source.target_vocab_size
        self._limit = limit if any(token >= limit for prompt in prompts for token in prompt) else None
        self._found: list[tuple[int, list[int]]] = [(0, []) for _ in prompts]  # for the step to come
        self._proposed: list[list[int]] = [[] for _ in prompts]  # what of it the step has
        self._merged: dict[TokenTree, MergedTree] = {}
        self._base = BaseEvidence(costs)
        self._missed = [0] * len(self._texts)  # newest committed tokens that the draft has not read

    def tree(self, base: StepTree, requests: Sequence[Request]) -> StepTree:
        """Choose the next step's tree: `base`, with proposals in it or not, or a lookup tree; hand proposals over.

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
        nothing: tuple[int, list[int]] = (0, [])
        active = [request.is_active for request in requests]
        self._found = [self._find(text) if alive else nothing for text, alive in zip(self._texts, active, strict=True)]
        self._proposed = [[] for _ in requests]
        if not isinstance(base, TokenTree) or not any(path for _, path in self._found):
            return base
        # By request: what a step with the draft's tree gives, and with the proposal in that tree.
        own, merged, reaches = [], [], []
        for (match, path), alive in zip(self._found, active, strict=True):
            if not alive:
                own.append(0.0)
                merged.append(0.0)
                continue
            own.append(self._base.tokens_to_beat(base, match))
            chances = self.evidence.chances(match, len(path)) if path else []
            takes = bool(path) and base.num_nodes > 1
            merged.append(self._base.merged_tokens(base, match, chances) if takes else 0.0)
            reaches.append(self.evidence.reach(match, len(path)) if path else None)
        best = sum(map(max, own, merged)) / self.costs.base_ms[base]
        # A draft that is not asked any more is not asked for siblings either.
        pick = self.costs.fastest(reaches, self.evidence.sibling_chance, read=base.num_nodes > 1)
        if pick is not None and pick.speed > best:
            return self._propose(pick.tree, [path[: pick.tree.length] for _, path in self._found])
        if not any(one > other for one, other in zip(merged, own, strict=True)):
            return base
        tree = self._merged.get(base)
        if tree is None:
            tree = self._merged[base] = MergedTree(base)
        paths = [
            path[: len(tree.path)] if one > other else []
            for (_, path), one, other in zip(self._found, merged, own, strict=True)
        ]
        return self._propose(tree, paths)

    def _propose(self, tree: LookupTree | MergedTree, paths: list[list[int]]) -> LookupTree | MergedTree:
        self._proposed = paths
        self.drafting.propose(paths)
        self.num_proposed += 1
        return tree

    def _find(self, text: _host.TextIndex) -> tuple[int, list[int]]:
        match, path = text.propose(LONGEST_PATH)
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
        match, found = self._found[index]
        if tree is not None:
            if not self.drafting.reads(tree):
                self._missed[index] += len(tokens)
            self.evidence.note(match, found, tokens)
            proposed = self._proposed[index]
            if isinstance(tree, (LookupTree, MergedTree)):
                self.num_copied += sum(node in tree.path[: len(proposed)] for node in path[:num_taken])
            if isinstance(tree, LookupTree):
                if tree.siblings and (not path or path[-1] != tree.path[-1]):
                    self.evidence.note_sibling(bool(path) and path[-1] not in tree.path)
            elif proposed:
                self._base.note_merged(match, len(tokens))
            elif isinstance(tree, TokenTree) and tree.num_nodes > 1:
                self._base.note(match, len(tokens))
        self._texts[index].append(list(tokens))
