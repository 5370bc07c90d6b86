"""What the CUDA backend builds on of vLLM, in plain torch: enough of FlashAttention's backend to stand below ours."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

__all__ = ["common_metadata", "gpu_attention"]

MODULE = "sequoia_kernels.vllm.gpu_attention"


class AttentionCGSupport(enum.Enum):
    """Which batches may be captured whole."""

    ALWAYS = 3
    UNIFORM_BATCH = 2
    NEVER = 0


@dataclasses.dataclass
class CommonAttentionMetadata:
    """A batch, as the runner tells it to builders."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool = True


class CpuGpuBuffer:
    """A tensor on the host and one on the device."""

    def __init__(self, *size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.cpu = torch.zeros(*size, dtype=dtype)
        self.gpu = torch.zeros(*size, dtype=dtype, device=device)  # never the same memory
        self.np = self.cpu.numpy()
        self.copies = 0

    def copy_to_gpu(self, n: int | None = None) -> torch.Tensor:
        self.copies += 1
        return self.gpu[:n].copy_(self.cpu[:n], non_blocking=True)


class FlashAttentionBackend:
    """Serves everything."""

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0


@dataclasses.dataclass
class FlashAttentionMetadata:
    """What a layer reads of a step."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class FlashAttentionMetadataBuilder:
    """Hands on what it is given."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.vllm_config, self.device = vllm_config, device

    def _init_reorder_batch_threshold(self, threshold: int, supports_spec_as_decode: bool = False) -> None:
        assert supports_spec_as_decode
        self.reorder_batch_threshold = max(threshold, 1 + self.vllm_config.num_speculative_tokens)

    def build(self, common_prefix_len: int, meta: CommonAttentionMetadata, fast_build: bool) -> FlashAttentionMetadata:
        assert meta.query_start_loc.shape == meta.query_start_loc_cpu.shape == (meta.num_reqs + 1,)
        assert len(meta.seq_lens) == len(meta.block_table_tensor) == meta.num_reqs
        return FlashAttentionMetadata(
            meta.num_actual_tokens,
            meta.max_query_len,
            meta.query_start_loc,
            meta.seq_lens,
            meta.block_table_tensor,
            meta.slot_mapping,
        )


class FlashAttentionImpl:
    """Causal attention, request by request."""

    def __init__(self, *settings: Any) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = settings[:4]
        self.window, self.softcap, self.sinks = settings[5], settings[7], settings[10]
        self.rows_seen = 0

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: FlashAttentionMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor:
        self.rows_seen += metadata.num_actual_tokens
        if query.is_meta:
            return output
        starts = metadata.query_start_loc.tolist()
        assert starts[-1] == metadata.num_actual_tokens and starts[0] == 0
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        group = self.num_heads // self.num_kv_heads
        for request, length in enumerate(metadata.seq_lens.tolist()):
            first, last = starts[request], starts[request + 1]
            assert last - first <= metadata.max_query_len
            pages = metadata.block_table[request].long()
            seen, read = (
                part[pages].flatten(0, 1)[:length].double().repeat_interleave(group, 1) for part in (keys, values)
            )
            scores = torch.einsum("qhd,shd->hqs", query[first:last].double(), seen) * self.scale
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            behind = torch.arange(length - (last - first), length)[:, None] - torch.arange(length)
            hidden = behind < 0 if self.window is None else (behind < 0) | (behind >= self.window)
            scores = scores.masked_fill(hidden, -torch.inf)
            if self.sinks is not None:
                sinks = self.sinks.double()[:, None, None].expand(-1, last - first, 1)
                scores = torch.cat([scores, sinks], dim=2)
            weights = scores.softmax(-1)[:, :, :length]
            output[first:last] = torch.einsum("hqs,shd->qhd", weights, read).to(output.dtype)
        return output


def gpu_attention(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the CUDA backend on top of these; it is forgotten with the patch."""
    contents = {
        "vllm": (),
        "vllm.v1": (),
        "vllm.v1.attention": (),
        "vllm.v1.attention.backend": (AttentionCGSupport, CommonAttentionMetadata),
        "vllm.v1.attention.backends": (),
        "vllm.v1.attention.backends.flash_attn": (
            FlashAttentionBackend,
            FlashAttentionImpl,
            FlashAttentionMetadata,
            FlashAttentionMetadataBuilder,
        ),
        "vllm.v1.utils": (CpuGpuBuffer,),
    }
    for name, classes in contents.items():
        module = ModuleType(name)
        for entry in classes:
            setattr(module, entry.__name__, entry)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, MODULE, ModuleType(MODULE))  # so that it is taken out again
    del sys.modules[MODULE]
    return importlib.import_module(MODULE)


def common_metadata(
    num_rows: list[int],
    committed: list[int],
    block_table: torch.Tensor,
    *,
    padded_to: int = 0,
    device: str = "cpu",
) -> CommonAttentionMetadata:
    """A batch of requests.

    Args:
        num_rows: of each request.
        committed: tokens of each before the step.
        block_table: of the largest batch. [requests, pages] int32
        padded_to: requests that the batch is filled up to, as for a captured step, of `num_rows[0]` rows each.
        device: where the device's tensors lie.
    """
    requests = max(len(num_rows), padded_to)
    starts = torch.zeros(requests + 1, dtype=torch.int32)
    starts[1 : len(num_rows) + 1] = torch.tensor(num_rows).cumsum(0)
    starts[len(num_rows) + 1 :] = sum(num_rows)
    lens = torch.zeros(requests, dtype=torch.int32)
    lens[: len(num_rows)] = torch.tensor(num_rows) + torch.tensor(committed)
    tokens = requests * num_rows[0] if padded_to else sum(num_rows)
    return CommonAttentionMetadata(
        query_start_loc=starts.clone().to(device),
        query_start_loc_cpu=starts,
        seq_lens=lens.to(device),
        num_reqs=requests,
        num_actual_tokens=tokens,
        max_query_len=max(num_rows),
        max_seq_len=int(lens.max()),
        block_table_tensor=block_table[:requests],
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
    )
