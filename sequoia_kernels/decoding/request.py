"""The host's side of a request: its tokens, and whether it has ended."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


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


class Request:
    """One request of a batch as the host sees it.

    Args:
        prompt: its prompt.
        max_new_tokens: tokens to emit at most.
        max_len: tokens that it may commit, prompt included; None without a limit. The newest token is not committed.
        eos_token_ids: tokens that end it.
        stop_strings: strings that end it.

    Attributes:
        new_tokens: tokens emitted so far.
        finish_reason: None while decoding, then "eos", "length", "stop_string" or "cache_full".
    """

    def __init__(
        self, prompt: list[int], max_new_tokens: int, max_len: int | None, eos_token_ids: Collection[int],
        stop_strings: StopStrings | None,
    ) -> None:  # fmt: skip
        self.prompt, self.max_new_tokens, self.max_len = prompt, max_new_tokens, max_len
        self.eos_token_ids, self.stop_strings = frozenset(eos_token_ids), stop_strings
        self.new_tokens: list[int] = []
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

    def extend(self, tokens: Sequence[int]) -> list[int]:
        """Take the tokens of one step up to the end of the request. Returns those that were taken."""
        taken: list[int] = []
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.new_tokens.append(token)
            taken.append(token)
            if token in self.eos_token_ids:
                self.finish_reason = "eos"
            elif self.stop_strings is not None and self.stop_strings.completed_by(self._tail(self.stop_strings)):
                self.finish_reason = "stop_string"
            elif len(self.new_tokens) >= self.max_new_tokens:
                self.finish_reason = "length"
            elif self.max_len is not None and self.committed_len >= self.max_len:
                self.finish_reason = "cache_full"
        return taken
