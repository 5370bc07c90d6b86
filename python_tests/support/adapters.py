"""Low-rank adapters as an adapter library makes them: modules in the place of linear layers, switched by attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class AdaptedLinear(nn.Module):
    """A linear layer with named low-rank updates, of which one is active, none, or one merged into the weight."""

    def __init__(self, base_layer: nn.Linear, names: tuple[str, ...], dropout: float, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.dropout = nn.ModuleDict({name: nn.Dropout(dropout) for name in names})
        self.down = nn.ModuleDict({name: nn.Linear(self.in_features, rank, bias=False) for name in names})
        self.up = nn.ModuleDict({name: nn.Linear(rank, self.out_features, bias=False) for name in names})
        self.to(next(base_layer.parameters()).dtype)
        self.scaling = dict.fromkeys(names, 1.0)
        self.active: list[str] = list(names[:1])
        self.merged: list[str] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.base_layer(input)
        for name in self.active if not self.merged else []:
            output = output + self.scaling[name] * self.up[name](self.down[name](self.dropout[name](input)))
        return output

    def merge(self) -> None:
        for name in self.active:
            self.base_layer.weight.data += self.scaling[name] * self.up[name].weight.data @ self.down[name].weight.data
            self.merged.append(name)


def add_adapters(model: Any, names: tuple[str, ...] = ("a", "b"), dropout: float = 0.0) -> list[AdaptedLinear]:
    """Put adapters into the place of every query projection; they start in training mode, as any new module does."""
    adapters = []
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        adapter = AdaptedLinear(layer.self_attn.q_proj, names, dropout)
        with torch.no_grad():
            for parameter in [*adapter.down.parameters(), *adapter.up.parameters()]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        layer.self_attn.q_proj = adapter
        adapters.append(adapter)
    return adapters
