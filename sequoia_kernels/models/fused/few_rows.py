"""A forward of few rows through a small model in one launch, in CUDA; see csrc/cuda/few_rows_kernel.h.

`FewRowsModel` holds what does not change from forward to forward; `FewRowsCall.of` puts a launch together, which
`launch` hands to the compiled module. `reference.few_rows` is the specification.

Models take it where `SEQUOIA_SINGLE_LAUNCH=1` is set when they are adapted, for as many rows as it is worth it. They do
not take it by themselves, since no loop with it has been seen to run on a GPU; see docs/architecture.md.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from sequoia_kernels.models.fused.steps import RowPlaces
from sequoia_kernels.ops import triton_device

__all__ = [
    "MAX_ROWS", "FewRowsCall", "FewRowsLayer", "FewRowsModel", "is_wanted", "is_worthwhile", "launch",
    "unavailable_reason",
]  # fmt: skip

MAX_ROWS = 32
"""of a forward, of all requests together"""
MAX_WEIGHTS = 64 << 20
"""of a layer; larger ones are left to torch's products"""
MAX_LAYERS = 32
MAX_WIDTH = 2048
MAX_TREE_ROWS = 1024
MAX_SLOTS = 4096
HEAD_DIMS = (64, 128)


class FewRowsLayer(NamedTuple):
    """Weights of a layer: RMS norms; rotated queries and keys, in front of values; SiLU of gates, times up."""

    input_norm: Tensor  # [width]
    projections: Tensor  # [(heads + 2 * kv heads) * head_dim, width]
    output: Tensor  # [width, heads * head_dim]
    mlp_norm: Tensor  # [width]
    gate_up: Tensor  # [2 * inner, width]
    down: Tensor  # [width, inner]


class FewRowsModel(NamedTuple):
    """What all forwards of a model have in common."""

    layers: tuple[FewRowsLayer, ...]
    embedding: Tensor  # [embeddings, width]
    final_norm: Tensor  # [width]
    head: Tensor  # [vocab, width]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float

    @property
    def width(self) -> int:
        """Of the stream."""
        return self.embedding.shape[1]

    @property
    def inner_width(self) -> int:
        """Between up and down."""
        return self.layers[0].down.shape[1]

    def reason_against(self, device: torch.device) -> str | None:
        """Why no launch on a device computes it, or None."""
        tensors = [*(tensor for layer in self.layers for tensor in layer), self.embedding, self.final_norm, self.head]
        if {tensor.dtype for tensor in tensors} not in ({torch.bfloat16}, {torch.float16}):
            return "its weights are neither all bfloat16 nor all float16"
        if len(self.layers) > MAX_LAYERS or self.head_dim not in HEAD_DIMS:
            return f"takes up to {MAX_LAYERS} layers with heads of {' or '.join(map(str, HEAD_DIMS))}"
        if self.width % 32 or self.inner_width % 32 or self.width > MAX_WIDTH:
            return f"takes widths that are multiples of 32, up to {MAX_WIDTH}"
        if sum(tensor.numel() for tensor in self.layers[0]) > MAX_WEIGHTS:
            return f"takes layers of up to {MAX_WEIGHTS} weights"
        if not all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors):
            return "takes weights that lie one behind the other"
        return unavailable_reason(device) if self.scale > 0 else "takes scores that are scaled up"

    def takes(self, num_rows: int, num_tree_rows: int, num_slots: int, device: torch.device) -> bool:
        """Whether a launch takes so many rows, beside so many of a tree, in such caches."""
        is_small = num_rows <= MAX_ROWS and num_tree_rows <= MAX_TREE_ROWS and num_slots <= MAX_SLOTS
        return is_small and self.shared_bytes(num_rows) <= triton_device.device_traits(device).shared_bytes

    def shared_bytes(self, num_rows: int) -> int:
        """Of a block, the least: sums and rows, or what the attention has there, and four stages of weights."""
        eights = 1 if num_rows <= 8 else 2 if num_rows <= 16 else 4
        multiplying = 8192 * eights + 2 * num_rows * (self.width + 32)
        attending = 2 * 16 * (self.head_dim + 32) + 4 * 32 * (self.head_dim + 8) + 4 * 8 * 16 * (self.head_dim + 6)
        return 4544 + max(multiplying, attending) + 4 * 8 * 9 * 64


class FewRowsCall(NamedTuple):
    """A launch, in numbers, and what must live until it has run."""

    layers: list[int]
    addresses: list[int]
    strides: list[int]
    sizes: list[int]
    eps: float
    scale: float
    is_float16: bool
    logits: Tensor
    kept: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        model: FewRowsModel,
        tokens: Tensor,
        caches: list[tuple[Tensor, Tensor]],
        places: RowPlaces,
        tree_mask: Tensor,
        num_tree_rows: int,
        table: Tensor,
        counters: Tensor,
    ) -> FewRowsCall:
        """Put a launch together.

        Args:
            model: what runs.
            tokens: fed ones. [B, N], integers.
            caches: keys and values of each layer, of equal strides. [B, S, Hkv, D] each.
            places: where rows belong; int32, contiguous.
            tree_mask: what each row sees. [N, words] or [B, N, words] int32, contiguous.
            num_tree_rows: tree slots in use.
            table: cosines and sines by position. [positions, D] float32.
            counters: [2] int32, zeros, of no other launch that may run at the same time.
        """
        batch_size, num_nodes = tokens.shape
        rows, dtype = batch_size * num_nodes, model.embedding.dtype
        tokens = tokens.to(torch.int64).contiguous()
        widths = (
            model.width, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim,
            model.num_heads * model.head_dim, model.inner_width,
        )  # fmt: skip
        # One allocation, of which each part begins at a multiple of 16 bytes.
        space = torch.empty(rows * sum(widths), dtype=dtype, device=tokens.device)
        parts = space.split([rows * width for width in widths])
        logits = torch.empty(rows, model.head.shape[0], dtype=dtype, device=tokens.device)
        keys = caches[0][0]
        layers = [
            tensor.data_ptr() for layer, pair in zip(model.layers, caches, strict=True) for tensor in (*layer, *pair)
        ]
        given = (
            model.embedding, model.final_norm, model.head, table, tokens, places.cache_lens, places.depths,
            places.node_ids, tree_mask, *parts, logits, counters,
        )  # fmt: skip
        words = tree_mask.shape[-1]
        strides = [
            num_nodes, logits.stride(0), num_nodes * words if tree_mask.dim() == 3 else 0,
            keys.stride(0), keys.stride(1), keys.stride(2),
        ]  # fmt: skip
        sizes = [
            model.embedding.shape[0], rows, num_nodes, words, num_tree_rows, keys.shape[1],
            min(places.last_position, table.shape[0] - 1), model.num_heads, model.num_kv_heads, model.head_dim,
            model.width, model.inner_width, logits.shape[1],
        ]  # fmt: skip
        addresses = [tensor.data_ptr() for tensor in given]
        is_float16 = dtype == torch.float16
        return cls(layers, addresses, strides, sizes, model.eps, model.scale, is_float16, logits, given)


def launch(call: FewRowsCall) -> None:
    """Launch on the current stream of the device that the call's tensors are on."""
    from sequoia_kernels import _cuda

    _cuda.few_rows(
        device=call.logits.device.index, stream=torch.cuda.current_stream(call.logits.device).cuda_stream,
        layers=call.layers, addresses=call.addresses, strides=call.strides, sizes=call.sizes,
        eps=call.eps, scale=call.scale, is_float16=call.is_float16,
    )  # fmt: skip


def is_wanted() -> bool:
    """Whether models that are adapted now shall take it."""
    return os.environ.get("SEQUOIA_SINGLE_LAUNCH", "0") not in ("", "0")


def is_worthwhile(width: int, num_rows: int) -> bool:
    """Whether a launch takes less time than torch's products with steps between them, as far as an H100 has shown."""
    return num_rows <= (16 if width <= 1024 else 8)


@functools.cache
def unavailable_reason(device: torch.device) -> str | None:
    """Why nothing can be launched on a device, or None."""
    if device.type != "cuda":
        return "takes a CUDA device"
    try:
        from sequoia_kernels import _cuda
    except ImportError:
        return "sequoia_kernels._cuda was not built"
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = _cuda.unavailable_reason() or _cuda.device_reason(index)
    return None if reason is None else str(reason)
