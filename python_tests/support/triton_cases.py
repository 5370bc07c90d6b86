"""The calls whose kernels are compiled: every dtype, head dim, block and option that changes a kernel's code.

`CASES` is the table. An op joins by adding its cases here, each a `CompileCase` that calls the op's own `run` with
tensors of the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from support.triton_compile import CompileCase

from sequoia_kernels.ops.compact_kv_cache_ import triton_kernel as compaction
from sequoia_kernels.ops.tree_attention import triton_kernel as attention

__all__ = ["CASES"]

FLOAT8 = torch.float8_e4m3fn
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", FLOAT8: "fp8"}


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# tree_attention


def _attention_case(
    dtype: torch.dtype,
    head_dim: int,
    num_nodes: int,
    *,
    cache_dtype: torch.dtype | None = None,
    value_dim: int | None = None,
    group: int = 4,
    page_size: int = 0,
    num_slots: int = 8192,
    batch_size: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    lse: bool = False,
    quick: tuple[int, ...] = (),
) -> CompileCase:
    cache_dtype, value_dim, num_kv_heads = cache_dtype or dtype, value_dim or head_dim, 8
    is_float8 = cache_dtype == FLOAT8
    options = [
        *([f"{NAMES[cache_dtype]} cache"] if is_float8 else []),
        *([f"group {group}"] if group != 4 else []),
        *([f"pages of {page_size}"] if page_size else []),
        *(["window"] if window else []),
        *(["soft-cap"] if softcap else []),
        *(["sinks"] if sinks else []),
        *(["lse"] if lse else []),
        *([f"batch {batch_size}"] if batch_size > 1 else []),
    ]
    dims = f"{head_dim}" if value_dim == head_dim else f"{head_dim}/{value_dim}"
    name = ", ".join([NAMES[dtype], f"head dim {dims}", f"{num_nodes} nodes", *options])

    def launch() -> Any:
        if page_size:
            outer = (batch_size * num_slots // page_size, page_size)
            block_table = _empty(batch_size, num_slots // page_size, dtype=torch.int32)
        else:
            outer, block_table = (batch_size, num_slots), None
        scale = _empty(num_kv_heads, dtype=torch.float32) if is_float8 else None
        return attention.run(
            _empty(batch_size, num_nodes, num_kv_heads * group, head_dim, dtype=dtype),
            _empty(*outer, num_kv_heads, head_dim, dtype=cache_dtype),
            _empty(*outer, num_kv_heads, value_dim, dtype=cache_dtype),
            _empty(num_nodes, -(-num_nodes // 32), dtype=torch.int32),
            _empty(batch_size, dtype=torch.int32),
            head_dim**-0.5,
            softcap,
            window,
            _empty(num_kv_heads * group, dtype=torch.float32) if sinks else None,
            block_table,
            scale,
            scale,
            lse,
            None,
            None,
        )

    def shared_bound(traits: Any) -> int:
        config = attention._launch_config(
            batch_size,
            num_nodes,
            num_kv_heads,
            group,
            head_dim,
            value_dim,
            dtype.itemsize,
            cache_dtype.itemsize,
            num_slots,
            traits,
        )
        return attention.shared_bytes(
            config.block_rows,
            config.tile,
            attention._padded_dim(head_dim),
            attention._padded_dim(value_dim),
            dtype.itemsize,
            cache_dtype.itemsize,
            traits.capability,
        )

    return CompileCase("tree_attention", name, launch, quick, shared_bound)


def _attention_cases() -> Iterator[CompileCase]:
    half = torch.bfloat16
    everything = {"page_size": 16, "window": 1024, "sinks": True, "lse": True}
    for head_dim in (64, 128, 256):
        for num_nodes in (1, 8, 16, 64):  # 4, 32, 64 and 256 rows: one for each block of rows
            common = (80, 90, 100) if (head_dim, num_nodes) == (128, 1) else ()
            wide = (90,) if (head_dim, num_nodes) in ((128, 16), (256, 64)) else ()
            many = (80, 90, 100) if (head_dim, num_nodes) == (128, 64) else ()
            yield _attention_case(half, head_dim, num_nodes, quick=common or wide or many)
            yield _attention_case(
                half,
                head_dim,
                num_nodes,
                **everything,
                quick=(80, 90, 100) if (head_dim, num_nodes) == (128, 8) else (),
            )
            yield _attention_case(half, head_dim, num_nodes, softcap=50.0, window=4096)
            yield _attention_case(
                half,
                head_dim,
                num_nodes,
                cache_dtype=FLOAT8,
                quick=(80, 90) if (head_dim, num_nodes) == (128, 16) else (),
            )
    # A grid that fills the device without splits writes the output itself.
    yield _attention_case(half, 128, 512)
    yield _attention_case(half, 128, 1, batch_size=64, sinks=True, lse=True)
    yield _attention_case(half, 128, 1024, **everything)
    for head_dim, value_dim in ((32, 32), (40, 40), (80, 80), (96, 96), (112, 112), (192, 128), (64, 128)):
        for num_nodes in (1, 64):
            yield _attention_case(half, head_dim, num_nodes, value_dim=value_dim)
    for group in (1, 3, 7, 32):
        yield _attention_case(half, 128, 8, group=group)
    for num_nodes in (1, 8, 64):
        yield _attention_case(torch.float16, 128, num_nodes)
    yield _attention_case(torch.float16, 128, 8, cache_dtype=FLOAT8)
    for head_dim in (64, 128, 256):
        for num_nodes in (1, 8):
            yield _attention_case(
                torch.float32, head_dim, num_nodes, quick=(80, 90) if (head_dim, num_nodes) == (128, 1) else ()
            )
            yield _attention_case(torch.float32, head_dim, num_nodes, **everything, softcap=50.0)
    yield _attention_case(torch.float32, 128, 8, cache_dtype=FLOAT8)


# compact_kv_cache_


def _compaction_case(num_levels: int, *, page_size: int = 0, quick: tuple[int, ...] = ()) -> CompileCase:
    num_caches, batch_size, num_slots = 64, 2, 8192

    def launch() -> None:
        outer = (batch_size * num_slots // page_size, page_size) if page_size else (batch_size, num_slots)
        caches = [_empty(*outer, 8, 128, dtype=torch.bfloat16) for _ in range(num_caches)]
        lens = _empty(batch_size, dtype=torch.int32)
        block_table = _empty(batch_size, num_slots // page_size, dtype=torch.int32) if page_size else None
        entries = _empty(num_caches, 7, dtype=torch.int64)
        compaction.run(
            caches, _empty(batch_size, num_levels, dtype=torch.int32), lens, lens, block_table, entries, 8 * 128 * 2
        )

    name = f"{num_levels} levels" + (f", pages of {page_size}" if page_size else "")
    return CompileCase("compact_kv_cache_", name, launch, quick)


def _compaction_cases() -> Iterator[CompileCase]:
    for num_levels in (1, 8, 32, 100):
        yield _compaction_case(num_levels, quick=(80, 90, 100) if num_levels == 8 else ())
        yield _compaction_case(num_levels, page_size=16)


CASES: list[CompileCase] = [*_attention_cases(), *_compaction_cases()]
