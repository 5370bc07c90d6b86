"""Reference of tree_attention: the specification, in plain torch on any device. Inputs and outputs as in op.py.

Definition, for request b, query row i, query head h with key/value head g = h // (Hq / Hkv):
    depth(i)   = number of set bits in row i of the mask - 1
    visible    = prefix rows s < cache_lens[b], and rows cache_lens[b] + j for every set bit j
    with a window w: prefix rows with cache_lens[b] + depth(i) - s < w, and of the set bits the last w (they stand in
    depth order, so bit j has the depth that its rank among the set bits gives)
    score(s)   = scale * q . k_s, then softcap * tanh(score / softcap)
    lse        = log(sum over visible s of exp(score(s)) + exp(sinks[h]))
    out        = sum over visible s of exp(score(s) - lse) * v_s,   0 where nothing is visible and there is no sink
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import TreeAttentionInputs, TreeAttentionOutput

__all__ = ["gather_pages", "run", "supports", "visible_slots"]


def supports(inputs: TreeAttentionInputs) -> str | None:
    """Every call that passes the op's checks runs here."""
    return None


def run(inputs: TreeAttentionInputs, outputs: TreeAttentionOutput) -> None:
    """Write the outputs."""
    q, k_cache, v_cache, tree_mask, cache_lens, scale, softcap, sliding_window = inputs[:8]
    sinks, block_table, k_scale, v_scale = inputs[8:12]
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch_size, num_rows, num_q_heads, head_dim = q.shape
    if block_table is not None:
        k_cache, v_cache = gather_pages(k_cache, block_table), gather_pages(v_cache, block_table)
    num_slots, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    if cache_lens.is_cpu and batch_size > 0:  # where lengths can be read without a sync, leave out rows that none sees
        num_slots = min(num_slots, int(cache_lens.max()) + 32 * tree_mask.shape[-1])

    visible = visible_slots(tree_mask, cache_lens, num_slots, sliding_window)  # [B, N, S]
    # What nobody sees may be uninitialised memory, and 0 * nan is nan.
    seen = visible.any(dim=1)[:, :, None, None]
    keys = _scaled(k_cache[:, :num_slots].to(compute_dtype), k_scale).masked_fill(~seen, 0)  # [B, S, Hkv, D]
    values = _scaled(v_cache[:, :num_slots].to(compute_dtype), v_scale).masked_fill(~seen, 0)  # [B, S, Hkv, Dv]

    grouped = q.to(compute_dtype).reshape(batch_size, num_rows, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    scores = torch.einsum("bnhgd,bshd->bnhgs", grouped, keys) * scale  # [B, N, Hkv, group, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, :, None, None, :], -torch.inf)
    log_sum = scores.logsumexp(dim=-1)  # [B, N, Hkv, group]
    if sinks is not None:
        log_sum = torch.logaddexp(log_sum, sinks.to(compute_dtype).reshape(num_kv_heads, -1))
    weights = torch.exp(scores - log_sum.unsqueeze(-1))
    weights = weights.masked_fill(~visible[:, :, None, None, :], 0)  # a row that sees nothing: exp(-inf + inf)
    outputs.out.copy_(torch.einsum("bnhgs,bshd->bnhgd", weights, values).flatten(2, 3))
    if outputs.lse is not None:
        outputs.lse.copy_(log_sum.flatten(2, 3))


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """Lay a paged cache [P, page, H, D] out as [B, max_pages * page, H, D]."""
    # Entries behind a request's last page may be anything.
    return pages[block_table.long().clamp(0, pages.shape[0] - 1)].flatten(1, 2)


def visible_slots(tree_mask: Tensor, cache_lens: Tensor, num_slots: int, sliding_window: int | None) -> Tensor:
    """Which cache rows each query row sees. [B, N, num_slots] bool."""
    device = tree_mask.device
    if tree_mask.dim() == 2:
        tree_mask = tree_mask.expand(cache_lens.shape[0], -1, -1)
    bits = (tree_mask.unsqueeze(-1) >> torch.arange(32, device=device, dtype=torch.int32)) & 1
    bits = bits.flatten(2)  # [B, N, 32 W], bit j = tree slot j
    num_bits = bits.sum(dim=-1, keepdim=True)
    tree_visible = bits.bool()
    slots = torch.arange(num_slots, device=device)
    lens = cache_lens.long()[:, None, None]
    prefix_visible = slots < lens  # [B, 1, S]
    if sliding_window is not None:
        depth_of_bit = bits.cumsum(dim=-1) - 1
        tree_visible = tree_visible & (num_bits - 1 - depth_of_bit < sliding_window)
        prefix_visible = prefix_visible & (lens + num_bits - 1 - slots < sliding_window)
    tree_slots = slots - lens  # [B, 1, S]
    in_tree = (tree_slots >= 0) & (tree_slots < bits.shape[-1])
    indices = torch.where(in_tree, tree_slots, 0).expand(-1, bits.shape[1], -1)
    return prefix_visible | (in_tree & tree_visible.gather(-1, indices))


def _scaled(cache: Tensor, scale: Tensor | None) -> Tensor:
    return cache if scale is None else cache * scale.unsqueeze(-1).to(cache.dtype)
