"""The decoding loop: prefill, then steps until every request has ended."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from sequoia_kernels.cuda_graphs import on_device
from sequoia_kernels.decoding.arguments import GenerationArguments
from sequoia_kernels.decoding.draft_context import DraftContext
from sequoia_kernels.decoding.engine import DecodingEngine, borrow_engine, let_go, return_engine, steps_ahead
from sequoia_kernels.decoding.lookup import LookupSteps
from sequoia_kernels.decoding.request import EmittedRows, Request, StoppingCriteria
from sequoia_kernels.decoding.stats import GenerateStats
from sequoia_kernels.decoding.step import EmittedTokens
from sequoia_kernels.decoding.streaming import BatchStreamer
from sequoia_kernels.drafts import DecodingState, DraftSource, LookupDrafting, StageClock, StepTree, each_tree
from sequoia_kernels.models import TreeModel
from sequoia_kernels.planner import LookupCosts, TreeFollower
from sequoia_kernels.tree import LookupTree, MergedTree, TokenTree

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def on_target_device(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function whose first argument is the target run with the target's device as the current one."""

    @functools.wraps(function)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = getattr(args[0] if args else kwargs.get("target"), "device", None)
        with on_device(device) if isinstance(device, torch.device) else contextlib.nullcontext():
            return function(*args, **kwargs)

    return guarded


class Decoded(NamedTuple):
    """What `decode` returns: the requests with their tokens, and counts and times of the steps."""

    requests: list[Request]
    stats: GenerateStats


@on_target_device
@torch.inference_mode()
def decode(
    target: TreeModel, draft: DraftSource | None, tree: StepTree | TreeFollower, arguments: GenerationArguments,
    lookup: LookupCosts | None = None,
) -> Decoded:  # fmt: skip
    """Decode a batch of requests to their ends.

    Args:
        target: the target.
        draft: what proposes tokens; None decodes one token a step, as a tree of one node does.
        tree: the tree, one for each request, or what chooses one for every step.
        arguments: the requests, and how they are decoded.
        lookup: what steps take with proposals from the requests' own texts, of a draft that has some.

    Returns:
        The requests and statistics, all but the wall time of the whole call.
    """
    try:
        return _decode(target, draft, tree, arguments, lookup)
    finally:
        let_go(target, draft)


def _decode(
    target: TreeModel, draft: DraftSource | None, tree: StepTree | TreeFollower, arguments: GenerationArguments,
    lookup: LookupCosts | None,
) -> Decoded:  # fmt: skip
    if draft is None:
        tree = TokenTree.single()
    step_trees: Sequence[StepTree] = tree.plan.trees if isinstance(tree, TreeFollower) else [tree]
    trees = [entry for step_tree in step_trees for entry in each_tree(step_tree)]
    if lookup is not None:
        rows = target.max_cache_rows(arguments.batch_size)
        lookup = lookup if rows is None else lookup.within(rows - arguments.longest)
        trees.extend(lookup.trees)
    if all(entry.num_nodes == 1 for entry in trees):
        draft = None
    device = target.device
    clock = StageClock(enabled=device.type == "cpu")
    # A hook follows the text, which must not go on behind the end of a request; it waits for the device anyway. What is
    # looked up is what the newest tokens are.
    lag = steps_ahead(target) if arguments.logits_hook is None and lookup is None else 0
    num_levels = max(entry.num_levels for entry in trees)
    # Behind a request's last token there is room for one whole tree, for what the last step accepts beyond the end, and
    # for the step that an asynchronous device may already be running then. So no tree ever has to shrink.
    room = max(entry.num_nodes for entry in trees) + 2 * num_levels
    context = None if draft is None else DraftContext.where_needed(draft, arguments, num_levels, lag)
    state = DecodingState.create(
        arguments.batch_size, device, seeds=arguments.seeds, temperature=arguments.temperature,
        top_k=arguments.top_k, top_p=arguments.top_p, own_draft_lens=context is not None,
    )  # fmt: skip
    draft_positions = None if context is None else context.positions
    engine = borrow_engine(target, draft, state, arguments, room, clock, draft_positions)
    loop = DecodingLoop(engine, arguments, context, lag)
    if lookup is not None and draft is not None:
        assert isinstance(engine.eager.drafting, LookupDrafting)
        loop.lookup = LookupSteps(engine.eager.drafting, [request.prompt for request in loop.requests], lookup)
    if loop.streamer is not None:
        prompts = [row[:length] for row, length in zip(arguments.prompts, arguments.prompt_lens, strict=True)]
        loop.streamer.begin(arguments.input_ids, prompts)
    first_tokens = engine.eager.prefill(
        arguments.prompts.to(device),
        torch.tensor(arguments.prompt_lens, dtype=torch.int32, device=device),
        None if context is None else [context.tokens(index, request) for index, request in enumerate(loop.requests)],
    )
    for step_tree in step_trees:
        engine.prepare(step_tree)
    started = time.perf_counter()
    loop.run(first_tokens, tree)
    stats = loop.stats
    stats.decode_seconds = time.perf_counter() - started
    stats.new_tokens = [len(request.new_tokens) for request in loop.requests]
    stats.stage_seconds = dict(clock.seconds)
    stats.draft_restarts = 0 if context is None else context.num_restarts
    if loop.lookup is not None:
        stats.lookup_steps, stats.copied_tokens = loop.lookup.num_proposed, loop.lookup.num_copied
    return_engine(engine)
    return Decoded(loop.requests, stats)


class HostCopy:
    """Copies a step's emitted tokens to the host without waiting; `read` waits for that copy, not for later work.

    Rows of logits stay on the device: steps that leave some are not captured, so nothing overwrites them.
    """

    def __init__(self, emitted: EmittedTokens) -> None:
        self._event: torch.cuda.Event | None = None
        self._rows = emitted.logits, emitted.scores
        copied = [emitted.tokens, emitted.nodes, emitted.num_tokens]
        if emitted.logprobs is not None:
            copied.append(emitted.logprobs)
        self._tensors = copied
        self._lists: list[Any] = []
        if emitted.tokens.device.type != "cuda":  # nothing to wait for, and the next step may overwrite them
            self._lists = [tensor.tolist() for tensor in copied]
            return
        with on_device(emitted.tokens.device):  # whose stream the copies and the event go to
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in copied]
            for host, device in zip(self._tensors, copied, strict=True):
                host.copy_(device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Return (tokens [B][levels], nodes [B][levels], num_tokens [B])."""
        if self._event is not None:
            self._event.synchronize()
        self._lists = self._lists or [tensor.tolist() for tensor in self._tensors]
        tokens, nodes, num_tokens = self._lists[:3]
        return tokens, nodes, num_tokens

    def rows(self, index: int) -> EmittedRows | None:
        """What a request's tokens were decided from, behind `read`; None where nothing of it was asked for."""
        logits, scores = (None if part is None else list(part[index]) for part in self._rows)
        logprobs = self._lists[3][index] if len(self._lists) > 3 else None
        return None if logprobs is logits is scores is None else EmittedRows(logprobs, logits, scores)


class _Launched(NamedTuple):
    tree: StepTree
    active: list[bool]  # which requests were active when the step was launched
    emitted: HostCopy


class DecodingLoop:
    """Steps of an engine whose prompts are committed, until every request has ended.

    Args:
        engine: the engine.
        arguments: its requests, and how they are decoded.
        context: keeps the draft within its positions; None where it needs no care.
        lag: steps that are launched before the tokens of one are read. On an asynchronous device the host reads a
            step's tokens while the next one runs.

    Attributes:
        requests: the requests with the tokens that were read so far.
        stats: what was counted so far.
    """

    def __init__(
        self, engine: DecodingEngine, arguments: GenerationArguments, context: DraftContext | None, lag: int
    ) -> None:
        self.engine, self.context, self.lag = engine, context, lag
        self.streamer: BatchStreamer | None = None
        if arguments.streamer is not None:
            self.streamer = BatchStreamer(arguments.streamer, arguments.batch_size, arguments.pad_token_id)
        criteria: list[StoppingCriteria | None] = [None] * arguments.batch_size
        if arguments.stopping_criteria:
            shown = arguments.padded_prompts
            criteria = [StoppingCriteria(arguments.stopping_criteria, prompt) for prompt in shown]
        keeps = {name.removeprefix("processed_") for name in arguments.keeps}
        self.requests = [
            Request(
                prompt[:length], arguments.max_new_tokens, arguments.max_cache_len, arguments.eos_token_ids,
                arguments.stop_strings, ends, arguments.deadline, keeps,
            )
            for prompt, length, ends in zip(arguments.prompts.tolist(), arguments.prompt_lens, criteria, strict=True)
        ]  # fmt: skip
        num_requests = arguments.batch_size
        self.stats = GenerateStats(request_steps=[0] * num_requests, last_nodes=[[] for _ in range(num_requests)])
        self.follower: TreeFollower | None = None
        self.lookup: LookupSteps | None = None
        self.in_flight: deque[_Launched] = deque()  # oldest first

    def run(self, first_tokens: EmittedTokens, tree: StepTree | TreeFollower) -> None:
        """Take the prefill's tokens and decode behind them; arguments as in `decode`."""
        self.follower = tree if isinstance(tree, TreeFollower) else None
        step_tree: StepTree = tree.tree if isinstance(tree, TreeFollower) else tree
        self.stats.tree = None if isinstance(step_tree, tuple) else step_tree
        first = HostCopy(first_tokens)
        for index, tokens in enumerate(first.read()[0]):
            self._take(index, tokens, first)
            if self.lookup is not None:
                self.lookup.take(index, tokens)
        while any(request.is_active for request in self.requests):
            if self.follower is not None:
                self.stats.tree = step_tree = self.follower.tree
            # With lookup a step's rows are moved in the draft's cache, too, whatever the tree of the draft.
            may_draft = each_tree(step_tree)[0].num_nodes > 1 or self.lookup is not None
            if may_draft and self._restart_drafts():
                continue  # what was in flight may have ended the last request, or changed the tree
            self._launch(step_tree if self.lookup is None else self.lookup.tree(step_tree, self.requests))
            self._read(self.lag)
        self._read(0)
        if self.streamer is not None:
            self.streamer.end()

    def _launch(self, tree: StepTree) -> None:
        active = [request.is_active for request in self.requests]
        self.in_flight.append(_Launched(tree, active, HostCopy(self.engine.step(tree))))
        self.stats.num_steps += 1
        for entry in dict.fromkeys(each_tree(tree)):
            self.stats.steps_by_tree[entry] = self.stats.steps_by_tree.get(entry, 0) + 1

    def _read(self, num_left: int) -> None:
        """Bring the tokens of all steps but the newest to the host: the only place where the loop waits."""
        while len(self.in_flight) > num_left:
            with self.engine.eager.clock.stage("host"):
                self._read_step(self.in_flight.popleft())

    def _read_step(self, launched: _Launched) -> None:
        tokens, nodes, num_tokens = launched.emitted.read()
        step = self.stats.num_steps - 1 - len(self.in_flight)
        trees = each_tree(launched.tree)
        counts = []
        for index, was_active in enumerate(launched.active):
            if was_active and self.requests[index].is_active:
                self.stats.request_steps[index] += 1
                counts.append(self.stats.count_path(trees[index % len(trees)], nodes[index], num_tokens[index]))
                emitted = tokens[index][: num_tokens[index]]
                num_taken = self._take(index, emitted, launched.emitted)
                if self.lookup is not None:
                    path = nodes[index][1 : num_tokens[index]]
                    self.lookup.take(index, emitted, launched.tree, path, num_taken)
                self.stats.last_nodes[index].append(nodes[index][num_tokens[index] - 1])
                if self.context is not None:
                    self.context.note(index, self.requests[index], step)
        if self.follower is not None and counts and not isinstance(trees[0], (LookupTree, MergedTree)):
            ranks = ([sum(rank) for rank in zip_longest(*lists, fillvalue=0)] for lists in zip(*counts))
            self.follower.observe(*ranks)

    def _take(self, index: int, tokens: list[int], emitted: HostCopy) -> int:
        request = self.requests[index]
        taken = request.extend(tokens, emitted.rows(index))
        if self.streamer is not None:
            self.streamer.take(index, taken, not request.is_active)
        if not request.is_active:
            self.engine.eager.end_request(index)
        return len(taken)

    def _restart_drafts(self) -> bool:
        """Restart the draft's contexts that are due before the next step. Returns whether there were any."""
        due = [] if self.context is None else self.context.due(self.requests, self.stats.num_steps)
        if self.context is None or not due:
            return False
        self._read(0)  # their newest tokens
        due = [index for index in due if self.requests[index].is_active]
        if due:
            if self.lookup is not None:
                self.lookup.forget(due)
            self.engine.eager.restart_draft(due, [self.context.tokens(index, self.requests[index]) for index in due])
        return True
