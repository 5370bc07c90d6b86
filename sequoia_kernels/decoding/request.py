"""The host's side of a request: its tokens, and whether it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch


class StopStrings:
    """Tells whether the newest token completed one of the stop strings.

    As in transformers a string may begin in the prompt, and the token that completes it may go on behind it.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # a token stands for at least one byte, so this tail holds every match that ends in the newest token; the rest
        # gives decoders that look at neighbouring tokens some context
        self.num_tail_tokens = max(len(string.encode()) for string in self.strings) + 8

    def completed_by(self, tail: list[int]) -> bool:
        """Return whether a stop string ends in the last of the tokens, of which `num_tail_tokens` are enough."""
        before, text = (self.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in (tail[:-1], tail))
        # a token may change the text before it, such as a character whose bytes it completes
        stable = next(
            (at for at, (old, new) in enumerate(zip(before, text)) if old != new), min(len(before), len(text))
        )
        return any(string in text[max(0, stable - len(string) + 1) :] for string in self.strings)


class StoppingCriteria:
    """transformers' stopping criteria for one request, asked behind every token.

    Args:
        criteria: called with the request's tokens so far, the prompt as it was given included, [1, length] int64, and
            the scores of its new tokens ([1, vocab] float32 each) or None; they give whether it ends, one value.
        prompt: the prompt as it was given. [W] int64.
    """

    def __init__(self, criteria: Sequence[Callable[..., Any]], prompt: torch.Tensor) -> None:
        self.criteria, self.prompt = list(criteria), prompt

    def met(self, new_tokens: list[int], scores: list[torch.Tensor] | None) -> bool:
        """Tell whether one of them ends the request behind these tokens."""
        input_ids = torch.cat((self.prompt, self.prompt.new_tensor(new_tokens)))[None]
        rows = None if scores is None else tuple(row[None] for row in scores)
        answers = [criterion(input_ids, rows) for criterion in self.criteria]  # all are asked, as transformers does
        return any(bool(torch.as_tensor(answer).any()) for answer in answers)


class EmittedRows(NamedTuple):
    """What was asked for of the rows that tokens were decided from; one entry a token each, None where not asked for.

    Attributes:
        logprobs: log-probabilities of the tokens.
        logits: the target's logits. [vocab] each.
        scores: what processors made of them. [vocab] each.
    """

    logprobs: list[float] | None = None
    logits: list[torch.Tensor] | None = None
    scores: list[torch.Tensor] | None = None


class Request:
    """One request of a batch as the host sees it.

    Args:
        prompt: its prompt.
        max_new_tokens: tokens to emit at most.
        max_len: tokens that it may commit, prompt included; None without a limit. The newest token is not committed.
        eos_token_ids: tokens that end it.
        stop_strings: strings that end it.
        criteria: transformers' stopping criteria.
        deadline: time.monotonic() at which its newest token is its last.
        keeps: what of `EmittedRows` its tokens come with.

    Attributes:
        new_tokens: tokens emitted so far.
        rows: what was kept of the rows that they were decided from.
        finish_reason: None while decoding, then "eos", "length", "stop_string", "stopping_criteria", "max_time" or
            "cache_full".
    """

    def __init__(
        self, prompt: list[int], max_new_tokens: int, max_len: int | None, eos_token_ids: Collection[int],
        stop_strings: StopStrings | None, criteria: StoppingCriteria | None = None, deadline: float | None = None,
        keeps: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.prompt, self.max_new_tokens, self.max_len = prompt, max_new_tokens, max_len
        self.eos_token_ids, self.stop_strings = frozenset(eos_token_ids), stop_strings
        self.criteria, self.deadline = criteria, deadline
        self.new_tokens: list[int] = []
        self.rows = EmittedRows(*([] if name in keeps else None for name in EmittedRows._fields))
        self.finish_reason: str | None = None

    @property
    def is_active(self) -> bool:
        """Whether it still decodes."""
        return self.finish_reason is None

    @property
    def committed_len(self) -> int:
        """Rows of the target's cache that hold this request's tokens: all but the newest token."""
        return len(self.prompt) + len(self.new_tokens) - 1

    @property
    def committed(self) -> list[int]:
        """Tokens of those rows."""
        return self.prompt + self.new_tokens[:-1]

    def _tail(self, stop_strings: StopStrings) -> list[int]:
        tail = self.new_tokens[-stop_strings.num_tail_tokens :]
        missing = stop_strings.num_tail_tokens - len(tail)
        return self.prompt[-missing:] + tail if missing else tail

    def extend(self, tokens: Sequence[int], rows: EmittedRows | None = None) -> list[int]:
        """Take the tokens of one step up to the end of the request. Returns those that were taken.

        Args:
            tokens: the tokens.
            rows: what was kept of the rows that they were decided from.
        """
        taken: list[int] = []
        for index, token in enumerate(tokens):
            if self.finish_reason is not None:
                break
            self.new_tokens.append(token)
            taken.append(token)
            for kept, new in zip(self.rows, rows or ()):
                if kept is not None and new is not None:
                    kept.append(new[index])  # type: ignore[arg-type]
            self.finish_reason = self._reason(token)
        return taken

    def _reason(self, token: int) -> str | None:
        """Why the request ends behind its newest token; None where it goes on."""
        if token in self.eos_token_ids:
            return "eos"
        if self.stop_strings is not None and self.stop_strings.completed_by(self._tail(self.stop_strings)):
            return "stop_string"
        if self.criteria is not None and self.criteria.met(self.new_tokens, self.rows.scores):
            return "stopping_criteria"
        if len(self.new_tokens) >= self.max_new_tokens:
            return "length"
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "max_time"
        if self.max_len is not None and self.committed_len >= self.max_len:
            return "cache_full"
        return None
