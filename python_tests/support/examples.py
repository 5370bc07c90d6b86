"""The example files, imported as their readers run them, and what plain decoding of their toy model says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["EXAMPLES", "example", "plain_greedy", "plain_joint", "plain_logits"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """Import examples/<name>.py, whose neighbours it may import."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def plain_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a `ToyModel` behind sequences [M, L], without a cache, a tree or an op. [M, vocab]."""
    length = tokens.shape[1]
    hidden = model.embed(tokens, torch.arange(length))
    queries, keys, values = model.project(hidden)
    group = model.heads // model.kv_heads
    keys, values = (part.repeat_interleave(group, dim=2) for part in (keys, values))
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * model.head_dim**-0.5
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    return model.read_out(hidden, attended)[:, -1]


def plain_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The text that plain greedy decoding gives behind a prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(plain_logits(model, torch.tensor([tokens]))[0].argmax()))
    return tokens[len(prompt) :]


def plain_joint(model: Any, prompt: list[int], num_tokens: int, temperature: float) -> torch.Tensor:
    """The probability of every text of so many tokens behind a prompt. [vocab] * num_tokens, float64."""
    vocab = model.weights["head"].shape[1]
    prefixes, joint = torch.tensor([prompt]), torch.ones(1, dtype=torch.float64)
    for _ in range(num_tokens):
        probs = (plain_logits(model, prefixes).double() / temperature).softmax(-1)
        joint = (joint[:, None] * probs).flatten()
        tokens = torch.arange(vocab).repeat(len(prefixes))[:, None]
        prefixes = torch.cat((prefixes.repeat_interleave(vocab, dim=0), tokens), dim=1)
    return joint.reshape([vocab] * num_tokens)
