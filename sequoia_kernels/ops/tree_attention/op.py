"""tree_attention: contract, checks and dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops import backends

OP = "tree_attention"

MAX_ROWS = 1024
"""query rows of one call; a longer prompt comes in chunks"""

# Their quotient, times 2^8 for some float8 caches, is still a float32.
_SCALE = checks.Rule("be from -1e18 to 1e18", lambda value: -1e18 <= value <= 1e18)
_SOFTCAP = checks.Rule("be from 1e-18 to 1e18", lambda value: 1e-18 <= value <= 1e18)


class TreeAttentionOutput(NamedTuple):
    """Attention output, and the log-sum-exp it was normalised by."""

    out: Tensor
    """[B, N, Hq, Dv], dtype of q."""
    lse: Tensor | None
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

    Returns:
        TreeAttentionOutput(out [B, N, Hq, Dv], lse [B, N, Hq] or None). A row that sees nothing gives 0 and -inf (with
        a sink: 0 and the sink).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, layout, device or range; on CPU tensors also lengths or pages that reach outside the
            cache.
        BackendUnavailableError: the backend asked for cannot run this call.

    Notes:
        Mutates ``out`` only. No host sync on a device; can be captured in a CUDA graph. float32 softmax (float64 for
        float64). On devices other than the CPU nobody checks that lengths and pages stay inside the cache.

    Source:
        Sequoia (arXiv 2402.12374), section 3: one forward over all nodes. The packed mask covers the tree only; the
        prefix needs none.

    Example:
        >>> q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 16, 2, 8), torch.randn(1, 16, 2, 8)
        >>> tree_mask = torch.tensor([[0b001], [0b011], [0b101]], dtype=torch.int32)  # a root and its two children
        >>> tree_attention(q, k, v, tree_mask, torch.tensor([10], dtype=torch.int32)).out.shape
        torch.Size([1, 3, 4, 8])
    """
    tensors = (q, k_cache, v_cache, tree_mask, cache_lens)
    direct = backends.runs_directly(*tensors)
    if not direct:
        checks.check_tensors(OP, q=q, k_cache=k_cache, v_cache=v_cache, tree_mask=tree_mask, cache_lens=cache_lens)
    checks.check_options(OP, backend, return_lse=return_lse)
    if scale is None:
        checks.check_rows(OP, "q", q, "batch, nodes, q heads, head dim")
        scale = max(q.shape[3], 1) ** -0.5
    else:
        scale = checks.real_number(OP, "scale", scale, _SCALE)
    if softcap is not None:
        softcap = checks.real_number(OP, "softcap", softcap, _SOFTCAP)
    if sliding_window is not None:
        sliding_window = checks.whole_number(OP, "sliding_window", sliding_window, torch.int64)
    for name, tensor in (("sinks", sinks), ("block_table", block_table)):
        if tensor is not None:
            checks.check_tensor(OP, name, tensor)
    if k_scale is not None:
        k_scale = _head_scales("k_scale", k_scale, k_cache)
    if v_scale is not None:
        v_scale = _head_scales("v_scale", v_scale, v_cache)
    inputs = (*tensors, scale, softcap, sliding_window, sinks, block_table)
    if out is None:
        # A decoding step of a small model comes here once a layer, and torch's dispatcher would cost it more than the
        # attention. It is left out where it has nothing to do.
        if (
            direct
            and (sinks is None or backends.runs_directly(sinks))
            and block_table is None
            and k_scale is None
            and v_scale is None
        ):
            result = _dispatch(*inputs, None, None, backend, return_lse=return_lse, out=None, lse=None)
            return TreeAttentionOutput._make(result)
        if return_lse:
            return TreeAttentionOutput(*_lse_operator(*inputs, k_scale, v_scale, backend))
        return TreeAttentionOutput(_operator(*inputs, k_scale, v_scale, backend), None)
    out_buffer, lse_buffer = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    checks.check_tensor(OP, "out", out_buffer)
    if return_lse and lse_buffer is None:
        raise TypeError(f"{OP}: out must be a TreeAttentionOutput of two tensors with return_lse, got one tensor")
    _out_operator(*inputs, k_scale, v_scale, backend, out_buffer, lse_buffer if return_lse else None)
    return TreeAttentionOutput(out_buffer, lse_buffer if return_lse else None)


def _head_scales(name: str, value: float | Tensor, cache: Tensor) -> Tensor:
    """A scale a key/value head, [Hkv] contiguous; a tensor of one element serves all heads."""
    checks.check_rows(OP, "k_cache" if name == "k_scale" else "v_cache", cache, "batch, slots, kv heads, head dim")
    num_heads = cache.shape[2]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.reshape(1).expand(num_heads)
    return checks.row_values(OP, name, value, num_heads, torch.float32, cache.device, "kv heads").contiguous()


def _dispatch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tree_mask: Tensor,
    cache_lens: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    backend: str,
    *,
    return_lse: bool,
    out: Tensor | None,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    # What the structure checks and the choice of a backend depend on; see `backends.known_calls`.
    call = (
        (q.dtype, q.device, q.shape, q.stride()),
        (k_cache.dtype, k_cache.device, k_cache.shape, k_cache.stride()),
        (v_cache.dtype, v_cache.device, v_cache.shape, v_cache.stride()),
        (tree_mask.dtype, tree_mask.device, tree_mask.shape, tree_mask.stride()),
        (cache_lens.dtype, cache_lens.device, cache_lens.shape, cache_lens.stride()),
        scale,
        softcap,
        sliding_window,
        None if sinks is None else (sinks.dtype, sinks.device, sinks.shape, sinks.stride()),
        None if block_table is None else _layout(block_table),
        None if k_scale is None else _layout(k_scale),
        None if v_scale is None else _layout(v_scale),
        return_lse,
        backend,
        torch.get_num_threads(),
    )
    inputs = (
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
        k_scale,
        v_scale,
        return_lse,
    )
    chosen = _known_calls.get(call)
    if chosen is None:
        _check_inputs(*inputs[:-1])
    if out is not None:
        _check_outputs(q, v_cache, out, lse)
        given: dict[str, Tensor | None] = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "tree_mask": tree_mask}
        given |= {"cache_lens": cache_lens, "sinks": sinks, "block_table": block_table}
        given |= {"k_scale": k_scale, "v_scale": v_scale}
        checks.check_memory(OP, {"out": out, "out.lse": lse}, given)
    if chosen is None:
        if q.shape[0] == 0:
            return _new_outputs(q, v_cache, return_lse) if out is None else (out, lse)
        chosen = backends.choose(OP, backend, "cpu" if q.is_cpu else q.device.type, inputs)
        backends.remember_call(OP, call, chosen)
    if q.is_cpu and not chosen.checks_values:
        check_values(k_cache, tree_mask, cache_lens, block_table)
    return chosen.run(*inputs, out, lse)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


# The operators below differ in their outputs only; their inputs are those of `_dispatch` up to `backend`.
def _run(*inputs: Any) -> Tensor:
    return _dispatch(*inputs, return_lse=False, out=None, lse=None)[0]


def _run_lse(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    return _dispatch(*inputs, return_lse=True, out=None, lse=None)


def _run_out(*inputs_and_outputs: Any) -> None:
    *inputs, out, lse = inputs_and_outputs
    _dispatch(*inputs, return_lse=lse is not None, out=out, lse=lse)


def _fake(*inputs: Any) -> Tensor:
    _check_inputs(*inputs[:-1])
    return _new_outputs(q=inputs[0], v_cache=inputs[2], return_lse=False)[0]


def _fake_lse(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    _check_inputs(*inputs[:-1])
    return _new_outputs(q=inputs[0], v_cache=inputs[2], return_lse=True)


def _fake_out(*inputs_and_outputs: Any) -> None:
    *inputs, _backend, out, lse = inputs_and_outputs
    _check_inputs(*inputs)
    _check_outputs(inputs[0], inputs[2], out, lse)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _new_outputs(q: Tensor, v_cache: Tensor, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    out = q.new_empty((*q.shape[:3], v_cache.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=_lse_dtype(q)) if return_lse else None


def _check_inputs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tree_mask: Tensor,
    cache_lens: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Types, dtypes, shapes, layouts, devices and options. What it reads of them is part of `_dispatch`'s key."""
    device, dtype = q.device, q.dtype
    if dtype not in checks.FLOAT_DTYPES:
        checks.check_dtype(OP, "q", q, *checks.FLOAT_DTYPES)
    checks.check_rows(OP, "q", q, "batch, nodes, q heads, head dim")
    batch_size, num_rows, num_q_heads, head_dim = q.shape
    if not 1 <= num_rows <= MAX_ROWS:
        checks.fail_range(OP, "q", f"have from 1 to {MAX_ROWS} nodes", checks.shape_text(q.shape))

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
            checks.row_values(OP, name, head_scale, num_kv_heads, torch.float32, device, "kv heads")


def _check_outputs(q: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """The caller's buffers."""
    out_shape = (*q.shape[:3], v_cache.shape[3])
    checks.check_out(OP, "out", out, out_shape, q.dtype, q.device, "batch, nodes, q heads, value dim")
    if lse is not None:
        checks.check_out(OP, "out.lse", lse, out_shape[:3], _lse_dtype(q), q.device, "batch, nodes, q heads")


def check_values(k_cache: Tensor, tree_mask: Tensor, cache_lens: Tensor, block_table: Tensor | None) -> None:
    """Every row that a request may look at lies inside the cache. CPU tensors only."""
    lens, page_size = cache_lens.tolist(), k_cache.shape[1]
    num_slots = page_size if block_table is None else block_table.shape[1] * page_size
    if min(lens) < 0:
        checks.fail_range(OP, "cache_lens", "not be negative", lens)
    # Usually there is room for every slot that the mask can name, and its bits need not be read.
    if block_table is None and max(lens) + 32 * tree_mask.shape[-1] <= num_slots:
        return
    tree_slots = num_tree_slots(tree_mask.numpy(), len(lens))
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


backends.register_room(OP, package=__package__)
_known_calls = backends.known_calls(OP)

_INPUTS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor tree_mask, Tensor cache_lens, float scale, float? softcap, "
    "int? sliding_window, Tensor? sinks, Tensor? block_table, Tensor? k_scale, Tensor? v_scale"
)
_operator = backends.define_operator(f"{OP}({_INPUTS}, str backend) -> Tensor", run=_run, fake=_fake)
_lse_operator = backends.define_operator(
    f"{OP}.lse({_INPUTS}, str backend) -> (Tensor, Tensor)", run=_run_lse, fake=_fake_lse
)
_out_operator = backends.define_operator(
    f"{OP}.out({_INPUTS}, str backend, Tensor(a!) out, Tensor(b!)? lse) -> ()", run=_run_out, fake=_fake_out
)
