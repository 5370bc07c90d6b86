"""Parts of heads in training, with the names that published folders give their weights, and how a folder is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["Attention", "Mlp", "Norm", "rotated", "rotation_of", "write_folder"]


class Norm(nn.Module):
    """A root-mean-square norm, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, rows: Tensor) -> Tensor:
        """Norm the last dimension."""
        wide = rows.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """Projections of an attention, with norms of queries and keys where wanted.

    Args:
        config: the target's, whose heads it has.
        inputs: width of what queries, keys and values are made of.
        head_norms: whether queries and keys are normed, as Qwen3's are.
    """

    def __init__(self, config: Any, inputs: int, head_norms: bool) -> None:
        super().__init__()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.repeats = heads // kv_heads
        self.q_proj = nn.Linear(inputs, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(inputs, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(inputs, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = Norm(self.head_dim, config.rms_norm_eps) if head_norms else nn.Identity()
        self.k_norm = Norm(self.head_dim, config.rms_norm_eps) if head_norms else nn.Identity()

    def queries(self, rows: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, inputs] -> [B, heads, N, D]."""
        return rotated(self.q_norm(self._heads(self.q_proj(rows))), rotation)

    def keys_values(self, rows: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, N, inputs] -> [B, heads, N, D] each, those of a group repeated."""
        keys = rotated(self.k_norm(self._heads(self.k_proj(rows))), rotation)
        values = self._heads(self.v_proj(rows))
        repeated = [part.repeat_interleave(self.repeats, 1) for part in (keys, values)]
        return repeated[0], repeated[1].to(keys.dtype)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """A gated MLP with SiLU."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(rows)) * self.up_proj(rows))


def rotation_of(config: Any, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines at positions [B, N], by the target's base frequency. [B, 1, N, D] each."""
    theta = float(config.rope_parameters["rope_theta"])
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = positions[:, None, :, None].float() * torch.cat((frequencies, frequencies))
    return angles.cos(), angles.sin()


def rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads [B, heads, N, D] by what `rotation_of` gives."""
    cosines, sines = rotation
    first, second = heads.chunk(2, -1)
    return heads * cosines + torch.cat((-second, first), -1) * sines


def write_folder(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], vocabulary: VocabularyMap, head: Tensor
) -> None:
    """Write a head with its vocabulary into a new folder, in bfloat16.

    Args:
        folder: where to.
        config: its config.json.
        weights: what has learnt, by the names of the form.
        vocabulary: the target's tokens that it knows; kept as `d2t`, their ids less its own, and `t2d`, marks.
        head: the target's head of these. [Vd, width].
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    numbers["lm_head.weight"] = head.detach().to(torch.bfloat16).contiguous()
    ids = vocabulary.draft_to_target
    numbers["d2t"], numbers["t2d"] = ids - torch.arange(len(ids)), vocabulary.target_to_draft >= 0
    save_file(numbers, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
