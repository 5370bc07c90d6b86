"""tree_attention: contract, checks and dispatch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops.operators import Buffer, Operator
from sequoia_kernels.tree import MAX_STEP_ROWS

__all__ = ["TreeAttentionInputs", "TreeAttentionOutput", "check_values", "num_tree_slots", "tree_attention"]

OP = "tree_attention"

# Their quotient, times 2^8 for some float8 caches, is still a float32.
_SCALE = checks.Rule("be from -1e18 to 1e18", lambda value: -1e18 <= value <= 1e18)
_SOFTCAP = checks.Rule("be from 1e-18 to 1e18", lambda value: 1e-18 <= value <= 1e18)


class TreeAttentionInputs(NamedTuple):
    """What the op takes.

    Attributes:
        q: [B, N, Hq, D], float32, bfloat16, float16, or float64 (reference); last dimension contiguous, as of the
            caches.
        k_cache: [B, S, Hkv, D], or pages [P, page, Hkv, D] with a block table; dtype of q, or float8_e4m3fn.
        v_cache: [B, S, Hkv, Dv], or pages [P, page, Hkv, Dv]; dtype of k_cache.
        tree_mask: [N, W] or [B, N, W], int32, contiguous.
        cache_lens: [B], int32, contiguous.
        scale: factor of the scores.
        softcap: above 0, or None.
        sliding_window: at least 1, or None.
        sinks: [Hq], float32 or dtype of q, or None.
        block_table: [B, max_pages], int32, contiguous, or None; S is then max_pages * page.
        k_scale: [Hkv], float32, contiguous, or None.
        v_scale: likewise.
        return_lse: whether the second output is wanted.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tree_mask: Tensor
    cache_lens: Tensor
    scale: float
    softcap: float | None
    sliding_window: int | None
    sinks: Tensor | None
    block_table: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    return_lse: bool


class TreeAttentionOutput(NamedTuple):
    """Attention output, and the log-sum-exp it was normalised by."""

    out: Tensor
    """[B, N, Hq, Dv], dtype of q."""
    lse: Tensor | None = None
    """natural log of the softmax's denominator. [B, N, Hq] float32 (float64 for float64 q); None unless asked for."""


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tree_mask: Tensor,
    cache_lens: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | TreeAttentionOutput | None = None,
    backend: str = "auto",
    debug: bool = False,
) -> TreeAttentionOutput:
    """Attend from tree nodes to the committed prefix and, under a packed mask, to the tree's own cache rows.

    Row i of request b sees cache rows s < cache_lens[b] (the prefix) and row cache_lens[b] + j for every set bit j of
    its mask row. Its position is cache_lens[b] + depth(i), where depth(i) is its number of set bits - 1. The query rows
    need not be all the rows of the tree: a draft level feeds a few nodes only. A prompt is a chain: bits 0..i set in
    row i.

    Args:
        q: queries. [B, N, Hq, D], float32, bfloat16 or float16 (reference: also float64), N from 1 to 1024, last
            dimension contiguous.
        k_cache: keys, the new rows already written. [B, S, Hkv, D] of any strides with the last dimension contiguous,
            or pages [P, page, Hkv, D] with ``block_table``; dtype of q, or float8_e4m3fn. Hkv divides Hq.
        v_cache: values. [B, S, Hkv, Dv] or [P, page, Hkv, Dv]; dtype of ``k_cache``. Rows that no query row sees may
            hold anything, NaN included.
        tree_mask: which tree slots a row sees: bit j % 32 of word j // 32. [N, W], or [B, N, W] for a tree a request;
            int32, contiguous, W from 1 to 32.
        cache_lens: committed rows of each request. [B], int32, contiguous.
        scale: factor of q . k, at most 1e18 in size; None means D ** -0.5.
        softcap: c from 1e-18 to 1e18 turns a score into c * tanh(score / c); None is off.
        sliding_window: w >= 1; a row sees what lies less than w positions back, itself included. By depth, not by slot.
            None is off.
        sinks: a logit a query head that joins the softmax's denominator and nothing else. [Hq], float32 or dtype of q.
        block_table: page of each stretch of a request's cache: row s is in page block_table[b, s // page].
            [B, max_pages], int32, contiguous. Entries behind the last row that is used may be anything.
        k_scale: what a float8 key is multiplied by. A number or [Hkv] float32; float8 caches only.
        v_scale: likewise for values.
        return_lse: also return the log-sum-exp.
        out: buffer for the output, or a TreeAttentionOutput of both buffers. They share no memory with one another or
            an input.
        backend: "auto" or a backend's name.
        debug: check lengths and pages on devices other than the CPU, too, which syncs with the host.

    Returns:
        TreeAttentionOutput(out [B, N, Hq, Dv], lse [B, N, Hq] or None). A row that sees nothing gives 0 and -inf (with
        a sink: 0 and the sink).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, layout, device or range; on CPU tensors or under ``debug`` also lengths or pages that
            reach outside the cache.
        BackendUnavailableError: the backend asked for cannot run this call.

    Notes:
        Mutates ``out`` only. No host sync on a device unless ``debug``; can be captured in a CUDA graph. float32
        softmax (float64 for float64). On devices other than the CPU nobody else checks that lengths and pages stay
        inside the cache.

    Source:
        Sequoia (arXiv 2402.12374), section 3: one forward over all nodes. The packed mask covers the tree only; the
        prefix needs none.

    Example:
        >>> q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 16, 2, 8), torch.randn(1, 16, 2, 8)
        >>> tree_mask = torch.tensor([[0b001], [0b011], [0b101]], dtype=torch.int32)  # a root and its two children
        >>> tree_attention(q, k, v, tree_mask, torch.tensor([10], dtype=torch.int32)).out.shape
        torch.Size([1, 3, 4, 8])
    """
    checks.check_tensor(OP, "q", q)
    if scale is None:
        checks.check_rows(OP, "q", q, "batch, nodes, q heads, head dim")
        scale = max(q.shape[3], 1) ** -0.5
    else:
        scale = checks.real_number(OP, "scale", scale, _SCALE)
    if softcap is not None:
        softcap = checks.real_number(OP, "softcap", softcap, _SOFTCAP)
    if sliding_window is not None:
        sliding_window = checks.whole_number(OP, "sliding_window", sliding_window, torch.int64)
    inputs = TreeAttentionInputs(
        q,
        k_cache,
        v_cache,
        tree_mask,
        cache_lens,
        scale,
        softcap,
        sliding_window,
        sinks,
        block_table,
        None if k_scale is None else _head_scales("k_scale", k_scale, "k_cache", k_cache),
        None if v_scale is None else _head_scales("v_scale", v_scale, "v_cache", v_cache),
        return_lse,
    )
    if out is not None:
        out_buffer, lse_buffer = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        if return_lse is True and lse_buffer is None:
            checks.check_tensor(OP, "out", out_buffer)
            raise TypeError(f"{OP}: out must be a TreeAttentionOutput of two tensors with return_lse, got one tensor")
        out = TreeAttentionOutput(out_buffer, lse_buffer if return_lse else None)
    return OPERATOR(inputs, out, backend, debug)


def _head_scales(name: str, value: float | Tensor, cache_name: str, cache: Tensor) -> Tensor:
    """A scale a key/value head, [Hkv] contiguous; a tensor of one element serves all heads."""
    checks.check_tensor(OP, cache_name, cache)
    checks.check_rows(OP, cache_name, cache, "batch, slots, kv heads, head dim")
    num_heads = cache.shape[2]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.reshape(1).expand(num_heads)
    return checks.row_values(OP, name, value, num_heads, torch.float32, cache.device, "kv heads").contiguous()


def check(inputs: TreeAttentionInputs) -> None:
    """Check dtypes, shapes, layouts, devices and options. Layers of a model come here, so nothing is called in vain."""
    q, k_cache, v_cache, tree_mask, cache_lens, scale, softcap, sliding_window = inputs[:8]
    sinks, block_table, k_scale, v_scale = inputs[8:12]
    device, dtype = q.device, q.dtype
    if dtype not in checks.FLOAT_DTYPES:
        checks.check_dtype(OP, "q", q, *checks.FLOAT_DTYPES)
    checks.check_rows(OP, "q", q, "batch, nodes, q heads, head dim")
    batch_size, num_rows, num_q_heads, head_dim = q.shape
    if not 1 <= num_rows <= MAX_STEP_ROWS:
        checks.fail_range(OP, "q", f"have from 1 to {MAX_STEP_ROWS} nodes", checks.shape_text(q.shape))

    legend = "batch, slots, kv heads, head dim" if block_table is None else "pages, page size, kv heads, head dim"
    cache_dtype = k_cache.dtype
    if cache_dtype is not dtype:
        checks.check_dtype(OP, "k_cache", k_cache, dtype, torch.float8_e4m3fn)
    if v_cache.dtype is not cache_dtype:
        checks.check_dtype(OP, "v_cache", v_cache, cache_dtype)
    checks.check_rows(OP, "k_cache", k_cache, legend)
    checks.check_rows(OP, "v_cache", v_cache, legend)
    num_blocks, block_len, num_kv_heads, key_dim = k_cache.shape
    if key_dim != head_dim or (block_table is None and num_blocks != batch_size):
        expected = (batch_size if block_table is None else num_blocks, block_len, num_kv_heads, head_dim)
        checks.check_shape(OP, "k_cache", k_cache, expected, legend)
    if v_cache.shape[:3] != k_cache.shape[:3]:
        checks.check_shape(OP, "v_cache", v_cache, (*k_cache.shape[:3], v_cache.shape[3]), legend)
    if num_q_heads == 0 or head_dim == 0:
        checks.fail_range(OP, "q", "have at least one head and one dimension", checks.shape_text(q.shape))
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        rule = f"have a number of kv heads that divides q's {num_q_heads} heads"
        checks.fail_range(OP, "k_cache", rule, num_kv_heads)
    if v_cache.numel() == 0 and (batch_size or v_cache.shape[3] == 0):
        rule = "have at least one slot and one dimension"
        checks.fail_range(OP, "v_cache", rule, checks.shape_text(v_cache.shape))

    if tree_mask.dtype is not torch.int32:
        checks.check_dtype(OP, "tree_mask", tree_mask, torch.int32)
    per_request = tree_mask.dim() == 3
    expected_mask = (batch_size, num_rows) if per_request else (num_rows,)
    if tree_mask.dim() not in (2, 3) or tree_mask.shape[:-1] != expected_mask or not 1 <= tree_mask.shape[-1] <= 32:
        rule = (
            f"have shape [nodes, words] or [batch, nodes, words] with {num_rows} nodes, batch {batch_size}, 1..32 words"
        )
        checks.fail_range(OP, "tree_mask", rule, checks.shape_text(tree_mask.shape))
    if cache_lens.dtype is not torch.int32:
        checks.check_dtype(OP, "cache_lens", cache_lens, torch.int32)
    if cache_lens.shape != (batch_size,):
        checks.check_shape(OP, "cache_lens", cache_lens, (batch_size,), "batch")
    if not (tree_mask.is_contiguous() and cache_lens.is_contiguous()):
        checks.fail_range(OP, "tree_mask and cache_lens", "be contiguous", "strided tensors")
    if not (k_cache.device == v_cache.device == tree_mask.device == cache_lens.device == device):
        others = {"k_cache": k_cache, "v_cache": v_cache, "tree_mask": tree_mask, "cache_lens": cache_lens}
        for name, tensor in others.items():
            checks.check_device(OP, name, tensor, device)

    if not _SCALE.holds(scale):
        checks.fail_range(OP, "scale", _SCALE.text, scale)
    if softcap is not None and not _SOFTCAP.holds(softcap):
        checks.fail_range(OP, "softcap", _SOFTCAP.text, softcap)
    if sliding_window is not None and sliding_window < 1:
        checks.fail_range(OP, "sliding_window", "be at least 1", sliding_window)
    if sinks is not None:
        checks.check_dtype(OP, "sinks", sinks, torch.float32, dtype)
        checks.check_shape(OP, "sinks", sinks, (num_q_heads,), "q heads")
        checks.check_device(OP, "sinks", sinks, device)
    if block_table is not None:
        checks.check_dtype(OP, "block_table", block_table, torch.int32)
        if block_table.dim() != 2 or block_table.shape[0] != batch_size or not block_table.is_contiguous():
            rule = f"be contiguous with shape [batch, pages] and batch {batch_size}"
            checks.fail_range(OP, "block_table", rule, checks.shape_text(block_table.shape))
        checks.check_device(OP, "block_table", block_table, device)
    for name, head_scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if head_scale is not None:
            if cache_dtype is not torch.float8_e4m3fn:
                raise TypeError(
                    f"{OP}: {name} must be None unless the caches are float8_e4m3fn, got {cache_dtype} caches"
                )
            checks.check_row_values(OP, name, head_scale, num_kv_heads, torch.float32, device, "kv heads")


def buffers(inputs: TreeAttentionInputs) -> tuple[Buffer, Buffer | None]:
    """Describe the outputs."""
    q, rows = inputs.q, inputs.q.shape[:3]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        Buffer((*rows, inputs.v_cache.shape[3]), q.dtype, "batch, nodes, q heads, value dim"),
        Buffer(rows, lse_dtype, "batch, nodes, q heads") if inputs.return_lse else None,
    )


def check_values(inputs: TreeAttentionInputs) -> None:
    """Every row that a request may look at lies inside the cache. Reads values."""
    k_cache, tree_mask, cache_lens, block_table = inputs.k_cache, *inputs[3:5], inputs.block_table
    lens, page_size = cache_lens.tolist(), k_cache.shape[1]
    num_slots = page_size if block_table is None else block_table.shape[1] * page_size
    if min(lens) < 0:
        checks.fail_range(OP, "cache_lens", "not be negative", lens)
    # Usually there is room for every slot that the mask can name, and its bits need not be read.
    if block_table is None and max(lens) + 32 * tree_mask.shape[-1] <= num_slots:
        return
    tree_slots = num_tree_slots(tree_mask.cpu().numpy(), len(lens))
    pages = None if block_table is None else block_table.tolist()
    for request, (cache_len, count) in enumerate(zip(lens, tree_slots)):
        if cache_len + count > num_slots:
            rule = f"leave room for {count} tree rows in a cache of {num_slots} slots"
            checks.fail_range(OP, "cache_lens", rule, f"{cache_len} for request {request}")
        used = [] if pages is None else pages[request][: -(-(cache_len + count) // page_size)]
        if used and not (min(used) >= 0 and max(used) < k_cache.shape[0]):
            rule = f"name pages from 0 to {k_cache.shape[0] - 1}"
            checks.fail_range(OP, "block_table", rule, f"{used} for request {request}")


def num_tree_slots(words: np.ndarray, batch_size: int) -> list[int]:
    """One more than the highest tree slot that any row of each request's mask names. words: [N, W] or [B, N, W]."""
    unions = np.bitwise_or.reduce(words, axis=-2).reshape(-1, words.shape[-1])
    slots = [int.from_bytes(union.astype("<i4").tobytes(), "little").bit_length() for union in unions]
    return slots if words.ndim == 3 else slots * batch_size


OPERATOR = Operator(
    OP,
    TreeAttentionInputs,
    TreeAttentionOutput,
    package=__package__,
    check=check,
    buffers=buffers,
    check_values=check_values,
    out_names=("out", "out.lse"),
)
