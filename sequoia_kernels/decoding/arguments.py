"""Checks of `generate`'s arguments, and the plain values that the loop works with."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from sequoia_kernels.decoding.state import request_seeds
from sequoia_kernels.models import TreeModel, check_pair
from sequoia_kernels.planner import AdaptivePlan, TreeFollower, TreePlan
from sequoia_kernels.tree import TokenTree

logger = logging.getLogger("sequoia_kernels")

# Settings of a generation_config that change the distribution, and the values at which they do nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None, []),
    "forced_eos_token_id": (None,),
}


@dataclass(frozen=True)
class GenerationArguments:
    """Arguments of `generate` after their checks; lists have one entry for each request.

    Attributes:
        prompts: prompts without padding on the left, zeros on the right. [B, longest] int64.
        prompt_lens: tokens of each prompt. [B]
        max_cache_len: the caller's or the models' limit on cache rows, None without one.
    """

    prompts: torch.Tensor
    prompt_lens: list[int]
    max_new_tokens: int
    temperature: list[float]
    top_k: list[int] | None
    top_p: list[float] | None
    eos_token_ids: frozenset[int]
    pad_token_id: int
    seeds: list[int]
    stop_strings: tuple[str, ...]
    max_cache_len: int | None

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return len(self.prompt_lens)

    def cache_capacity(self, tree: TokenTree) -> int:
        """Rows that the caches need for these requests with this tree, within the limit.

        Behind the last token that is wanted there must be room for one whole tree, for what the last step accepts
        beyond the end, and for the step that an asynchronous device may already be running then.
        """
        wanted = max(self.prompt_lens) + self.max_new_tokens + tree.num_nodes + 2 * tree.num_levels
        return wanted if self.max_cache_len is None else min(wanted, self.max_cache_len)


def check_arguments(
    target: TreeModel,
    draft: TreeModel | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: TokenTree | TreePlan | AdaptivePlan | TreeFollower | str,
    max_new_tokens: int,
    temperature: float | Sequence[float],
    top_k: int | Sequence[int] | None,
    top_p: float | Sequence[float] | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    seed: int | Sequence[int],
    stop_strings: str | Sequence[str] | None,
    tokenizer: Any | None,
    streamer: Any | None,
    max_cache_len: int | None,
) -> GenerationArguments:
    """Check everything that can be checked before a model runs; see `generate` for the meaning of each."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"generate: input_ids must be an int64 or int32 tensor, got {_describe(input_ids)}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"generate: input_ids must have shape [batch, length] with at least one token, got {list(input_ids.shape)}"
        )
    if input_ids.device != target.device:
        raise ValueError(
            f"generate: input_ids must be on the target's device {target.device}, got {input_ids.device}; "
            "move it with .to(target.device)"
        )
    batch_size = input_ids.shape[0]
    prompts, prompt_lens = _left_aligned(input_ids, attention_mask)
    _check_token_range(prompts, prompt_lens, target.vocab_size)
    if draft is not None:
        check_pair(target, draft)
        if draft.device != target.device:
            raise ValueError(
                f"generate: draft must be on the target's device {target.device}, got {draft.device}; "
                "move one of the models with .to(...)"
            )
    if not isinstance(tree, (TokenTree, TreePlan, AdaptivePlan, TreeFollower)) and tree not in ("auto", "adaptive"):
        raise TypeError(
            "generate: tree must be a TokenTree, a TreePlan, an AdaptivePlan, a TreeFollower, "
            f'"auto" or "adaptive", got {tree!r}'
        )
    _check_positive("max_new_tokens", max_new_tokens)
    temperatures = _per_request(
        "temperature", temperature, batch_size, Real, lambda t: math.isfinite(t) and t >= 0, "be finite and >= 0"
    )
    top_ks = (
        None
        if top_k is None
        else _per_request("top_k", top_k, batch_size, Integral, lambda k: k >= 0, "be >= 0 (0 is off)")
    )
    top_ps = (
        None if top_p is None else _per_request("top_p", top_p, batch_size, Real, lambda p: 0 < p <= 1, "be in (0, 1]")
    )
    seeds = _per_request("seed", seed, batch_size, Integral, lambda s: 0 <= s < 1 << 63, "be in [0, 2^63)")
    eos_token_ids = _eos_token_ids(target, eos_token_id)
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
    if any(not isinstance(string, str) or not string for string in strings):
        raise ValueError(f"generate: stop_strings must be non-empty strings, got {stop_strings!r}")
    if strings and tokenizer is None:
        raise ValueError("generate: tokenizer must be given with stop_strings, got None")
    if streamer is not None and batch_size > 1:
        raise ValueError(f"generate: streamer must be used with one request, got {batch_size} requests")
    _warn_of_settings_not_applied(target)
    return GenerationArguments(
        prompts=prompts,
        prompt_lens=prompt_lens,
        max_new_tokens=int(max_new_tokens),
        temperature=temperatures,
        top_k=top_ks,
        top_p=top_ps,
        eos_token_ids=eos_token_ids,
        pad_token_id=_pad_token_id(target, pad_token_id, eos_token_ids),
        seeds=request_seeds(seeds[0], batch_size) if isinstance(seed, Integral) else [int(s) for s in seeds],
        stop_strings=strings,
        max_cache_len=_cache_limit(target, draft, max_cache_len, prompt_lens),
    )


def _warn_of_settings_not_applied(target: TreeModel) -> None:
    """Say which settings of the target's generation_config are not applied, though transformers' own loop would."""
    config = getattr(target.model, "generation_config", None)
    found = {name: getattr(config, name, None) for name in _NOT_APPLIED}
    active = [f"{name}={value}" for name, value in found.items() if value not in _NOT_APPLIED[name]]
    if active:
        logger.warning("generate: the target's generation_config asks for %s, which is not applied", ", ".join(active))


def _describe(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def _left_aligned(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, list[int]]:
    """Shift every prompt to column 0. Returns (prompts [B, longest], lengths)."""
    batch_size, width = input_ids.shape
    if attention_mask is None:
        return input_ids.to(torch.int64), [width] * batch_size
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        got = list(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise ValueError(f"generate: attention_mask must have the shape of input_ids {[batch_size, width]}, got {got}")
    kept = attention_mask.to(torch.bool).cpu()
    rows = []
    for index in range(batch_size):
        columns = kept[index].nonzero()[:, 0].tolist()
        if not columns:
            raise ValueError(
                f"generate: attention_mask must keep at least one token of each prompt, got none in row {index}"
            )
        if columns[-1] - columns[0] + 1 != len(columns):
            raise ValueError(
                f"generate: attention_mask must pad on one side or both, not inside a prompt, got a hole in row {index}"
            )
        rows.append(input_ids[index, columns[0] : columns[-1] + 1].to(torch.int64))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [len(row) for row in rows]


def _check_token_range(prompts: torch.Tensor, prompt_lens: list[int], vocab_size: int) -> None:
    lowest, highest = int(prompts.min()), int(prompts.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"generate: input_ids must hold tokens in [0, {vocab_size}), got {lowest if lowest < 0 else highest}; "
            "was it made by another model's tokenizer?"
        )


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"generate: {name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"generate: {name} must be at least 1, got {value}")


def _per_request(name: str, value: Any, batch_size: int, kind: type, holds: Any, rule: str) -> list[Any]:
    values = [value] * batch_size if isinstance(value, Real) else list(value)
    if len(values) != batch_size:
        raise ValueError(
            f"generate: {name} must be one value or one for each of {batch_size} requests, got {len(values)}"
        )
    for entry in values:
        if isinstance(entry, bool) or not isinstance(entry, kind):
            raise TypeError(f"generate: {name} must be a number, got {entry!r}")
        if not holds(entry):
            raise ValueError(f"generate: {name} must {rule}, got {entry}")
    return values


def _eos_token_ids(target: TreeModel, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset(target.eos_token_ids)
    ids: list[Any] = [eos_token_id] if isinstance(eos_token_id, Integral) else list(eos_token_id)  # type: ignore[arg-type]
    for token in ids:
        if not isinstance(token, Integral) or not 0 <= int(token) < target.vocab_size:
            raise ValueError(f"generate: eos_token_id must hold tokens in [0, {target.vocab_size}), got {token!r}")
    return frozenset(int(token) for token in ids)


def _pad_token_id(target: TreeModel, pad_token_id: int | None, eos_token_ids: frozenset[int]) -> int:
    if pad_token_id is not None:
        return int(pad_token_id)
    configured = getattr(getattr(target.model, "generation_config", None), "pad_token_id", None)
    if configured is not None:
        return int(configured)
    return min(eos_token_ids) if eos_token_ids else 0


def _cache_limit(
    target: TreeModel, draft: TreeModel | None, max_cache_len: int | None, prompt_lens: list[int]
) -> int | None:
    if max_cache_len is not None:
        _check_positive("max_cache_len", max_cache_len)
    limits = {
        "max_cache_len": max_cache_len,
        "the target's positions": target.max_positions,
        "the draft's positions": draft.max_positions if draft is not None else None,
    }
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if not given:
        return None
    name, limit = min(given.items(), key=lambda item: item[1])
    if max(prompt_lens) > limit:
        raise ValueError(
            f"generate: input_ids must be at most as long as the cache, {limit} tokens ({name}), "
            f"got a prompt of {max(prompt_lens)}"
        )
    return limit
