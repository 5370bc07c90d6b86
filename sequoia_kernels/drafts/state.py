"""The state of a batch of requests between two steps: small device tensors, nothing on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_MASK64 = (1 << 64) - 1


@dataclass
class DecodingState:
    """Per-request tensors that a step reads and advances. B requests.

    Attributes:
        cache_lens: committed tokens, which the target's cache holds. [B] int32.
        draft_lens: how many of them the draft's cache holds, the newest ones. [B] int32. `cache_lens` itself, except
            where the draft cannot hold all that the requests may need.
        root_tokens: the last emitted token, whose keys and values are not in the cache yet. [B] int64.
        last_tokens: the committed token before it, at cache row cache_lens - 1. [B] int64.
        active: 1 while the request decodes, 0 once it has ended; an ended request commits nothing. [B] int32.
        seeds: the requests' random streams. [B] int64.
        offsets: place in those streams; every step moves it on by the number of nodes: no noise twice. [B] int64.
        temperature: 0 is greedy. [B] float32.
        top_k: 0 is off. [B] int32, or None when off for all.
        top_p: 1 is off. [B] float32, or None when off for all.
        carried: what a draft keeps from one step to the next beside cache rows: a step that is run to be captured puts
            it back. A `Drafting` adds its tensors when it starts; another batch's values are written by its prefill.
    """

    cache_lens: torch.Tensor
    draft_lens: torch.Tensor
    root_tokens: torch.Tensor
    last_tokens: torch.Tensor
    active: torch.Tensor
    seeds: torch.Tensor
    offsets: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    carried: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def create(
        cls, batch_size: int, device: torch.device, *, seeds: Sequence[int], temperature: Sequence[float],
        top_k: Sequence[int] | None, top_p: Sequence[float] | None, own_draft_lens: bool = False,
    ) -> DecodingState:  # fmt: skip
        """Create the state of requests that have committed nothing yet."""

        def of(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        zeros = [0] * batch_size
        cache_lens = of(zeros, torch.int32)
        return cls(
            cache_lens=cache_lens,
            draft_lens=cache_lens.clone() if own_draft_lens else cache_lens,
            root_tokens=of(zeros, torch.int64),
            last_tokens=of(zeros, torch.int64),
            active=of([1] * batch_size, torch.int32),
            seeds=of(seeds, torch.int64),
            offsets=of(zeros, torch.int64),
            temperature=of(temperature, torch.float32),
            top_k=None if top_k is None else of(top_k, torch.int32),
            top_p=None if top_p is None else of(top_p, torch.float32),
        )

    @property
    def has_own_draft_lens(self) -> bool:
        """Whether the draft's cache may hold fewer tokens than the target's."""
        return self.draft_lens is not self.cache_lens

    def advancing(self) -> list[torch.Tensor]:
        """Give the tensors that a step changes."""
        return [self.cache_lens, self.draft_lens, self.root_tokens, self.last_tokens, self.offsets, *self.carried]

    def copy_(self, other: DecodingState) -> None:
        """Take over another state's values, in place; both have the same batch size, filters and kind of lengths."""
        for mine, its in zip(vars(self).values(), vars(other).values(), strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(its)


def request_seeds(seed: int, batch_size: int) -> list[int]:
    """Give every request of a batch its own seed.

    The first request gets the seed itself; the others get seeds mixed from it and their index (the finaliser of
    SplitMix64), so that neighbouring seeds do not share streams across a batch.
    """
    seeds = [seed]
    for index in range(1, batch_size):
        value = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
        seeds.append((value ^ (value >> 31)) >> 1)  # a non-negative int64
    return seeds
