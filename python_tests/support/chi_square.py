"""Pearson's chi-square test of counted sequences against exact probabilities."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import chi2

__all__ = ["joint_probs", "p_value", "sequence_counts"]


def joint_probs(conditionals: list[torch.Tensor]) -> torch.Tensor:
    """Multiply conditional probabilities (see `chain_probs`) into the joint one of whole sequences."""
    joint = conditionals[0]
    for conditional in conditionals[1:]:
        joint = joint[..., None] * conditional
    return joint


def sequence_counts(sequences: torch.Tensor, vocab: int) -> torch.Tensor:
    """Count every sequence. [B, L] -> [vocab] * L."""
    flat = torch.zeros(len(sequences), dtype=torch.int64)
    for position in range(sequences.shape[1]):
        flat = flat * vocab + sequences[:, position]
    return torch.bincount(flat, minlength=vocab ** sequences.shape[1]).reshape([vocab] * sequences.shape[1])


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Probability of counts this far from their expectation, if `probs` is true; 0 where an impossible cell was hit.

    Cells are pooled from the least probable up, until every pool expects the 5 counts that the asymptotics need.
    """
    observed, probs = counts.flatten().double().numpy(), probs.flatten().double().numpy()
    if observed[probs == 0].sum() > 0:
        return 0.0
    expected = probs * observed.sum()
    order = np.argsort(expected)
    pools: list[tuple[float, float]] = []
    pooled_expected = pooled_observed = 0.0
    for cell in order[expected[order] > 0]:
        pooled_expected += expected[cell]
        pooled_observed += observed[cell]
        if pooled_expected >= 5:
            pools.append((pooled_expected, pooled_observed))
            pooled_expected = pooled_observed = 0.0
    if pools:
        pools[-1] = (pools[-1][0] + pooled_expected, pools[-1][1] + pooled_observed)
    if len(pools) < 2:
        return 1.0
    statistic = sum((seen - hoped) ** 2 / hoped for hoped, seen in pools)
    return float(chi2.sf(statistic, len(pools) - 1))
