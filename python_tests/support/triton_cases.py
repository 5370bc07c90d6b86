"""The calls whose kernels are compiled: every dtype, head dim, block and option that changes a kernel's code.

Sizes of 1 are among them: Triton makes a constant of each, which is other code than that of a size it does not know.

`CASES` is the table. An op joins by adding its cases here, each a `CompileCase` that calls the op's own `run` with
tensors of the meta device. The steps of the fused forward, and what drafts do beside their draws, are no ops, but
compiled as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from support.triton_compile import DEVICES, CompileCase

from sequoia_kernels.drafts import triton_shaping, triton_unlikely
from sequoia_kernels.drafts.shaping import LEAST_REACH
from sequoia_kernels.models.fused import steps
from sequoia_kernels.ops.compact_kv_cache_ import triton_launch as compaction
from sequoia_kernels.ops.compact_kv_cache_.op import CompactInputs
from sequoia_kernels.ops.sample_without_replacement import triton_launch as sampling
from sequoia_kernels.ops.sample_without_replacement.op import OPERATOR as sampling_operator
from sequoia_kernels.ops.sample_without_replacement.op import SampleInputs
from sequoia_kernels.ops.tree_attention import triton_launch as attention
from sequoia_kernels.ops.tree_attention.op import OPERATOR as attention_operator
from sequoia_kernels.ops.tree_attention.op import TreeAttentionInputs
from sequoia_kernels.ops.verify_tree import triton_launch as verification
from sequoia_kernels.ops.verify_tree.op import OPERATOR as verification_operator
from sequoia_kernels.ops.verify_tree.op import VerifyTreeInputs
from sequoia_kernels.ops.warped_logsumexp import triton_launch as warping
from sequoia_kernels.ops.warped_logsumexp.op import OPERATOR as warping_operator
from sequoia_kernels.ops.warped_logsumexp.op import WarpInputs
from sequoia_kernels.tree import Topology

__all__ = [
    "CASES", "DRAFTING", "FUSED", "attention_case", "compaction_case", "sampling_case", "verification_case",
    "warping_case",
]  # fmt: skip

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
        *([f"slots {num_slots}"] if num_slots < 8192 else []),
        *(["window"] if window else []),
        *(["soft-cap"] if softcap else []),
        *(["sinks"] if sinks else []),
        *(["lse"] if lse else []),
        *([f"batch {batch_size}"] if batch_size > 1 else []),
    ]
    dims = f"{head_dim}" if value_dim == head_dim else f"{head_dim}/{value_dim}"
    name = ", ".join([NAMES[dtype], f"head dim {dims}", f"{num_nodes} nodes", *options])

    def launch() -> None:
        if page_size:
            outer = (batch_size * num_slots // page_size, page_size)
            block_table = _empty(batch_size, num_slots // page_size, dtype=torch.int32)
        else:
            outer, block_table = (batch_size, num_slots), None
        scale = _empty(num_kv_heads, dtype=torch.float32) if is_float8 else None
        inputs = TreeAttentionInputs(
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
        )
        attention.run(inputs, attention_operator.new_outputs(inputs))

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

    return CompileCase("tree_attention", name, launch, tuple(devices), quick, shared_bound, "tree_attention_kernel")


def _attention_cases() -> Iterator[CompileCase]:
    half = torch.bfloat16
    everything = {"page_size": 16, "window": 1024, "sinks": True, "lse": True}
    tables: tuple[tuple[str, dict[str, Any]], ...] = (("contiguous", {}), ("paged", everything))
    # What the test suite compiles, and for which devices: (dtype, head dim, nodes, kind of table).
    quick = {
        ("bf16", 128, 1, "contiguous"): (80,),
        ("bf16", 128, 8, "paged"): (90, 100),
        ("bf16", 128, 64, "contiguous"): (80,),
        ("bf16", 256, 64, "paged"): (90,),
        ("fp8", 128, 16, "contiguous"): (100,),
        ("fp32", 128, 1, "contiguous"): (80,),
    }
    dtypes: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "bf16": (half, {}),
        "fp16": (torch.float16, {}),
        "fp8": (half, {"cache_dtype": FLOAT8}),
        "fp32": (torch.float32, {}),
    }
    # 4 rows to 256: every block of rows, and more than one of the largest. What float16 launches is bfloat16's.
    nodes_of = {
        "bf16": {32: (16,), 64: (16, 64), 128: (1, 8, 16, 32, 64), 256: (16, 32, 64)},
        "fp16": {32: (16,), 64: (16,), 128: (16,), 256: (16,)},
        "fp8": {32: (16,), 64: (16,), 128: (16, 64), 256: (16, 64)},
        "fp32": {32: (8,), 64: (8,), 128: (1, 8), 256: (8,)},
    }
    for name, (dtype, cache) in dtypes.items():
        for head_dim, nodes in nodes_of[name].items():
            for table, options in tables:
                small = DEVICES if head_dim == 128 and table == "contiguous" else ALL_BUT_SMALL
                for num_nodes in nodes:
                    tested = quick.get((name, head_dim, num_nodes, table), ())
                    yield attention_case(dtype, head_dim, num_nodes, **cache, **options, quick=tested, devices=small)
    for head_dim, value_dim in ((40, 40), (80, 80), (96, 96), (192, 128)):
        yield attention_case(half, head_dim, 64, value_dim=value_dim)
    yield attention_case(half, 40, 1)
    yield attention_case(half, 128, 64, softcap=50.0, window=4096)
    yield attention_case(torch.float32, 128, 8, **everything, softcap=50.0)
    # A grid that fills the device without splits writes the output itself.
    yield attention_case(half, 128, 512)
    yield attention_case(half, 128, 1, batch_size=64, sinks=True, lse=True)
    yield attention_case(half, 128, 1024, **everything)
    for group in (3, 32):
        yield attention_case(half, 128, 8, group=group)
    yield attention_case(torch.float16, 128, 8, cache_dtype=FLOAT8)
    yield attention_case(torch.float32, 128, 8, cache_dtype=FLOAT8)
    yield attention_case(half, 64, 1, group=1, num_slots=1, quick=(90,))
    yield attention_case(half, 64, 1, group=1, num_slots=1, **{**everything, "page_size": 1}, quick=(90,))


# compact_kv_cache_


def compaction_case(
    num_levels: int,
    *,
    num_caches: int = 64,
    batch_size: int = 2,
    num_slots: int = 8192,
    page_size: int = 0,
    quick: tuple[int, ...] = (),
) -> CompileCase:
    """A call of compact_kv_cache_, on the 64 caches of a Llama-3-8B if no other number is given."""

    def launch() -> None:
        outer = (batch_size * num_slots // page_size, page_size) if page_size else (batch_size, num_slots)
        caches = [_empty(*outer, 8, 128, dtype=torch.bfloat16) for _ in range(num_caches)]
        lens = _empty(batch_size, dtype=torch.int32)
        block_table = _empty(batch_size, num_slots // page_size, dtype=torch.int32) if page_size else None
        entries = _empty(num_caches, 7, dtype=torch.int64)
        path = _empty(batch_size, num_levels, dtype=torch.int32)
        compaction.run(CompactInputs(caches, path, lens, lens, block_table, entries, 8 * 128 * 2, num_slots, True))

    options = [
        *([f"pages of {page_size}"] if page_size else []),
        *([f"caches {num_caches}"] if num_caches != 64 else []),
        *([f"batch {batch_size}"] if batch_size != 2 else []),
        *([f"slots {num_slots}"] if num_slots != 8192 else []),
    ]
    name = ", ".join([f"{num_levels} levels", *options])
    return CompileCase("compact_kv_cache_", name, launch, quick=quick)


def _compaction_cases() -> Iterator[CompileCase]:
    for num_levels in (1, 8, 32, 100):
        yield compaction_case(num_levels, quick=(80, 100) if num_levels == 8 else ())
        yield compaction_case(num_levels, page_size=16)
    for page_size in (0, 1):
        yield compaction_case(1, num_caches=1, batch_size=1, num_slots=1, page_size=page_size, quick=(90,))


# the ops on logits


def warping_case(
    dtype: torch.dtype,
    *,
    num_rows: int = 64,
    vocab: int = 128256,
    top_k: bool = False,
    top_p: bool = False,
    quick: tuple[int, ...] = (),
) -> CompileCase:
    """A call of warped_logsumexp."""
    options = [*(["top-k"] if top_k else []), *(["top-p"] if top_p else [])]
    name = ", ".join([NAMES[dtype], f"{num_rows} x {vocab}", *options])

    def launch() -> None:
        inputs = WarpInputs(
            _empty(num_rows, vocab, dtype=dtype),
            _empty(num_rows, dtype=torch.float32),
            _empty(num_rows, dtype=torch.int32) if top_k else None,
            _empty(num_rows, dtype=torch.float32) if top_p else None,
        )
        warping.run(inputs, warping_operator.new_outputs(inputs))

    return CompileCase("warped_logsumexp", name, launch, quick=quick)


def _warping_cases() -> Iterator[CompileCase]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tested = (80, 100) if dtype == torch.bfloat16 else ()
        yield warping_case(dtype)
        yield warping_case(dtype, top_k=True, top_p=True, quick=tested)
    yield warping_case(torch.bfloat16, top_k=True)
    yield warping_case(torch.bfloat16, top_p=True)
    for num_rows, vocab in ((1, 32000), (1, 61), (1, 2), (1, 1), (4, 1)):
        tested = (90,) if vocab == 1 else ()
        yield warping_case(torch.bfloat16, num_rows=num_rows, vocab=vocab, top_k=True, top_p=True, quick=tested)


def sampling_case(
    dtype: torch.dtype,
    num_samples: int,
    *,
    num_rows: int = 64,
    vocab: int = 128256,
    quick: tuple[int, ...] = (),
) -> CompileCase:
    """A call of sample_without_replacement."""

    def launch() -> None:
        streams = _empty(num_rows, dtype=torch.int64)
        inputs = SampleInputs(
            _empty(num_rows, vocab, dtype=dtype),
            num_samples,
            _empty(num_rows, dtype=torch.float32),
            streams,
            streams,
        )
        sampling.run(inputs, sampling_operator.new_outputs(inputs))

    name = f"{NAMES[dtype]}, {num_rows} x {vocab}, k = {num_samples}"
    return CompileCase("sample_without_replacement", name, launch, quick=quick)


def _sampling_cases() -> Iterator[CompileCase]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_samples in (1, 16, 128):
            tested = (80, 100) if dtype == torch.bfloat16 and num_samples == 16 else ()
            yield sampling_case(dtype, num_samples, quick=tested)
    for num_rows, vocab, num_samples in ((1, 128256, 8), (4, 32000, 4), (1, 61, 2), (5, 50, 6), (1, 1, 1), (4, 1, 1)):
        tested = (90,) if vocab in (1, 50) else ()
        yield sampling_case(torch.bfloat16, num_samples, num_rows=num_rows, vocab=vocab, quick=tested)


def verification_case(
    dtype: torch.dtype,
    tree: str,
    num_nodes: int,
    num_levels: int,
    max_branching: int,
    *,
    vocab: int = 128256,
    batch_size: int = 1,
    warped: bool = False,
    rule: str = "sequoia",
    draft_vocab: int | None = None,
    certain: str | None = None,
    quick: tuple[int, ...] = (),
) -> CompileCase:
    """A call of verify_tree; of a tree, only these numbers decide what is compiled. draft_vocab 0: without a draft."""
    options = [
        *([f"batch {batch_size}"] if batch_size > 1 else []),
        *(["top-k, top-p"] if warped else []),
        *([rule] if rule != "sequoia" else []),
        *([f"draft vocab {draft_vocab}" if draft_vocab else "no draft"] if draft_vocab is not None else []),
        *([f"certain {certain}"] if certain else []),
    ]
    name = ", ".join([NAMES[dtype], f"{tree} x {vocab}", *options])

    def launch() -> None:
        logits = _empty(batch_size, num_nodes, vocab, dtype=dtype)
        streams = _empty(batch_size, dtype=torch.int64)
        topology = _empty(num_nodes, dtype=torch.int32)
        draft_logits = logits if num_nodes > 1 and draft_vocab != 0 else None
        if draft_vocab:
            draft_logits = _empty(batch_size, num_nodes, draft_vocab, dtype=dtype)
        flags = {"nodes": (num_nodes,), "requests": (batch_size, num_nodes)}
        inputs = VerifyTreeInputs(
            _empty(batch_size, num_nodes, dtype=torch.int64),
            logits,
            draft_logits,
            topology,
            topology,
            num_levels,
            max_branching,
            _empty(batch_size, dtype=torch.float32),
            streams,
            streams,
            _empty(batch_size, dtype=torch.int32) if warped else None,
            _empty(batch_size, dtype=torch.float32) if warped else None,
            rule,
            _empty(vocab, dtype=torch.int32) if draft_vocab else None,
            _empty(*flags[certain], dtype=torch.bool) if certain else None,
        )
        verification.run(inputs, verification_operator.new_outputs(inputs))

    return CompileCase("verify_tree", name, launch, quick=quick)


def _verification_cases() -> Iterator[CompileCase]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tested = (90,) if dtype == torch.bfloat16 else ()
        yield verification_case(dtype, "64 nodes, 8 children", 64, 8, 8)
        yield verification_case(dtype, "128 nodes, 16 children", 128, 10, 16, warped=True, quick=tested)
    half = torch.bfloat16
    yield verification_case(half, "1024 nodes, 128 children", 1024, 20, 128)
    yield verification_case(half, "64 nodes, 8 children", 64, 8, 8, vocab=32000, batch_size=8)
    for warped in (False, True):
        yield verification_case(half, "1 node", 1, 1, 0, vocab=61, warped=warped)
        yield verification_case(half, "2 nodes, 1 child", 2, 2, 1, vocab=61, warped=warped)
        yield verification_case(half, "1 node", 1, 1, 0, vocab=1, warped=warped, quick=(90,) if warped else ())
        yield verification_case(half, "11 nodes, 10 children", 11, 2, 10, vocab=1, warped=warped, quick=(90,))
    yield verification_case(half, "6 nodes, 1 child", 6, 6, 1, vocab=32000)
    for warped in (False, True):
        yield verification_case(half, "13 nodes, 12 children", 13, 2, 12, vocab=600, warped=warped)
    traversal: dict[str, Any] = {"rule": "traversal"}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tested = (90,) if dtype == torch.bfloat16 else ()
        yield verification_case(dtype, "64 nodes, 8 children", 64, 8, 8, **traversal, quick=tested)
        yield verification_case(dtype, "128 nodes, 16 children", 128, 10, 16, warped=True, **traversal)
    yield verification_case(half, "1024 nodes, 128 children", 1024, 20, 128, **traversal)
    yield verification_case(half, "64 nodes, 8 children", 64, 8, 8, vocab=32000, batch_size=8, **traversal)
    for warped in (False, True):
        yield verification_case(half, "2 nodes, 1 child", 2, 2, 1, vocab=61, warped=warped, **traversal)
        yield verification_case(half, "11 nodes, 10 children", 11, 2, 10, vocab=1, warped=warped, **traversal)
    yield verification_case(half, "6 nodes, 1 child", 6, 6, 1, vocab=32000, **traversal)
    yield verification_case(half, "1024 nodes, 1 child", 1024, 1024, 1, vocab=32000, **traversal)
    yield from _partial_verification_cases()


def _partial_verification_cases() -> Iterator[CompileCase]:
    """Drafts of a smaller vocabulary, children that are certain, and both."""
    half = torch.bfloat16
    small, wide = ("64 nodes, 8 children", 64, 8, 8), ("128 nodes, 16 children", 128, 10, 16)
    forms: tuple[tuple[dict[str, Any], int], ...] = (
        ({"draft_vocab": 32000}, 80),
        ({"certain": "nodes"}, 90),
        ({"draft_vocab": 32000, "certain": "nodes"}, 100),
        ({"draft_vocab": 0, "certain": "nodes"}, 90),
    )
    for rule in ("sequoia", "traversal"):
        for form, tested in forms:
            yield verification_case(half, *small, rule=rule, **form, quick=(tested,))
        both: dict[str, Any] = {"draft_vocab": 32000, "certain": "requests", "rule": rule}
        for dtype in (half, torch.float16, torch.float32):
            yield verification_case(dtype, *wide, warped=True, batch_size=4, **both)
        yield verification_case(half, "1024 nodes, 128 children", 1024, 20, 128, **both)
        # Strides and sizes of 1, of which Triton makes constants.
        ones: dict[str, Any] = {"vocab": 61, "draft_vocab": 1, "certain": "nodes", "rule": rule}
        yield verification_case(half, "2 nodes, 1 child", 2, 2, 1, **ones, quick=(90,) if rule == "sequoia" else ())
        yield verification_case(half, "11 nodes, 10 children", 11, 2, 10, **{**ones, "vocab": 1})


# the fused forward's steps

FUSED = "fused_forward"


def _norm(width: int, dtype: torch.dtype, kind: int = 1, offset: float = 0.0) -> steps.Norm:
    bias = _empty(width, dtype=dtype) if kind == 2 else None
    return steps.Norm(kind, _empty(width, dtype=dtype), bias, 1e-5, offset)


def residual_case(
    rows: int, width: int, norm: str, dtype: torch.dtype = torch.bfloat16, quick: tuple[int, ...] = ()
) -> CompileCase:
    """The sum and norm before a product."""

    def launch() -> None:
        stream, update = (_empty(rows, width, dtype=dtype) for _ in range(2))
        if norm == "layer":
            steps.residual_norm_(stream, update, _norm(width, dtype, kind=2))
        elif norm == "first":
            steps.residual_norm_(stream, None, _norm(width, dtype))
        elif norm == "of the branch, too":
            offset = _norm(width, dtype, offset=1.0)
            steps.residual_norm_(stream, update, offset, update_norm=offset, update_scale=0.5)
        else:
            steps.residual_norm_(stream, update, _norm(width, dtype))

    return CompileCase(FUSED, f"{NAMES[dtype]}, {rows} x {width}, norm {norm}", launch, quick=quick)


def rotation_case(
    rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotated: int,
    *,
    norms: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    quick: tuple[int, ...] = (),
) -> CompileCase:
    """Rotation, norms of heads and cache rows."""
    width, keys = (num_heads + 2 * num_kv_heads) * head_dim, num_heads * head_dim
    values = keys + num_kv_heads * head_dim
    heads = steps.Heads(num_heads, num_kv_heads, head_dim, 0, keys, values, head_dim, rotated)

    def launch() -> None:
        places = steps.RowPlaces(*(_empty(count, dtype=torch.int32) for count in (1, rows, rows)), 4095)
        caches = [_empty(1, 2048, num_kv_heads, head_dim, dtype=dtype) for _ in range(2)]
        table = _empty(4096, rotated, dtype=torch.float32) if rotated else None
        norm = _norm(head_dim, dtype) if norms else None
        projected = _empty(rows, width, dtype=dtype)
        steps.rotate_and_store_(projected, *caches, places, heads, table, query_norm=norm, key_norm=norm)

    name = f"{NAMES[dtype]}, {rows} rows, {num_heads}/{num_kv_heads} heads of {head_dim}, {rotated} rotated"
    return CompileCase(FUSED, name + (", norms" if norms else ""), launch, quick=quick)


def activation_case(rows: int, width: int, activation: int, gated: bool = True) -> CompileCase:
    """The activation between two products."""
    kind = "gated" if gated else "plain"

    def launch() -> None:
        steps.gated_activation(_empty(rows, 2 * width if gated else width, dtype=torch.bfloat16), gated, activation)

    return CompileCase(FUSED, f"bf16, {rows} x {width}, {kind} activation {activation}", launch)


def _fused_cases() -> Iterator[CompileCase]:
    for norm in ("first", "after a branch", "layer", "of the branch, too"):
        yield residual_case(1, 4096, norm, quick=(90,) if norm == "after a branch" else ())
        yield residual_case(128, 768, norm)
    yield residual_case(128, steps.MAX_WIDTH, "after a branch")
    yield residual_case(128, 8192, "of the branch, too", torch.float32)
    yield residual_case(1, 1, "after a branch")
    yield rotation_case(1, 32, 32, 128, 128, quick=(80,))
    yield rotation_case(128, 32, 8, 128, 128)
    yield rotation_case(128, 32, 8, 128, 128, norms=True, quick=(100,))
    yield rotation_case(64, 32, 32, 80, 32)
    yield rotation_case(64, 12, 12, 64, 0)
    yield rotation_case(256, 8, 4, 256, 256, norms=True, dtype=torch.float32)
    yield rotation_case(1, 1, 1, 8, 8)
    for activation in range(5):
        yield activation_case(128, 11008, activation)
    yield activation_case(1, 11008, 0)
    yield activation_case(1, 3072, 2, gated=False)
    yield activation_case(1, 1, 0)


# what drafts do beside their draws

DRAFTING = "drafting"


def setting_back_case(
    dtype: torch.dtype, batch_size: int, width: int, vocab: int, quick: tuple[int, ...] = ()
) -> CompileCase:
    """Unlikely tokens set behind the others."""

    def launch() -> None:
        settings = [_empty(batch_size, dtype=torch.float32) for _ in range(2)]
        triton_unlikely.run(_empty(batch_size, width, vocab, dtype=dtype), *settings, 30.0, 32)

    return CompileCase(DRAFTING, f"unlikely, {NAMES[dtype]}, {batch_size} x {width} x {vocab}", launch, quick=quick)


def shaping_case(
    dtype: torch.dtype, batch_size: int, widths: tuple[int, ...], ranks: int, vocab: int, quick: tuple[int, ...] = ()
) -> CompileCase:
    """The children of the last level but one of a shaped tree given out, and their chances."""
    nodes, width, num_children = sum(widths), widths[-2], widths[-1]

    def launch() -> None:
        parts = [_empty(batch_size, nodes, dtype=torch.int32) for _ in range(5)]
        masks = [_empty(batch_size, rows, -(-nodes // 32), dtype=torch.int32) for rows in (nodes, num_children)]
        level = triton_shaping.Level(
            Topology(*parts, masks[0], len(widths), ranks),
            _empty(batch_size, nodes, dtype=torch.float32),
            *(_empty(rows, 19, dtype=torch.float32) for rows in (4, ranks)),
            _empty(18, dtype=torch.float32),
            _empty(batch_size, num_children, dtype=torch.int64),
            masks[1] if vocab > 1 else None,
            nodes - num_children - width, width, ranks,
        )  # fmt: skip
        logits, temperature = _empty(batch_size, width, vocab, dtype=dtype), _empty(batch_size, dtype=torch.float32)
        log_normaliser = triton_shaping.give_out(level, logits, temperature)
        tokens = _empty(batch_size, nodes, dtype=torch.int64)
        triton_shaping.note_draws(level, logits, temperature, tokens, log_normaliser, LEAST_REACH)

    name = f"shaped, {NAMES[dtype]}, {batch_size} x {width} x {vocab}, {num_children} children, {ranks} a node at most"
    return CompileCase(DRAFTING, name, launch, quick=quick)


def _drafting_cases() -> Iterator[CompileCase]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield setting_back_case(dtype, 1, 16, 32000, quick=(90,) if dtype == torch.bfloat16 else ())
        yield setting_back_case(dtype, 4, 8, 151936, quick=(80,) if dtype == torch.float32 else ())
    for vocab in (1, 61):
        yield setting_back_case(torch.bfloat16, 1, 1, vocab, quick=(100,) if vocab == 1 else ())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield shaping_case(dtype, 1, (1, 16, 16), 8, 32000, quick=(80, 100) if dtype == torch.bfloat16 else ())
    yield shaping_case(torch.bfloat16, 4, (1, 100, 100), 16, 151936)
    yield shaping_case(torch.bfloat16, 1, (1, 500, 500), 8, 128256, quick=(90,))  # as many places as are taken
    yield shaping_case(torch.bfloat16, 1, (1, 500, 500), 1, 128256)
    yield shaping_case(torch.bfloat16, 1, (1, 1, 1000), 64, 32000)
    yield shaping_case(torch.bfloat16, 1, (1, 1), 1, 1, quick=(90,))
    yield shaping_case(torch.bfloat16, 1, (1, 8, 8), 4, 61)


CASES: list[CompileCase] = [
    *_attention_cases(),
    *_warping_cases(),
    *_sampling_cases(),
    *_verification_cases(),
    *_compaction_cases(),
    *_fused_cases(),
    *_drafting_cases(),
]
