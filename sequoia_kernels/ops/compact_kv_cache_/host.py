"""compact_kv_cache_ in C++ on the CPU; see csrc/host/compact_kv_cache.cpp. Inputs as in op.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

import sequoia_kernels._host as _host
from sequoia_kernels.ops.host_calls import address

from .op import CompactInputs

__all__ = ["bind", "run", "supports"]


def supports(inputs: CompactInputs) -> str | None:
    """CPU tensors of every shape and dtype of the contract."""
    return None if inputs.cache_lens.is_cpu else "takes CPU tensors"


def bind(inputs: CompactInputs) -> Callable[[], None]:
    """Prepare moves by what will lie in these tensors then."""
    accepted_nodes, num_accepted = inputs.accepted_nodes, inputs.num_accepted
    # what the module advances
    cache_lens = inputs.cache_lens if inputs.advance else torch.empty_like(inputs.cache_lens)
    entries, page_size = inputs.table(), inputs.page_size
    arguments = (
        entries.data_ptr(),
        len(inputs.caches),
        accepted_nodes.data_ptr(),
        *accepted_nodes.stride(),
        num_accepted.data_ptr(),
        num_accepted.stride(0),
        cache_lens.data_ptr(),
        cache_lens.stride(0),
        accepted_nodes.shape[0],
        address(inputs.block_table if page_size else None),
        *inputs.table_strides,
        page_size or 1,
    )

    def call(held: object = (inputs, cache_lens, entries)) -> None:
        if not inputs.advance:
            cache_lens.copy_(inputs.cache_lens)
        _host.compact_kv_cache(*arguments)

    return call


def run(inputs: CompactInputs, outputs: None = None) -> None:
    """Move the rows and advance the lengths."""
    bind(inputs)()
