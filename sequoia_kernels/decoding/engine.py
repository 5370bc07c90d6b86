"""One batch's models, caches and state, and the engines that stay behind for the next batch of the same shapes."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakMethod, WeakSet, ref

import torch

from sequoia_kernels.cuda_graphs import CaptureError, forget_refusals, refuse, refused
from sequoia_kernels.decoding.commit import EmittedTokens, commit_path
from sequoia_kernels.decoding.cuda_graphs import GraphedSteps
from sequoia_kernels.decoding.draft import TokenBuffers, grow_tree
from sequoia_kernels.decoding.layout import TreeLayout
from sequoia_kernels.decoding.prefill import prefill_draft, prefill_prompts
from sequoia_kernels.decoding.state import DecodingState
from sequoia_kernels.decoding.stats import StageClock
from sequoia_kernels.decoding.verify import verify_tokens
from sequoia_kernels.guard import guarded, release_if_owned
from sequoia_kernels.models import TreeModel
from sequoia_kernels.ops import CacheTable
from sequoia_kernels.tree import TokenTree

__all__ = ["DecodingEngine", "borrow_engine", "release_engines", "return_engine", "steps_ahead"]

logger = logging.getLogger("sequoia_kernels")

Result = TypeVar("Result")

KEPT_ENGINES = 2  # for each target: say, one that speculates and one that does not
SMALLEST_BUCKET = 512  # rows


class DecodingEngine:
    """Two models, their caches and the state of one batch; `step` is one speculative step on static buffers."""

    def __init__(
        self,
        target: TreeModel,
        draft: TreeModel | None,
        state: DecodingState,
        max_cache_len: int,
        backend: str = "auto",
        clock: StageClock | None = None,
        cuda_graphs: bool = True,
        draft_cache_len: int | None = None,
    ) -> None:
        batch_size = state.cache_lens.shape[0]
        self.target, self.draft, self.state, self.backend = target, draft, state, backend
        self.key: _Key | None = None  # where it may be kept for later batches
        self.clock = clock or StageClock(enabled=False)
        self.target_cache = target.new_cache(batch_size, max_cache_len, beyond_positions=True)
        self.draft_cache = None
        if draft is not None:
            rows = draft_cache_len or max_cache_len
            self.draft_cache = draft.new_cache(batch_size, rows, beyond_positions=True)
        target_tensors = self.target_cache.tensors()
        draft_tensors = [] if self.draft_cache is None else self.draft_cache.tensors()
        self._tensors = target_tensors + draft_tensors
        if draft_tensors and state.has_own_draft_lens:
            parts = [(target_tensors, state.cache_lens), (draft_tensors, state.draft_lens)]
        else:
            parts = [(self._tensors, state.cache_lens)]
        self.cache_tables = [(CacheTable.by_device(tensors), cache_lens) for tensors, cache_lens in parts]
        self._prepared: dict[TokenTree, tuple[TreeLayout, TokenBuffers]] = {}
        self._graphed: GraphedSteps | None = None
        self._graphed_draft: GraphedSteps | None = None
        self._out_of_memory = False  # for graphs of further trees
        if cuda_graphs and can_capture(target, draft):
            self._graphed = GraphedSteps(_weakly(self._run_step), state)
        elif cuda_graphs and draft is not None and can_capture(draft, None):
            # The target's part of a step is launched layer by layer; the draft's many forwards still are one graph.
            self._graphed_draft = GraphedSteps(_weakly(self._grow), state)
            _log_once(target)

    def prefill(
        self, prompts: torch.Tensor, prompt_lens: torch.Tensor, draft_tokens: Sequence[list[int]] | None = None
    ) -> torch.Tensor:
        """Commit the prompts and return each request's first token. [B] int64.

        The draft is given `draft_tokens` where it cannot hold every prompt.
        """
        with self.clock.stage("prefill"):
            first_tokens = prefill_prompts(
                self.target, self.target_cache, prompts, prompt_lens, self.state, self.backend
            )
            if self.draft is not None and self.draft_cache is not None:
                lanes = list(range(len(prompts)))
                if draft_tokens is not None:
                    self._prefill_draft(lanes, draft_tokens)
                else:
                    prefill_draft(self.draft, self.draft_cache, lanes, prompts, prompt_lens, self.state)
            return first_tokens

    def restart_draft(self, lanes: list[int], tokens: Sequence[list[int]]) -> None:
        """Let the draft's context of some requests consist of these tokens, the last ones that were committed."""
        with self.clock.stage("draft"):
            self._prefill_draft(lanes, tokens)

    def _prefill_draft(self, lanes: list[int], tokens: Sequence[list[int]]) -> None:
        assert self.draft is not None and self.draft_cache is not None  # whoever has tokens for a draft has a draft
        rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)
        lens = torch.tensor([len(row) for row in tokens], dtype=torch.int32)
        device = self.draft.device
        prefill_draft(self.draft, self.draft_cache, lanes, rows.to(device), lens.to(device), self.state)

    def prepare(self, tree: TokenTree) -> None:
        """Allocate and, on CUDA, capture a tree's step now, so that its first one does not have to."""
        self._prepare(tree)
        self._capture(tree)

    def step(self, tree: TokenTree) -> EmittedTokens:
        """Draft a tree, verify it, commit the accepted path: as a replayed graph on CUDA."""
        self._prepare(tree)  # allocates, so it must not be captured
        self._capture(tree)
        return self._graphed.step(tree) if self._graphed is not None else self._run_step(tree)

    def _capture(self, tree: TokenTree) -> None:
        """Capture a tree's step; where the target is what cannot be captured, the draft's part of it."""
        if self._out_of_memory:
            return
        try:
            for graphed in (self._graphed, self._graphed_draft):
                if graphed is not None:
                    graphed.capture(tree)
        except CaptureError as error:
            if not error.lasting:
                self._out_of_memory = True
                logger.warning("further trees of this call are not captured but launched kernel by kernel: %s", error)
            elif self._graphed is None:
                self._graphed_draft = None
                refuse(self.draft, error)
            else:  # one of the two models: the draft, if its part alone cannot be captured either
                self._graphed = None
                if self.draft is not None:
                    self._graphed_draft = GraphedSteps(_weakly(self._grow), self.state)
                    self._capture(tree)
                if self.draft is None or (self._graphed_draft is not None and self._graphed_draft.num_captured):
                    refuse(self.target, error)

    def _run_step(self, tree: TokenTree) -> EmittedTokens:
        layout, buffers = self._prepare(tree)
        if self._graphed_draft is not None:
            self._graphed_draft.step(tree)
        else:
            self._grow(tree)
        path = verify_tokens(self.target, self.target_cache, layout, self.state, buffers, self.clock, self.backend)
        return commit_path(path, layout, self.state, buffers, self.cache_tables, self.clock, self.backend)

    def _grow(self, tree: TokenTree) -> None:
        """The draft's part of a step: fill the buffers with the tree's tokens."""
        layout, buffers = self._prepare(tree)
        if self.draft is not None and self.draft_cache is not None:
            grow_tree(self.draft, self.draft_cache, layout, self.state, buffers, self.clock, self.backend)
        else:
            buffers.tokens[:, 0].copy_(self.state.root_tokens)

    def end_request(self, index: int) -> None:
        """Stop committing for a request; its lane goes on with caches of one row."""
        self.state.active[index] = 0
        self.state.cache_lens[index] = 1
        self.state.draft_lens[index] = 1

    def restart(self, state: DecodingState) -> None:
        """Begin another batch of the same shape: take over its state's values and forget the old rows."""
        self.state.copy_(state)
        self._out_of_memory = False
        for tensor in self._tensors:  # a masked row counts with weight 0, and 0 times a left-over inf is NaN
            tensor.zero_()

    def _prepare(self, tree: TokenTree) -> tuple[TreeLayout, TokenBuffers]:
        if tree not in self._prepared:
            layout = TreeLayout.build(tree, self.target.device)
            batch_size = self.state.cache_lens.shape[0]
            self._prepared[tree] = layout, TokenBuffers.allocate(layout, batch_size, self.target, self.draft)
        return self._prepared[tree]


def can_capture(target: TreeModel, draft: TreeModel | None) -> bool:
    """Tell whether a step of these models may become a CUDA graph."""
    return target.device.type == "cuda" and not any(refused(model) for model in (target, draft) if model is not None)


def steps_ahead(target: TreeModel) -> int:
    """How many steps the host launches before it reads the tokens of one.

    On an asynchronous device one, so that it never idles. But none with a target that streams its layers: beside such a
    pass reading costs nothing, and the pass launched behind the last token would be for nothing.
    """
    return 1 if target.device.type == "cuda" and target.capturable else 0


def _weakly(method: Callable[[TokenTree], Any]) -> Callable[[TokenTree], Any]:
    """Call a method of an object that is not kept alive by it.

    An engine owns what calls it; as a cycle it would hold its caches until the garbage collector comes by.
    """
    weak = WeakMethod(method)

    def call(tree: TokenTree) -> Any:
        bound = weak()
        assert bound is not None  # the caller is part of the engine
        return bound(tree)

    return call


_logged: WeakSet[TreeModel] = WeakSet()


def _log_once(target: TreeModel) -> None:
    if target not in _logged:
        _logged.add(target)
        logger.info("CUDA graphs hold the draft's part of a step only: %r cannot be captured", target)


class _Key(NamedTuple):
    """What an engine's buffers and graphs depend on."""

    batch_size: int
    max_cache_len: int
    draft_cache_len: int | None  # where the draft has lengths of its own
    backend: str
    filters: tuple[bool, bool]  # whether the state has a top_k and a top_p
    weights: tuple[int, ...]  # where the models' weights lie: graphs read them there
    forwards: tuple[
        Any, ...
    ]  # what the models' forwards do: their modules, settings, adapters, hooks; how they compile


class _Kept(NamedTuple):
    draft: ref[Any] | None
    engine: DecodingEngine


# Engines without their models, so that they do not keep these alive: the most recently used one last.
_kept: WeakKeyDictionary[Any, OrderedDict[_Key, _Kept]] = WeakKeyDictionary()
_lock = threading.RLock()


def _locked(work: Callable[[], Result]) -> Result:
    return guarded(_lock.acquire, work, lambda: release_if_owned(_lock))


def borrow_engine(
    target: TreeModel,
    draft: TreeModel | None,
    state: DecodingState,
    max_cache_len: int,
    *,
    limit: int | None,
    backend: str,
    clock: StageClock,
    cuda_graphs: bool,
    draft_cache_len: int | None = None,
) -> DecodingEngine:
    """Give an engine for a batch: where steps are captured one that was used before, with its graphs, if it fits.

    Args:
        target: the target.
        draft: the draft, or None.
        state: the batch's state; the engine's own state takes over its values.
        max_cache_len: rows that the caches need.
        limit: rows that the caches need at most, whatever the length of the requests; None without a limit.
        backend: backend of the ops.
        clock: adds up the times of this batch.
        cuda_graphs: whether steps are captured.
        draft_cache_len: rows that the draft's cache needs, where the draft has lengths of its own in the state.

    Returns:
        The engine. Where steps are captured or compiled its caches may be longer than asked for: lengths are rounded up
        to buckets, so that batches of about the same length share what was made for them.
    """
    captures = cuda_graphs and can_capture(target, draft)
    static = captures or any(model is not None and model.compile_mode for model in (target, draft))
    rows = cache_bucket(max_cache_len, limit) if static else max_cache_len
    draft_rows = cache_bucket(draft_cache_len, None) if static and draft_cache_len is not None else draft_cache_len
    if not captures:
        return DecodingEngine(target, draft, state, rows, backend, clock, cuda_graphs, draft_rows)
    key = _key(target, draft, state, rows, draft_rows, backend)
    entry = _locked(lambda: _kept.get(target.model, OrderedDict()).pop(key, None))
    if entry is None or (entry.draft() if entry.draft is not None else None) is not getattr(draft, "model", None):
        engine = DecodingEngine(target, draft, state, rows, backend, clock, cuda_graphs, draft_rows)
        engine.key = key  # of now: what changes while it runs is not in its graphs
        return engine
    engine = entry.engine
    engine.target, engine.draft, engine.clock = target, draft, clock
    engine.restart(state)
    return engine


def return_engine(engine: DecodingEngine) -> None:
    """Keep an engine for the next batch of its shapes, where its captured steps are worth it.

    The two most recently used engines of a target stay, until the target itself goes or `release_engines` is called.
    """
    target, draft, key = engine.target, engine.draft, engine.key
    if key is None or engine._graphed is None or not engine._graphed.num_captured:
        return
    engine.target = engine.draft = None  # type: ignore[assignment]  # set again when it is borrowed
    engine.clock = StageClock(enabled=False)

    def keep() -> None:
        kept = _kept.setdefault(target.model, OrderedDict())
        kept[key] = _Kept(None if draft is None else ref(draft.model), engine)
        while len(kept) > KEPT_ENGINES:
            kept.popitem(last=False)

    _locked(keep)


def release_engines() -> None:
    """Free the caches and CUDA graphs that `generate` keeps on the GPU for its next call.

    Models that could not be captured are tried again by their next call.

    Example:
        >>> release_engines()
    """
    forget_refusals()
    _locked(_kept.clear)


def cache_bucket(rows: int, limit: int | None) -> int:
    """Round a cache length up, by at most a quarter above the smallest bucket, within the limit."""
    bucket = SMALLEST_BUCKET
    if rows > bucket:
        unit = 1 << (rows.bit_length() - 3)
        bucket = -(-rows // unit) * unit
    return bucket if limit is None else max(rows, min(bucket, limit))


def _key(
    target: TreeModel,
    draft: TreeModel | None,
    state: DecodingState,
    rows: int,
    draft_rows: int | None,
    backend: str,
) -> _Key:
    models = [model for model in (target, draft) if model is not None]
    return _Key(
        state.cache_lens.shape[0],
        rows,
        draft_rows,
        backend,
        (state.top_k is not None, state.top_p is not None),
        tuple(tensor.data_ptr() for model in models for tensor in model.weights()),
        tuple((model.compile_mode, model.forward_state()) for model in models),
    )
