"""The calls whose kernels are compiled: every dtype, head dim, block and option that changes a kernel's code.

`CASES` is the table. An op joins by adding its cases here, each a `CompileCase` that calls the op's own `run` with
tensors of the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from support.triton_compile import DEVICES, CompileCase

from sequoia_kernels.ops.compact_kv_cache_ import triton_kernel as compaction
from sequoia_kernels.ops.tree_attention import triton_kernel as attention

__all__ = ["CASES", "attention_case", "compaction_case"]

FLOAT8 = torch.float8_e4m3fn
ALL_BUT_SMALL = (80, 90, 100)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", FLOAT8: "fp8"}


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# tree_attention


def attention_case(
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
    devices: Iterable[int] = ALL_BUT_SMALL,
) -> CompileCase:
    """A call of tree_attention with 8 kv heads."""
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
            page_size > 0,
            traits,
        )
        return attention.shared_bytes(
            config.block_rows,
            config.tile,
            attention._padded_dim(head_dim),
            attention._padded_dim(value_dim),
            dtype.itemsize,
            cache_dtype.itemsize,
            page_size > 0,
            traits.capability,
        )

    return CompileCase("tree_attention", name, launch, tuple(devices), quick, shared_bound)


def _attention_cases() -> Iterator[CompileCase]:
    half = torch.bfloat16
    everything = {"page_size": 16, "window": 1024, "sinks": True, "lse": True}
    # What the test suite compiles, and for which devices: (head dim, nodes, kind of case).
    quick = {
        (128, 1, "plain"): (80, 90, 100),
        (128, 8, "everything"): (80, 90, 100),
        (128, 16, "plain"): (90,),
        (128, 16, "float8"): (80, 90),
        (128, 64, "plain"): (80, 90, 100),
        (256, 64, "plain"): (90,),
    }
    for head_dim in (64, 128, 256):
        for num_nodes in (1, 8, 16, 32, 64):  # 4 to 256 rows: every block of rows, and several of the largest
            small = DEVICES if head_dim == 128 else ALL_BUT_SMALL
            for kind, options in (("plain", {}), ("everything", everything), ("float8", {"cache_dtype": FLOAT8})):
                tested = quick.get((head_dim, num_nodes, kind), ())
                yield attention_case(half, head_dim, num_nodes, **options, quick=tested, devices=small)
    for num_nodes in (8, 32, 64):
        yield attention_case(half, 128, num_nodes, softcap=50.0, window=4096)
    # A grid that fills the device without splits writes the output itself.
    yield attention_case(half, 128, 512)
    yield attention_case(half, 128, 1, batch_size=64, sinks=True, lse=True)
    yield attention_case(half, 128, 1024, **everything)
    for head_dim, value_dim in ((32, 32), (40, 40), (80, 80), (96, 96), (192, 128), (64, 128)):
        yield attention_case(half, head_dim, 64, value_dim=value_dim)
    yield attention_case(half, 80, 1)
    for group in (3, 32):
        yield attention_case(half, 128, 8, group=group)
    for num_nodes in (8, 64):
        yield attention_case(torch.float16, 128, num_nodes)
    yield attention_case(torch.float16, 128, 8, cache_dtype=FLOAT8)
    for head_dim in (64, 128, 256):
        tested = (80, 90) if head_dim == 128 else ()
        yield attention_case(torch.float32, head_dim, 1, quick=tested, devices=DEVICES)
        yield attention_case(torch.float32, head_dim, 8, **everything, softcap=50.0)
    yield attention_case(torch.float32, 128, 8, cache_dtype=FLOAT8)


# compact_kv_cache_


def compaction_case(num_levels: int, *, page_size: int = 0, quick: tuple[int, ...] = ()) -> CompileCase:
    """A call of compact_kv_cache_ on the 64 caches of a Llama-3-8B."""
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
    return CompileCase("compact_kv_cache_", name, launch, tuple(DEVICES), quick)


def _compaction_cases() -> Iterator[CompileCase]:
    for num_levels in (1, 8, 32, 100):
        yield compaction_case(num_levels, quick=(80, 90, 100) if num_levels == 8 else ())
        yield compaction_case(num_levels, page_size=16)


CASES: list[CompileCase] = [*_attention_cases(), *_compaction_cases()]
