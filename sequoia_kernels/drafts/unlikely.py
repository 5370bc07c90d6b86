"""A draft's unlikely tokens behind the others, where the target is cut by top-p: children are seldom spent on them.

Top-p leaves the target few tokens, and the draft would give a part of a node's children to others, which cannot be
accepted. So the least likely tokens of the draft, of (1 - top_p) / 2 of its probability at most, lose `BEHIND`
temperatures of their logits: they are drawn once the others are used up, and nearly never before. That is half of what
top-p takes from the target, since the two do not agree. Children are drawn from the changed rows and verified against
the same, so this is exact as any other draft is.

    unlikely(x) = logit(x) < largest logit - n T ln 2,   n in 1 .. 32 the smallest for which
                  the sum of these tokens' probabilities is at most (1 - top_p) / 2, or 32

A bound that is a power of 2 takes five sums over a row to find, and no sort of it. On a CUDA device three launches of
Triton do it (`triton_unlikely.py`): by default as on a CPU, since that is less than 2 % of a step by estimate.
"""

from __future__ import annotations

import math

import torch

from sequoia_kernels.host_module import host as _host
from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.ops.backends import runs_own
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, address
from sequoia_kernels.ops.warping import compute_dtype

__all__ = ["BEHIND", "set_back_unlikely"]

BEHIND = 30.0  # nats: far less likely than anything that is kept, and far from where float32 gives 0
_MOST_HALVINGS = 32


def set_back_unlikely(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor | None, backend: str = "auto"
) -> torch.Tensor:
    """Move a draft's unlikely tokens behind the others.

    Args:
        logits: of the draft. [B, W, vocab], strided at will.
        temperature: of each request. [B] float32. At 0 its rows are left as they are.
        top_p: of each request, the target's. [B] float32, or None for off. At 1 its rows are left as they are.
        backend: backend of the ops: where the draw runs in C++ or Triton, this does.

    Returns:
        The changed logits, or those given where nothing can change. Finite ones stay finite.

    Notes:
        No host sync; can be captured in a CUDA graph.
    """
    if top_p is None:
        return logits
    batch_size, width, vocab = logits.shape
    draw, device_type = sample_without_replacement.__name__, logits.device.type
    if logits.is_cpu and runs_own(draw, backend, device_type, "host"):
        changed = logits.clone(memory_format=torch.contiguous_format)
        _host.set_back_unlikely(
            address(changed), ELEMENT_TYPES[changed.dtype], address(temperature), address(top_p), BEHIND, batch_size,
            width, vocab, vocab,
        )  # fmt: skip
        return changed
    if runs_own(draw, backend, device_type, "triton"):
        from sequoia_kernels.drafts import triton_unlikely

        if triton_unlikely.supports(logits):
            return triton_unlikely.run(logits, temperature, top_p, BEHIND, _MOST_HALVINGS)
    rows = (values.repeat_interleave(width) for values in (temperature, top_p))
    return _reference(logits.flatten(0, 1), *rows).view_as(logits)


def _reference(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The specification. [R, vocab], [R], [R]."""
    wide = logits.to(compute_dtype(logits.dtype))
    finite = wide.nan_to_num()  # a row with NaN or infinity is the draw's to refuse
    is_cut = (temperature > 0) & (top_p < 1)
    scale = torch.where(is_cut, temperature, 1.0).to(wide.dtype)[:, None]
    peak = finite.amax(1, keepdim=True)
    weights = ((finite - peak) / scale).exp()
    halvings = torch.arange(1, _MOST_HALVINGS + 1, dtype=wide.dtype, device=wide.device)
    cuts = peak - halvings * (math.log(2) * scale)  # [R, 32]
    below = torch.stack([torch.where(finite < cut[:, None], weights, 0).sum(1) for cut in cuts.unbind(1)], 1)
    fits = below <= weights.sum(1, keepdim=True) * ((1 - top_p) / 2).to(wide.dtype)[:, None]
    fits[:, -1] = True
    cut = cuts.gather(1, fits.int().argmax(1, keepdim=True))  # the first that fits
    lowered = (wide - BEHIND * scale).clamp(min=torch.finfo(logits.dtype).min).to(logits.dtype)
    return torch.where(is_cut[:, None] & (wide < cut) & (wide > -torch.inf), lowered, logits)
