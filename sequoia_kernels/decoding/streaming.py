"""Streamers: who gets which tokens while a batch is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sequoia_kernels.models import foreign_code_ran

__all__ = ["BatchStreamer"]


class BatchStreamer:
    """Hands the tokens of a batch to one streamer, or to one for each request.

    One for each request gets that request's prompt, its tokens as they come, and `end()` as the request ends. One for
    all of several requests gets what transformers' own loop would give it: the prompts as they are, [B, W], then a
    token of each request at a time, [B], pad tokens for those that have ended.

    Args:
        streamers: one, or one for each request.
        batch_size: requests.
        pad_token_id: what stands for tokens of ended requests.
    """

    def __init__(self, streamers: Any, batch_size: int, pad_token_id: int) -> None:
        self.is_each = isinstance(streamers, Sequence)
        self.streamers: list[Any] = list(streamers) if isinstance(streamers, Sequence) else [streamers]
        self.pad_token_id = pad_token_id
        self.waiting: list[list[int]] = [[] for _ in range(batch_size)]  # for tokens of the other requests
        self.ended = [False] * batch_size

    def begin(self, input_ids: torch.Tensor, prompts: Sequence[torch.Tensor]) -> None:
        """Give the prompts: as they were given, [B, W], and without padding, [length] each."""
        if self.is_each:
            for streamer, prompt in zip(self.streamers, prompts, strict=True):
                streamer.put(prompt[None].cpu())
        else:
            self.streamers[0].put(input_ids.cpu())
        foreign_code_ran()

    def take(self, index: int, tokens: Sequence[int], has_ended: bool) -> None:
        """Give a request's new tokens."""
        self.ended[index] = has_ended
        if self.is_each or len(self.waiting) == 1:
            streamer = self.streamers[index if self.is_each else 0]
            for token in tokens:
                streamer.put(torch.tensor([token]))
            if self.is_each and has_ended:
                streamer.end()
        else:
            self.waiting[index].extend(tokens)
            self._put_columns()
        foreign_code_ran()

    def _put_columns(self) -> None:
        while any(self.waiting) and all(row or ended for row, ended in zip(self.waiting, self.ended, strict=True)):
            column = [row.pop(0) if row else self.pad_token_id for row in self.waiting]
            self.streamers[0].put(torch.tensor(column))

    def end(self) -> None:
        """End what has not ended."""
        if not self.is_each:
            self.streamers[0].end()
            foreign_code_ran()
