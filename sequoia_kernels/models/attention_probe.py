"""Learn how a model attends from one forward of a few tokens, instead of from the names in its configuration.

The forward runs under an attention and a mask function of its own. The mask function is handed the rule from which
transformers builds the real masks; instead of a mask it returns a description of that rule, which the model then passes
to each attention layer. So every layer's window is known from what the model does, whatever its configuration calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from sequoia_kernels.models.cache import LayerSpec, find_context

__all__ = ["PROBE_NAME", "LayerCall", "ProbedCalls"]

PROBE_NAME = "sequoia_tree_probe"

# Mask rules are examined at this query, far beyond any context, and at the next one.
_FAR_QUERY = (1 << 40) + 12345


class ProbedCalls:
    """Stands in for the step context during the probing forward, and takes the calls of the attention layers.

    No list, of which accelerate's hooks hand the layers a copy.

    Attributes:
        calls: one entry a call, in their order.
    """

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []


class LayerCall(NamedTuple):
    """One attention layer's call."""

    module: str
    layer_idx: int | None
    spec: LayerSpec
    chunk: int | None  # size of the chunks within which the layer attends, None for all other rules
    problem: str | None  # why tree attention cannot stand in for this call
    num_heads: int  # of queries
    scale: float | None  # None stands for 1 / sqrt(key_dim)
    softcap: float | None
    has_sinks: bool


def _visible(rule: Callable[..., torch.Tensor], query: int, key: int, device: torch.device) -> bool:
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return bool(rule(zero, zero, zero + query, zero + key))


def _first_visible(rule: Callable[..., torch.Tensor], query: int, device: torch.device) -> int:
    """Return the first key that a query sees, given that it sees an interval that ends at itself."""
    low, high = 0, query
    while low < high:
        middle = (low + high) // 2
        if _visible(rule, query, middle, device):
            high = middle
        else:
            low = middle + 1
    return low


def describe_mask(
    batch_size: int,
    q_length: int,
    mask_function: Callable[..., torch.Tensor],
    device: torch.device | str,
    **kwargs: Any,
) -> torch.Tensor:
    """Describe a mask rule in the place of building a mask. Returns [1, 1, 1, 2] int64: (kind, size).

    Kinds: 0 full attention, 1 sliding window, 2 chunks, 3 something else.
    """
    device = torch.device(device)
    kind, size = 3, 0
    causal = not _visible(mask_function, _FAR_QUERY, _FAR_QUERY + 1, device)
    if causal and _visible(mask_function, _FAR_QUERY, _FAR_QUERY, device):
        queries = (_FAR_QUERY, _FAR_QUERY + 1)
        spans = [query - _first_visible(mask_function, query, device) + 1 for query in queries]
        if spans == [query + 1 for query in queries]:
            kind = 0
        elif spans[0] == spans[1]:
            kind, size = 1, spans[0]
        elif spans[1] in (1, spans[0] + 1):
            # A chunk's last query sees all of it: walk from the far query's chunk to the end of that chunk.
            start = _FAR_QUERY - spans[0] + 1
            step = 1
            while _visible(mask_function, start + step, start, device):
                step *= 2
            low, high = step // 2, step
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _visible(mask_function, start + middle, start, device) else (low, middle)
            kind, size = 2, high
    return torch.tensor([kind, size], dtype=torch.int64, device=device).view(1, 1, 1, 2)


# Tensors that attention layers may receive beside queries, keys and values, and that do not change what they attend to.
_HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings", "input_ids"})


def probe_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Record what the layer asks for; its output is zeros. The function that transformers calls while probing."""
    probed = find_context(module, key, kwargs)
    problem = None
    window = chunk = None
    if attention_mask is None:
        problem = "it attends without a mask from transformers' mask functions"
    elif tuple(attention_mask.shape) != (1, 1, 1, 2) or attention_mask.dtype != torch.int64:
        problem = "it builds its own attention mask"
    else:
        kind, size = attention_mask.flatten().tolist()
        window = size if kind == 1 else None
        chunk = size if kind == 2 else None
        if kind == 3:
            problem = "its attention mask is neither causal, nor a sliding window, nor chunked"
    if is_causal is False or not getattr(module, "is_causal", True):  # as transformers' sdpa asks
        problem = "it attends in both directions"
    extra = [name for name, entry in kwargs.items() if isinstance(entry, torch.Tensor) and name not in _HARMLESS]
    if extra:
        problem = f"it adds {', '.join(extra)} to the attention"
    if key.shape[2] != query.shape[2]:
        problem = "its keys do not belong to the rows that are fed"
    spec = LayerSpec(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device, window)
    batch_size, num_heads, num_rows, _ = query.shape
    number = getattr(module, "layer_idx", None)
    probed.calls.append(
        LayerCall(
            type(module).__name__, number, spec, chunk, problem, num_heads, scaling, softcap, s_aux is not None
        )
    )  # fmt: skip
    return query.new_zeros(batch_size, num_rows, num_heads, value.shape[3]), None


AttentionInterface.register(PROBE_NAME, probe_attention_forward)
AttentionMaskInterface.register(PROBE_NAME, describe_mask)
