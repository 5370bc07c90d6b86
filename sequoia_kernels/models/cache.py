"""The key/value cache of tree decoding: preallocated rows, written where the tree says, with no length of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from sequoia_kernels.errors import UnsupportedModelError

if TYPE_CHECKING:
    from sequoia_kernels.models.attention import StepContext
    from sequoia_kernels.models.probe import AttentionProbe

__all__ = ["ForwardCache", "LayerSpec", "TreeCache", "TreeCacheLayer"]

# The attribute under which `ForwardCache.update` leaves the forward's context on the key tensor.
CONTEXT_ATTRIBUTE = "_sequoia_context"


class LayerSpec(NamedTuple):
    """What one attention layer stores and sees.

    Attributes:
        num_kv_heads: heads of its keys and values (local ones under tensor parallelism).
        key_dim: width of a key head.
        value_dim: width of a value head.
        dtype: dtype of keys and values.
        device: device of the layer.
        window: sliding window in tokens, None for full attention.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None


class TreeCacheLayer(CacheLayerMixin):
    """Keys and values of one layer; full length also under a sliding window, which the attention masks instead.

    Attributes:
        keys: [B, S, Hkv, D].
        values: [B, S, Hkv, Dv].
        flat_keys: `keys` seen as rows. [B * S, Hkv, D].
        flat_values: `values` seen as rows. [B * S, Hkv, Dv].
        keys_by_head: `keys` seen as the models lay them out. [B, Hkv, S, D].
        values_by_head: `values` likewise. [B, Hkv, S, Dv].
        window: sliding window in tokens, None for full attention.
    """

    is_sliding = False

    def __init__(self, spec: LayerSpec, batch_size: int, max_cache_len: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.max_cache_len = max_cache_len
        self.dtype, self.device = spec.dtype, spec.device
        self.window = spec.window
        shape = (batch_size, max_cache_len, spec.num_kv_heads)
        # Zeros, not garbage: a backend may multiply a masked row's values by a weight of 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(*shape, spec.key_dim, dtype=spec.dtype, device=spec.device)
        self.values = torch.zeros(*shape, spec.value_dim, dtype=spec.dtype, device=spec.device)
        self.flat_keys = self.keys.view(-1, *self.keys.shape[2:])
        self.flat_values = self.values.view(-1, *self.values.shape[2:])
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
    kept by the caller, since several caches (target and draft) share them.

    Attributes:
        layers: one `TreeCacheLayer` a layer of the model, with `.keys` and `.values`.
    """

    def __init__(self, specs: tuple[LayerSpec, ...], batch_size: int, max_cache_len: int) -> None:
        # Normal tensors even inside inference mode, so that the cache can be used outside of it as well.
        with torch.inference_mode(False):
            super().__init__(layers=[TreeCacheLayer(spec, batch_size, max_cache_len) for spec in specs])
        self._shape = (batch_size, max_cache_len)

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return self._shape[0]

    @property
    def max_cache_len(self) -> int:
        """Rows of a request."""
        return self._shape[1]

    def tensors(self) -> list[torch.Tensor]:
        """Return keys and values of all layers, [B, S, Hkv, D] each, in the order k0, v0, k1, v1, ...; not copies."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: a model is given a `ForwardCache`."""
        raise UnsupportedModelError(
            "TreeCache: the cache must be used through TreeModel.forward, got a direct call of the model; "
            "pass the model its own cache instead"
        )


class ForwardCache(Cache):
    """A cache as the model sees it during one forward, whose context it hands to the attention layers.

    An object of the forward's own, so that nothing has to be taken back when the forward ends or fails.
    """

    def __init__(self, layers: list[TreeCacheLayer], context: StepContext | AttentionProbe) -> None:
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
