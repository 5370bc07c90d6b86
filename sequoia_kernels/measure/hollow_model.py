"""A Llama without its linear layers and attention: what remains is everything else that a decoder layer does.

The linear layers and the attention give rows of fixed buffers. So a forward's time is that of norms, rotary embedding,
activation, residuals, the cache's writes, and on a CPU of the Python around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import TreeModel, adapt

__all__ = ["hollow_llama"]

VOCAB = 64
MAX_ROWS = 1024


class _FixedRows(nn.Module):
    """In place of a linear layer: the first rows of a buffer, whatever the input."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        batch_size, num_rows = inputs.shape[:2]
        return self.rows[: batch_size * num_rows].view(batch_size, num_rows, -1)


def hollow_llama(shapes: ModelFingerprint, num_layers: int, device: torch.device) -> TreeModel:
    """Build a hollow Llama of a model's widths, dtype and heads, with a tiny vocabulary."""
    dtype = getattr(torch, shapes.dtype)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size or 4 * shapes.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shapes.num_heads,
        num_key_value_heads=shapes.num_kv_heads,
        head_dim=shapes.head_dim,
        max_position_embeddings=4 * MAX_ROWS,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    generator = torch.Generator(device).manual_seed(0)

    def rows(width: int) -> torch.Tensor:
        # All the same: whichever rows a forward is given, it computes what any other one would, as `adapt` checks.
        row = torch.randn(1, width, generator=generator, device=device).to(dtype)
        return row.repeat(MAX_ROWS, 1)

    shared: dict[str, torch.Tensor] = {}  # the same projection of all layers gives the same rows
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, name = path.rpartition(".")
            if name not in shared:
                shared[name] = rows(module.out_features)
            setattr(model.get_submodule(owner), name, _FixedRows(shared[name]))
    attended = rows(shapes.num_heads * shapes.head_dim)

    def attend(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch_size, num_rows = query.shape[:2]
        return attended[: batch_size * num_rows].view(query.shape)

    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return adapt(model.eval(), attention=attend)
