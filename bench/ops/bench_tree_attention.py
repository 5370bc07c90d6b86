"""tree_attention against torch SDPA with a dense mask, FlexAttention and FlashInfer.

GPU cases have the heads of Llama-3-8B in bfloat16, one request, contexts of 1k to 32k and trees of 1 to 1024 nodes.
Masks and plans of the others are built before the clock starts, though a loop builds them every step: the numbers
favour them.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.common.harness import Case, Provider, Unavailable, main, own_providers
from bench.common.workloads import LLAMA_3_8B
from sequoia_kernels.measure.calls import typical_tree
from sequoia_kernels.ops import tree_attention

OP = "tree_attention"

PAGE_SIZE = 16  # of the paged rival; the cache is cut into pages of this size where it lies

# Largest error of a query row, relative to the row: twice what eager torch makes of the same inputs in that dtype.
ROW_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _case(device: str, context_len: int, num_nodes: int, quick: bool, **sizes: Any) -> Case:
    name = f"{context_len} committed, {num_nodes} node{'s' if num_nodes > 1 else ''}"
    return Case(name, device, {"context_len": context_len, "num_nodes": num_nodes, "batch_size": 1, **sizes}, quick)


_SMALL = {"q_heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float32"}
_LLAMA = {**{key: LLAMA_3_8B[key] for key in ("q_heads", "kv_heads", "head_dim")}, "dtype": "bfloat16"}
# What is compiled for each shape takes seconds: FlexAttention runs at these only.
FLEX_CASES = {(8192, 1), (8192, 16), (8192, 64), (8192, 256), (32768, 64)}
QUICK_CUDA_CASES = {(8192, 16), (8192, 64), (8192, 256)}
CONTEXT_LENS = (1024, 4096, 8192, 16384, 32768)
NODE_COUNTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)

CASES = [
    _case("cpu", 64, 4, True, **_SMALL),
    _case("cpu", 512, 1, True, **_SMALL),
    _case("cpu", 512, 64, True, **_SMALL),
    _case("cpu", 2048, 16, False, **_SMALL),
    _case("cpu", 2048, 64, False, **_SMALL),
    _case("cpu", 2048, 256, False, **_SMALL),
    *(
        _case("cuda", context_len, num_nodes, (context_len, num_nodes) in QUICK_CUDA_CASES, **_LLAMA)
        # The contexts that the targets speak of come first: time may be short.
        for context_len in sorted(CONTEXT_LENS, key=lambda length: (length != 8192, length))
        for num_nodes in NODE_COUNTS
    ),
]


class Inputs(NamedTuple):
    q: torch.Tensor  # [B, N, Hq, D]
    k_cache: torch.Tensor  # [B, S, Hkv, D]
    v_cache: torch.Tensor  # [B, S, Hkv, D]
    tree_mask: torch.Tensor  # [N, W] int32
    cache_lens: torch.Tensor  # [B] int32


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case["dtype"])
    used = case["context_len"] + case["num_nodes"]
    num_slots = -(-used // PAGE_SIZE) * PAGE_SIZE

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    batch_size, kv_heads, head_dim = case["batch_size"], case["kv_heads"], case["head_dim"]
    return Inputs(
        normal(batch_size, case["num_nodes"], case["q_heads"], head_dim),
        normal(batch_size, num_slots, kv_heads, head_dim),
        normal(batch_size, num_slots, kv_heads, head_dim),
        typical_tree(case["num_nodes"]).tensors(device).ancestor_mask,
        torch.full((batch_size,), case["context_len"], dtype=torch.int32, device=device),
    )


def bytes_moved(case: Case) -> int:
    """The visible keys and values once, queries and outputs once."""
    itemsize = getattr(torch, case["dtype"]).itemsize
    visible = case["context_len"] + case["num_nodes"]
    rows = 2 * visible * case["kv_heads"] + 2 * case["num_nodes"] * case["q_heads"]
    return case["batch_size"] * rows * case["head_dim"] * itemsize


def flops(case: Case) -> int:
    """Both products over the prefix; the tree's own part depends on its shape and is small."""
    return 4 * case["batch_size"] * case["num_nodes"] * case["q_heads"] * case["context_len"] * case["head_dim"]


def expected(case: Case, inputs: Inputs) -> torch.Tensor:
    """The reference in float64, a few query rows at a time."""
    chunks = []
    doubles = [tensor.double() for tensor in inputs[:3]]
    for start in range(0, case["num_nodes"], 32):
        rows = slice(start, start + 32)
        mask = inputs.tree_mask[rows].contiguous()
        arguments = (doubles[0][:, rows], *doubles[1:], mask, inputs.cache_lens)
        chunks.append(tree_attention(*arguments, backend="reference").out)
    return torch.cat(chunks, dim=1)


def mismatch(case: Case, inputs: Inputs, expected: torch.Tensor, result: torch.Tensor) -> str | None:
    if result.shape != expected.shape:
        return f"shape {list(result.shape)} instead of {list(expected.shape)}"
    error = (result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst, bound = float(error.max()), ROW_ERROR[inputs.q.dtype]
    return None if worst <= bound else f"a row is off by {worst:.2e} of its length, at most {bound:.0e} is right"


def _visible(case: Case, inputs: Inputs) -> torch.Tensor:
    """Which cache rows each node sees. [N, context + N] bool."""
    num_nodes = case["num_nodes"]
    shifts = torch.arange(32, dtype=torch.int32, device=inputs.q.device)
    tree = ((inputs.tree_mask.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)[:, :num_nodes]
    return torch.cat([tree.new_ones(num_nodes, case["context_len"]), tree], dim=1)


def _heads_first(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as [B, H, rows, D] views of the rows in use."""
    used = case["context_len"] + case["num_nodes"]
    q, k, v = inputs.q, inputs.k_cache[:, :used], inputs.v_cache[:, :used]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _sdpa(case: Case, inputs: Inputs) -> Any:
    q, k, v = _heads_first(case, inputs)
    mask = _visible(case, inputs)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def _sdpa_repeated(case: Case, inputs: Inputs) -> Any:
    q, k, v = _heads_first(case, inputs)
    mask = _visible(case, inputs)
    group = case["q_heads"] // case["kv_heads"]

    def call() -> torch.Tensor:
        keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)

    return call


# Compiled code and block mask of the shape in hand: they serve all input sets of a case, and one tree has one mask.
_flex_parts: dict[str, tuple[Any, Any]] = {}


def _flex(case: Case, inputs: Inputs) -> Any:
    if case.device != "cuda":
        raise Unavailable("its CPU code is compiled for half a minute a shape")
    if (case["context_len"], case["num_nodes"]) not in FLEX_CASES:
        raise Unavailable("compiled for some of the shapes only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _heads_first(case, inputs)
    if case.name not in _flex_parts:
        visible = _visible(case, inputs)

        def mask_mod(b: Any, h: Any, row: Any, slot: Any) -> Any:
            return visible[row, slot]

        torch._dynamo.reset()
        block_mask = create_block_mask(mask_mod, None, None, *visible.shape, device=str(q.device))
        _flex_parts.clear()
        _flex_parts[case.name] = torch.compile(flex_attention, dynamic=False), block_mask
    compiled, block_mask = _flex_parts[case.name]
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)


def _flashinfer(case: Case, inputs: Inputs) -> Any:
    if case.device != "cuda":
        raise Unavailable("needs a CUDA device")
    try:
        import flashinfer
    except ImportError as error:
        raise Unavailable(f"flashinfer cannot be imported: {error}") from None

    device, batch_size, num_nodes = inputs.q.device, case["batch_size"], case["num_nodes"]
    used = case["context_len"] + num_nodes
    pages_each, pages_used = inputs.k_cache.shape[1] // PAGE_SIZE, -(-used // PAGE_SIZE)
    requests = torch.arange(batch_size + 1, dtype=torch.int32)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=device),  # workspace
        "NHD",
        backend="fa2",  # the only one with masks
    )
    pages = torch.arange(pages_each, dtype=torch.int32)[:pages_used]
    wrapper.plan(
        (requests * num_nodes).to(device),
        (requests * pages_used).to(device),
        torch.cat([pages + request * pages_each for request in range(batch_size)]).to(device),
        torch.full((batch_size,), (used - 1) % PAGE_SIZE + 1, dtype=torch.int32, device=device),
        case["q_heads"],
        case["kv_heads"],
        case["head_dim"],
        PAGE_SIZE,
        custom_mask=_visible(case, inputs).flatten().repeat(batch_size),
        q_data_type=inputs.q.dtype,
        kv_data_type=inputs.k_cache.dtype,
    )
    rows = (-1, PAGE_SIZE, case["kv_heads"], case["head_dim"])
    caches = (inputs.k_cache.view(rows), inputs.v_cache.view(rows))
    q = inputs.q.flatten(0, 1)
    return lambda: wrapper.run(q, caches).unflatten(0, (batch_size, num_nodes))


PROVIDERS = {
    **own_providers(OP, lambda case, inputs, backend: lambda: tree_attention(*inputs, backend=backend).out),
    "torch SDPA": Provider(_sdpa, note="dense boolean mask, built beforehand; enable_gqa"),
    "torch SDPA, repeated heads": Provider(
        _sdpa_repeated, note="dense boolean mask, built beforehand; keys and values repeated for the query heads"
    ),
    "FlexAttention": Provider(_flex, note="compiled for the shape; block mask built beforehand"),
    "FlashInfer": Provider(_flashinfer, note="paged prefill with a custom mask, planned beforehand"),
}


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
