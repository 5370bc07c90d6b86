"""The tree worker with what it takes on CUDA, on a CPU: vLLM's FlashAttention above kernels in plain torch.

vLLM's scheduler, its order of a batch, its buffers and its builder of FlashAttention's metadata are the real ones. A
step that could be captured whole runs on the metadata of the first one like it, as a captured step would.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from support.engines.worker import ProbedWorker
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from sequoia_kernels.vllm import CUDA_BACKEND, gpu_attention, runner
from sequoia_kernels.vllm.gpu_attention import DeviceTreeMetadata, DeviceTreeMetadataBuilder
from sequoia_kernels.vllm.runner import DeviceTreesMixin


def causal_attention(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],
    **_: Any,
) -> None:
    """What FlashAttention's kernel computes."""
    assert causal and window_size == [-1, -1]
    starts = cu_seqlens_q.tolist()
    for request, length in enumerate(seqused_k.tolist()):
        first, last = starts[request], starts[request + 1]
        count = last - first
        assert count <= max_seqlen_q
        pages = block_table[request, : -(-length // k.shape[1])].long()
        keys, values = (part[pages].flatten(0, 1)[:length].transpose(0, 1) for part in (k, v))
        seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        out[first:last] = torch.nn.functional.scaled_dot_product_attention(
            q[first:last].transpose(0, 1), keys, values, seen, scale=softmax_scale, enable_gqa=True
        ).transpose(0, 1)


def store(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, *_: Any
) -> None:
    """What vLLM's kernel writes into the cache: rows with a slot of at least 0."""
    kept = slots >= 0
    pages, rows = slots[kept] // keys.shape[1], slots[kept] % keys.shape[1]
    keys[pages, rows], values[pages, rows] = key[: len(slots)][kept], value[: len(slots)][kept]


class DeviceRunner(DeviceTreesMixin, CPUModelRunner):
    """What `DeviceTreeModelRunner` is on CUDA."""


flash_attn.get_flash_attn_version = lambda **_: 2
flash_attn._FA4_DENSE_ATTENTION_KERNEL = causal_attention
flash_attn.reshape_and_cache_flash = store
gpu_attention.TREE_BACKEND = "auto"
runner.RUNNER = DeviceRunner
register_backend(AttentionBackendEnum.CPU_ATTN, CUDA_BACKEND)

LAYOUTS: Counter[str] = Counter()
CAPTURED: dict[tuple[int, int], DeviceTreeMetadata] = {}
build = DeviceTreeMetadataBuilder.build


def build_once(self: DeviceTreeMetadataBuilder, common_prefix_len: int, meta: Any, fast_build: bool = False) -> Any:
    """Build a step's metadata; give the first of those that could be captured."""
    built = build(self, common_prefix_len, meta, fast_build)
    if self._is_uniform(meta):
        LAYOUTS["whole"] += 1
        return CAPTURED.setdefault((id(self), meta.num_reqs), built)
    if built.groups:
        LAYOUTS["slices" if built.rest_row or built.rest is None else "all to FlashAttention"] += 1
        LAYOUTS["scattered"] += any(group.rows is not None for group in built.groups)
        LAYOUTS["with a rest"] += built.rest is not None
    else:
        LAYOUTS["no trees"] += 1
    return built


DeviceTreeMetadataBuilder.build = build_once


class DeviceWorker(ProbedWorker):
    """The tree worker on these."""

    def layouts(self) -> dict[str, int]:
        """Steps of each kind so far."""
        return dict(LAYOUTS)
