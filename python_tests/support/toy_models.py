"""Toy language models small enough that every sequence they can emit is listed, with their exact probabilities."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["KINDS", "TableModel", "chain_probs", "plain_probs", "toy_pair"]

# Relations of a target and a draft, for `toy_pair`.
KINDS = [
    "unrelated",
    "near",
    "same",
    "one-hot draft",
    "peaked draft",
    "draft misses tokens",
    "target misses tokens",
    "disjoint",
    "tied",
]


class TableModel:
    """A model whose logits are looked up by the last few tokens.

    Args:
        table: logits of every context. [vocab ** context, vocab].
    """

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.vocab = table.shape[1]
        self.context = 0
        while self.vocab**self.context < table.shape[0]:
            self.context += 1

    @classmethod
    def random(cls, vocab: int, context: int, seed: int, spread: float = 1.5) -> TableModel:
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(vocab**context, vocab, generator=generator, dtype=torch.float64) * spread)

    def logits(self, prefix: torch.Tensor) -> torch.Tensor:
        """Logits behind each prefix; a short one counts as filled up with token 0 in front. [M, L] -> [M, vocab]."""
        index = torch.zeros(prefix.shape[0], dtype=torch.int64)
        for position in range(max(0, prefix.shape[1] - self.context), prefix.shape[1]):
            index = index * self.vocab + prefix[:, position]
        return self.table[index]


def toy_pair(kind: str, vocab: int, context: int, seed: int) -> tuple[TableModel, TableModel]:
    """Return (target, draft) whose relation is one of the kinds below."""
    target, draft = TableModel.random(vocab, context, seed), TableModel.random(vocab, context, seed + 1)
    ids = torch.arange(vocab)
    rows = torch.arange(len(draft.table))[:, None]
    if kind == "unrelated":
        pass
    elif kind == "near":
        draft.table = target.table + 0.3 * draft.table
    elif kind == "same":
        draft.table = target.table.clone()
    elif kind == "one-hot draft":  # exactly: the other tokens cannot be drawn at all
        draft.table = draft.table.masked_fill(ids != rows % vocab, -torch.inf)
    elif kind == "peaked draft":  # the other tokens hold a mass that float32 cannot see next to 1
        draft.table = draft.table - 60.0 * (ids != rows % vocab)
    elif kind == "draft misses tokens":
        draft.table = draft.table.masked_fill(ids == rows % vocab, -torch.inf)
    elif kind == "target misses tokens":
        target.table = target.table.masked_fill(ids == rows % vocab, -torch.inf)
    elif kind == "disjoint":
        in_draft = (ids + rows) % 2 == 0
        draft.table = draft.table.masked_fill(~in_draft, -torch.inf)
        target.table = target.table.masked_fill(in_draft, -torch.inf)
    elif kind == "tied":  # few distinct logits, so that arg-maxima and cuts meet ties
        target.table, draft.table = target.table.round(), draft.table.round()
    elif kind == "close":  # units in the last place of float32, and in the draft a token far above in every other row
        target.table, draft.table = (20 + (model.table * 8).round() * 2.0**-19 for model in (target, draft))
        draft.table = torch.where((ids == rows // 2 % vocab) & (rows % 2 == 1), 100.0, draft.table)
    else:
        raise ValueError(f"unknown kind {kind}")
    return target, draft


def plain_probs(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """The warped distribution of each row in float64, one row at a time, written apart from the package's own."""
    temperature = float(np.float32(temperature))
    rows = []
    for row in logits.double().numpy():
        probs = np.zeros_like(row)
        if temperature == 0:
            probs[int(np.argmax(row))] = 1.0
            rows.append(probs)
            continue
        with np.errstate(invalid="ignore"):
            probs = np.exp((row - row.max()) / temperature)
        if top_k is not None and 0 < top_k < len(row):
            probs[row < np.sort(row)[::-1][top_k - 1]] = 0
        probs /= probs.sum()
        if top_p is not None and top_p < 1:
            # a token stays while the tokens that are strictly more probable do not yet make up top_p
            above = np.array([probs[row > logit].sum() for logit in row])
            kept = above < float(np.float32(top_p))
            probs = np.where(kept, probs, 0)
            probs /= probs.sum()
        rows.append(probs)
    return torch.from_numpy(np.stack(rows))


def chain_probs(
    model: TableModel, root: int, length: int, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> list[torch.Tensor]:
    """Conditional probabilities of the 1st to `length`-th token behind the root, given the tokens before it.

    Entry d has shape [vocab] * (d + 1); its last dimension is the token whose probability it is.
    """
    conditionals = []
    for depth in range(length):
        prefix = torch.cartesian_prod(torch.tensor([root]), *[torch.arange(model.vocab)] * depth)
        prefix = prefix.reshape(-1, depth + 1)
        probs = plain_probs(model.logits(prefix), temperature, top_k, top_p)
        conditionals.append(probs.reshape([model.vocab] * (depth + 1)))
    return conditionals
