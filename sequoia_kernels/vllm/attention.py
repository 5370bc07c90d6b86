"""Attention backend of vLLM: a request's rows are a token tree behind its committed ones; a prompt chunk is a chain.

vLLM's paged cache is one tensor a layer, keys and values of a head side by side, in any physical order of its
dimensions. The op takes strides, so keys and values are views of it and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from sequoia_kernels.host_module import host as _host
from sequoia_kernels.models import causal_step
from sequoia_kernels.ops import tree_attention
from sequoia_kernels.ops.backends import runs_own
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, address
from sequoia_kernels.tree import MAX_STEP_ROWS, TokenTree
from sequoia_kernels.vllm.cut_trees import first_nodes

__all__ = ["TreeAttentionBackend", "TreeMetadataBuilder", "paged_rows"]


CACHE_DTYPES = ("float16", "bfloat16")  # vLLM's names; float32 is "auto"


class RowGroup(NamedTuple):
    """Requests whose rows go through one call of the op: equally many, under the same mask."""

    first_rows: torch.Tensor  # of each request among the step's tokens, on the host. [B] int64
    num_rows: int
    mask: torch.Tensor  # [N, W] int32
    cache_lens: torch.Tensor  # [B] int32
    block_table: torch.Tensor  # [B, pages] int32


@dataclass
class TreeMetadata:
    """What the layers that share a block table need of a step."""

    groups: list[RowGroup]
    slot_mapping: torch.Tensor  # cache row of each token. [tokens] int64
    num_actual_tokens: int
    prepared: Any = None  # the same for the host's layers, where the step runs there


@dataclass
class StepTrees:
    """Which of a step's requests are trees; the runner fills it before the metadata is built.

    Attributes:
        trees: of each request of the batch in order, None where its rows are a chain.
    """

    trees: Sequence[TokenTree | None] = field(default_factory=tuple)


def paged_rows(kv_cache: torch.Tensor) -> torch.Tensor:
    """View vLLM's [blocks, Hkv, page, content] as the ops' [blocks, page, Hkv, content]."""
    return kv_cache.permute(0, 2, 1, 3)


class TreeAttentionBackend(AttentionBackend):
    """Registered as CUSTOM, and in place of the CPU's only choice in processes of the tree worker."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *CACHE_DTYPES]

    @staticmethod
    def get_name() -> str:
        """Give the name that vLLM knows it by."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        """Give the class of a layer's attention."""
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeMetadataBuilder]:
        """Give the class that builds a step's metadata."""
        return TreeMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Give the layouts; the first one is preferred: the heads of a token side by side."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Tell that windows are served: they count depth, not rows."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Tell that attention sinks are served."""
        return True


class TreeMetadataBuilder(AttentionMetadataBuilder[TreeMetadata]):
    """Groups a step's requests by their trees; rows that are no tree are chains."""

    # Row groups and lengths are read on the host: no step of it can be captured.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.step_trees: StepTrees | None = None  # set by the runner

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TreeMetadata:
        """Build the metadata of one step."""
        meta = common_attn_metadata
        num_requests = meta.num_reqs
        starts = meta.query_start_loc_cpu[: num_requests + 1].numpy()
        # Exact, not a bound, without asynchronous scheduling, which vLLM refuses for custom proposers.
        ends = meta.seq_lens_cpu_upper_bound[:num_requests].numpy()
        num_rows = np.diff(starts)
        trees = () if self.step_trees is None else self.step_trees.trees
        kept = [tree if rows > 1 else None for tree, rows in zip(trees, num_rows)] or [None] * num_requests
        groups: dict[tuple[TokenTree | None, int], list[tuple[int, int, int]]] = {}
        for request in range(num_requests):
            first, rows, tree = int(starts[request]), int(num_rows[request]), kept[request]
            committed = int(ends[request]) - rows
            if tree is not None:
                groups.setdefault((tree, rows), []).append((request, first, committed))
                continue
            # Chunks of one prompt may stand in any order: the rows of all of them are stored by then.
            for row in range(0, rows, MAX_STEP_ROWS):
                key = (None, min(MAX_STEP_ROWS, rows - row))
                groups.setdefault(key, []).append((request, first + row, committed + row))
        row_groups = [self._group(tree, rows, members, meta) for (tree, rows), members in groups.items()]
        metadata = TreeMetadata(row_groups, meta.slot_mapping, meta.num_actual_tokens)
        if self.device.type == "cpu":
            metadata.prepared = _host.PagedStep(
                [_prepared(group) for group in row_groups], meta.slot_mapping.data_ptr(), meta.num_actual_tokens
            )
        return metadata

    def _group(
        self,
        tree: TokenTree | None,
        num_rows: int,
        members: list[tuple[int, int, int]],
        meta: CommonAttentionMetadata,
    ) -> RowGroup:
        requests, firsts, committed = (np.array(column) for column in zip(*members))
        if tree is None:
            mask = causal_step(num_rows, self.device).tree_mask
        else:
            mask = first_nodes(tree, num_rows).tensors(self.device).ancestor_mask
        table = meta.block_table_tensor
        if len(requests) == meta.num_reqs and (requests == np.arange(meta.num_reqs)).all():
            table = table[: meta.num_reqs]
        else:
            table = table.index_select(0, torch.from_numpy(requests).to(table.device))
        lens = torch.from_numpy(committed.astype(np.int32)).to(self.device)
        return RowGroup(torch.from_numpy(firsts), num_rows, mask.contiguous(), lens, table.contiguous())


def _prepared(group: RowGroup) -> dict[str, int]:
    return {
        "first_rows": group.first_rows.data_ptr(),
        "tree_mask": group.mask.data_ptr(),
        "cache_lens": group.cache_lens.data_ptr(),
        "block_table": group.block_table.data_ptr(),
        "num_requests": group.block_table.shape[0],
        "num_rows": group.num_rows,
        "num_words": group.mask.shape[-1],
        "max_pages": group.block_table.shape[1],
    }


class TreeAttentionImpl(AttentionImpl[TreeMetadata]):
    """A layer's attention: stores the step's keys and values, then attends group by group."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        where = "sequoia_kernels.vllm"
        if attn_type != "decoder":
            raise ValueError(f"{where}: attention layers must be a decoder's, got one of an {attn_type}")
        if alibi_slopes is not None:
            raise ValueError(f"{where}: attention layers must have no ALiBi slopes, got some")
        if kv_cache_dtype not in ("auto", *CACHE_DTYPES):
            raise ValueError(f"{where}: caches must be of {', '.join(CACHE_DTYPES)}, got {kv_cache_dtype}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window, self.softcap, self.sinks = sliding_window, logits_soft_cap or None, sinks
        self.stores = kv_sharing_target_layer_name is None
        self._cache = torch.empty(0)  # what the layer was prepared for
        self._pages = self._keys = self._values = self._cache
        self._prepared: Any = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [tokens, Hq, D]
        key: torch.Tensor,  # [tokens, Hkv, D]
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [blocks, Hkv, page, 2 * D]
        attn_metadata: TreeMetadata | None,
        output: torch.Tensor,  # [tokens, Hq, D]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; writes `output` and the cache rows of the step's tokens."""
        if attn_metadata is None:  # a forward to measure memory, or to compile
            return output.zero_()
        if kv_cache is not self._cache:
            self._prepare(kv_cache)
        is_prepared = self._prepared is not None and attn_metadata.prepared is not None
        if is_prepared and _are_rows(query, key, value, output, kv_cache.dtype):
            attended = self._prepared.attend(
                attn_metadata.prepared,
                query.data_ptr(),
                query.stride(0),
                key.data_ptr(),
                key.stride(0),
                value.data_ptr(),
                value.stride(0),
                output.data_ptr(),
                torch.get_num_threads(),
            )
            if not attended:
                raise ValueError("sequoia_kernels.vllm: slots and pages must lie in the cache, got one outside of it")
            return output
        if self.stores:
            _store(self._pages, key, value, attn_metadata)
        heads_of_rows = output.view(query.shape)
        for group in attn_metadata.groups:
            rows = (group.first_rows[:, None] + torch.arange(group.num_rows)).flatten().to(query.device)
            attended = tree_attention(
                query.index_select(0, rows).view(-1, group.num_rows, *query.shape[1:]),
                self._keys,
                self._values,
                group.mask,
                group.cache_lens,
                scale=self.scale,
                softcap=self.softcap,
                sliding_window=self.sliding_window,
                sinks=self.sinks,
                block_table=group.block_table,
            ).out
            heads_of_rows.index_copy_(0, rows, attended.flatten(0, 1))
        return output

    def _prepare(self, kv_cache: torch.Tensor) -> None:
        """Lay out a cache; vLLM gives a layer the same one in every step."""
        self._cache, self._pages = kv_cache, paged_rows(kv_cache)
        self._keys, self._values = self._pages.split(self.head_size, dim=3)
        self._prepared = None
        if kv_cache.dtype not in ELEMENT_TYPES or not runs_own(tree_attention.__name__, "auto", "cpu", "host"):
            return
        if not kv_cache.is_cpu or kv_cache.dtype == torch.float64:
            return
        if self.sinks is not None:
            self.sinks = self.sinks.detach().to(torch.float32).contiguous()
        self._prepared = _host.PagedLayer(
            {
                "keys": self._keys.data_ptr(),
                "values": self._values.data_ptr(),
                "pages": (tuple(self._keys.shape), self._keys.stride()),
                "type": ELEMENT_TYPES[kv_cache.dtype],
                "scale": self.scale,
                "softcap": self.softcap or 0.0,
                "sliding_window": self.sliding_window or 0,
                "sinks": address(self.sinks),
                "num_heads": self.num_heads,
                "stores": self.stores,
            }
        )


def _are_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Tell whether the heads of each row lie side by side, all in the cache's dtype."""
    width = query.shape[2]
    return (
        query.stride(1) == key.stride(1) == value.stride(1) == width
        and query.stride(2) == key.stride(2) == value.stride(2) == 1
        and query.dtype == key.dtype == value.dtype == output.dtype == dtype
        and output.is_contiguous()
    )


def _store(pages: torch.Tensor, key: torch.Tensor, value: torch.Tensor, metadata: TreeMetadata) -> None:
    """Write the step's keys and values into their cache rows. pages: [blocks, page, Hkv, 2 * D]."""
    slots = metadata.slot_mapping[: metadata.num_actual_tokens]
    count, width = slots.shape[0], key.shape[2]
    if pages.is_contiguous():
        rows = pages.flatten(0, 1)
        rows[..., :width].index_copy_(0, slots, key[:count])
        rows[..., width:].index_copy_(0, slots, value[:count])
        return
    page, row = slots // pages.shape[1], slots % pages.shape[1]
    pages[page, row, :, :width] = key[:count]
    pages[page, row, :, width:] = value[:count]
