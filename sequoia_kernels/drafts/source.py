"""The door for drafts: what proposes the tokens of a tree. Every other file of this room is one such source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.levels import DraftLevel, StepTree, TokenBuffers, TreeLayout
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.drafts.unlikely import set_back_unlikely
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import TreeCache, TreeModel, TreeStep
from sequoia_kernels.ops import VerifiedPath, sample_without_replacement
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["DraftSource", "Drafting", "shares_split_target"]


class DraftSource(ABC):
    """Proposes tokens for a target: what `generate` takes as its draft.

    The output never depends on a source, only the speed does: children are drawn from the very logits that it leaves
    for the verification. A source holds what lasts (weights); what belongs to a batch is in the `Drafting` that it
    starts. One that runs no model of transformers' overrides the attributes that differ.

    Attributes:
        device: where it runs: the target's device.
        vocab_size: width of its logits; a vocabulary narrower than the target's is the first part of it, unless
            `vocabulary` says otherwise.
        vocabulary: which tokens of a target its logits are of, on its device; None where they are the target's own.
        proposes: whether it has children that are certain, which it marks in `TokenBuffers.certain`.
        foretells: whether it says how likely a child of a node is accepted before it draws any, in
            `TokenBuffers.foretold` where there is one: by what it knows without the children.
        scores_paths: whether it must read tokens that others proposed in its place, and tells what it makes of them:
            `Drafting.score_path` and `Drafting.read`. A source that is shown accepted tokens by `committed` need not.
        logits_dtype: dtype of its logits, which are stored, drawn from and verified in it.
        needs: hidden states of the target that it reads, numbered as transformers' `hidden_states`: i is the input of
            layer i, the number of layers what is behind the last norm. It gets them of every committed row.
        positions: positions that it was made for, None without a limit. Behind them its context is begun anew with the
            newest tokens; so a source with `needs` has none.
        max_levels: levels of the deepest tree that it can grow, the root's included; None without a limit.
        models: the models that it runs: what a captured step depends on besides `graph_key`.
        shares_target: whether it runs or reads modules or caches of the target's own: not for targets that are split
            over ranks, of which each holds a part.
        capturable: whether its part of a step may become a CUDA graph: static shapes, nothing waits for the device.
    """

    device: torch.device
    vocab_size: int
    logits_dtype: torch.dtype
    vocabulary: VocabularyMap | None = None
    proposes: bool = False
    foretells: bool = False
    scores_paths: bool = False
    needs: tuple[int, ...] = ()
    positions: int | None = None
    max_levels: int | None = None
    models: tuple[TreeModel, ...] = ()
    shares_target: bool = False
    capturable: bool = True

    @property
    def owner(self) -> Any:
        """What captured steps are kept for, and no longer than it lives: an object that can be referenced weakly."""
        return self

    @property
    def graph_key(self) -> Hashable:
        """Whatever else changes what a captured step does."""
        return None

    @property
    def identity(self) -> str | None:
        """What measured times and acceptance belong to besides `fingerprint` and `models`, from process to process.

        None: to this object alone; nothing of it is kept on disk.
        """
        return None

    @property
    def fingerprint(self) -> ModelFingerprint:
        """What times and acceptance that were measured belong to."""
        return ModelFingerprint(
            family=type(self).__name__, dtype=str(self.logits_dtype).removeprefix("torch."), num_parameters=0,
            vocab_size=self.vocab_size, num_layers=0, hidden_size=0, intermediate_size=None, num_heads=0,
            num_kv_heads=0, head_dim=0,
        )  # fmt: skip

    def draws_children(self, tree: StepTree) -> bool:
        """Tell whether any children of a tree are drawn; where none are, no logits are kept of it."""
        return True

    def check_target(self, target: TreeModel) -> None:  # noqa: B027
        """Raise ValueError where it cannot propose tokens for a target; the message says why."""

    def meet_prompts(self, target: TreeModel, prompts: torch.Tensor, prompt_lens: Sequence[int]) -> None:  # noqa: B027
        """See the prompts of a call before anything is measured, planned or allocated for it.

        The only place where `needs` and what tells captured steps apart may change. No other thread is to decode with
        the source meanwhile.

        Args:
            target: the target, which `check_target` has let pass.
            prompts: prompts, padded on the right. [B, longest] int64.
            prompt_lens: tokens of each.
        """

    @abstractmethod
    def start(
        self, target: TreeModel, state: DecodingState, max_cache_len: int, *, backend: str, clock: StageClock
    ) -> Drafting:
        """Begin a batch.

        Args:
            target: the target; an object that outlasts the call must not keep it.
            state: the batch's state, which steps advance in place.
            max_cache_len: rows that a cache needs: committed tokens and the tree behind them.
            backend: backend of the ops.
            clock: adds up the times of the stages "draft" and "sample".
        """


class Drafting(ABC):
    """A source at work for one batch of B requests, on buffers that live as long as this object.

    Args:
        source: the source. None while an engine that is kept for later calls lies idle.
        state: the batch's state.
        backend: backend of the ops.
        clock: adds up the times of the stages.

    Attributes:
        logits_hook: changes a level's logits before its children are drawn; None leaves them as they are. Called with
            the level, logits [B, W, vocab] as wide as the target's, and the buffers.
    """

    foreign = True  # whether code outside of this package may run in it, which might change models

    def __init__(self, source: DraftSource, state: DecodingState, backend: str, clock: StageClock) -> None:
        self.source: Any = source
        self.state, self.backend, self.clock = state, backend, clock
        self.logits_hook: Callable[[DraftLevel, torch.Tensor, TokenBuffers], torch.Tensor] | None = None

    def use(self, source: DraftSource | None, clock: StageClock) -> None:
        """Go on with this object of the same source; without any while nobody decodes, so that none is kept alive."""
        self.source, self.clock = source, clock

    def share(self, cache: TreeCache) -> None:  # noqa: B027
        """See the target's cache, whose rows live as long as this object; of sources that use them.

        Args:
            cache: the target's. Its committed rows are not to be written.
        """

    def cache_tensors(self) -> list[torch.Tensor]:
        """Give the caches whose tree rows lie as the target's do, node j at row lens + j: they are compacted with it.

        Returns:
            [B, S, Hkv, D] each. Where the state has lengths of the draft's own, lens are those.
        """
        return []

    def prefill(  # noqa: B027
        self,
        lanes: list[int],
        tokens: torch.Tensor,  # [R, longest] int64, padded on the right
        num_tokens: torch.Tensor,  # [R] int32
        hidden_states: Sequence[torch.Tensor],
    ) -> None:
        """Take committed tokens as the context of some requests, in increasing order; the other requests keep theirs.

        Args:
            lanes: the R requests.
            tokens: their tokens, on the target's device; the state's lengths are set behind this call.
            num_tokens: how many each has.
            hidden_states: what `needs` names, of these tokens. [R, longest, width] each.
        """

    def prepare(self, layout: TreeLayout, buffers: TokenBuffers) -> None:  # noqa: B027
        """Make what growing this tree in these buffers takes, ahead of its first step."""

    @abstractmethod
    def grow(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Fill the tokens of a tree behind the root, and the logits of its nodes with children.

        Args:
            layout: the tree, level by level.
            buffers: `tokens[:, 0]` holds the roots; `draw_children` fills the rest of a level. Where children are not
                drawn, their tokens must be -1 and the logits of their parents finite; or they are certain, and marked
                so in every step.
        """

    def see_tree(self, layout: TreeLayout, buffers: TokenBuffers) -> None:  # noqa: B027
        """See the tokens of a tree that something else proposed, in place of `grow`; of sources that score no paths.

        Args:
            layout: the tree.
            buffers: hold its tokens.
        """

    def score_path(self, proposed: torch.Tensor, step: TreeStep) -> torch.Tensor:
        """Read a path of tokens that was proposed elsewhere, in place of `grow`; of sources that score paths.

        Args:
            proposed: tokens below the root, -1 behind the end. [B, L] int64.
            step: rows of the last committed token, of the root and of these, one row before the committed length.

        Returns:
            The logits behind the root and each of them. [B, L + 1, vocab].
        """
        raise NotImplementedError(f"{type(self).__name__} scores no paths")

    def read(self, tokens: torch.Tensor, starts: torch.Tensor) -> None:
        """Read committed tokens that were accepted without it; of sources that score paths.

        Args:
            tokens: tokens of each request, which follow one another. [B, M] int64. What reaches beyond the committed
                length is padding.
            starts: place of the first of them in the draft's context. [B] int32.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no tokens of others")

    def committed(self, path: VerifiedPath, hidden_states: Sequence[torch.Tensor]) -> None:  # noqa: B027
        """See what a step accepted; the state is advanced, the buffers are as `grow` left them.

        Args:
            path: the accepted path; of an ended request too, which commits nothing.
            hidden_states: what `needs` names, of the tree's nodes. [B, N, width] each.
        """

    def level_call(self, step: TreeStep, context_len: int) -> Callable[[], object] | None:
        """Give a call that does what growing a level takes beside its draws: it is timed, and trees are planned by it.

        Args:
            step: the level's nodes with children.
            context_len: committed tokens.

        Returns:
            The call; None where the source cannot tell what it costs, and so must be given a tree.
        """
        return None

    def step_call(self, context_len: int) -> Callable[[], object] | None:
        """Give a call that does what a step takes whatever its tree, where that is not the first level's forward.

        Timed beside `level_call`, whose levels then do all but that, the root's like any other.

        Args:
            context_len: committed tokens.
        """
        return None

    def draw_children(self, level: DraftLevel, logits: torch.Tensor, buffers: TokenBuffers) -> None:
        """Draw the children of a level's nodes, and keep the logits that they were drawn from.

        Args:
            level: the level.
            logits: of its nodes. [B, W, vocab]; a vocabulary narrower than the target's is a part of it, unless the
                source has its own.
            buffers: takes both.
        """
        assert buffers.draft_logits is not None  # allocated with every tree that has a level to draw
        with self.clock.stage("sample"):
            batch_size, width, _ = logits.shape
            vocab, vocabulary = min(logits.shape[2], buffers.draft_logits.shape[2]), buffers.vocabulary
            if self.logits_hook is not None:  # which may name tokens that only the target knows
                if vocabulary is None:
                    missing = buffers.draft_logits.shape[2] - vocab
                    logits = torch.nn.functional.pad(logits[:, :, :vocab], (0, missing), value=-torch.inf)
                    hooked, vocab = self.logits_hook(level, logits, buffers), vocab + missing
                else:
                    hooked = self.logits_hook(level, vocabulary.widened(logits), buffers)
                    hooked = hooked.index_select(2, vocabulary.draft_to_target)
                # A row of nothing that the draft knows is left as it was: any guess will do.
                logits = torch.where(hooked.isneginf().all(-1, keepdim=True), logits.to(hooked.dtype), hooked)
            # drawn from the very numbers that are kept for the verification
            state = self.state
            logits = logits[:, :, :vocab].to(buffers.draft_logits.dtype)
            logits = set_back_unlikely(logits, state.temperature, state.top_p, self.backend)
            if level.step.first_node is not None:
                kept = buffers.draft_logits.narrow(1, level.step.first_node, width).narrow(2, 0, vocab)
                kept.copy_(logits)
            else:
                buffers.draft_logits[:, :, :vocab].index_copy_(1, level.nodes, logits)
            per_request = (state.temperature, state.seeds)
            if batch_size == 1:  # views, for which nothing is launched
                temperatures, seeds = (values.expand(width) for values in per_request)
            else:
                temperatures, seeds = (values.repeat_interleave(width) for values in per_request)
            drawn = sample_without_replacement(
                logits.flatten(0, 1), level.num_samples, temperatures, seeds,
                (state.offsets[:, None] + level.nodes).flatten(), backend=self.backend,
            ).tokens.view(batch_size, -1)  # fmt: skip
            if level.shape is not None:  # after the draw, but by nothing that was drawn in it
                level.shape.give_out(logits, state.temperature, self.backend, foretold=buffers.foretold)
            children = buffers.tokens.narrow(1, level.first_child, level.num_children)
            if level.drawn.dim() == 2:  # each request has its own tree
                children.copy_(drawn.gather(1, level.drawn))
            elif batch_size == 1:
                torch.index_select(drawn, 1, level.drawn, out=children)
            else:
                children.copy_(drawn.index_select(1, level.drawn))
            if level.shape is not None:
                level.shape.note_draws(logits, state.temperature, buffers.tokens, self.backend)
            if vocabulary is not None:  # until here they were places in a row
                ids = vocabulary.draft_to_target.index_select(0, children.clamp(min=0).flatten()).view_as(children)
                children.copy_(torch.where(children < 0, children, ids))
            if level.num_with_proposal:
                assert buffers.proposed is not None  # allocated with every tree that has such a level
                proposed = buffers.proposed.narrow(1, level.first_child, 1)
                put_first(proposed, children.narrow(1, 0, level.num_with_proposal))

    def restart(self) -> None:
        """Forget everything of the batch before: another one of the same shape begins, with the state's new values."""
        for tensor in self.cache_tensors():  # a masked row counts with weight 0, and 0 times a left-over inf is NaN
            tensor.zero_()


def shares_split_target(draft: str) -> str:
    """Say why a draft that runs the target's own modules cannot have one that is split over ranks."""
    return (
        "generate: draft must run without the target's own weights where these are split over ranks, of which each has "
        f"a part, got {draft}; take a model or lookup"
    )


def put_first(proposed: torch.Tensor, drawn: torch.Tensor) -> None:
    """Put a proposed token before a node's drawn children, of which those up to itself, or all, move on by one.

    What is left are draws without replacement from all tokens but the proposed one: it is as if that one had not been
    among what they are drawn from.

    Args:
        proposed: -1 leaves the children as they are. [B, 1] int64.
        drawn: the children in the order of their draw; overwritten. [B, C] int64.
    """
    places = torch.arange(drawn.shape[1], device=drawn.device)
    behind = (drawn == proposed).cumsum(1) > 0  # from the proposed token's own draw on
    before = torch.cat((torch.zeros_like(behind[:, :1]), behind[:, :-1]), dim=1)
    moved = drawn.gather(1, (places - (~before).long()).clamp_(min=0))
    moved = torch.where(places == 0, proposed, moved)
    drawn.copy_(torch.where(proposed < 0, drawn, moved))
