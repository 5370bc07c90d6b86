"""A smaller language model as the draft: a forward a level."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.host_growth import HostGrowth
from sequoia_kernels.drafts.levels import StepTree, TokenBuffers, TreeLayout
from sequoia_kernels.drafts.source import Drafting, DraftSource
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.drafts.vocabulary import TokenPairing
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import (
    BoundForward,
    TreeCache,
    TreeModel,
    TreeStep,
    causal_step,
    check_pair,
    check_sizes,
    prefill,
)
from sequoia_kernels.parallel import leading

__all__ = ["ModelDraft", "forward_call"]

ROWS_READ = 64


class ModelDraft(DraftSource):
    """A language model as the draft.

    Args:
        model: the model.
        pairing: what it has in common with the target, where its tokens are others; see `pair_tokens`.
    """

    scores_paths = True

    def __init__(self, model: TreeModel, pairing: TokenPairing | None = None) -> None:
        if not isinstance(model, TreeModel):
            raise TypeError(f"ModelDraft: model must be a TreeModel, as adapt gives, got {type(model).__name__}")
        self.model = model
        self.models = (model,)
        self.pairing = None if pairing is None else pairing.to(model.device)
        if pairing is not None:
            self.vocabulary = self.pairing.vocabulary  # type: ignore[union-attr]

    def __repr__(self) -> str:
        return repr(self.model)

    # Of the model as it is now: it may be moved, cast or resized between two calls.

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Device of its inputs."""
        return self.model.device

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Width of its head, or the tokens that it has in common with the target."""
        return self.model.vocab_size if self.pairing is None else len(self.pairing.own_ids)

    @property
    def logits_dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of its head."""
        return self.model.logits_dtype

    @property
    def positions(self) -> int | None:  # type: ignore[override]
        """Positions that it was trained for."""
        return self.model.trained_positions

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """False where it streams its layers."""
        return self.model.capturable

    @property
    def owner(self) -> Any:
        """The Hugging Face model: a call that is given it again makes another source of it."""
        return self.model.model

    @property
    def graph_key(self) -> Hashable:
        """Where its map between vocabularies lies."""
        return None if self.pairing is None else (self.pairing.own_ids.data_ptr(), self.pairing.fed_ids.data_ptr())

    @property
    def identity(self) -> str | None:
        """What the model does not say of itself: the class, where it is another one, and that its tokens are others."""
        name = "" if type(self) is ModelDraft else f"{type(self).__module__}.{type(self).__qualname__}"
        return name if self.pairing is None else f"{name}, {len(self.pairing.own_ids)} common tokens"

    def fed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Give what the model is fed for tokens of the target, -1 among them."""
        if self.pairing is not None:
            return self.pairing.fed(tokens).clamp_(max=self.model.num_embeddings - 1)
        return tokens.clamp(0, self.model.num_embeddings - 1)

    def common(self, logits: torch.Tensor) -> torch.Tensor:
        """Cut logits to the tokens that are common. [..., vocab]."""
        return logits if self.pairing is None else logits.index_select(-1, self.pairing.own_ids)

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Shapes of the model."""
        return ModelFingerprint.of(self.model)

    def check_target(self, target: TreeModel) -> None:
        """Raise ValueError where the two do not make a pair."""
        if self.pairing is None:
            check_pair(target, self.model)
            return
        check_sizes(target, self.model)
        if self.pairing.vocabulary.vocab_size != target.vocab_size:
            raise ValueError(
                f"ModelDraft: pairing must be made for the target's {target.vocab_size} tokens, "
                f"got one for {self.pairing.vocabulary.vocab_size}"
            )

    def start(
        self, target: TreeModel, state: DecodingState, max_cache_len: int, *, backend: str, clock: StageClock
    ) -> Drafting:
        """Begin a batch with an empty cache."""
        cache = self.model.new_cache(state.cache_lens.shape[0], max_cache_len, beyond_positions=True)
        return self.start_on(cache, state, max(target.num_embeddings, target.vocab_size), backend=backend, clock=clock)

    def start_on(
        self, cache: TreeCache, state: DecodingState, num_tokens: int, *, backend: str, clock: StageClock
    ) -> Drafting:
        """Begin, or go on, with a cache of the caller's.

        Args:
            cache: of the model, for the requests of the state; what is committed in it is the caller's to know.
            state: the batch's state.
            num_tokens: the tokens that it may meet are below this number.
            backend: backend of the ops.
            clock: adds up the times of the stages.
        """
        return _ModelDrafting(self, cache, state, num_tokens, backend, clock)


class _ModelDrafting(Drafting):
    source: ModelDraft
    foreign = False

    def __init__(
        self, source: ModelDraft, cache: TreeCache, state: DecodingState, num_tokens: int, backend: str,
        clock: StageClock,
    ) -> None:  # fmt: skip
        super().__init__(source, state, backend, clock)
        self.cache = cache
        # Whether it may meet tokens of the target that it has no embedding of. Such a one is fed as the last one that
        # it has: what grows behind it is a worse guess, and verified like any other.
        self.lacks_tokens = source.pairing is not None or source.model.num_embeddings < num_tokens
        self._grown: dict[StepTree, tuple[TokenBuffers, HostGrowth | None]] = {}
        self._readers: dict[int, _Reader | None] = {}  # by rows

    def use(self, source: DraftSource | None, clock: StageClock) -> None:
        """Go on with a source of the same model, or let go of it."""
        super().use(source, clock)
        self._grown.clear()  # what holds the model's weights
        self._readers.clear()

    def cache_tensors(self) -> list[torch.Tensor]:
        """Give the cache's."""
        return self.cache.tensors()

    def prefill(
        self, lanes: list[int], tokens: torch.Tensor, num_tokens: torch.Tensor, hidden_states: Sequence[torch.Tensor]
    ) -> None:
        """Run the tokens through the model."""
        model, cache = self.source.model, self.cache
        tokens = self.source.fed(tokens)
        if len(lanes) == cache.batch_size:
            prefill(model, cache, tokens, num_tokens)
        else:
            part = model.new_cache(*tokens.shape)
            prefill(model, part, tokens, num_tokens)
            for whole, rows in zip(cache.tensors(), part.tensors(), strict=True):
                whole[lanes, : rows.shape[1]] = rows
            session = leading()
            if session is not None:
                session.note_copy(part, cache, lanes)

    def level_call(self, step: TreeStep, context_len: int) -> Callable[[], object]:
        """Give a forward over the level; one with fewer positions sees no more than those."""
        if self.source.positions is not None:
            context_len = min(context_len, self.source.positions - 1)
        return forward_call(self.source.model, self.cache, step, context_len)

    def prepare(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Bind the forwards of all levels, where they are native."""
        self._host_growth(layout, buffers)

    def grow(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Draw level by level; leaves are never fed. Mutates the cache's rows behind the committed ones."""
        state, model, cache = self.state, self.source.model, self.cache
        host = self._host_growth(layout, buffers)
        if host is not None and host.run(self.clock):
            return  # where a value is out of range, the ops below say which
        for index, level in enumerate(layout.levels):
            with self.clock.stage("draft"):
                if index == 0:
                    fed = torch.stack((state.last_tokens, state.root_tokens), dim=1)
                    if self.lacks_tokens:
                        fed = self.source.fed(fed)
                    logits = model.forward(fed, cache, state.draft_lens - 1, layout.root_step)[:, 1:]
                else:
                    first, width = level.step.first_node, level.nodes.shape[0]
                    drawn = buffers.tokens
                    drawn = drawn.index_select(1, level.nodes) if first is None else drawn.narrow(1, first, width)
                    fed = self.source.fed(drawn)
                    logits = model.forward(fed, cache, state.draft_lens, level.step)
            self.draw_children(level, self.source.common(logits), buffers)

    def score_path(self, proposed: torch.Tensor, step: TreeStep) -> torch.Tensor:
        """Feed the path in one forward. Mutates the cache's rows behind the committed ones."""
        state, model = self.state, self.source.model
        fed = self.source.fed(torch.cat((state.last_tokens[:, None], state.root_tokens[:, None], proposed), dim=1))
        return self.source.common(model.forward(fed, self.cache, state.draft_lens - 1, step)[:, 1:])

    def read(self, tokens: torch.Tensor, starts: torch.Tensor) -> None:
        """Feed the tokens, at most `ROWS_READ` in a forward."""
        model, (batch_size, count) = self.source.model, tokens.shape
        for first in range(0, count, ROWS_READ):
            fed = self.source.fed(tokens[:, first : first + ROWS_READ])
            rows = fed.shape[1]
            if rows not in self._readers:
                self._readers[rows] = _Reader.bind(model, self.cache, rows)
            reader = self._readers[rows]
            if reader is None or not reader.run(fed, starts + first):
                last_row = torch.zeros(batch_size, dtype=torch.int64, device=tokens.device)
                step = causal_step(rows, tokens.device)
                model.forward(fed, self.cache, starts + first, step, last_row=last_row)

    def _host_growth(self, layout: TreeLayout, buffers: TokenBuffers) -> HostGrowth | None:
        """What grows this tree in one call, where something does; made when the tree is first met."""
        if self.logits_hook is not None:
            return None
        known = self._grown.get(layout.tree)
        if known is None or known[0] is not buffers:
            host = None
            if self.state.cache_lens.is_cpu and type(self).draw_children is Drafting.draw_children:
                source = self.source
                host = HostGrowth.bind(
                    source.model, self.cache, self.state, layout, buffers, self.backend, source.pairing
                )
            known = self._grown[layout.tree] = buffers, host
        return known[1]


class _Reader:
    """Native forwards of so many tokens a request whose logits nobody wants: of one row they are computed."""

    def __init__(self, tokens: torch.Tensor, cache_lens: torch.Tensor, bound: BoundForward, dtype: torch.dtype) -> None:
        self._tokens, self._cache_lens, self._bound = tokens, cache_lens, bound
        self._logits = torch.empty(bound.shape, dtype=dtype)

    @classmethod
    def bind(cls, model: TreeModel, cache: TreeCache, num_rows: int) -> _Reader | None:
        """Prepare them; None where the model's forwards are not native."""
        if model.device.type != "cpu":
            return None
        tokens = torch.zeros(cache.batch_size, num_rows, dtype=torch.int64)
        cache_lens = torch.zeros(cache.batch_size, dtype=torch.int32)
        last_row = torch.zeros(cache.batch_size, dtype=torch.int64)
        bound = model.bind(tokens, cache, cache_lens, causal_step(num_rows), last_row=last_row)
        return None if bound is None else cls(tokens, cache_lens, bound, model.logits_dtype)

    def run(self, tokens: torch.Tensor, cache_lens: torch.Tensor) -> bool:
        """Run one; False, and nothing is written, where a length leaves no room."""
        self._tokens.copy_(tokens)
        self._cache_lens.copy_(cache_lens)
        return self._bound.run(self._logits)


def forward_call(model: TreeModel, cache: TreeCache, step: TreeStep, context_len: int) -> Callable[[], object]:
    """Give a forward of some tokens over a level's rows, to be timed."""
    num_rows = step.node_ids.shape[0]
    generator = torch.Generator().manual_seed(num_rows)
    tokens = torch.randint(model.num_embeddings, (cache.batch_size, num_rows), generator=generator).to(model.device)
    cache_lens = torch.full((cache.batch_size,), context_len, dtype=torch.int32, device=model.device)
    bound = model.bind(tokens, cache, cache_lens, step)
    if bound is None:
        return lambda: model.forward(tokens, cache, cache_lens, step)
    logits = torch.empty(bound.shape, dtype=model.logits_dtype)
    return lambda: bound.run(logits)
