"""Prefill: commit prompts to a cache, as chains fed in chunks."""

from __future__ import annotations

import torch

from sequoia_kernels.models.adapter import ForwardInputs, TreeModel
from sequoia_kernels.models.cache import TreeCache
from sequoia_kernels.models.tree_step import causal_step

__all__ = ["prefill"]

# Rows of one forward. Larger chunks gain nothing (512 rows keep any device busy) and hold more activations.
_CHUNK_ROWS = 512


def prefill(
    model: TreeModel,
    cache: TreeCache,
    input_ids: torch.Tensor,
    prompt_lens: torch.Tensor,
    *,
    hidden_states: dict[int, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Store the prompts' keys and values in cache rows 0.. and return the logits behind each prompt's last token.

    Args:
        model: the tree model.
        cache: its cache for B requests.
        input_ids: prompts, padded on the right. [B, L] int64; the padding may be any token of the vocabulary.
        prompt_lens: tokens of each prompt. [B] int32 or int64, 1..L, on the device of `input_ids`.
        hidden_states: takes hidden states of all L rows, [B, L, width] each; see `TreeModel.forward`.

    Returns:
        Logits of each request's last prompt token. [B, 1, vocab_size].

    Raises:
        ValueError: shapes do not fit together, the cache is shorter than L, the model has fewer positions, or (checked
            for CPU tensors) a length is not in 1..L.

    Notes:
        Mutates the cache: all of rows [0, L). Rows past a prompt's end hold keys and values of the padding; nothing
        ever reads them, since only committed rows and rows of the current tree are visible, and both are written before
        they become so. In a paged cache the padding needs rows as well: pages of the request's own, or one for all
        padding that nobody reads. No host sync on accelerators.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sequoia_kernels.models import adapt
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = adapt(LlamaForCausalLM(config).eval())
        >>> prompts, lens = torch.tensor([[3, 4, 5], [6, 0, 0]]), torch.tensor([3, 1])
        >>> prefill(model, model.new_cache(2, 8), prompts, lens).shape
        torch.Size([2, 1, 32])
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"prefill: input_ids must have shape [batch, length], got {list(input_ids.shape)}")
    batch_size, length = input_ids.shape
    if length > cache.max_cache_len:
        raise ValueError(f"prefill: input_ids must fit the cache of {cache.max_cache_len} rows, got {length} tokens")
    if model.max_positions is not None and length > model.max_positions:
        raise ValueError(
            f"prefill: input_ids must fit the model's {model.max_positions} positions, got {length} tokens"
        )
    if prompt_lens.shape != (batch_size,):
        raise ValueError(
            f"prefill: prompt_lens must have shape [batch] = [{batch_size}], got {list(prompt_lens.shape)}"
        )
    if prompt_lens.device.type == "cpu" and not 1 <= int(prompt_lens.min()) <= int(prompt_lens.max()) <= length:
        raise ValueError(f"prefill: prompt_lens must be in 1..{length}, got {prompt_lens.tolist()}")
    last_tokens = prompt_lens.to(torch.int64) - 1
    starts = range(0, length, _CHUNK_ROWS)
    chunks = []
    for start in starts:
        num_rows = min(_CHUNK_ROWS, length - start)
        chunks.append(
            ForwardInputs(
                input_ids[:, start : start + num_rows],
                torch.full((batch_size,), start, dtype=torch.int32, device=input_ids.device),
                causal_step(num_rows, input_ids.device),
                (last_tokens - start).clamp(0, num_rows - 1),
                dict(hidden_states or {}),
            )
        )
    logits, *later = model.forward_chunks(chunks, cache)
    if hidden_states:
        parts = [chunk.hidden_states or {} for chunk in chunks]
        hidden_states.update({number: torch.cat([part[number] for part in parts], 1) for number in hidden_states})
    # Prompts that end in an earlier chunk keep the logits of that chunk.
    for start, chunk_logits in zip(starts[1:], later):
        logits = torch.where((last_tokens >= start)[:, None, None], chunk_logits, logits)
    return logits
