"""The attention function that transformers' models call: store the new rows, then attend along the tree."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.cache import find_context, missing_context, store_rows
from sequoia_kernels.ops import tree_attention

__all__ = ["ATTENTION_NAME"]

# Registered as an attention function but not as a mask function: the models then build no mask at all.
ATTENTION_NAME = "sequoia_tree"


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
