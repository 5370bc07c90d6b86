"""Llamas of given layers, for what a layer takes: real ones, and hollow ones without linear layers and attention.

What remains in a hollow one is everything else that a decoder layer does. The linear layers and the attention give rows
of fixed buffers. So a forward's time is that of norms, rotary embedding, activation, residuals, the cache's writes, and
on a CPU of the Python around them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import TreeModel, adapt
from sequoia_kernels.tree import MAX_STEP_ROWS

__all__ = ["LayerShape", "hollow_llama", "whole_llama"]

VOCAB = 64


class LayerShape(NamedTuple):
    """Widths of a decoder layer."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: ModelFingerprint) -> LayerShape:
        """Take a model's."""
        intermediate_size = model.intermediate_size or 4 * model.hidden_size
        return cls(model.hidden_size, intermediate_size, model.num_heads, model.num_kv_heads, model.head_dim)

    def config(self, num_layers: int) -> LlamaConfig:
        """Give the configuration of a Llama of such layers, with a tiny vocabulary."""
        return LlamaConfig(
            vocab_size=VOCAB, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=num_layers, num_attention_heads=self.num_heads, num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim, max_position_embeddings=4 * MAX_STEP_ROWS,
        )  # fmt: skip


def whole_llama(shape: LayerShape, num_layers: int, dtype: torch.dtype, device: torch.device) -> TreeModel:
    """Build a Llama of random weights."""
    return adapt(LlamaForCausalLM(shape.config(num_layers)).to(device, dtype).eval())


class _FixedRows(nn.Module):
    """In place of a linear layer: the first rows of a buffer, whatever the input."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        batch_size, num_rows = inputs.shape[:2]
        return self.rows[: batch_size * num_rows].view(batch_size, num_rows, -1)


def hollow_llama(shape: LayerShape, num_layers: int, dtype: torch.dtype, device: torch.device) -> TreeModel:
    """Build a hollow Llama."""
    config = shape.config(num_layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    generator = torch.Generator(device).manual_seed(0)

    def rows(width: int) -> torch.Tensor:
        # All the same: whichever rows a forward is given, it computes what any other one would, as `adapt` checks.
        row = torch.randn(1, width, generator=generator, device=device).to(dtype)
        return row.repeat(MAX_STEP_ROWS, 1)

    shared: dict[str, torch.Tensor] = {}  # the same projection of all layers gives the same rows
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, name = path.rpartition(".")
            if name not in shared:
                shared[name] = rows(module.out_features)
            setattr(model.get_submodule(owner), name, _FixedRows(shared[name]))
    attended = rows(shape.num_heads * shape.head_dim)

    def attend(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch_size, num_rows = query.shape[:2]
        return attended[: batch_size * num_rows].view(query.shape)

    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return adapt(model.eval(), attention=attend)
