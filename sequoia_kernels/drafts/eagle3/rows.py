"""One forward of a head on rows that are known beforehand, by torch or in C++."""

from __future__ import annotations

from typing import Protocol

import torch

from sequoia_kernels.drafts.eagle3.head import EagleHead
from sequoia_kernels.drafts.eagle3.native import NativeHead
from sequoia_kernels.models import TreeCache, TreeStep

__all__ = ["Rows", "bind_rows"]


class Rows(Protocol):
    """Forwards of N rows of B requests."""

    def run(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        cache_lens: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the rows through the layers and score what is behind them.

        Args:
            tokens: tokens of the rows; those that have no embedding are fed as the nearest that has. [B, N] int64.
            features: what goes with them. [B, N, H].
            cache_lens: rows that all of these see. [B] int32.
            wanted: different rows whose logits are wanted, as many as it was bound for. [B, K] int64; None for all.

        Returns:
            Outputs of the last layer, not normed, [B, N, H], and logits [B, N or K, Vd]. The next run may overwrite
            both.
        """


def bind_rows(
    head: EagleHead, native: NativeHead | None, cache: TreeCache, num_rows: int, step: TreeStep, num_wanted: int | None
) -> Rows:
    """Prepare forwards.

    Args:
        head: the head.
        native: the same in C++, where that is to run.
        cache: the head's, for B requests.
        num_rows: N.
        step: what each row sees, and where it goes.
        num_wanted: K, None where the logits of all rows are wanted.
    """
    if native is None:
        return _TorchRows(head, cache, step)
    return _NativeRows(head, native, cache, num_rows, step, num_wanted)


class _TorchRows:
    def __init__(self, head: EagleHead, cache: TreeCache, step: TreeStep) -> None:
        self._head, self._cache, self._step = head, cache, step

    def run(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        cache_lens: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self._head.forward(tokens, features, self._cache, cache_lens, self._step)
        scored = outputs if wanted is None else outputs.take_along_dim(wanted[:, :, None], 1)
        return outputs, self._head.logits(scored)


class _NativeRows(_TorchRows):
    """Has buffers that the bound forward reads and writes."""

    def __init__(
        self, head: EagleHead, native: NativeHead, cache: TreeCache, num_rows: int, step: TreeStep,
        num_wanted: int | None,
    ) -> None:  # fmt: skip
        super().__init__(head, cache, step)
        batch_size, width = cache.batch_size, head.embed.shape[1]
        vocab = head.lm_head.weight.shape[0]
        with torch.inference_mode(False):
            self._tokens = torch.zeros(batch_size, num_rows, dtype=torch.int64)
            self._features = torch.zeros(batch_size, num_rows, width, dtype=torch.float32)
            self._outputs = torch.zeros_like(self._features)
            self._cache_lens = torch.zeros(batch_size, dtype=torch.int32)
            self._wanted = None if num_wanted is None else torch.zeros(batch_size, num_wanted, dtype=torch.int64)
            self._logits = torch.zeros(batch_size, num_wanted or num_rows, vocab, dtype=head.lm_head.weight.dtype)
        self._bound = native.bind(
            self._tokens, self._features, cache, self._cache_lens, step, self._outputs, self._wanted
        )

    def run(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        cache_lens: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._tokens.copy_(tokens)
        self._features.copy_(features)
        self._cache_lens.copy_(cache_lens)
        if self._wanted is not None and wanted is not None:
            self._wanted.copy_(wanted)
        if self._bound.run(self._logits):
            return self._outputs, self._logits
        # A length is out of range: the op says which.
        return super().run(tokens, features.to(self._logits.dtype), cache_lens, wanted)
