"""Captured steps, and the engines that stay behind with them for the next batch of the same shapes."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakSet, ref

import torch

from sequoia_kernels.cuda_graphs import Captured, CaptureError, capture, forget_refusals, refuse, refused
from sequoia_kernels.decoding.arguments import GenerationArguments
from sequoia_kernels.decoding.step import DecodingStep, EmittedTokens
from sequoia_kernels.drafts import DecodingState, DraftSource, StageClock, StepTree
from sequoia_kernels.guard import guarded, release_if_owned
from sequoia_kernels.models import TreeModel

__all__ = ["DecodingEngine", "borrow_engine", "let_go", "release_engines", "return_engine", "steps_ahead"]

logger = logging.getLogger("sequoia_kernels")

Result = TypeVar("Result")

KEPT_ENGINES = 2  # for each target: say, one that speculates and one that does not
SMALLEST_BUCKET = 512  # rows

_logged: WeakSet[TreeModel] = WeakSet()  # targets that were said to be left out of graphs


class DecodingEngine:
    """Steps of one batch: on CUDA captured once a tree and replayed, elsewhere run as they are.

    Args:
        eager: the step as it is, with the models, caches and state.
        cuda_graphs: whether steps are captured.

    Attributes:
        key: what its buffers and graphs depend on, where it may be kept for later batches.
    """

    def __init__(self, eager: DecodingStep, cuda_graphs: bool = True) -> None:
        self.eager = eager
        target, draft, state = eager.target, eager.draft, eager.state
        self.key: Hashable | None = None
        self._graphed: GraphedSteps | None = None
        self._graphed_draft: GraphedSteps | None = None
        self._out_of_memory = False  # for graphs of further trees
        hooks_draft = getattr(eager.logits_hook, "hooks_draft", False)
        if cuda_graphs and can_capture(target, draft) and not is_looked_at(eager):
            self._graphed = GraphedSteps(self.eager.run, state)
        elif cuda_graphs and draft is not None and can_capture(draft, None) and not hooks_draft:
            # The target's part of a step is launched layer by layer; the draft's many forwards still are one graph.
            self._graphed_draft = GraphedSteps(self.eager.draft_tokens, state)
            if target not in _logged:
                _logged.add(target)
                logger.info("CUDA graphs hold the draft's part of a step only: %r cannot be captured", target)

    def prepare(self, tree: StepTree) -> None:
        """Allocate and, on CUDA, capture a tree's step, so that its first one does not have to."""
        self.eager.prepare(tree)  # allocates, so it must not be captured
        self._capture(tree)

    def step(self, tree: StepTree) -> EmittedTokens:
        """Draft a tree, verify it, commit the accepted path: as a replayed graph on CUDA."""
        self.prepare(tree)
        if self._graphed is not None:
            return self._graphed.step(tree)
        return self.eager.run(tree, None if self._graphed_draft is None else self._graphed_draft.step)

    def _capture(self, tree: StepTree) -> None:
        """Capture a tree's step; where the target is what cannot be captured, the draft's part of it."""
        if self._out_of_memory:
            return
        target, draft = self.eager.target, self.eager.draft
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
                assert draft is not None  # whose part it was
                for model in draft.models:
                    refuse(model, error)
                if not draft.models:
                    logger.warning("CUDA-graph capture is off for %r in this call: %s", draft, error)
            else:  # one of the two models: the draft, if its part alone cannot be captured either
                self._graphed = None
                if draft is not None:
                    self._graphed_draft = GraphedSteps(self.eager.draft_tokens, self.eager.state)
                    self._capture(tree)
                if draft is None or (self._graphed_draft is not None and self._graphed_draft.num_captured):
                    refuse(target, error)

    def restart(self, state: DecodingState) -> None:
        """Begin another batch of the same shape."""
        self.eager.restart(state)
        self._out_of_memory = False


class GraphedSteps:
    """Captures `run_step(tree)`, a step or a part of one, once for every tree and replays it; runs others as they are.

    The captured step reads and advances the state in place and works on buffers that live as long as the engine, so a
    replay needs no inputs. Lengths are read on the device and grids follow from shapes, so one graph serves every
    context length.
    """

    def __init__(self, run_step: Callable[[StepTree], Any], state: DecodingState) -> None:
        self.run_step = run_step
        self.state = state
        self._captured: dict[StepTree, Captured] = {}
        self._memory = torch.cuda.graph_pool_handle() if state.cache_lens.is_cuda else None

    def step(self, tree: StepTree) -> Any:
        """Run one step. The returned tensors of a captured one are overwritten by the next step of the same tree."""
        captured = self._captured.get(tree)
        if captured is None:
            return self.run_step(tree)
        captured.graph.replay()
        return captured.result

    @property
    def num_captured(self) -> int:
        """Trees whose step is captured."""
        return len(self._captured)

    def capture(self, tree: StepTree) -> None:
        """Capture a tree's step, unless that is done, or raise CaptureError. The state is as before afterwards."""
        if tree in self._captured:
            return
        advanced = self.state.advancing()
        before = [tensor.clone() for tensor in advanced]

        def restore() -> None:  # what else a step writes lies behind the committed rows
            for tensor, value in zip(advanced, before, strict=True):
                tensor.copy_(value)

        self._captured[tree] = capture(
            lambda: self.run_step(tree), self.state.cache_lens.device, memory=self._memory, undo=restore
        )


def can_capture(target: TreeModel | DraftSource, draft: DraftSource | None) -> bool:
    """Tell whether a step of these two, or the part of one of them alone, may become a CUDA graph."""
    is_capturable = target.capturable and (draft is None or draft.capturable)
    return target.device.type == "cuda" and is_capturable and not any(map(refused, _models(target, draft)))


def is_looked_at(step: DecodingStep | GenerationArguments) -> bool:
    """Tell whether a step's logits are seen by code on the host, or leave it as rows: then it is not captured."""
    return step.logits_hook is not None or step.observer is not None or not step.keeps.isdisjoint({"logits", "scores"})


def steps_ahead(target: TreeModel) -> int:
    """How many steps the host launches before it reads the tokens of one.

    On an asynchronous device one, so that it never idles. But none with a target that streams its layers: beside such a
    pass reading costs nothing, and the pass launched behind the last token would be for nothing.
    """
    return 1 if target.device.type == "cuda" and target.capturable else 0


class _Kept(NamedTuple):
    draft: ref[Any] | None
    engine: DecodingEngine


# Engines without their models, so that they do not keep these alive: the most recently used one last.
_kept: WeakKeyDictionary[Any, OrderedDict[Hashable, _Kept]] = WeakKeyDictionary()
_lock = threading.RLock()


def _locked(work: Callable[[], Result]) -> Result:
    return guarded(_lock.acquire, work, lambda: release_if_owned(_lock))


def borrow_engine(
    target: TreeModel, draft: DraftSource | None, state: DecodingState, arguments: GenerationArguments, room: int,
    clock: StageClock, draft_positions: int | None = None,
) -> DecodingEngine:  # fmt: skip
    """Give an engine for a batch: where steps are captured one that was used before, with its graphs, if it fits.

    Args:
        target: the target.
        draft: the draft, or None.
        state: the batch's state; the engine's own state takes over its values.
        arguments: how the batch is decoded.
        room: rows of the caches behind the committed tokens.
        clock: adds up the times of this batch.
        draft_positions: tokens that the draft sees at most, where it has lengths of its own in the state.

    Returns:
        The engine. Where steps are captured or compiled its caches may be longer than asked for: lengths are rounded up
        to buckets, so that batches of about the same length share what was made for them.
    """
    captures = arguments.cuda_graphs and can_capture(target, draft) and not is_looked_at(arguments)
    rows = arguments.longest + room
    draft_rows = None if draft_positions is None else draft_positions + room
    if captures or any(model.compile_mode for model in _models(target, draft)):
        rows = cache_bucket(rows, None if arguments.max_cache_len is None else arguments.max_cache_len + room)
        draft_rows = None if draft_rows is None else cache_bucket(draft_rows, None)

    def make() -> DecodingEngine:
        eager = DecodingStep(
            target, draft, state, rows, draft_cache_len=draft_rows, rule=arguments.rule,
            logits_hook=arguments.logits_hook, observer=arguments.observer, shorten=arguments.shorten,
            keeps=arguments.keeps, backend=arguments.backend, clock=clock,
        )  # fmt: skip
        return DecodingEngine(eager, arguments.cuda_graphs)

    if not captures:
        return make()
    key = _key(target, draft, state, rows, draft_rows, arguments)
    entry = _locked(lambda: _kept.get(target.model, OrderedDict()).pop(key, None))
    owner = None if draft is None else draft.owner
    if entry is None or (entry.draft() if entry.draft is not None else None) is not owner:
        engine = make()
        engine.key = key  # of now: what changes while it runs is not in its graphs
        return engine
    engine = entry.engine
    engine.eager.use(target, draft, clock)
    engine.restart(state)
    return engine


def return_engine(engine: DecodingEngine) -> None:
    """Keep an engine for the next batch of its shapes, where its captured steps are worth it.

    The two most recently used engines of a target stay, until the target itself goes or `release_engines` is called.
    """
    target, draft, key = engine.eager.target, engine.eager.draft, engine.key
    if key is None or engine._graphed is None or not engine._graphed.num_captured:
        return
    engine.eager.use(None, None, StageClock(enabled=False))

    def keep() -> None:
        kept = _kept.setdefault(target.model, OrderedDict())
        kept[key] = _Kept(None if draft is None else ref(draft.owner), engine)
        while len(kept) > KEPT_ENGINES:
            kept.popitem(last=False)

    _locked(keep)


def let_go(target: TreeModel, draft: DraftSource | None) -> None:
    """Hold no weights of the models that a step ran, however it ended: they may be moved or cast next."""
    for model in _models(target, draft):
        model.let_go()


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


def _models(*parts: TreeModel | DraftSource | None) -> list[TreeModel]:
    """The models that a step runs."""
    of_parts = [part.models if isinstance(part, DraftSource) else (part,) for part in parts if part is not None]
    return [model for models in of_parts for model in models]


def _key(
    target: TreeModel, draft: DraftSource | None, state: DecodingState, rows: int, draft_rows: int | None,
    arguments: GenerationArguments,
) -> Hashable:  # fmt: skip
    """What an engine's buffers and graphs depend on."""
    models = _models(target, draft)
    for model in models:
        model.settle()
    # What the draft says of its buffers and graphs, and whose they are.
    source = None if draft is None else (
        type(draft), id(draft.owner), draft.vocab_size, draft.logits_dtype, tuple(draft.needs), draft.positions,
        draft.graph_key, None if draft.vocabulary is None else draft.vocabulary.target_to_draft.data_ptr(),
        draft.proposes,
    )  # fmt: skip
    return (
        state.cache_lens.shape[0], rows, draft_rows, arguments.backend, arguments.rule, arguments.keeps,
        state.top_k is not None, state.top_p is not None,
        tuple(tensor.data_ptr() for model in models for tensor in model.weights()),  # graphs read them there
        tuple((model.compile_mode, model.forward_state()) for model in models),  # what their forwards do
        source,
    )  # fmt: skip
