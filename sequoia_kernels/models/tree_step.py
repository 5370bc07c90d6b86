"""What one forward feeds: which tree nodes, what each of them sees, and where their rows go."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

__all__ = ["MAX_STEP_ROWS", "TreeStep", "causal_step"]

# The most query rows a forward may feed: the limit of `tree_attention`.
MAX_STEP_ROWS = 1024


class TreeStep(NamedTuple):
    """The rows of one forward: N nodes of a token tree, in the order of `input_ids`.

    Device tensors, equal for every request of a batch; nothing in here depends on the tokens, so one object serves all
    steps with the same tree.

    Attributes:
        tree_mask: bit j % 32 of word j // 32 in row i is set iff row i sees tree slot j. [N, W] int32.
        node_ids: tree slot of each row; its keys and values go to cache row cache_lens[b] + node_ids[i]. [N] int32.
        depths: depth of each row; its position is cache_lens[b] + depths[i]. [N] int32.
        num_tree_rows: tree slots in use: one more than the highest slot written or seen.
        first_node: node_ids[0] where node_ids is one ascending run without holes, else None.
    """

    tree_mask: torch.Tensor
    node_ids: torch.Tensor
    depths: torch.Tensor
    num_tree_rows: int
    first_node: int | None = None


@lru_cache(maxsize=64)
def causal_step(num_rows: int, device: torch.device | str = "cpu") -> TreeStep:
    """Return the step of a chain: row i sees slots 0..i, as in ordinary causal decoding.

    Args:
        num_rows: rows of the chain, 1..1024.
        device: device of the tensors.

    Returns:
        A `TreeStep`, cached by row count and device: do not write to its tensors.

    Raises:
        ValueError: `num_rows` is out of range.

    Notes:
        This is the step of prefill (a chain behind what is committed) and of decoding without speculation
        (`causal_step(1)`).

    Example:
        >>> causal_step(3).tree_mask.flatten().tolist()
        [1, 3, 7]
    """
    if not 1 <= num_rows <= MAX_STEP_ROWS:
        raise ValueError(
            f"causal_step: num_rows must be in 1..{MAX_STEP_ROWS}, got {num_rows}; feed longer chains in chunks"
        )
    with torch.inference_mode(False):  # kept for later calls, which may run outside inference mode
        num_words = (num_rows + 31) // 32
        rows = torch.arange(num_rows, dtype=torch.int64)
        # Row i has its lowest i + 1 bits set: word w holds the clamp(i + 1 - 32 w, 0, 32) lowest ones.
        num_bits = (rows[:, None] + 1 - 32 * torch.arange(num_words, dtype=torch.int64)).clamp_(0, 32)
        words = (torch.ones_like(num_bits) << num_bits) - 1
        words = torch.where(words >= 1 << 31, words - (1 << 32), words)  # the same 32 bits as a signed word
        ids = rows.to(device=device, dtype=torch.int32)
        return TreeStep(words.to(device=device, dtype=torch.int32), ids, ids, num_rows, 0)
