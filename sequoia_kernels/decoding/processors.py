"""transformers' logits processors on a tree: each node's logits, processed behind that node's own tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers

from sequoia_kernels.decoding.dead_ends import DeadEnds
from sequoia_kernels.decoding.logits_hook import LogitsHook, NodePaths
from sequoia_kernels.tree import Topology

__all__ = ["ChainedHooks", "ProcessorHook", "check_processors", "takes_any_rows"]

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Processors of transformers' that look at each row for itself: they take any number of rows in one call. Compared by
# the very class, since a class derived from one may do anything.
ROW_WISE = (
    "EpsilonLogitsWarper", "EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper", "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper",
    "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper", "WatermarkLogitsProcessor",
)  # fmt: skip

# What gives scores by more than input_ids and scores, so that the nodes of a tree cannot have theirs.
REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale runs the target a second time for every token",
    "ClassifierFreeGuidanceLogitsProcessor": "it wants each request twice in the batch",
    "SynthIDTextWatermarkLogitsProcessor": "it counts its calls; other watermarks are taken",
}


@functools.cache
def _row_wise_classes() -> frozenset[type]:
    """Those of the installed transformers; the oldest supported one may lack some."""
    logits_process = transformers.generation.logits_process
    return frozenset(getattr(logits_process, name) for name in ROW_WISE if hasattr(logits_process, name))


def takes_any_rows(processor: Any) -> bool:
    """Tell whether a processor may be given rows that are not the requests of the batch, one by one."""
    if isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor):  # one entry a request
        return False
    return type(processor) in _row_wise_classes()


def check_processors(processors: Any) -> list[Processor]:
    """Check what a caller gives as `logits_processor`.

    Raises:
        TypeError: it is not a list, or holds something that cannot be called.
        ValueError: it holds a processor that trees cannot have.
    """
    if not isinstance(processors, Sequence) or isinstance(processors, (str, bytes)):
        name = type(processors).__name__
        raise TypeError(f"generate: logits_processor must be a list of logits processors, got {name}")
    for processor in processors:
        if not callable(processor):
            name = type(processor).__name__
            raise TypeError(f"generate: logits_processor must hold what is called with (input_ids, scores), got {name}")
        reason = REFUSED.get(type(processor).__name__)
        if reason is not None:
            raise ValueError(
                f"generate: logits_processor must depend on input_ids and scores alone, got "
                f"{type(processor).__name__}: {reason}"
            )
    return list(processors)


class _Row(NamedTuple):
    """A row of logits that decides something."""

    request: int
    place: int  # in the request's rows
    num_new: int  # new tokens of the request before it
    path: list[int]  # the newest of them: from the root of the tree on
    input_ids: torch.Tensor  # all tokens before it. [length] int64


class ChainedHooks:
    """Several hooks, one behind the other; the draft's logits go through those that ask for them."""

    def __init__(self, hooks: Sequence[LogitsHook]) -> None:
        self.hooks = list(hooks)

    @property
    def hooks_draft(self) -> bool:
        """Whether one of them does."""
        return any(getattr(hook, "hooks_draft", False) for hook in self.hooks)

    @property
    def scales(self) -> list[float]:
        """Those of the last one; see `ProcessorHook`."""
        return self.hooks[-1].scales  # type: ignore[attr-defined]

    def begin(self, prompt_lens: Sequence[int]) -> None:
        """Tell those that want to know."""
        for hook in self.hooks:
            if hasattr(hook, "begin"):
                hook.begin(prompt_lens)

    def check(self, request: int, new_tokens: list[int]) -> None:
        """Let those that remember dead ends check them."""
        for hook in self.hooks:
            if hasattr(hook, "check"):
                hook.check(request, new_tokens)

    def __call__(self, paths: NodePaths, logits: torch.Tensor) -> torch.Tensor:
        for hook in self.hooks:
            if paths.nodes is None or getattr(hook, "hooks_draft", False):
                logits = hook(paths, logits)
        return logits


class ProcessorHook:
    """Runs logits processors on the rows of a tree, as transformers' loop would behind each node's tokens. B requests.

    Processors of transformers' that look at single rows are called once for all nodes of a length. Any other is called
    with one node of each request, so that row b belongs to request b as it does in transformers' loop; where it gives
    different scores for the same input at the prefill, it is refused.

    Rows that decide nothing are left as they are: of requests that have ended, behind a token that ends the request,
    behind the last token that is wanted, and of nodes whose tokens could not be drawn.

    Args:
        processors: for each request; one object for several where they share it. [B]
        prompts: the prompts as transformers shows them to processors, padding on the left included. [B, W] int64.
        prompt_lens: tokens of each prompt. [B]
        scales: multiplies what the processors give: the temperature that they divide by, where the op divides again,
            else 1. [B]
        eos_token_ids: tokens that end a request.
        max_new_tokens: tokens that a request emits at most.
        hooks_draft: process the draft's logits as well. More of its tokens are accepted then, but its levels no longer
            run in one call or graph. Always done for processors that are not transformers' own, which might not bear
            to be asked about a text that they forbid.
    """

    def __init__(
        self, processors: Sequence[Sequence[Processor]], prompts: torch.Tensor, prompt_lens: Sequence[int],
        scales: Sequence[float], eos_token_ids: frozenset[int], max_new_tokens: int, *, hooks_draft: bool = False,
    ) -> None:  # fmt: skip
        self.processors, self.prompts, self.prompt_lens, self.scales = processors, prompts, prompt_lens, scales
        self.eos_token_ids, self.max_new_tokens = eos_token_ids, max_new_tokens
        self._dead_ends = DeadEnds()
        self._to_check = {id(entry): entry for entries in processors for entry in entries if not takes_any_rows(entry)}
        self.hooks_draft = hooks_draft or bool(self._to_check)

    def __call__(self, paths: NodePaths, logits: torch.Tensor) -> torch.Tensor:
        """Process the logits; see `LogitsHook`. float32, as transformers' processors take and give it."""
        changed = logits.to(torch.float32, copy=True)
        groups: dict[tuple[int, int], list[_Row]] = {}
        for row in self._rows(paths):
            groups.setdefault((len(row.input_ids), id(self.processors[row.request])), []).append(row)
        for rows in groups.values():
            requests = [row.request for row in rows]
            places = torch.tensor(requests), torch.tensor([row.place for row in rows])
            before = changed[places]
            scores = self._process(requests, torch.stack([row.input_ids for row in rows]), before)
            scales = torch.tensor([self.scales[request] for request in requests], device=scores.device)
            scores = scores.to(torch.float32) * scales[:, None]
            has_none_left = scores.isneginf().all(-1)
            if bool(has_none_left.any()):
                scores = torch.where(has_none_left[:, None], before, scores)
                for row in (row for row, is_dead in zip(rows, has_none_left.tolist(), strict=True) if is_dead):
                    self._note_end(row, paths)
            changed[places] = scores
        return changed

    def _note_end(self, row: _Row, paths: NodePaths) -> None:
        """Remember a row without a token left: an error as soon as the request gets there."""
        if paths.nodes is None and len(row.path) <= 1:
            raise self._no_token_left(row.request, row.num_new)
        self._dead_ends.note(row.request, row.num_new, row.path)

    def _no_token_left(self, request: int, num_new: int) -> ValueError:
        names = dict.fromkeys(type(processor).__name__ for processor in self.processors[request])
        return ValueError(
            f"generate: logits processors must leave at least one token, request {request} has none behind {num_new} "
            f"new tokens ({', '.join(names)})"
        )

    def _rows(self, paths: NodePaths) -> Iterator[_Row]:
        """Give the rows that decide something, and the tokens before them."""
        all_tokens, all_lens = paths.tokens.tolist(), paths.history_lens.tolist()
        all_parents = _parents(paths.topology)
        wanted = range(paths.topology.num_nodes) if paths.nodes is None else paths.nodes.tolist()
        for request, is_active in enumerate(paths.active.tolist()):
            if not is_active:
                continue
            tokens, prompt_len = all_tokens[request], self.prompt_lens[request]
            num_new = all_lens[request] - prompt_len  # committed ones; -1 at the prefill, whose root ends the prompt
            behind = torch.cat(
                (self.prompts[request], paths.history[request, prompt_len : prompt_len + max(num_new, 0)])
            )
            own = self._own_paths(tokens, all_parents[request if len(all_parents) > 1 else 0], is_prefill=num_new < 0)
            self.check(request, behind[self.prompts.shape[1] :].tolist() + tokens[:1])
            for place, node in enumerate(wanted):
                path = own[node]
                if path is not None and num_new + len(path) < self.max_new_tokens:
                    input_ids = torch.cat((behind, behind.new_tensor(path)))
                    yield _Row(request, place, max(num_new, 0) + len(path), path, input_ids)

    def check(self, request: int, new_tokens: list[int]) -> None:
        """Raise ValueError where the newest tokens of a request lie behind a row that had no token left."""
        num_new = self._dead_ends.reached(request, new_tokens)
        if num_new is not None:
            raise self._no_token_left(request, num_new)

    def _own_paths(self, tokens: list[int], parents: list[int], *, is_prefill: bool) -> list[list[int] | None]:
        """Tokens from the root to each node; None where what comes behind them decides nothing."""
        if is_prefill:  # the root ends the prompt, which may hold whatever it likes
            return [[]]
        paths: list[list[int] | None] = []
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            above = paths[parent] if parent >= 0 else None if node else []
            ends = token < 0 or token in self.eos_token_ids
            paths.append(None if above is None or ends else [*above, token])
        return paths

    def _process(self, requests: Sequence[int], input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Run the processors that these rows, all of one length, share. [R, length], [R, vocab] -> [R, vocab]."""
        for processor in self.processors[requests[0]]:
            if takes_any_rows(processor):
                scores = processor(input_ids, scores)
                continue
            parts = scores.clone()
            for rows in _one_of_each(requests):
                places = list(range(len(self.processors)))  # requests without a row here take the first one's place
                index = torch.tensor([rows.get(place, next(iter(rows.values()))) for place in places])
                given = self._call(processor, input_ids[index], scores[index])
                for place, row in rows.items():
                    parts[row] = given[place]
            scores = parts
        return scores

    def _call(self, processor: Processor, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        given = processor(input_ids, scores.clone())
        if not isinstance(given, torch.Tensor) or given.shape != scores.shape or not given.is_floating_point():
            is_tensor = isinstance(given, torch.Tensor)
            looks = f"{given.dtype} {list(given.shape)}" if is_tensor else type(given).__name__
            raise ValueError(
                f"generate: logits_processor must give scores of shape {list(scores.shape)}, got {looks} from "
                f"{type(processor).__name__}"
            )
        if self._to_check.pop(id(processor), None) is not None:
            try:
                same = bool(torch.equal(processor(input_ids, scores.clone()), given))
            except Exception as error:
                raise _depends_on_calls(processor, "failed when called again") from error
            if not same:
                raise _depends_on_calls(processor, "gave other scores when called again")
        return given


def _parents(topology: Topology) -> list[list[int]]:
    """Parents of each request's tree, or of the one that all share."""
    return torch.atleast_2d(topology.parents).tolist()


def _one_of_each(requests: Sequence[int]) -> Iterator[dict[int, int]]:
    """Split rows into calls of at most one row of each request: from request to row."""
    left = list(enumerate(requests))
    while left:
        call: dict[int, int] = {}
        for row, request in left:
            call.setdefault(request, row)
        left = [(row, request) for row, request in left if call[request] != row]
        yield call


def _depends_on_calls(processor: Any, what: str) -> ValueError:
    name = type(processor).__name__
    return ValueError(
        f"generate: logits_processor must depend on input_ids and scores alone, got {name}, which {what} with the same "
        "ones; a grammar's matcher goes into a GrammarHook"
    )
