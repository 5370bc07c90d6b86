"""Checks of `generate`'s arguments, and the plain values that the loop works with."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NoReturn, TypeAlias

import torch

from sequoia_kernels import checks
from sequoia_kernels.decoding.logits_hook import LogitsHook
from sequoia_kernels.decoding.request import StopStrings
from sequoia_kernels.decoding.settings import warn_once
from sequoia_kernels.documents import is_integer
from sequoia_kernels.drafts import DraftSource, TokenBuffers, request_seeds
from sequoia_kernels.models import TreeModel
from sequoia_kernels.ops import VerifiedPath, backends
from sequoia_kernels.planner import (
    AdaptivePlan,
    HardwareProfile,
    StepRecords,
    TreeFollower,
    TreePlan,
    validate_acceptance,
)
from sequoia_kernels.tree import (
    DEFAULT_RULE,
    MAX_STEP_ROWS,
    LookupTree,
    MergedTree,
    ShapedTree,
    TokenTree,
    rule_named,
    usual_rule,
)

GivenTree: TypeAlias = TokenTree | Sequence[TokenTree] | ShapedTree | TreePlan | AdaptivePlan | TreeFollower | str

WORDS = ("auto", "adaptive")  # trees that are chosen


@dataclass(frozen=True)
class GenerationArguments:
    """Arguments of `generate` after their checks; lists have one entry for each request.

    Attributes:
        input_ids: prompts as given, which a streamer takes first. [B, L].
        prompts: prompts without padding on the left, zeros on the right. [B, longest] int64.
        prompt_lens: tokens of each prompt. [B]
        max_cache_len: tokens that a request may commit, prompt included: the caller's limit or the target's positions,
            None without one.
        streamer: one, or one for each request.
        stopping_criteria: transformers', asked behind every token of each request.
        deadline: time.monotonic() at which the newest tokens are the last.
        observer: is shown every step's tree and logits.
        shorten: beside an observer, says how much of the accepted paths is committed (`DecodingStep`).
        keeps: what a step leaves besides tokens (`DecodingStep`).
    """

    input_ids: torch.Tensor
    prompts: torch.Tensor
    prompt_lens: list[int]
    max_new_tokens: int
    temperature: list[float]
    top_k: list[int] | None
    top_p: list[float] | None
    eos_token_ids: frozenset[int]
    pad_token_id: int
    seeds: list[int]
    max_cache_len: int | None
    stop_strings: StopStrings | None = None
    streamer: Any | None = None
    rule: str = DEFAULT_RULE
    logits_hook: LogitsHook | None = None
    backend: str = "auto"
    cuda_graphs: bool = True
    stopping_criteria: tuple[Callable[..., Any], ...] = ()
    deadline: float | None = None
    observer: Callable[[TokenBuffers, torch.Tensor], None] | None = None
    shorten: Callable[[TokenBuffers, VerifiedPath], VerifiedPath] | None = None
    keeps: frozenset[str] = frozenset()

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return len(self.prompt_lens)

    @property
    def longest(self) -> int:
        """Tokens that a request commits at most."""
        wanted = max(self.prompt_lens) + self.max_new_tokens - 1
        return wanted if self.max_cache_len is None else min(wanted, self.max_cache_len)

    @property
    def padded_prompts(self) -> torch.Tensor:
        """The prompts as transformers' loop has them: the tokens given, all padding on the left. [B, W] int64."""
        width = self.input_ids.shape[1]
        padded = self.input_ids.to(torch.int64, copy=True)
        for row, (prompt, length) in enumerate(zip(self.prompts, self.prompt_lens, strict=True)):
            if not torch.equal(padded[row, width - length :], prompt[:length]):  # padding on the right, too
                padded[row, : width - length] = self.pad_token_id
                padded[row, width - length :] = prompt[:length]
        return padded


def check_arguments(
    target: TreeModel, draft: DraftSource | None, input_ids: Any, attention_mask: Any, *,
    tree: Any, max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any, eos_token_id: Any, pad_token_id: Any,
    seed: Any, stop_strings: Any, tokenizer: Any, streamer: Any, max_cache_len: Any, acceptance: Any, profile: Any,
    rule: Any, logits_hook: Any, backend: Any, cuda_graphs: bool, stopping_criteria: Any = (),
) -> GenerationArguments:  # fmt: skip
    """Check everything that can be checked before a model runs; `generate` tells types and meaning of each."""
    _check_input_ids(target, input_ids)
    batch_size = input_ids.shape[0]
    eos_token_ids = _eos_token_ids(target, eos_token_id)
    if pad_token_id is not None:
        checks.whole_number("generate", "pad_token_id", pad_token_id, torch.int64)
    inferred = attention_mask is None
    if inferred:
        attention_mask = _inferred_mask(target, input_ids, pad_token_id, eos_token_ids)
    prompts, prompt_lens = _left_aligned(input_ids, attention_mask, inferred)
    _check_token_range(prompts, target.num_embeddings)
    if draft is not None:
        _check_draft(target, draft)
    _check_tree(tree, batch_size)
    if draft is not None and draft.max_levels is not None:
        deepest = max((entry.num_levels for entry in _trees(tree)), default=0)
        if deepest > draft.max_levels:
            _refuse("tree", f"have at most the {draft.max_levels} levels that {draft!r} can grow", deepest)
    if acceptance is not None and not isinstance(acceptance, StepRecords):
        validate_acceptance(acceptance, "generate")
    if profile is not None and not isinstance(profile, HardwareProfile):
        _refuse("profile", "be a HardwareProfile", _describe(profile), TypeError)
    if logits_hook is not None and not callable(logits_hook):
        _refuse("logits_hook", "be called with (paths, logits)", _describe(logits_hook), TypeError)
    names = ("auto", *backends.backend_names("verify_tree"))
    if backend not in names:
        _refuse("backend", f"be one of {', '.join(names)}", repr(backend))
    checks.check_options("generate", backend, cuda_graphs=cuda_graphs)
    checks.whole_number("generate", "max_new_tokens", max_new_tokens, rule=checks.at_least(1))
    temperatures, top_ks, top_ps = _sampling(temperature, top_k, top_p, batch_size)
    usual = usual_rule(target.device.type, any(temperatures))
    rule = rule_named("generate", (_planned_rule(tree) or usual) if rule is None else rule).name
    seeds = _per_request("seed", seed, batch_size, Integral, lambda s: 0 <= s < 1 << 63, "be in [0, 2^63)")
    strings = _stop_strings(stop_strings, tokenizer)
    if streamer is not None:
        _check_streamer(streamer, batch_size)
    if not isinstance(stopping_criteria, Sequence) or not all(map(callable, stopping_criteria)):
        rule = "be a list of what is called with (input_ids, scores)"
        _refuse("stopping_criteria", rule, _describe(stopping_criteria), TypeError)
    ends = list(target.eos_token_ids) if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()
    pad = _pad_token_id(target, pad_token_id, [token for token in ends if token in eos_token_ids])
    arguments = GenerationArguments(
        input_ids, prompts, prompt_lens, int(max_new_tokens),
        temperature=temperatures, top_k=top_ks, top_p=top_ps, eos_token_ids=eos_token_ids, pad_token_id=pad,
        seeds=request_seeds(int(seeds[0]), batch_size) if isinstance(seed, Integral) else [int(s) for s in seeds],
        max_cache_len=_cache_limit(target, max_cache_len, prompt_lens),
        stop_strings=StopStrings(strings, tokenizer) if strings else None,
        streamer=streamer, rule=rule, logits_hook=logits_hook, backend=backend, cuda_graphs=cuda_graphs,
        stopping_criteria=tuple(stopping_criteria),
    )  # fmt: skip
    trained = target.trained_positions
    if trained is not None and arguments.longest > trained:
        warn_once(
            target.model,
            f"generate: prompt and max_new_tokens come to more than the {trained} positions that the target was made "
            "for (max_position_embeddings): it goes on behind them, but what it says there may be worse",
        )
    return arguments


def _refuse(name: str, rule: str, actual: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"generate: {name} must {rule}, got {actual}") from None


def _check_input_ids(target: TreeModel, input_ids: Any) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        _refuse("input_ids", "be an int64 or int32 tensor", _describe(input_ids), TypeError)
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        _refuse("input_ids", "have shape [batch, length] with at least one token", list(input_ids.shape))
    if input_ids.device != target.device:
        fix = f"{input_ids.device}; move it with .to(target.device)"
        _refuse("input_ids", f"be on the target's device {target.device}", fix)


def _check_draft(target: TreeModel, draft: DraftSource) -> None:
    draft.check_target(target)
    if draft.device != target.device:
        fix = f"{draft.device}; move one of the models with .to(...)"
        _refuse("draft", f"be on the target's device {target.device}", fix)
    needs, positions = draft.needs, draft.positions
    if not isinstance(needs, (tuple, list)) or not all(map(is_integer, needs)) or len(set(needs)) < len(needs):
        _refuse("draft.needs", "be a tuple of different integers", repr(needs), TypeError)
    for number in needs:
        if not 0 <= number <= target.num_layers:
            _refuse("draft", f"need hidden states in 0..{target.num_layers}", f"{number!r} from {draft!r}")
    if positions is not None:
        checks.whole_number("generate", "draft.positions", positions, rule=checks.at_least(2))
        if needs:
            _refuse("draft.positions", "be None where it needs hidden states", positions)
    try:
        weakref.ref(draft.owner)
    except TypeError:
        owner = type(draft.owner).__name__
        _refuse("draft.owner", "be an object that takes weak references", owner, TypeError)


def _check_tree(tree: GivenTree, batch_size: int) -> None:
    is_word = isinstance(tree, str) and tree in WORDS
    is_each = _is_one_each(tree)
    if not (is_word or is_each or isinstance(tree, (TokenTree, ShapedTree, TreePlan, AdaptivePlan, TreeFollower))):
        plans = "a TreePlan, an AdaptivePlan, a TreeFollower"
        rule = f'be a TokenTree, one for each request, a ShapedTree, {plans}, the path of one, "auto" or "adaptive"'
        _refuse("tree", rule, repr(tree), TypeError)
    trees = _trees(tree)
    if any(isinstance(entry, (LookupTree, MergedTree)) for entry in trees):
        _refuse("tree", "be no tree of proposals, which lookup=True takes by itself", repr(tree), TypeError)
    size = largest_size(tree)
    if size > MAX_STEP_ROWS:
        _refuse("tree", f"have at most {MAX_STEP_ROWS} nodes", size)
    if is_each and (len(trees) != batch_size or any(entry.widths != trees[0].widths for entry in trees)):
        rule = f"be one tree or one for each of {batch_size} requests, all of the same widths"
        _refuse("tree", rule, f"{len(trees)} of widths {sorted({tuple(entry.widths) for entry in trees})}")


def _check_streamer(streamer: Any, batch_size: int) -> None:
    streamers = list(streamer) if isinstance(streamer, Sequence) else [streamer]
    for entry in streamers:
        if not (callable(getattr(entry, "put", None)) and callable(getattr(entry, "end", None))):
            _refuse("streamer", "have put(tokens) and end()", type(entry).__name__, TypeError)
    if isinstance(streamer, Sequence) and len(streamers) != batch_size:
        _refuse("streamer", f"be one or one for each of {batch_size} requests", len(streamers))


def _sampling(
    temperature: Any, top_k: Any | None, top_p: Any | None, batch_size: int
) -> tuple[list[float], list[int] | None, list[float] | None]:
    temperatures = _per_request(
        "temperature", temperature, batch_size, Real,
        lambda t: t == 0 or _in_float32(checks.MIN_TEMPERATURE) <= _in_float32(t) < math.inf,
        f"be 0 or at least {checks.MIN_TEMPERATURE} and finite in float32",
    )  # fmt: skip
    top_ks = top_ps = None
    if top_k is not None:
        top_ks = _per_request(
            "top_k", top_k, batch_size, Integral, lambda k: 0 <= k < 1 << 31, "be in [0, 2^31), where 0 is off"
        )
    if top_p is not None:
        top_ps = _per_request(
            "top_p", top_p, batch_size, Real, lambda p: p <= 1 and _in_float32(p) > 0, "be in (0, 1] in float32"
        )
    return temperatures, top_ks, top_ps


def _describe(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def _inferred_mask(
    target: TreeModel, input_ids: torch.Tensor, pad_token_id: int | None, eos_token_ids: frozenset[int]
) -> torch.Tensor | None:
    """Take pad tokens for padding, as transformers does where no mask is given; None where there are none.

    A pad token that also ends sequences may be text: then it counts as such, with a warning if it stands at an end.
    """
    pad = _configured_pad_token_id(target) if pad_token_id is None else pad_token_id
    is_pad = input_ids == pad if isinstance(pad, Integral) else None
    if is_pad is None or not bool(is_pad.any()):
        return None
    if pad not in eos_token_ids:
        return ~is_pad
    if bool(is_pad[:, 0].any()) or bool(is_pad[:, -1].any()):
        warn_once(
            target.model,
            f"generate: input_ids begins or ends with token {pad}, which both pads and ends sequences, and no "
            "attention_mask is given: it counts as text of the prompt",
        )
    return None


def _left_aligned(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, inferred: bool
) -> tuple[torch.Tensor, list[int]]:
    """Shift every prompt to column 0. Returns (prompts [B, longest], lengths)."""
    batch_size, width = input_ids.shape
    if attention_mask is None:
        return input_ids.to(torch.int64), [width] * batch_size
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        got = list(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        _refuse("attention_mask", f"have the shape of input_ids {[batch_size, width]}", got)
    kept = attention_mask.to(torch.bool).cpu()
    rows = []
    for index in range(batch_size):
        columns = kept[index].nonzero()[:, 0].tolist()
        if not columns:
            _refuse("attention_mask", "keep at least one token of each prompt", f"none in row {index}")
        if columns[-1] - columns[0] + 1 != len(columns):
            fix = "; it was inferred from the pad token, so give it where that is text" if inferred else ""
            rule = "pad on one side or both, not inside a prompt"
            _refuse("attention_mask", rule, f"a hole in row {index}{fix}")
        rows.append(input_ids[index, columns[0] : columns[-1] + 1].to(torch.int64))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [len(row) for row in rows]


def _check_token_range(prompts: torch.Tensor, num_embeddings: int) -> None:
    lowest, highest = int(prompts.min()), int(prompts.max())
    if lowest < 0 or highest >= num_embeddings:
        actual = f"{lowest if lowest < 0 else highest}; was it made by another model's tokenizer?"
        _refuse("input_ids", f"hold tokens in [0, {num_embeddings})", actual)


def _in_float32(value: float) -> float:
    """Round as the ops' tensors do; what float32 cannot hold becomes infinite."""
    try:
        return float(torch.tensor(float(value), dtype=torch.float64).to(torch.float32))
    except OverflowError:  # an integer beyond float64
        return math.inf


def _per_request(
    name: str, value: Any, batch_size: int, kind: type, holds: Callable[[Any], bool], rule: str
) -> list[Any]:
    noun = "an integer" if kind is Integral else "a number"
    if isinstance(value, Real):
        value = [value] * batch_size
    elif not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        _refuse(name, f"be {noun} or one for each request in a sequence", _describe(value), TypeError)
    values = list(value)
    if len(values) != batch_size:
        _refuse(name, f"be one value or one for each of {batch_size} requests", len(values))
    for entry in values:
        if isinstance(entry, bool) or not isinstance(entry, kind):
            _refuse(name, f"be {noun}", repr(entry), TypeError)
        if not holds(entry):
            _refuse(name, rule, entry)
    return values


def _eos_token_ids(target: TreeModel, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset(target.eos_token_ids)
    ids: Any = [eos_token_id] if isinstance(eos_token_id, Integral) else eos_token_id
    if not isinstance(ids, Collection) or isinstance(ids, (str, bytes)) or getattr(ids, "ndim", 1) != 1:
        _refuse("eos_token_id", "be an integer or several", _describe(ids), TypeError)
    for token in ids:
        if not is_integer(token):
            _refuse("eos_token_id", "hold integers", repr(token), TypeError)
        if not 0 <= int(token) < target.vocab_size:
            _refuse("eos_token_id", f"hold tokens in [0, {target.vocab_size})", repr(token))
    return frozenset(int(token) for token in ids)


def _is_one_each(tree: Any) -> bool:
    is_several = isinstance(tree, Sequence) and not isinstance(tree, str) and len(tree) > 0
    return is_several and all(isinstance(entry, TokenTree) for entry in tree)


def _trees(tree: GivenTree) -> Sequence[TokenTree | ShapedTree]:
    """The trees that may be decoded with; none yet for a word."""
    if isinstance(tree, TreeFollower):
        tree = tree.plan
    if isinstance(tree, AdaptivePlan):
        return tree.trees
    if isinstance(tree, TreePlan):
        return [tree.tree]
    return [tree] if isinstance(tree, (TokenTree, ShapedTree)) else [] if isinstance(tree, str) else list(tree)


def largest_size(tree: GivenTree) -> int:
    """Give the nodes of the largest tree that may be decoded with; none yet for a word."""
    return max((entry.num_nodes for entry in _trees(tree)), default=0)


def _planned_rule(tree: GivenTree) -> str | None:
    """The verification rule that a tree was planned for, None where it was not planned."""
    plan = tree.plan if isinstance(tree, TreeFollower) else tree
    return plan.rule if isinstance(plan, (TreePlan, AdaptivePlan)) else None


def _pad_token_id(target: TreeModel, pad_token_id: int | None, eos_token_ids: Sequence[int]) -> int:
    if pad_token_id is None:
        configured = _configured_pad_token_id(target)
        return configured if configured is not None else eos_token_ids[0] if eos_token_ids else 0
    return int(pad_token_id)


def _configured_pad_token_id(target: TreeModel) -> int | None:
    configured = getattr(getattr(target.model, "generation_config", None), "pad_token_id", None)
    return None if configured is None else int(configured)


def _stop_strings(stop_strings: str | Sequence[str] | None, tokenizer: Any | None) -> tuple[str, ...]:
    strings: Any = [stop_strings] if isinstance(stop_strings, str) else stop_strings or ()
    if not isinstance(strings, Collection) or not all(isinstance(string, str) for string in strings):
        _refuse("stop_strings", "be a string or several", repr(stop_strings), TypeError)
    if not all(strings):
        _refuse("stop_strings", "be non-empty strings", repr(stop_strings))
    if strings and tokenizer is None:
        _refuse("tokenizer", "be given with stop_strings", None)
    if strings and not callable(getattr(tokenizer, "decode", None)):
        _refuse("tokenizer", "have decode(tokens)", type(tokenizer).__name__, TypeError)
    return tuple(strings)


def _cache_limit(target: TreeModel, max_cache_len: int | None, prompt_lens: list[int]) -> int | None:
    if max_cache_len is not None:
        checks.whole_number("generate", "max_cache_len", max_cache_len, rule=checks.at_least(1))
    limits = ((max_cache_len, "max_cache_len"), (target.max_positions, "the target's positions"))
    given = [(int(limit), name) for limit, name in limits if limit is not None]
    if not given:
        return None
    limit, name = min(given, key=lambda entry: entry[0])
    if max(prompt_lens) > limit:
        rule = f"be at most as long as the cache, {limit} tokens ({name})"
        _refuse("input_ids", rule, f"a prompt of {max(prompt_lens)}")
    return limit
