"""The attention of a tree forward: a door, what stands in it by default, and the bridge from transformers' models."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.cache import StepContext, find_context, store_rows
from sequoia_kernels.ops import tree_attention
from sequoia_kernels.ops.backends import backend_names

__all__ = ["ATTENTION_NAME", "TreeAttention", "attend_along_tree", "find_attention", "reads_block_tables"]

# Registered as an attention function but not as a mask function: the models then build no mask at all.
ATTENTION_NAME = "sequoia_tree"


class TreeAttention(Protocol):
    """What a layer's queries read from the cache while a tree forward runs: the door of `adapt(model, attention=...)`.

    Called once in each attention layer, in the order of the layers, behind the projections and rotary embeddings and
    before the output projection. The layer's new keys and values lie in their cache rows already. It must not change
    its arguments or wait for the device, and obey the rules of CUDA graphs and `torch.compile` where those are used.

    Args:
        query: rows that are fed. [B, N, Hq, D].
        keys: the layer's cache, rows of trees included. [B, S, Hkv, D]; not to be written.
        values: likewise. [B, S, Hkv, Dv].
        context: of the forward: `context.cache_lens`, [B] int32, committed rows of each request, and
            `context.tree_mask`, [N, W] or [B, N, W] int32: row i sees the committed rows and those tree slots j, cache
            row cache_lens[b] + j, whose bit j % 32 of word j // 32 is set. `context.block_table` is None, or (see
            the notes) [B, max_pages] int32: row s of request b is then row s % page of page block_table[b, s // page],
            and `keys` and `values` are pages, [num_pages, page, Hkv, D] and [num_pages, page, Hkv, Dv].
        scale: what scores are multiplied by; None stands for 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap); None leaves them.
        sliding_window: a row sees what lies less than so many positions back, itself included, by depth and not by
            slot: row i of request b is at position cache_lens[b] + depth of i. None sees all.
        sinks: a score that takes part in the softmax and brings no value. [Hq], None where there is none.
        module: the attention layer, for what belongs to it alone.

    Returns:
        The attended values. [B, N, Hq, Dv], the dtype of `query`.

    Notes:
        An attention that reads block tables says so by a true attribute `reads_block_tables`. Without it a forward on a
        paged cache is refused.
    """

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        context: StepContext,
        *,
        scale: float | None,
        softcap: float | None,
        sliding_window: int | None,
        sinks: torch.Tensor | None,
        module: torch.nn.Module,
    ) -> torch.Tensor:
        """Attend; see the class."""


def attend_along_tree(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: StepContext,
    *,
    module: torch.nn.Module,
    backend: str = "auto",
    **settings: Any,  # which the op calls by the same names
) -> torch.Tensor:
    """Attend by the op `tree_attention`: the `TreeAttention` that `adapt` takes where nothing else is asked for."""
    return tree_attention(
        query, keys, values, context.tree_mask, context.cache_lens, block_table=context.block_table, backend=backend,
        **settings,
    ).out  # fmt: skip


attend_along_tree.reads_block_tables = True  # type: ignore[attr-defined]


def reads_block_tables(attention: TreeAttention) -> bool:
    """Tell whether an attention may be given pages, see `TreeAttention`; settings bound to it change nothing."""
    while isinstance(attention, partial) and "reads_block_tables" not in vars(attention):
        attention = attention.func
    return bool(getattr(attention, "reads_block_tables", False))


@cache
def find_attention(name: str) -> TreeAttention:
    """Return `attend_along_tree` by a backend's name, the same object for the same name."""
    known = ("auto", *backend_names("tree_attention"))
    if name not in known:
        raise ValueError(f"adapt: attention must be callable or one of {', '.join(known)}, got {name!r}")
    return attend_along_tree if name == "auto" else partial(attend_along_tree, backend=name)


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
    """Write the new keys and values into their cache rows, then let the forward's attention read prefix and tree.

    The function that transformers calls in each attention layer under the name "sequoia_tree". Mutates the layer's
    cache. Returns ([B, N, Hq, Dv], None).
    """
    context = find_context(module, key, kwargs)
    if attention_mask is not None:
        raise UnsupportedModelError(
            f"tree attention: {type(module).__name__} must be called without a mask, got one of shape "
            f"{list(attention_mask.shape)}; the family builds its own masks"
        )
    layer, context = store_rows(module, key, value, context)
    attended = context.attention(
        query.transpose(1, 2),
        layer.keys,
        layer.values,
        context,
        scale=scaling,
        softcap=softcap,
        sliding_window=layer.window,
        sinks=s_aux,
        module=module,
    )
    return attended.contiguous(), None  # some families `view` it


AttentionInterface.register(ATTENTION_NAME, tree_attention_forward)
