"""tree_attention through torch's scaled_dot_product_attention and a dense mask. Inputs and outputs as in op.py.

Computes: the softmax of reference.py, for caches in the dtype of q, contiguous, without soft-cap, sinks and LSE.

Memory: the caches are read in place through views. On a CPU only rows below max(cache_lens) + tree rows are looked at.
On other devices the lengths are not known without a sync, so the mask covers the whole cache and the rows that nobody
sees are blanked in a copy: a path for checks, not for speed.

Numerics: as torch's kernel. It multiplies rows that nobody sees by a weight of zero, which would let NaN out of
uninitialised cache rows; on a CPU a result that is not finite is therefore computed again from blanked copies. A query
of NaN whose row sees nothing would give NaN, too; such rows are set to 0.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sequoia_kernels.ops.host_calls import ELEMENT_TYPES

from .op import TreeAttentionInputs, TreeAttentionOutput, num_tree_slots
from .reference import visible_slots

try:
    from sequoia_kernels import _host
except ImportError:  # the kernel needs no C++ of ours, only the mask is made faster by it
    _host = None  # type: ignore[assignment]


def supports(inputs: TreeAttentionInputs) -> str | None:
    """Whether torch's kernel can run this call."""
    if inputs.softcap is not None:
        return "torch's scaled_dot_product_attention has no soft-cap"
    if inputs.sinks is not None:
        return "torch's scaled_dot_product_attention has no sinks"
    if inputs.block_table is not None:
        return "torch's scaled_dot_product_attention takes no paged cache"
    if inputs.k_cache.dtype != inputs.q.dtype:
        return "torch's scaled_dot_product_attention takes no float8 cache"
    if inputs.return_lse:
        return "torch's scaled_dot_product_attention returns no log-sum-exp"
    return None


class DenseMask(NamedTuple):
    """What the kernel needs to know about a mask."""

    num_slots: int
    """cache rows to look at"""
    additive: Tensor | None
    """0 or -inf, [B or 1, 1, N, num_slots] in the dtype of q; None if every row sees every slot"""
    has_unseen_slots: bool
    """a request has a slot below num_slots that none of its rows sees"""


def run(inputs: TreeAttentionInputs, outputs: TreeAttentionOutput) -> None:
    """Write the output."""
    q, k_cache, v_cache, tree_mask, cache_lens, scale = inputs[:6]
    sliding_window = inputs.sliding_window
    if q.is_cpu:
        masks = _tree_masks if q.shape[1] <= _TREE_ROWS else _prefill_masks
        lens, shape = tuple(cache_lens.tolist()), tuple(tree_mask.shape)
        num_slots, additive, has_unseen_slots = masks(tree_mask.numpy().tobytes(), shape, lens, sliding_window, q.dtype)
        k_cache, v_cache = k_cache[:, :num_slots], v_cache[:, :num_slots]
        result = _attend(q, k_cache, v_cache, additive, scale)
        if additive is not None and not math.isfinite(float(result.sum())):
            visible = visible_slots(tree_mask, cache_lens, num_slots, sliding_window)
            if has_unseen_slots:
                result = _attend(q, *_blanked(k_cache, v_cache, visible), additive, scale)
            result = result.masked_fill(~visible.any(dim=-1)[:, :, None, None], 0)
    else:
        visible = visible_slots(tree_mask, cache_lens, k_cache.shape[1], sliding_window)
        additive = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf).unsqueeze(1)
        result = _attend(q, *_blanked(k_cache, v_cache, visible), additive, scale)
        result = result.masked_fill(~visible.any(dim=-1)[:, :, None, None], 0)
    outputs.out.copy_(result)


def _attend(q: Tensor, keys: Tensor, values: Tensor, additive: Tensor | None, scale: float) -> Tensor:
    """[B, N, Hq, Dv]. A row that sees nothing comes out as 0 from torch's CPU kernels."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=additive,
        scale=scale,
        enable_gqa=q.shape[2] != keys.shape[2],
    ).transpose(1, 2)


def _blanked(keys: Tensor, values: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the caches in which the rows that nobody sees are 0."""
    unseen = ~visible.any(dim=1)[:, :, None, None]
    return keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)


def dense_mask(
    packed: bytes,
    shape: tuple[int, ...],
    cache_lens: tuple[int, ...],
    sliding_window: int | None,
    dtype: torch.dtype,
) -> DenseMask:
    """Unpack a tree mask on the CPU, in C++ where that is built.

    Args:
        packed: the words of the mask, contiguous.
        shape: [N, W] or [B, N, W].
        cache_lens: committed rows of each request.
        sliding_window: as in the op.
        dtype: of the additive mask.
    """
    num_rows, num_words = shape[-2:]
    if len(shape) == 2 and min(cache_lens) == max(cache_lens):
        cache_lens = cache_lens[:1]  # one mask for all requests
    words = np.frombuffer(packed, dtype=np.int32).reshape(shape)
    tree_slots = num_tree_slots(words, len(cache_lens))
    # the kernel wants a slot to look at, even if nobody sees it
    num_slots = max(1, *(cache_len + count for cache_len, count in zip(cache_lens, tree_slots)))
    if _host is None:
        visible = visible_slots(torch.from_numpy(words.copy()), torch.tensor(cache_lens), num_slots, sliding_window)
        all_seen, has_unseen_slots = bool(visible.all()), not bool(visible.any(dim=1).all())
        additive = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf).unsqueeze(1)
    else:
        additive = torch.empty((len(cache_lens), 1, num_rows, num_slots), dtype=dtype)
        all_seen, has_unseen_slots = _host.expand_tree_mask(
            packed,
            num_words,
            num_rows,
            cache_lens,
            sliding_window or 0,
            additive.data_ptr(),
            ELEMENT_TYPES[dtype],
            num_slots,
        )
    return DenseMask(num_slots, None if all_seen else additive, has_unseen_slots)


# All layers of a forward share one mask, and windowed and full layers alternate in some models: keep a few masks. The
# key is the mask's content and the lengths themselves, so an entry can never be stale: neither writing to the mask in
# place nor reusing its memory matters, and tensors of inference mode, which carry no version counter, work as well.
# A prefill's masks are large and soon obsolete: of those only as many as its layers alternate between.
_TREE_ROWS = 128
_tree_masks = functools.lru_cache(maxsize=16)(dense_mask)
_prefill_masks = functools.lru_cache(maxsize=2)(dense_mask)
