"""Which steps decode with proposals from the requests' own texts, and which with the draft's tree."""

from __future__ import annotations

from collections.abc import Sequence

from sequoia_kernels.decoding.request import Request
from sequoia_kernels.drafts import LookupDrafting, StepTree
from sequoia_kernels.host_module import host as _host
from sequoia_kernels.planner.lookup import LookupCosts, MergedValue, choice_of
from sequoia_kernels.tree import LookupTree, MergedTree, TokenTree

__all__ = ["LookupSteps"]


class LookupSteps:
    """Follows the texts of a batch, and chooses a tree before every step.

    What is chosen follows from the texts and from the costs, not from the clock: equal calls decode alike.

    Args:
        drafting: takes the proposals.
        prompts: of the requests.
        costs: what steps take.

    Attributes:
        choice: follows the texts, and weighs what is found in them; in C++.
        num_proposed: steps that decoded with proposals.
        num_copied: tokens that were accepted as proposed.
    """

    def __init__(self, drafting: LookupDrafting, prompts: Sequence[Sequence[int]], costs: LookupCosts) -> None:
        self.drafting, self.costs = drafting, costs
        self.num_proposed = self.num_copied = 0
        # Prompts may hold tokens that the target's head does not know: they are never proposed.
        self.choice = choice_of(costs, len(prompts), drafting.source.target_vocab_size)
        for index, prompt in enumerate(prompts):
            self.choice.take(index, list(prompt), self.choice.PROMPT)
        self._bases: dict[TokenTree, int] = {}
        self._base: tuple[StepTree | None, int] = (None, self.choice.BASE)  # the newest one and its number
        self._merged: dict[TokenTree, MergedTree] = {}
        self._missed = [0] * len(prompts)  # newest committed tokens that the draft has not read
        # The newest step's tree, whether the draft has seen all tokens of such steps, and what kind of step that is.
        self._decoded: tuple[StepTree | None, bool, int] = (None, True, self.choice.PROMPT)

    def tree(self, base: StepTree, requests: Sequence[Request]) -> StepTree:
        """Choose the next step's tree: `base`, with proposals in it or not, or a lookup tree; hand proposals over.

        A draft that is asked again reads what it missed first.
        """
        tree = self._chosen(base, requests)
        if any(self._missed) and self.drafting.reads(tree):
            # One more: the last token before may have been a leaf, which nobody fed. And more than that, where there
            # are: what reads so many tokens is kept.
            texts, least = [request.committed for request in requests], max(self._missed) + 1
            num_read = min(1 << max(self._missed).bit_length(), max(least, min(map(len, texts))))
            self.drafting.catch_up(texts, num_read)
            self._missed = [0] * len(self._missed)
        return tree

    def forget(self, lanes: Sequence[int]) -> None:
        """Take notice that the draft's context of some requests was begun anew, with all that it may see."""
        for lane in lanes:
            self._missed[lane] = 0

    def _chosen(self, base: StepTree, requests: Sequence[Request]) -> StepTree:
        if base is not self._base[0]:
            self._base = base, self._number_of(base)
        chosen = self.choice.choose(self._base[1], [request.is_active for request in requests])
        if chosen == self.choice.BASE:
            return base
        assert isinstance(base, TokenTree)  # no other takes proposals
        if chosen == self.choice.MERGED:
            return self._propose(self._merged[base], self.choice.proposed())
        return self._propose(self.costs.trees[chosen], self.choice.proposed())

    def _number_of(self, base: StepTree) -> int:
        if not isinstance(base, TokenTree):
            return int(self.choice.BASE)
        if base not in self._bases:
            costs = self.costs
            value = MergedValue(base, costs.acceptance)
            ms, tokens, drafts = costs.base_ms[base], costs.base_tokens[base], base.num_nodes > 1
            self._bases[base] = self.choice.add_base(ms, tokens, drafts, value.nodes)
            self._merged[base] = MergedTree(base)
        return self._bases[base]

    def _propose(self, tree: LookupTree | MergedTree, paths: list[list[int]]) -> LookupTree | MergedTree:
        self.choice.propose(paths)
        self.drafting.propose(paths)
        self.num_proposed += 1
        return tree

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
        if tree is None:
            self.choice.take(index, tokens, self.choice.PROMPT)
            return
        if tree is not self._decoded[0]:
            self._decoded = tree, self.drafting.reads(tree), self._kind_of(tree)
        _, reads, kind = self._decoded
        if not reads:
            self._missed[index] += len(tokens)
        if isinstance(tree, (LookupTree, MergedTree)):
            proposed = self.choice.proposed()[index]
            self.num_copied += sum(node in tree.path[: len(proposed)] for node in path[:num_taken])
            if isinstance(tree, LookupTree) and tree.siblings and (not path or path[-1] != tree.path[-1]):
                self.choice.note_sibling(bool(path) and path[-1] not in tree.path)
        self.choice.take(index, tokens, kind)

    def _kind_of(self, tree: StepTree) -> int:
        if isinstance(tree, MergedTree):
            return int(_host.LookupChoice.AFTER_MERGED)
        drafted = isinstance(tree, TokenTree) and not isinstance(tree, LookupTree) and tree.num_nodes > 1
        return int(_host.LookupChoice.AFTER_DRAFTED if drafted else _host.LookupChoice.AFTER_OTHER)
