"""Log-probabilities of the tokens that a step emits."""

from __future__ import annotations

import torch

from sequoia_kernels.ops import warped_logsumexp

__all__ = ["token_logprobs"]


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None, top_p: torch.Tensor | None = None, *, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Give the log-probability of each token under its row of logits.

    Args:
        logits: [B, L, vocab].
        tokens: -1 gives anything. [B, L] int64.
        temperature: with it, the probabilities are those of the warped distribution, as tokens are drawn; of a greedy
            request those of its logits, which are not divided then. [B] float32.
        top_k: [B] int32.
        top_p: [B] float32.
        backend: of the op.

    Returns:
        [B, L] float32, -inf where the token has no probability.
    """
    chosen = logits.gather(2, tokens.clamp(min=0)[:, :, None])[:, :, 0].to(torch.float32)
    if temperature is None:
        return chosen - logits.to(torch.float32).logsumexp(-1)
    batch_size, num_rows, _ = logits.shape
    is_drawn = temperature > 0
    scale = torch.where(is_drawn, temperature, 1.0).repeat_interleave(num_rows)
    k = None if top_k is None else torch.where(is_drawn, top_k, 0).repeat_interleave(num_rows)
    p = None if top_p is None else torch.where(is_drawn, top_p, 1.0).repeat_interleave(num_rows)
    warped = warped_logsumexp(logits.flatten(0, 1), scale, k, p, backend=backend)
    shape = batch_size, num_rows
    logprobs = chosen / scale.view(shape) - warped.log_normaliser.view(shape)
    return torch.where(chosen >= warped.cut.view(shape), logprobs, -torch.inf)
