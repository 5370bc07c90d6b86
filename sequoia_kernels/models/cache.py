"""The key/value cache of tree decoding: preallocated rows, written where the tree says, with no length of its own.

And the context of a forward, which tells the attention layers where their rows go, and how it comes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from sequoia_kernels import checks
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.tree_step import TreeStep

__all__ = [
    "CONTEXT_KWARG", "ForwardCache", "LayerSpec", "PagedTreeCache", "StepContext", "TreeCache", "TreeCacheLayer",
    "find_context", "row_bytes", "store_rows",
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


def row_bytes(specs: Sequence[LayerSpec]) -> int:
    """Bytes of a token's keys and values in all layers."""
    return sum(spec.num_kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize for spec in specs)


class TreeCacheLayer(CacheLayerMixin):
    """Keys and values of one layer; full length also under a sliding window, which the attention masks instead.

    Of a paged cache these are its pages: B is then their number, and S the rows of one.
    """

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

    Attributes:
        block_table: where the rows are in pages, as `PagedTreeCache.of` gives them: row s of request b is in page
            block_table[b, s // page_size]. [B, max_pages] int32; None where each request has rows of its own.
        page_size: rows of a page, 0 without pages.
    """

    block_table: torch.Tensor | None = None
    page_size = 0

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
        part.block_table, part.page_size = self.block_table, self.page_size
        return part

    def tensors(self) -> list[torch.Tensor]:
        """Return keys and values of all layers, in the order k0, v0, k1, v1, ...; not copies.

        [B, S, Hkv, D] each; of pages [num_pages, page_size, Hkv, D], and those of all requests.
        """
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    def flat_rows(self, cache_lens: torch.Tensor, node_ids: torch.Tensor) -> torch.Tensor:
        """Return where rows cache_lens[b] + node_ids[i] lie in a layer's `flat_keys`. [B * N] int64."""
        rows = (cache_lens[:, None] + node_ids).to(torch.int64)  # [B, N]
        if self.block_table is not None:
            pages = self.block_table.gather(1, rows // self.page_size)
            rows = pages * self.page_size + rows % self.page_size
        elif rows.shape[0] > 1:
            length = self.max_cache_len
            rows = rows + torch.arange(0, rows.shape[0] * length, length, device=rows.device)[:, None]
        return rows.flatten()

    def check_pages(self, cache_lens: torch.Tensor, num_tree_rows: int) -> None:
        """Refuse a block table that leads out of the pages, as far as its rows are in use. On a CPU only: it reads.

        Raises:
            ValueError: a page of rows 0..cache_lens[b] + num_tree_rows - 1 of a request is none.
        """
        table = self.block_table
        if table is None or not table.is_cpu:
            return
        num_pages = self.layers[0].keys.shape[0]
        lowest, highest = (int(bound) for bound in table.aminmax())
        if lowest >= 0 and highest < num_pages:
            return
        in_use = torch.arange(table.shape[1]) * self.page_size < cache_lens[:, None] + num_tree_rows
        wrong = (in_use & ((table < 0) | (table >= num_pages))).nonzero()
        if len(wrong):
            request, place = wrong[0].tolist()
            raise ValueError(
                f"forward: block_table must have pages in 0..{num_pages - 1} for "
                f"{int(cache_lens[request]) + num_tree_rows} rows of request {request}, got "
                f"{int(table[request, place])} in place {place}"
            )

    def require_rows(self, reader: str) -> None:
        """Refuse pages on behalf of a reader of rows that lie side by side."""
        if self.block_table is not None:
            raise UnsupportedModelError(f"{reader}: cache must not be paged, got pages of {self.page_size} rows")

    def reset(self) -> None:
        """Fill the cache with zeros; refused where its pages hold other requests' rows as well."""
        self.require_rows("reset")
        super().reset()

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: a model is given a `ForwardCache`."""
        raise UnsupportedModelError(
            "TreeCache: the cache must be used through TreeModel.forward, got a direct call of the model; "
            "pass the model its own cache instead"
        )


class PagedTreeCache:
    """Keys and values of all layers in pages of one pool, for requests that come and go; made by `new_paged_cache`.

    Which pages belong to which request is the caller's to keep, in block tables: the cache of a forward is
    `of(block_table)`. A page may serve several requests as long as none writes to it, and the rows that a forward
    writes, `TreeModel.forward` says which, must not be another's.

    Args:
        specs: what each layer stores.
        num_pages: pages of the pool.
        page_size: rows of a page.

    Attributes:
        specs: as above.
        num_pages: as above.
        page_size: as above.
        layers: one `TreeCacheLayer` a layer, with `.keys` and `.values`.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive, or the pool has 2^31 rows or more.

    Example:
        >>> spec = LayerSpec(2, 8, 8, torch.float32, torch.device("cpu"), None)
        >>> pool = PagedTreeCache((spec,), num_pages=6, page_size=16)
        >>> block_table = torch.tensor([[4, 0], [2, -1]], dtype=torch.int32)  # of two requests
        >>> cache = pool.of(block_table)
        >>> cache.batch_size, cache.max_cache_len, pool.num_bytes
        (2, 32, 12288)
    """

    def __init__(self, specs: tuple[LayerSpec, ...], num_pages: int, page_size: int) -> None:
        num_pages = checks.whole_number("PagedTreeCache", "num_pages", num_pages, rule=checks.at_least(1))
        page_size = checks.whole_number("PagedTreeCache", "page_size", page_size, rule=checks.at_least(1))
        if num_pages * page_size >= 2**31:  # rows are counted in int32
            raise ValueError(f"PagedTreeCache: num_pages * page_size must be below 2^31, got {num_pages} * {page_size}")
        self.specs, self.num_pages, self.page_size = specs, num_pages, page_size
        with torch.inference_mode(False):  # as of `TreeCache`
            self.layers = [TreeCacheLayer(spec, num_pages, page_size) for spec in specs]

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return row_bytes(self.specs)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_pages * self.page_size * self.bytes_per_row

    def tensors(self) -> list[torch.Tensor]:
        """Return the pools, [num_pages, page_size, Hkv, D] each, in the order k0, v0, k1, v1, ...; not copies.

        They are what `CacheTable(cache.tensors(), paged=True)` takes.
        """
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    def of(self, block_table: torch.Tensor) -> TreeCache:
        """Return the cache of B requests, for forwards: its rows are those of their pages.

        Args:
            block_table: row s of request b is in page block_table[b, s // page_size]. [B, max_pages] int32, contiguous,
                on the device of the forwards' `cache_lens`. Entries behind a request's last row in use may be
                anything. Kept, not copied: what it holds may change between forwards, where it lies may not.

        Returns:
            A cache of max_pages * page_size rows a request. It costs nothing: there may be many, one a batch.

        Raises:
            TypeError: not a tensor of int32.
            ValueError: another shape, or not contiguous.
        """
        checks.check_tensor("PagedTreeCache.of", "block_table", block_table)
        checks.check_dtype("PagedTreeCache.of", "block_table", block_table, torch.int32)
        if block_table.dim() != 2 or 0 in block_table.shape or not block_table.is_contiguous():
            raise ValueError(
                "PagedTreeCache.of: block_table must be contiguous with shape [batch, pages], got "
                f"{list(block_table.shape)} with strides {block_table.stride()}"
            )
        batch_size, max_pages = block_table.shape
        cache = TreeCache((), batch_size, max_pages * self.page_size)
        cache.layers.extend(self.layers)
        cache.specs = self.specs
        cache.block_table, cache.page_size = block_table, self.page_size
        return cache


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
    block_table: torch.Tensor | None = None  # of a paged cache, see `TreeCache`. [B, max_pages] int32
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
        """Work out the rows to write, once for all layers; `first_row` only where it may be read on the host.

        Raises:
            ValueError: the cache's block table leads out of its pages (checked for CPU tensors).
        """
        table, may_read_row = cache.block_table, may_read_row and cache_lens.is_cpu and cache_lens.shape[0] == 1
        if may_read_row and step.first_node is not None and table is None:
            return cls(cache.layers, int(cache_lens) + step.first_node, None, step.tree_mask, cache_lens, attention)
        cache.check_pages(cache_lens, step.num_tree_rows)
        rows = cache.flat_rows(cache_lens, step.node_ids)
        return cls(cache.layers, None, rows, step.tree_mask, cache_lens, attention, table)

    def on(self, device: torch.device) -> StepContext:
        """Return the same context with its tensors on a layer's device (models spread over several devices)."""
        moved = self._moved.get(device)
        if moved is None:
            rows, table = (None if part is None else part.to(device) for part in (self.rows, self.block_table))
            mask, cache_lens = self.tree_mask.to(device), self.cache_lens.to(device)
            moved = StepContext(self.layers, self.first_row, rows, mask, cache_lens, self.attention, table)
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
