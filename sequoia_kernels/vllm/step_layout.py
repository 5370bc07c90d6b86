"""How the rows of a step on CUDA are shared between our op and vLLM's FlashAttention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sequoia_kernels.tree import TokenTree

__all__ = ["StepLayout", "step_layout"]


class StepLayout(NamedTuple):
    """Which requests go where; known on the host.

    Attributes:
        groups: requests of the trees of one number of rows, by that.
        rest_request: first request of those that FlashAttention attends to, which are all from there on.
    """

    groups: dict[int, list[int]]
    rest_request: int


def step_layout(num_rows: np.ndarray, trees: Sequence[TokenTree | None]) -> StepLayout:
    """Group a step's trees by their rows.

    Args:
        num_rows: of each request. [B]
        trees: of each request, None where its rows are a chain. Requests behind them have none.

    Example:
        >>> pair = TokenTree([-1, 0])
        >>> step_layout(np.array([2, 2, 1, 9]), [pair, pair, None, None])
        StepLayout(groups={2: [0, 1]}, rest_request=2)
        >>> step_layout(np.array([2, 1, 2]), [pair, None, pair])  # not in order: FlashAttention gets all rows
        StepLayout(groups={2: [0, 2]}, rest_request=0)
    """
    groups: dict[int, list[int]] = {}
    for request, (rows, tree) in enumerate(zip(num_rows, trees)):
        if tree is not None:
            groups.setdefault(int(rows), []).append(request)
    placed = sorted(request for members in groups.values() for request in members)
    return StepLayout(groups, len(placed) if placed == list(range(len(placed))) else 0)
