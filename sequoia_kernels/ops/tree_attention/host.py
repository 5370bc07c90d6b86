"""tree_attention in C++ on the CPU; see csrc/host/tree_attention.cpp. Inputs and outputs as in op.py.

One call, no mask tensors: the lengths and the packed mask are read in place, and checked there, so that a decoding step
of a small model, which attends once a layer, pays little more than the arithmetic.
"""

from __future__ import annotations

import torch

from sequoia_kernels import _host
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, address, deliver, writable

from . import sdpa
from .op import TreeAttentionInputs, TreeAttentionOutput, check_values

__all__ = ["CHECKS_VALUES", "declines", "run", "supports"]

CHECKS_VALUES = True

_TYPES = {dtype: ELEMENT_TYPES[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def supports(inputs: TreeAttentionInputs) -> str | None:
    """CPU tensors in one of three dtypes."""
    if not inputs.q.is_cpu:
        return "takes CPU tensors"
    if inputs.q.dtype not in _TYPES:
        return "takes float32, bfloat16 and float16"
    if inputs.k_cache.dtype != inputs.q.dtype:
        return "takes no float8 cache"
    return None


# Multiply-adds of about 60 us on one core; see `declines`.
_ONE_THREAD_WORK = 1 << 21
# Turning a key and reading a value costs about as much as using them for this many query rows.
_COST_OF_A_SLOT = 6
# Query rows of a key/value head up to which one thread of this backend is as fast as two of torch's kernel.
_ROWS_AGAINST_TWO = 64


def declines(inputs: TreeAttentionInputs) -> str | None:
    """Leave to torch's kernel what its threads do faster.

    On one thread this backend takes 0.3 to 0.9 of the time of torch's kernel with its mask for 1 to 256 rows behind
    256 to 4096 slots, float32 and bfloat16 (AVX-512, torch 2.13; it is 0 to 20 % slower where float32 caches of 16 MiB
    and more stream from memory). It runs on one thread only, while torch's kernel spreads the heads over all. Two
    threads do not make up for it: up to 64 rows of a key/value head this backend takes 0.1 (one bfloat16 row) to 1.1 of
    the time of torch's two, beyond 0.7 to 1.5 (two cores, 128 to 4096 slots). More threads win over their fixed cost
    from some 60 us of work on. The work is that of a full cache, since lengths are values.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or sdpa.supports(inputs) is not None:
        return None
    q, k_cache, v_cache = inputs[:3]
    rows_per_head = q.shape[1] * q.shape[2] // k_cache.shape[2]
    if num_threads == 2 and rows_per_head <= _ROWS_AGAINST_TWO:
        return None
    cache_elements = q.shape[0] * k_cache.shape[1] * k_cache.shape[2] * (q.shape[3] + v_cache.shape[3])
    return (
        "one thread is slower there than torch's kernel on all"
        if (rows_per_head + _COST_OF_A_SLOT) * cache_elements > _ONE_THREAD_WORK
        else None
    )


def run(inputs: TreeAttentionInputs, outputs: TreeAttentionOutput) -> None:
    """Write the outputs."""
    q, k_cache, v_cache, tree_mask, cache_lens = inputs[:5]
    block_table = inputs.block_table
    results = writable(outputs)
    sinks = None if inputs.sinks is None else inputs.sinks.to(torch.float32).contiguous()
    attended = _host.tree_attention(
        q.data_ptr(),
        q.shape,
        q.stride(),
        k_cache.data_ptr(),
        k_cache.shape,
        k_cache.stride(),
        v_cache.data_ptr(),
        v_cache.shape,
        v_cache.stride(),
        _TYPES[q.dtype],
        tree_mask.data_ptr(),
        tree_mask.shape[-1],
        tree_mask.dim() == 3,
        cache_lens.data_ptr(),
        inputs.scale,
        inputs.softcap or 0.0,
        inputs.sliding_window or 0,
        address(sinks),
        address(block_table),
        0 if block_table is None else block_table.shape[1],
        results.out.data_ptr(),
        address(results.lse),
        1,
    )
    if not attended:  # something lies outside the cache: name it
        check_values(inputs)
    deliver(results, outputs)
