"""Accounting: which layers stay on the device, and what everything there adds up to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MemoryPlan", "format_bytes", "parse_bytes", "plan_memory", "spread_layers"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device, by use, and the layers that stay there.

    Attributes:
        num_layers: decoder layers of the model.
        resident: layers that stay on the device.
        streamed: layers that are copied to the device in every pass.
        num_buffers: buffers for streamed layers; 0 when there are none.
        buffer_bytes: size of one buffer, that of the largest streamed layer.
        resident_bytes: weights of the resident layers.
        streamed_bytes: weights of the streamed layers; what one pass copies.
        host_bytes: what they take on the host; less than `streamed_bytes` only where layers share their weights.
        fixed_bytes: embeddings, norms, head and tables.
        kv_bytes: reserved for keys and values.
        workspace_bytes: reserved for activations and logits, an estimate.
        budget_bytes: the limit, None without one.
    """

    num_layers: int
    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    num_buffers: int
    buffer_bytes: int
    resident_bytes: int
    streamed_bytes: int
    host_bytes: int
    fixed_bytes: int
    kv_bytes: int
    workspace_bytes: int
    budget_bytes: int | None

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
    wanted = _check_resident(resident_layers, num_layers)
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

    def spread(num_resident: int) -> tuple[int, ...]:
        return tuple(sorted(set(range(num_layers)) - set(spread_layers(num_layers, num_layers - num_resident))))

    if isinstance(wanted, tuple):
        candidates = [wanted]
    elif wanted is not None:
        candidates = [spread(wanted)]
    elif budget_bytes is None:
        candidates = [()]
    else:
        candidates = [spread(count) for count in range(num_layers, -1, -1)]
    for resident in candidates:
        found = plan(resident)
        if budget_bytes is None or found.total_bytes <= budget_bytes:
            return found
    raise ValueError(
        f"load_offloaded: device_memory_budget must be at least {found.total_bytes} bytes for this model, "
        f"got {budget_bytes}: {found.describe().splitlines()[0]}; raise it, or lower max_cache_len, batch_size, "
        "max_rows, resident_layers or num_buffers"
    )


def _check_resident(resident_layers: int | Sequence[int] | None, num_layers: int) -> int | tuple[int, ...] | None:
    if resident_layers is None:
        return None
    if isinstance(resident_layers, int) and not isinstance(resident_layers, bool):
        if not 0 <= resident_layers <= num_layers:
            raise ValueError(f"load_offloaded: resident_layers must be in 0..{num_layers}, got {resident_layers}")
        return resident_layers
    if isinstance(resident_layers, bool) or not hasattr(resident_layers, "__iter__"):
        raise TypeError(f"load_offloaded: resident_layers must be a number or layer indices, got {resident_layers!r}")
    indices = tuple(resident_layers)
    if len(set(indices)) < len(indices) or not set(indices) <= set(range(num_layers)):
        raise ValueError(
            f"load_offloaded: resident_layers must be different indices below {num_layers}, got {list(indices)}"
        )
    return indices


def spread_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Pick `count` of the layers, evenly spread, the first one included."""
    return tuple(index * num_layers // count for index in range(count))


def parse_bytes(name: str, value: int | str) -> int:
    """Read a size: bytes, or text such as "20GiB" or "512 MB".

    Raises:
        TypeError: `value` is neither an integer nor text.
        ValueError: it is no positive size.
    """
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
