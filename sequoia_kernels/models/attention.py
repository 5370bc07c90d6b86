"""The attention function that transformers' models call: store the new rows, then attend along the tree."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.cache import CONTEXT_ATTRIBUTE, TreeCacheLayer
from sequoia_kernels.models.step import TreeStep
from sequoia_kernels.ops import tree_attention

__all__ = ["ATTENTION_NAME", "CONTEXT_KWARG", "StepContext", "find_context", "store_rows"]

# Registered as an attention function but not as a mask function: the models then build no mask at all.
ATTENTION_NAME = "sequoia_tree"
# The keyword under which the context rides on the model call.
CONTEXT_KWARG = "sequoia_context"


class StepContext:
    """What the attention layers of one forward need to know. Lives as long as the forward.

    Attributes:
        layers: the cache's layers, by `layer_idx`.
        first_row: cache row of the first new row, where one request's new rows follow each other and their place can be
            read without a sync (on a CPU); else None.
        rows: flat cache row of every new row. [B * N] int64; None where `first_row` says it all.
        tree_mask: see `TreeStep`. [N, W] int32.
        cache_lens: committed rows. [B] int32.
        num_calls: attention layers that ran so far.
    """

    __slots__ = ("_moved", "cache_lens", "device", "first_row", "layers", "num_calls", "rows", "tree_mask")

    def __init__(
        self,
        layers: list[TreeCacheLayer],
        first_row: int | None,
        rows: torch.Tensor | None,
        tree_mask: torch.Tensor,
        cache_lens: torch.Tensor,
    ) -> None:
        self.layers = layers
        self.first_row = first_row
        self.rows = rows
        self.tree_mask = tree_mask
        self.cache_lens = cache_lens
        self.device = cache_lens.device
        self.num_calls = 0
        self._moved: dict[torch.device, StepContext] | None = None

    @classmethod
    def create(
        cls,
        layers: list[TreeCacheLayer],
        step: TreeStep,
        cache_lens: torch.Tensor,
        max_cache_len: int,
        may_read_row: bool = True,
    ) -> StepContext:
        """Work out the rows to write, once for all layers; `first_row` only where it may be read on the host."""
        if may_read_row and step.first_node is not None and cache_lens.is_cpu and cache_lens.shape[0] == 1:
            return cls(layers, int(cache_lens) + step.first_node, None, step.tree_mask, cache_lens)
        rows = cache_lens[:, None] + step.node_ids  # [B, N]
        if rows.shape[0] > 1:
            offsets = torch.arange(0, rows.shape[0] * max_cache_len, max_cache_len, device=rows.device)
            rows = rows + offsets[:, None]
        return cls(layers, None, rows.flatten().to(torch.int64), step.tree_mask, cache_lens)

    def on(self, device: torch.device) -> StepContext:
        """Return the same context with its tensors on a layer's device (models spread over several devices)."""
        if self._moved is None:
            self._moved = {}
        moved = self._moved.get(device)
        if moved is None:
            rows = None if self.rows is None else self.rows.to(device)
            moved = StepContext(
                self.layers, self.first_row, rows, self.tree_mask.to(device), self.cache_lens.to(device)
            )
            self._moved[device] = moved
        return moved


def find_context(key: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """Return the forward's context, or None where the family let go of it.

    First the keyword argument of the model call, which most families hand through to the attention function; then the
    attribute that `ForwardCache.update` left on the key tensor, for families that drop unknown keyword arguments
    (StableLM). Families that replace the key tensor behind the cache (DeepSeek-V3) keep the keyword.
    """
    context = kwargs.get(CONTEXT_KWARG)
    return getattr(key, CONTEXT_ATTRIBUTE, None) if context is None else context


def missing_context(module: torch.nn.Module) -> UnsupportedModelError:
    """Return the error for an attention layer that was called without a context."""
    return UnsupportedModelError(
        f"tree attention: {type(module).__name__} must receive the step's context from its model, got neither the "
        "keyword argument nor a key tensor from the cache; call the model through TreeModel.forward only, and not from "
        "another thread meanwhile"
    )


def store_rows(
    module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, context: StepContext
) -> tuple[TreeCacheLayer, StepContext]:
    """Write a layer's new keys and values into their cache rows.

    Returns:
        The layer's cache, and the context on its device.
    """
    context.num_calls += 1
    layer = context.layers[module.layer_idx]  # type: ignore[index]  # an attention module's own number
    if key.device != context.device:
        context = context.on(key.device)
    if context.rows is None:
        assert context.first_row is not None
        num_rows = key.shape[2]
        layer.keys_by_head.narrow(2, context.first_row, num_rows).copy_(key)
        layer.values_by_head.narrow(2, context.first_row, num_rows).copy_(value)
    else:
        layer.flat_keys.index_copy_(0, context.rows, key.transpose(1, 2).flatten(0, 1))
        layer.flat_values.index_copy_(0, context.rows, value.transpose(1, 2).flatten(0, 1))
    return layer, context


def tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, Hq, N, D]
    key: torch.Tensor,  # [B, Hkv, N, D]
    value: torch.Tensor,  # [B, Hkv, N, Dv]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write the new keys and values into their cache rows, then attend over prefix and tree.

    The function that transformers calls in each attention layer under the name "sequoia_tree". Mutates the layer's
    cache. Returns ([B, N, Hq, Dv], None).
    """
    context = find_context(key, kwargs)
    if context is None:
        raise missing_context(module)
    if attention_mask is not None:
        raise UnsupportedModelError(
            f"tree attention: {type(module).__name__} must be called without a mask, got one of shape "
            f"{list(attention_mask.shape)}; the family builds its own masks"
        )
    layer, context = store_rows(module, key, value, context)
    output = tree_attention(
        query.transpose(1, 2),
        layer.keys,
        layer.values,
        context.tree_mask,
        context.cache_lens,
        scale=scaling,
        softcap=softcap,
        sliding_window=layer.window,
        sinks=s_aux,
    )
    return output.out.contiguous(), None  # some families `view` it


AttentionInterface.register(ATTENTION_NAME, tree_attention_forward)
