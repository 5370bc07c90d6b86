"""Inputs and a loop-by-loop oracle for tree attention."""

from typing import NamedTuple

import torch
from support.packed_masks import unpack


class AttentionInputs(NamedTuple):
    """Positional arguments of tree_attention."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    tree_mask: torch.Tensor
    cache_lens: torch.Tensor

    def double(self):
        return self._replace(q=self.q.double(), k_cache=self.k_cache.double(), v_cache=self.v_cache.double())


def attention_inputs(
    tree_mask, cache_lens, *, num_slots, heads=(4, 2), head_dim=32, value_dim=None, dtype=torch.float32, seed=0
):
    """Standard normal inputs, strided: q as a slice of a wider projection, caches as views of [B, H, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    batch_size, num_rows = len(cache_lens), tree_mask.shape[-2]
    num_q_heads, num_kv_heads = heads
    value_dim = value_dim or head_dim

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q = normal(batch_size, num_rows, num_q_heads + 1, head_dim)[:, :, :num_q_heads]
    k_cache = normal(batch_size, num_kv_heads, num_slots, head_dim).transpose(1, 2)
    v_cache = normal(batch_size, num_kv_heads, num_slots, value_dim).transpose(1, 2)
    return AttentionInputs(q, k_cache, v_cache, tree_mask, torch.tensor(cache_lens, dtype=torch.int32))


def poison_unseen(inputs, sliding_window=None, value=float("nan")):
    """The inputs with every cache row that no query row sees set to a value that would spoil a result."""
    k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
    for request, rows in enumerate(visible_rows(inputs.tree_mask, inputs.cache_lens, sliding_window)):
        seen = sorted({slot for row in rows for slot in row})
        unseen = torch.ones(k_cache.shape[1], dtype=torch.bool)
        unseen[seen] = False
        k_cache[request, unseen] = value
        v_cache[request, unseen] = value
    return inputs._replace(k_cache=k_cache, v_cache=v_cache)


def visible_rows(tree_mask, cache_lens, sliding_window=None):
    """For each request and query row the cache rows that it sees, by the definition of positions."""
    masks = tree_mask if tree_mask.dim() == 3 else tree_mask.expand(len(cache_lens), -1, -1)
    visible = []
    for mask, cache_len in zip(masks, cache_lens.tolist()):
        rows = []
        for slots in unpack(mask):
            position = cache_len + len(slots) - 1
            candidates = [(slot, slot) for slot in range(cache_len)]  # (cache row, its position)
            candidates += [(cache_len + slot, cache_len + depth) for depth, slot in enumerate(slots)]
            rows.append([row for row, at in candidates if sliding_window is None or position - at < sliding_window])
        visible.append(rows)
    return visible


def loop_attention(inputs, *, scale=None, softcap=None, sliding_window=None, sinks=None):
    """Attention one head and one row at a time, in the dtype of the inputs. Returns out and log-sum-exp."""
    q, k_cache, v_cache, tree_mask, cache_lens = inputs
    batch_size, num_rows, num_q_heads, head_dim = q.shape
    group = num_q_heads // k_cache.shape[2]
    out = q.new_zeros(batch_size, num_rows, num_q_heads, v_cache.shape[3])
    lse = q.new_full((batch_size, num_rows, num_q_heads), -torch.inf)
    scale = head_dim**-0.5 if scale is None else scale
    for request, rows in enumerate(visible_rows(tree_mask, cache_lens, sliding_window)):
        for row, slots in enumerate(rows):
            for head in range(num_q_heads):
                scores = k_cache[request, slots, head // group] @ q[request, row, head] * scale
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                logits = scores if sinks is None else torch.cat([scores, sinks[head : head + 1].to(scores.dtype)])
                if len(logits) == 0:
                    continue
                lse[request, row, head] = torch.logsumexp(logits, dim=0)
                weights = torch.softmax(logits, dim=0)[: len(slots)]
                out[request, row, head] = weights @ v_cache[request, slots, head // group]
    return out, lse


def paged(cache, page_size, seed=0):
    """A contiguous cache as pages in random order with foreign pages between them, and its block table."""
    batch_size, num_slots = cache.shape[:2]
    pages_each = -(-num_slots // page_size)
    num_pages = batch_size * pages_each + 3
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
    block_table = order[: batch_size * pages_each].reshape(batch_size, pages_each).to(torch.int32)
    pages = cache.new_empty(num_pages, page_size, *cache.shape[2:]).fill_(float("nan"))
    for request in range(batch_size):
        for slot in range(num_slots):
            pages[block_table[request, slot // page_size], slot % page_size] = cache[request, slot]
    return pages, block_table
