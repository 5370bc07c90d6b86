"""Lookup: tokens that stood behind the same words earlier in a request's own text, with another draft or alone.

The proposals are certain children (see `verify_tree`): what was copied from the text is accepted with the target's own
probability of it. A step decodes with the tree of the draft, with the same as a `MergedTree`, which takes the proposed
path in, or with a `LookupTree` around a longer path; before each step the loop decides which, by what proposals have
been worth so far (`decoding.lookup`). A merged tree is drawn as the draft's own, and costs what it does. With a lookup
tree that has siblings, of captured steps, the draft reads along in one forward and draws them from it. Without siblings
it does nothing, and reads what it missed in one forward when it is asked again (`catch_up`); drafts that are shown
accepted tokens anyway (`scores_paths` is False) have missed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.levels import DraftLevel, StepTree, TokenBuffers, TreeLayout, each_tree
from sequoia_kernels.drafts.source import Drafting, DraftSource
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import TreeCache, TreeModel, TreeStep
from sequoia_kernels.ops import VerifiedPath, sample_without_replacement
from sequoia_kernels.tree import LONGEST_PATH, LookupTree, MergedTree, TokenTree

__all__ = ["LookupDraft", "LookupDrafting"]


class LookupDraft(DraftSource):
    """Proposals from the text itself, beside those of another source or alone.

    Args:
        target: the target; only what it looks like is kept.
        base: the other source, None for lookup alone.

    Attributes:
        base: as given.
    """

    proposes = True

    def __init__(self, target: TreeModel, base: DraftSource | None = None) -> None:
        if not isinstance(target, TreeModel):
            raise TypeError(f"LookupDraft: target must be a TreeModel, as adapt gives, got {type(target).__name__}")
        if base is not None and (not isinstance(base, DraftSource) or base.proposes):
            raise TypeError(f"LookupDraft: base must be a draft source that draws, got {type(base).__name__}")
        self.base = base
        self._device, self._vocab_size, self._logits_dtype = target.device, target.vocab_size, target.logits_dtype

    def __repr__(self) -> str:
        return "lookup" if self.base is None else f"lookup with {self.base!r}"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The base's, or the target's."""
        return self._device if self.base is None else self.base.device

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """The base's, or the target's."""
        return self._vocab_size if self.base is None else self.base.vocab_size

    @property
    def logits_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The base's, or the target's."""
        return self._logits_dtype if self.base is None else self.base.logits_dtype

    @property
    def vocabulary(self) -> Any:  # type: ignore[override]
        """The base's."""
        return None if self.base is None else self.base.vocabulary

    @property
    def needs(self) -> tuple[int, ...]:  # type: ignore[override]
        """The base's."""
        return () if self.base is None else self.base.needs

    @property
    def positions(self) -> int | None:  # type: ignore[override]
        """The base's."""
        return None if self.base is None else self.base.positions

    @property
    def max_levels(self) -> int | None:  # type: ignore[override]
        """The base's; paths that are proposed may be longer."""
        return None if self.base is None else self.base.max_levels

    @property
    def models(self) -> tuple[TreeModel, ...]:  # type: ignore[override]
        """The base's."""
        return () if self.base is None else self.base.models

    @property
    def foretells(self) -> bool:  # type: ignore[override]
        """As the base."""
        return self.base is not None and self.base.foretells

    @property
    def shares_target(self) -> bool:  # type: ignore[override]
        """As the base."""
        return self.base is not None and self.base.shares_target

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """As the base."""
        return self.base is None or self.base.capturable

    @property
    def owner(self) -> Any:
        """The base's."""
        return self if self.base is None else self.base.owner

    @property
    def graph_key(self) -> Hashable:
        """The base's, and that there is lookup."""
        return "lookup", None if self.base is None else self.base.graph_key

    @property
    def identity(self) -> str | None:
        """The base's: what is measured and learnt of drawn tokens is its own."""
        return "lookup" if self.base is None else self.base.identity

    @property
    def fingerprint(self) -> ModelFingerprint:
        """The base's."""
        return super().fingerprint if self.base is None else self.base.fingerprint

    @property
    def target_vocab_size(self) -> int:
        """Width of the target's logits: tokens from it on are never proposed."""
        return self._vocab_size

    @property
    def siblings(self) -> tuple[int, ...]:
        """How many drawn children there may be beside a proposed one.

        Some only where steps are captured: on a CPU the reading along, op by op, takes longer than the forwards that it
        saves, level by level in C++.
        """
        base = self.base
        reads_along = base is not None and base.scores_paths and base.capturable and base.device.type == "cuda"
        return (0, 1) if reads_along else (0,)

    def meet_prompts(self, target: TreeModel, prompts: torch.Tensor, prompt_lens: Sequence[int]) -> None:
        """Show them to the base."""
        if self.base is not None:
            self.base.meet_prompts(target, prompts, prompt_lens)

    def draws_children(self, tree: StepTree) -> bool:
        """Where there is a base: all but the proposed ones."""
        return self.base is not None and not (isinstance(tree, LookupTree) and tree.siblings == 0)

    def check_target(self, target: TreeModel) -> None:
        """Raise ValueError where the base does not fit."""
        if self.base is not None:
            self.base.check_target(target)

    def start(
        self, target: TreeModel, state: DecodingState, max_cache_len: int, *, backend: str, clock: StageClock
    ) -> LookupDrafting:
        """Begin a batch."""
        base = None
        if self.base is not None:
            base = self.base.start(target, state, max_cache_len, backend=backend, clock=clock)
        return LookupDrafting(self, base, state, backend, clock)


class LookupDrafting(Drafting):
    """Lookup at work for one batch: whoever chooses a lookup tree says before the step what is proposed.

    Args:
        base: the other source at work, None for lookup alone.

    Attributes:
        proposals: the proposed path of each request, -1 behind its end; captured steps read it where it is.
            [B, LONGEST_PATH] int64.
    """

    source: LookupDraft

    def __init__(
        self, source: LookupDraft, base: Drafting | None, state: DecodingState, backend: str, clock: StageClock
    ) -> None:
        self.base = base
        super().__init__(source, state, backend, clock)
        self.foreign = base is not None and base.foreign
        shape = (state.cache_lens.shape[0], LONGEST_PATH)
        self.proposals = torch.full(shape, -1, dtype=torch.int64, device=state.cache_lens.device)
        # Nodes that may be proposed, and of lookup trees the rows of the reading along: held for captured steps.
        self._steps: dict[LookupTree | MergedTree, tuple[torch.Tensor, TreeStep | None]] = {}

    @property
    def logits_hook(self) -> Callable[[DraftLevel, torch.Tensor, TokenBuffers], torch.Tensor] | None:  # type: ignore[override]
        """The base's: lookup itself proposes what it finds."""
        return None if self.base is None else self.base.logits_hook

    @logits_hook.setter
    def logits_hook(self, hook: Callable[[DraftLevel, torch.Tensor, TokenBuffers], torch.Tensor] | None) -> None:
        if self.base is not None:
            self.base.logits_hook = hook

    def propose(self, paths: Sequence[Sequence[int]]) -> None:
        """Say what the next step proposes.

        Args:
            paths: of each request, nothing where there is no proposal. `LONGEST_PATH` tokens at most.
        """
        rows = [[*path, *[-1] * (LONGEST_PATH - len(path))] for path in paths]
        self.proposals.copy_(torch.tensor(rows, dtype=torch.int64))

    def reads(self, tree: StepTree) -> bool:
        """Tell whether the base has seen all tokens of a step with this tree; one that is shown them always has."""
        if self.base is None or not self.base.source.scores_paths:
            return True
        first = each_tree(tree)[0]
        return first.num_nodes > 1 and not (isinstance(first, LookupTree) and first.siblings == 0)

    def catch_up(self, texts: Sequence[Sequence[int]], num_missed: int) -> None:
        """Let the base read the newest committed tokens of every request, which it has not read or reads again.

        Args:
            texts: committed tokens of each request.
            num_missed: how many of them.
        """
        assert self.base is not None  # nobody else misses anything
        with self.clock.stage("draft"):
            rows, starts = [], []
            for text, length in zip(texts, self.state.draft_lens.tolist(), strict=True):
                held = text[len(text) - min(num_missed, length) :]  # a context may hold fewer
                rows.append([*held, *[0] * (num_missed - len(held))])
                starts.append(length - len(held))
            tokens = torch.tensor(rows, dtype=torch.int64, device=self.proposals.device)
            self.base.read(tokens, torch.tensor(starts, dtype=torch.int32, device=self.proposals.device))

    def use(self, source: DraftSource | None, clock: StageClock) -> None:
        """Go on with a source of the same base."""
        super().use(source, clock)
        if self.base is not None:
            self.base.use(None if source is None else source.base, clock)  # type: ignore[attr-defined]

    def cache_tensors(self) -> list[torch.Tensor]:
        """Give the base's."""
        return [] if self.base is None else self.base.cache_tensors()

    def share(self, cache: TreeCache) -> None:
        """Hand it to the base."""
        if self.base is not None:
            self.base.share(cache)

    def prefill(
        self, lanes: list[int], tokens: torch.Tensor, num_tokens: torch.Tensor, hidden_states: Sequence[torch.Tensor]
    ) -> None:
        """Hand it to the base."""
        if self.base is not None:
            self.base.prefill(lanes, tokens, num_tokens, hidden_states)

    def prepare(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Mark a lookup tree's proposed nodes, which are the same in every step; hand any other tree to the base."""
        tree, device = layout.tree, buffers.tokens.device
        if isinstance(tree, LookupTree):
            assert buffers.certain is not None
            self._steps[tree] = path_of(tree, device), reading_step(tree, device)
            buffers.certain.index_fill_(1, path_of(tree, device), True)
            return
        if isinstance(tree, MergedTree):
            self._steps[tree] = path_of(tree, device), None
        if self.base is not None:
            self.base.prepare(layout, buffers)

    def grow(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Let the base draw its tree, with the proposals in a merged one, or copy them into a lookup tree."""
        tree = layout.tree
        if not isinstance(tree, LookupTree):
            if self.base is None:
                raise ValueError(f"lookup: tree must be a lookup tree or a single node, got {tree!r}")
            if isinstance(tree, MergedTree):
                assert buffers.proposed is not None and buffers.certain is not None
                buffers.proposed.index_copy_(1, self._steps[tree][0], self.proposals[:, : len(tree.path)])
                torch.ge(buffers.proposed, 0, out=buffers.certain)
            self.base.grow(layout, buffers)
            return
        path, step = self._steps[tree]
        proposed = self.proposals[:, : tree.length]
        buffers.tokens.index_copy_(1, path, proposed)
        if self.base is None:
            return
        if not self.base.source.scores_paths:
            self.base.see_tree(layout, buffers)
            return
        if not tree.siblings:
            return  # read when the base is asked again
        assert step is not None  # every lookup tree has one
        with self.clock.stage("draft"):
            logits = self.base.score_path(proposed, step)
        self._draw_siblings(tree, path, proposed, logits[:, :-1], buffers)

    def _draw_siblings(
        self, tree: LookupTree, path: torch.Tensor, proposed: torch.Tensor, logits: torch.Tensor, buffers: TokenBuffers
    ) -> None:
        """Draw the children beside each proposed node, from the rows of the nodes above. logits: [B, length, vocab]."""
        assert buffers.draft_logits is not None
        state, count = self.state, tree.siblings
        with self.clock.stage("sample"):
            batch_size, length = proposed.shape
            vocabulary = buffers.vocabulary
            vocab = min(logits.shape[2], buffers.draft_logits.shape[2])
            places = proposed if vocabulary is None else vocabulary.target_to_draft[proposed.clamp(min=0)].long()
            known = (proposed >= 0) & (places >= 0) & (places < vocab)
            # Without what is proposed already: it would be a repeat.
            logits = logits[:, :, :vocab].to(buffers.draft_logits.dtype)
            at_place = places.clamp(0, vocab - 1)[:, :, None]
            left = torch.where(known[:, :, None], -torch.inf, logits.gather(2, at_place))
            others = logits.scatter(2, at_place, left)
            # A row of nothing else is left as it was: a repeat is passed over.
            logits = torch.where(others.isneginf().all(-1, keepdim=True), logits, others)
            parents = torch.cat((path.new_zeros(1), path[:-1]))
            buffers.draft_logits[:, :, :vocab].index_copy_(1, parents, logits)
            drawn = sample_without_replacement(
                logits.flatten(0, 1), count, state.temperature.repeat_interleave(length),
                state.seeds.repeat_interleave(length), (state.offsets[:, None] + parents).flatten(),
                backend=self.backend,
            ).tokens.view(batch_size, length, count)  # fmt: skip
            if vocabulary is not None:
                drawn = torch.where(drawn < 0, drawn, vocabulary.draft_to_target[drawn.clamp(min=0)])
            siblings = path[:, None] + torch.arange(1, count + 1, device=path.device)
            buffers.tokens.index_copy_(1, siblings.flatten(), drawn.flatten(1))

    def committed(self, path: VerifiedPath, hidden_states: Sequence[torch.Tensor]) -> None:
        """Hand it to the base."""
        if self.base is not None:
            self.base.committed(path, hidden_states)

    def level_call(self, step: TreeStep, context_len: int) -> Callable[[], object] | None:
        """Give the base's."""
        return None if self.base is None else self.base.level_call(step, context_len)

    def step_call(self, context_len: int) -> Callable[[], object] | None:
        """Give the base's."""
        return None if self.base is None else self.base.step_call(context_len)

    def restart(self) -> None:
        """Forget the batch before."""
        super().restart()
        if self.base is not None:
            self.base.restart()


@lru_cache(maxsize=128)
def path_of(tree: LookupTree | MergedTree, device: torch.device) -> torch.Tensor:
    """Give the nodes that may be proposed as an index. [length] int64."""
    with torch.inference_mode(False):  # for later calls, which may run outside inference mode
        return torch.tensor(tree.path, dtype=torch.int64, device=device)


@lru_cache(maxsize=128)
def reading_step(tree: LookupTree, device: torch.device) -> TreeStep:
    """Rows of a draft's forward over the last committed token, the root and the proposed path.

    It starts one row before the committed length, as a draft's first forward does, so that node j lies at row j + 1.
    """
    shifted = TokenTree([-1, 0, *(parent + 1 for parent in tree.parents[1:])])
    with torch.inference_mode(False):
        return TreeStep.of(shifted, [0, 1, *(node + 1 for node in tree.path)], device=device)
