"""Accounting: which layers stay on the device, what is reserved beside them, and what everything adds up to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sequoia_kernels.documents import is_integer
from sequoia_kernels.offload.layers import DecoderLayer

__all__ = [
    "MAX_PREFILL_ROWS", "MemoryPlan", "format_bytes", "parse_bytes", "plan_memory", "reserved_bytes", "spread_layers",
]  # fmt: skip

_DEFAULT_CACHE_LEN = 4096
# Rows of a prompt that are prefilled in one pass over the weights; their hidden states are on the device meanwhile.
MAX_PREFILL_ROWS = 8192
_CHUNK_ROWS = 512  # of a request, prefilled at a time
# cuBLAS has a workspace for each thread and stream, 32 MiB on Hopper and 8 elsewhere, which torch allocates: for the
# loop, for the stream that captures, as much again for cuBLASLt, and for each chunk of a prompt, which has a thread.
_CUBLAS_BYTES = 32 << 20
_CUBLAS_STREAMS = 4

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device, by use, and the layers that stay there."""

    num_layers: int  # decoder layers of the model
    resident: tuple[int, ...]  # layers that stay on the device
    streamed: tuple[int, ...]  # layers that are copied to the device in every pass
    num_buffers: int  # for streamed layers; 0 when there are none
    buffer_bytes: int  # size of one buffer, that of the largest streamed layer
    resident_bytes: int  # weights of the resident layers
    streamed_bytes: int  # weights of the streamed layers; what one pass copies
    host_bytes: int  # what they take on the host; less than `streamed_bytes` only where layers share their weights
    fixed_bytes: int  # embeddings, norms, head and tables
    kv_bytes: int  # reserved for keys and values
    workspace_bytes: int  # reserved for activations and logits, an estimate
    budget_bytes: int | None  # the limit, None without one

    @property
    def weight_bytes(self) -> int:
        """Device memory that holds weights for as long as the model is open."""
        return self.fixed_bytes + self.resident_bytes + self.num_buffers * self.buffer_bytes

    @property
    def total_bytes(self) -> int:
        """Device memory at its peak."""
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes

    def describe(self) -> str:
        """Say in two lines what is where."""
        budget = "" if self.budget_bytes is None else f" of {format_bytes(self.budget_bytes)}"
        return (
            f"device {format_bytes(self.total_bytes)}{budget}: {len(self.resident)} of {self.num_layers} layers "
            f"{format_bytes(self.resident_bytes)}, {self.num_buffers} buffers of {format_bytes(self.buffer_bytes)}, "
            f"embeddings and head {format_bytes(self.fixed_bytes)}, keys and values {format_bytes(self.kv_bytes)}, "
            f"workspace {format_bytes(self.workspace_bytes)}\n"
            f"host {format_bytes(self.host_bytes)}: {len(self.streamed)} layers, "
            f"{format_bytes(self.streamed_bytes)} copied in every pass"
        )


def plan_memory(
    layer_bytes: Sequence[int],
    fixed_bytes: int,
    *,
    budget_bytes: int | None = None,
    resident_layers: int | Sequence[int] | None = None,
    num_buffers: int = 2,
    kv_bytes: int = 0,
    workspace_bytes: int = 0,
    weights_of: Sequence[int] | None = None,
) -> MemoryPlan:
    """Decide which layers stay on the device.

    Args:
        layer_bytes: size of each decoder layer. [layers]
        fixed_bytes: what is always on the device besides layers.
        budget_bytes: device memory that may be used in all; None without a limit.
        resident_layers: how many layers stay, or which; None takes as many as the budget allows, none without a budget.
        num_buffers: buffers for streamed layers. Two overlap copies with compute; more smooth uneven layers.
        kv_bytes: reserve for keys and values.
        workspace_bytes: reserve for activations and logits.
        weights_of: for each layer the one whose weights it has; None where every layer has its own. [layers]

    Returns:
        The plan. Streamed layers are spread evenly between resident ones, so that the link never idles while several
        resident layers run in a row.

    Raises:
        ValueError: a number is out of range, or the budget is too small; the message lists what it must hold.

    Example:
        >>> plan = plan_memory([100] * 8, 50, budget_bytes=660, num_buffers=2, kv_bytes=10)
        >>> plan.resident, plan.total_bytes
        ((1, 3, 5, 7), 660)
    """
    num_layers = len(layer_bytes)
    if num_buffers < 1:
        raise ValueError(f"load_offloaded: num_buffers must be at least 1, got {num_buffers}")
    block_of = range(num_layers) if weights_of is None else weights_of

    def plan(resident: Sequence[int]) -> MemoryPlan:
        streamed = tuple(sorted(set(range(num_layers)) - set(resident)))
        return MemoryPlan(
            num_layers=num_layers,
            resident=tuple(sorted(resident)),
            streamed=streamed,
            num_buffers=min(num_buffers, len(streamed)),
            buffer_bytes=max((layer_bytes[index] for index in streamed), default=0),
            resident_bytes=sum(layer_bytes[index] for index in resident),
            streamed_bytes=sum(layer_bytes[index] for index in streamed),
            host_bytes=sum({block_of[index]: layer_bytes[index] for index in streamed}.values()),
            fixed_bytes=fixed_bytes,
            kv_bytes=kv_bytes,
            workspace_bytes=workspace_bytes,
            budget_bytes=budget_bytes,
        )

    for resident in _choices(resident_layers, num_layers, budget_bytes is not None):
        found = plan(resident)
        if budget_bytes is None or found.total_bytes <= budget_bytes:
            return found
    raise ValueError(
        f"load_offloaded: device_memory_budget must be at least {found.total_bytes} bytes for this model, "
        f"got {budget_bytes}: {found.describe().splitlines()[0]}; raise it, or lower max_cache_len, batch_size, "
        "max_rows, resident_layers or num_buffers"
    )


def _choices(resident_layers: Any, num_layers: int, has_budget: bool) -> list[tuple[int, ...]]:
    """Say which layers may stay on the device as an argument asks for it, the most welcome first."""
    layers = set(range(num_layers))
    if resident_layers is None:
        counts = range(num_layers, -1, -1) if has_budget else range(1)
    elif is_integer(resident_layers):
        if not 0 <= resident_layers <= num_layers:
            raise ValueError(f"load_offloaded: resident_layers must be in 0..{num_layers}, got {resident_layers}")
        counts = range(resident_layers, resident_layers + 1)
    elif isinstance(resident_layers, bool) or not hasattr(resident_layers, "__iter__"):
        raise TypeError(f"load_offloaded: resident_layers must be a number or layer indices, got {resident_layers!r}")
    else:
        indices = tuple(resident_layers)
        if len(set(indices)) < len(indices) or not set(indices) <= layers:
            raise ValueError(
                f"load_offloaded: resident_layers must be different indices below {num_layers}, got {list(indices)}"
            )
        return [indices]
    return [tuple(sorted(layers - set(spread_layers(num_layers, num_layers - count)))) for count in counts]


def reserved_bytes(
    config: Any,
    layers: Sequence[DecoderLayer],
    dtype: torch.dtype,
    batch_size: int,
    max_cache_len: int | None,
    max_rows: int,
    on_cuda: bool,
) -> tuple[int, int]:
    """Estimate the bytes that forwards take beside the weights: of keys and values, and of a workspace.

    For `batch_size` requests of `max_cache_len` rows, whose largest tree forwards feed `max_rows`. The workspace is for
    activations, logits and, on CUDA, libraries.
    """
    if max_cache_len is None:
        max_cache_len = min(_DEFAULT_CACHE_LEN, _setting(config, "max_position_embeddings") or _DEFAULT_CACHE_LEN)
    # The largest forward: a tree, or a prompt's chunk while the other chunks of the pass wait with a layer's input.
    # What waits of a token: its hidden state, its residual, its rotary tables.
    _, _, head_dim = _head_shape(config)
    waiting_bytes = 2 * ((_setting(config, "hidden_size") or 1) * dtype.itemsize + head_dim * torch.float32.itemsize)
    waiting = min(MAX_PREFILL_ROWS, batch_size * max_cache_len) * waiting_bytes
    chunk_rows = batch_size * min(_CHUNK_ROWS, max_cache_len)
    num_chunks = -(-min(max_cache_len, MAX_PREFILL_ROWS // batch_size) // _CHUNK_ROWS)
    row_bytes = _activation_bytes(config, dtype)
    workspace = max(batch_size * max_rows * row_bytes, chunk_rows * row_bytes + waiting)
    libraries = (_CUBLAS_STREAMS + num_chunks) * _CUBLAS_BYTES if on_cuda else 0
    return batch_size * max_cache_len * _cache_row_bytes(config, layers, dtype), workspace + libraries


def _setting(config: Any, *names: str) -> int | None:
    """Read the first of some settings that is given. Not by attribute: some families forbid reading per-layer ones."""
    settings = config.to_dict()
    values = (settings.get(config.attribute_map.get(name, name)) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value > 0), None)


def _head_shape(config: Any) -> tuple[int, int, int]:
    """Return (query heads, key/value heads, width of a head)."""
    num_heads = _setting(config, "num_attention_heads") or 1
    head_dim = _setting(config, "head_dim") or (_setting(config, "hidden_size") or 1) // num_heads
    return num_heads, _setting(config, "num_key_value_heads") or num_heads, head_dim


def _cache_row_bytes(config: Any, layers: Sequence[DecoderLayer], dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers, from the projections' shapes or else the configuration."""
    num_heads, num_kv_heads, head_dim = _head_shape(config)
    per_layer = 2 * num_kv_heads * head_dim
    if _setting(config, "kv_lora_rank"):  # the tree cache holds expanded keys and values
        widths = [_setting(config, name) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
        per_layer = num_heads * sum(widths)
    total = 0
    for layer in layers:
        rows = [packed.shape[0] for packed in layer.tensors if packed.name.endswith(("k_proj.weight", "v_proj.weight"))]
        total += sum(rows) if len(rows) == 2 else per_layer
    return total * dtype.itemsize


def _activation_bytes(config: Any, dtype: torch.dtype) -> int:
    """Estimate the bytes that a token takes while it is computed: one layer's activations, or logits if larger."""
    num_heads, _, head_dim = _head_shape(config)
    hidden = _setting(config, "hidden_size") or 1
    inner = _setting(config, "intermediate_size", "ffn_dim") or 4 * hidden
    layer = 6 * hidden + 4 * num_heads * head_dim + 3 * inner
    return (max(layer, 2 * (_setting(config, "vocab_size") or 1)) + 2 * hidden) * dtype.itemsize


def spread_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Pick `count` of the layers, evenly spread, the first one included."""
    return tuple(index * num_layers // count for index in range(count))


def parse_bytes(name: str, value: int | str) -> int:
    """Read a positive size: bytes, or text such as "20GiB" or "512 MB"; `name` is the argument in errors."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"load_offloaded: {name} must be a number of bytes or text like '20GiB', got {value!r}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        unit = match and _UNITS.get(match[2].upper())
        if not match or not unit:
            raise ValueError(f"load_offloaded: {name} must be a size like '20GiB' or '512MB', got {value!r}")
        value = int(float(match[1]) * unit)
    if value < 1:
        raise ValueError(f"load_offloaded: {name} must be positive, got {value}")
    return value


def format_bytes(num_bytes: int) -> str:
    """Write a size for people, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
