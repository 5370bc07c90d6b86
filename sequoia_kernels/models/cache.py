"""The key/value cache of tree decoding: preallocated rows, written where the tree says, with no length of its own.

And the context of a forward, which tells the attention layers where their rows go, and how it comes to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.tree_step import TreeStep

__all__ = [
    "CONTEXT_KWARG", "ForwardCache", "LayerSpec", "StepContext", "TreeCache", "TreeCacheLayer", "find_context",
    "store_rows",
]  # fmt: skip

# The keyword under which the context rides on the model call.
CONTEXT_KWARG = "sequoia_context"
# The attribute under which `ForwardCache.update` leaves the forward's context on the key tensor.
CONTEXT_ATTRIBUTE = "_sequoia_context"


class LayerSpec(NamedTuple):
    """What one attention layer stores and sees."""

    num_kv_heads: int  # local ones under tensor parallelism
    key_dim: int  # width of a key head
    value_dim: int  # width of a value head
    dtype: torch.dtype  # of keys and values
    device: torch.device
    window: int | None  # sliding window in tokens, None for full attention


class TreeCacheLayer(CacheLayerMixin):
    """Keys and values of one layer; full length also under a sliding window, which the attention masks instead."""

    is_sliding = False

    def __init__(self, spec: LayerSpec, batch_size: int, max_cache_len: int) -> None:
        super().__init__()
        self.batch_size, self.max_cache_len = batch_size, max_cache_len
        self.dtype, self.device, self.window = spec.dtype, spec.device, spec.window
        shape = (batch_size, max_cache_len, spec.num_kv_heads)
        # Zeros, not garbage: a backend may multiply a masked row's values by a weight of 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(*shape, spec.key_dim, dtype=spec.dtype, device=spec.device)  # [B, S, Hkv, D]
        self.values = torch.zeros(*shape, spec.value_dim, dtype=spec.dtype, device=spec.device)  # [B, S, Hkv, Dv]
        # Seen as rows, [B * S, Hkv, D], and as the models lay them out, [B, Hkv, S, D].
        self.flat_keys, self.flat_values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        self.keys_by_head, self.values_by_head = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the rows are allocated where the layer is built."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new rows as they are: the attention hook stores what it is given behind this call."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the whole storage; the models build no masks for tree attention."""
        return self.max_cache_len, 0

    def get_seq_length(self) -> int:
        """Return 0: committed lengths belong to the decoding state, and positions are always passed explicitly."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of rows of a request."""
        return self.max_cache_len


class TreeCache(Cache):
    """The caches of all layers for a batch of requests; made by `TreeModel.new_cache`.

    Rows [0, cache_lens[b]) of request b are committed; the rows behind them belong to the current tree. The lengths are
    kept by the caller, since several caches (target and draft) share them. `layers` are `TreeCacheLayer`s, one
    a layer of the model, with `.keys` and `.values`; `specs` says what each of them stores.
    """

    def __init__(self, specs: tuple[LayerSpec, ...], batch_size: int, max_cache_len: int) -> None:
        # Normal tensors even inside inference mode, so that the cache can be used outside of it as well.
        with torch.inference_mode(False):
            super().__init__(layers=[TreeCacheLayer(spec, batch_size, max_cache_len) for spec in specs])
        self.specs = specs
        self._shape = (batch_size, max_cache_len)

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return self._shape[0]

    @property
    def max_cache_len(self) -> int:
        """Rows of a request."""
        return self._shape[1]

    def first_layers(self, num_layers: int) -> TreeCache:
        """Give the cache of the first layers alone: the same rows, not copies."""
        part = TreeCache((), *self._shape)
        part.layers.extend(self.layers[:num_layers])
        part.specs = self.specs[:num_layers]
        return part

    def tensors(self) -> list[torch.Tensor]:
        """Return keys and values of all layers, [B, S, Hkv, D] each, in the order k0, v0, k1, v1, ...; not copies."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: a model is given a `ForwardCache`."""
        raise UnsupportedModelError(
            "TreeCache: the cache must be used through TreeModel.forward, got a direct call of the model; "
            "pass the model its own cache instead"
        )


@dataclass(slots=True, eq=False)
class StepContext:
    """What the attention layers of one forward need to know. Lives as long as the forward."""

    layers: list[TreeCacheLayer]  # the cache's, by `layer_idx`
    # Cache row of the first new row, where one request's new rows follow each other and their place can be read without
    # a sync (on a CPU); else None, and `rows` has the flat cache row of every new row. [B * N] int64.
    first_row: int | None
    rows: torch.Tensor | None
    tree_mask: torch.Tensor  # see `TreeStep`. [N, W] or [B, N, W] int32
    cache_lens: torch.Tensor  # committed rows. [B] int32
    attention: Callable[..., torch.Tensor]  # the forward's `TreeAttention`
    num_calls: int = 0  # attention layers that ran so far
    _moved: dict[torch.device, StepContext] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        cache: TreeCache,
        step: TreeStep,
        cache_lens: torch.Tensor,
        attention: Callable[..., torch.Tensor],
        may_read_row: bool = True,
    ) -> StepContext:
        """Work out the rows to write, once for all layers; `first_row` only where it may be read on the host."""
        if may_read_row and step.first_node is not None and cache_lens.is_cpu and cache_lens.shape[0] == 1:
            return cls(cache.layers, int(cache_lens) + step.first_node, None, step.tree_mask, cache_lens, attention)
        rows = cache_lens[:, None] + step.node_ids  # [B, N]
        if rows.shape[0] > 1:
            length = cache.max_cache_len
            offsets = torch.arange(0, rows.shape[0] * length, length, device=rows.device)
            rows = rows + offsets[:, None]
        return cls(cache.layers, None, rows.flatten().to(torch.int64), step.tree_mask, cache_lens, attention)

    def on(self, device: torch.device) -> StepContext:
        """Return the same context with its tensors on a layer's device (models spread over several devices)."""
        moved = self._moved.get(device)
        if moved is None:
            rows = None if self.rows is None else self.rows.to(device)
            moved = StepContext(
                self.layers, self.first_row, rows, self.tree_mask.to(device), self.cache_lens.to(device), self.attention
            )
            self._moved[device] = moved
        return moved


class ForwardCache(Cache):
    """A cache as the model sees it during one forward, whose context it hands to the attention layers.

    The context is a `StepContext`, or what stands in for one while a model is probed. An object of the forward's own,
    so that nothing has to be taken back when the forward ends or fails.
    """

    def __init__(self, layers: list[TreeCacheLayer], context: Any) -> None:
        super().__init__(layers=layers)
        self.context = context

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mark the new rows with the forward's context and hand them back.

        The rows are stored by the attention hook and not here: some families cache a compressed form and expand it
        behind this call (DeepSeek-V3), others let a layer read what another one stored (Gemma 3n).
        """
        setattr(key_states, CONTEXT_ATTRIBUTE, self.context)
        return key_states, value_states


def find_context(module: torch.nn.Module, key: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """Return the forward's context to an attention layer; UnsupportedModelError where the family let go of it.

    First the keyword argument of the model call, which most families hand through to the attention function; then the
    attribute that `ForwardCache.update` left on the key tensor, for families that drop unknown keyword arguments
    (StableLM). Families that replace the key tensor behind the cache (DeepSeek-V3) keep the keyword.
    """
    context = kwargs.get(CONTEXT_KWARG)
    if context is None:
        context = getattr(key, CONTEXT_ATTRIBUTE, None)
    if context is None:
        raise UnsupportedModelError(
            f"tree attention: {type(module).__name__} must receive the step's context from its model, got neither the "
            "keyword argument nor a key tensor from the cache; call the model through TreeModel.forward only, and not "
            "from another thread meanwhile"
        )
    return context


def store_rows(
    module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, context: StepContext
) -> tuple[TreeCacheLayer, StepContext]:
    """Write a layer's new keys and values into their cache rows; return its cache, and the context on its device."""
    context.num_calls += 1
    layer = context.layers[module.layer_idx]  # type: ignore[index]  # an attention module's own number
    if key.device != context.cache_lens.device:
        context = context.on(key.device)
    if context.rows is None:
        assert context.first_row is not None
        layer.keys_by_head.narrow(2, context.first_row, key.shape[2]).copy_(key)
        layer.values_by_head.narrow(2, context.first_row, key.shape[2]).copy_(value)
    else:
        layer.flat_keys.index_copy_(0, context.rows, key.transpose(1, 2).flatten(0, 1))
        layer.flat_values.index_copy_(0, context.rows, value.transpose(1, 2).flatten(0, 1))
    return layer, context
