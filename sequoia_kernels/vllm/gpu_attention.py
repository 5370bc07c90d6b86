"""Attention backend of vLLM on CUDA: tree rows by our op, prompts and plain decoding by vLLM's FlashAttention.

Not run on a GPU yet: written from the sources of vLLM 0.32 and checked on a CPU (docs/serving.md, "On a GPU").

Both read the same paged cache, of which keys and values are views by strides. vLLM puts decoding requests first in a
batch, so in most steps the trees are one slice of the rows, and what FlashAttention gets is the other one. What a step
needs on the device lies in buffers that are allocated once and are filled there: nothing of the device is read on the
host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.utils import CpuGpuBuffer

from sequoia_kernels.ops import tree_attention
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm.step_layout import StepLayout, step_layout

__all__ = ["DeviceTreeBackend", "DeviceTreeMetadataBuilder", "DeviceTrees"]

WHERE = "sequoia_kernels.vllm"
TREE_BACKEND = "triton"  # by name: "auto" would go on with a slow one where Triton cannot run
MAX_HEAD_SIZE = 256  # of the Triton kernel


class DeviceTrees:
    """The trees of an engine as tensors, and which request of a step has which.

    Args:
        trees: those to choose from.
        max_requests: requests of the largest batch.
        device: where the tensors lie.

    Attributes:
        max_nodes: nodes of the largest tree, N.
        masks: of each tree, and of a chain as the last one. [trees + 1, N, W] int32
        shifts: depth of each node less its number, 0 for a chain. [trees + 1, N] int64
    """

    def __init__(self, trees: Sequence[TokenTree], max_requests: int, device: torch.device) -> None:
        self.max_nodes = max(tree.num_nodes for tree in trees)
        self._trees: Sequence[TokenTree | None] = ()
        self._row = {tree: row for row, tree in enumerate(trees)}
        self._chain = len(trees)
        with torch.inference_mode(False):
            masks = torch.zeros(len(trees) + 1, self.max_nodes, -(-self.max_nodes // 32), dtype=torch.int32)
            shifts = torch.zeros(len(trees) + 1, self.max_nodes, dtype=torch.int64)
            for row, tree in enumerate((*trees, TokenTree.chain(self.max_nodes))):
                nodes, words = (mask := tree.tensors().ancestor_mask).shape
                masks[row, :nodes, :words] = mask
                shifts[row, :nodes] = tree.tensors().depths - torch.arange(nodes)
            self.masks, self.shifts = masks.to(device), shifts.to(device)
            self._numbers = CpuGpuBuffer(max_requests, dtype=torch.int64, device=device)
        self._numbers.np.fill(self._chain)
        self._numbers.copy_to_gpu()

    @property
    def trees(self) -> Sequence[TokenTree | None]:
        """Of each request of the step in order, None where its rows are a chain. Set, they are told to the device."""
        return self._trees

    @trees.setter
    def trees(self, trees: Sequence[TokenTree | None]) -> None:
        self._trees = trees
        numbers = np.full_like(self._numbers.np, self._chain)
        numbers[: len(trees)] = [self._chain if tree is None else self._row[tree] for tree in trees]
        if not np.array_equal(numbers, self._numbers.np):
            self._numbers.np[:] = numbers
            self._numbers.copy_to_gpu()

    def forget(self) -> None:
        """End the step: one that vLLM runs by itself, to warm up or to capture, has no trees."""
        self._trees = ()

    @property
    def numbers(self) -> torch.Tensor:
        """Row of masks and shifts for each request, that of the chain behind the batch. [max_requests] int64."""
        return self._numbers.gpu

    def move_positions_(self, positions: torch.Tensor, requests: torch.Tensor, rows: torch.Tensor) -> None:
        """Turn positions one behind the other into positions by depth.

        Args:
            positions: of the step's rows; written. [tokens] int64
            requests: request of each row. [tokens] int64
            rows: place of each row among those of its request. [tokens] int64
        """
        positions += self.shifts[self.numbers[requests], rows.clamp(max=self.max_nodes - 1)]


class TreeGroup(NamedTuple):
    """Requests whose trees have equally many rows: one call of the op.

    Attributes:
        first_row: of the group's rows, which lie side by side unless `rows` is given.
        num_rows: rows of each request, n.
        rows: the group's rows among the step's tokens where they are scattered. [B * n] int64
        masks: [B, n, W] int32
        cache_lens: committed rows. [B] int32
        block_table: [B, pages] int32
    """

    first_row: int
    num_rows: int
    rows: torch.Tensor | None
    masks: torch.Tensor
    cache_lens: torch.Tensor
    block_table: torch.Tensor


@dataclasses.dataclass
class DeviceTreeMetadata:
    """What the layers that share a block table need of a step.

    Attributes:
        groups: the trees.
        rest: what FlashAttention attends to, from row `rest_row` on; None where there are only trees. Trees among its
            rows are attended to as chains there, and are written anew by their groups.
        rest_row: see above.
    """

    groups: list[TreeGroup]
    rest: FlashAttentionMetadata | None
    rest_row: int = 0


def _side_by_side(members: Sequence[int]) -> bool:
    return members[-1] - members[0] + 1 == len(members)


class DeviceTreeBackend(FlashAttentionBackend):
    """Registered as CUSTOM on CUDA."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """Give the name that vLLM knows it by."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[DeviceTreeImpl]:
        """Give the class of a layer's attention."""
        return DeviceTreeImpl

    @staticmethod
    def get_builder_cls() -> type[DeviceTreeMetadataBuilder]:
        """Give the class that builds a step's metadata."""
        return DeviceTreeMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Tell whether both kernels take heads of this size."""
        return head_size <= MAX_HEAD_SIZE and super().supports_head_size(head_size)

    # What FlashAttention serves and a tree has no rule for, or has not been tested with.

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Tell that only decoders are served."""
        return attn_type == "decoder"

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Tell that rows never see later ones."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Tell that windows which keep the prompt in sight are not served."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Tell that ranges which see both ways are not served."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Tell that the op's splits depend on the batch."""
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """Tell that caches have no scales."""
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Tell that rows must not leave before they are moved."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Tell that rows are counted on the host."""
        return False


class DeviceTreeMetadataBuilder(FlashAttentionMetadataBuilder):
    """Shares a step's rows between the op and FlashAttention, and fills what the op reads."""

    # vLLM replays a whole step only where every request has as many rows as the largest tree. Such a step is one group,
    # prompts of that length being chains in it, so it is one call on buffers that never move; which trees, how long and
    # in which pages are values in them. Any other step has another layout, which is decided on the host: its graphs end
    # at the attention layers.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    # Groups have a part of the block table each.
    supports_update_block_table: bool = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # As many rows as the largest tree has still count as decoding, which vLLM puts in front.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.step_trees: DeviceTrees | None = None  # set by the runner
        most, nodes = vllm_config.scheduler_config.max_num_seqs, 1 + vllm_config.num_speculative_tokens
        self._max_nodes = nodes
        with torch.inference_mode(False):
            self._masks = torch.zeros(most * nodes * -(-nodes // 32), dtype=torch.int32, device=device)
            self._cache_lens = torch.zeros(most, dtype=torch.int32, device=device)
            self._rest_starts = torch.zeros(most + 1, dtype=torch.int32, device=device)
            self._scattered = CpuGpuBuffer(most, dtype=torch.int64, device=device)
            self._nodes = torch.arange(nodes, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DeviceTreeMetadata:
        """Build the metadata of one step."""
        meta, step = common_attn_metadata, self.step_trees
        if step is None:
            return DeviceTreeMetadata([], super().build(common_prefix_len, meta, fast_build))
        count, starts = meta.num_reqs, meta.query_start_loc
        if self._is_uniform(meta):
            num_rows = np.full(count, self._max_nodes)
            layout = StepLayout({self._max_nodes: list(range(count))}, count)
        else:
            # Lengths on the host are those of the device: vLLM refuses asynchronous scheduling beside outside drafts.
            num_rows = np.diff(meta.query_start_loc_cpu[: count + 1].numpy())
            layout = step_layout(num_rows, step.trees)
        if layout.groups:
            # Requests that only fill a captured batch have no rows and no length: 0.
            torch.sub(meta.seq_lens[:count], starts[1 : count + 1] - starts[:count], out=self._cache_lens[:count])
        groups = self._groups(meta, step, layout, num_rows)
        if layout.rest_request == count:
            return DeviceTreeMetadata(groups, None)
        rest_row = int(num_rows[: layout.rest_request].sum())
        rest = self._rest(meta, layout.rest_request, rest_row, num_rows)
        return DeviceTreeMetadata(groups, super().build(common_prefix_len, rest, fast_build), rest_row)

    def _is_uniform(self, meta: CommonAttentionMetadata) -> bool:
        """Tell whether vLLM may capture or replay the step: the same question as its own, of the padded batch."""
        return meta.max_query_len == self._max_nodes and meta.num_actual_tokens == meta.num_reqs * self._max_nodes

    def _groups(
        self, meta: CommonAttentionMetadata, step: DeviceTrees, layout: StepLayout, num_rows: np.ndarray
    ) -> list[TreeGroup]:
        scattered = [members for members in layout.groups.values() if not _side_by_side(members)]
        if scattered:
            order = np.concatenate(scattered)
            self._scattered.np[: len(order)] = order
            self._scattered.copy_to_gpu(len(order))
        groups: list[TreeGroup] = []
        words, masked, taken = step.masks.shape[2], 0, 0
        for rows, members in layout.groups.items():
            count, places = len(members), None
            if _side_by_side(members):
                part = slice(members[0], members[0] + count)
                columns = [column[part] for column in (step.numbers, self._cache_lens, meta.block_table_tensor)]
            else:
                requests = self._scattered.gpu[taken : taken + count]
                taken += count
                columns = [
                    column.index_select(0, requests)
                    for column in (step.numbers, self._cache_lens, meta.block_table_tensor)
                ]
                places = (meta.query_start_loc.index_select(0, requests)[:, None] + self._nodes[:rows]).flatten()
            numbers, lens, table = columns
            masks = self._masks[masked : masked + count * rows * words].view(count, rows, words)
            masked += masks.numel()
            # Of a tree that was cut the first nodes are left, whose ancestors are among them.
            torch.index_select(step.masks[:, :rows], 0, numbers, out=masks)
            groups.append(TreeGroup(int(num_rows[: members[0]].sum()), rows, places, masks, lens, table))
        return groups

    def _rest(
        self, meta: CommonAttentionMetadata, first: int, first_row: int, num_rows: np.ndarray
    ) -> CommonAttentionMetadata:
        """Give the part of a batch that begins with a request."""
        if first == 0:
            return meta
        count = meta.num_reqs - first
        starts = self._rest_starts[: count + 1]
        torch.sub(meta.query_start_loc[first : meta.num_reqs + 1], first_row, out=starts)
        part = slice(first, meta.num_reqs)
        return dataclasses.replace(
            meta,
            query_start_loc=starts,
            query_start_loc_cpu=meta.query_start_loc_cpu[first : meta.num_reqs + 1] - first_row,
            seq_lens=meta.seq_lens[part],
            num_reqs=count,
            num_actual_tokens=meta.num_actual_tokens - first_row,
            max_query_len=int(num_rows[part].max()),
            block_table_tensor=meta.block_table_tensor[part],
            slot_mapping=meta.slot_mapping[first_row:],
        )


class DeviceTreeImpl(FlashAttentionImpl):
    """A layer's attention. Keys and values are stored before, by FlashAttention's own method."""

    supports_dcp: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if attn_type != "decoder":
            raise ValueError(f"{WHERE}: attention layers must be a decoder's, got one of an {attn_type}")
        if alibi_slopes is not None:
            raise ValueError(f"{WHERE}: attention layers must have no ALiBi slopes, got some")
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
        )
        self._window, self._softcap = sliding_window, logits_soft_cap or None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [tokens, Hq, D]
        key: torch.Tensor,  # [tokens, Hkv, D]
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [blocks, Hkv, page, 2 * D]
        attn_metadata: DeviceTreeMetadata | None,
        output: torch.Tensor,  # [tokens, Hq, D]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; writes `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{WHERE}: outputs must not be quantised in attention, got scales for them")
        if attn_metadata is None:  # a forward to measure memory, or to compile
            return output.zero_()
        first = attn_metadata.rest_row
        if attn_metadata.rest is not None:
            super().forward(
                layer, query[first:], key[first:], value[first:], kv_cache, attn_metadata.rest, output[first:]
            )
        if attn_metadata.groups:
            keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            for group in attn_metadata.groups:
                self._attend(query, keys, values, group, output)
        return output

    def _attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,  # [blocks, page, Hkv, D]
        values: torch.Tensor,
        group: TreeGroup,
        output: torch.Tensor,
    ) -> None:
        shape = group.masks.shape[:2]
        if group.rows is None:
            rows = slice(group.first_row, group.first_row + shape[0] * shape[1])
            taken, out = query[rows].unflatten(0, shape), output[rows].unflatten(0, shape)
        else:
            taken, out = query.index_select(0, group.rows).unflatten(0, shape), None
        attended = tree_attention(
            taken,
            keys,
            values,
            group.masks,
            group.cache_lens,
            scale=self.scale,
            softcap=self._softcap,
            sliding_window=self._window,
            sinks=self.sinks,
            block_table=group.block_table,
            out=out,
            backend=TREE_BACKEND,
        )
        if group.rows is not None:
            output.index_copy_(0, group.rows, attended.out.flatten(0, 1))
