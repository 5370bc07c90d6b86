"""Which hidden states a folder's layer ids mean, measured on a text where the ids can be read in two ways.

Measures, for hidden states f of a text y and the target's logits behind each of its rows, the head's overlap with the
target: the mean over rows of sum_v min(target(v), draft(v)), which is the probability that a first child drawn at
temperature 1 is accepted. Tokens that the head has no logit of count as 0, for one reading as for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sequoia_kernels.models import TreeModel, causal_step

__all__ = ["LayerReading", "compare_readings"]

MOST_ROWS = 64  # of the text; a forward over so many takes a GPU about as long as a step
FEWEST_ROWS = 16  # a shorter text says too little
_LEAST_GAIN = 0.02  # of overlap: less is not worth leaving what the form documents
_STANDARD_ERRORS = 3.0


class LayerReading(NamedTuple):
    """How the layer ids of a folder were read, and why.

    Attributes:
        layers: hidden states of the target that the head reads.
        other: those of the reading that was not taken.
        overlap: the head's overlap with the target by the reading that was taken, 0..1.
        other_overlap: likewise by the other one.
        num_rows: rows that were compared.
        is_documented: whether the reading is the one that the folder's form documents.
    """

    layers: tuple[int, ...]
    other: tuple[int, ...]
    overlap: float
    other_overlap: float
    num_rows: int
    is_documented: bool


def compare_readings(
    target: TreeModel,
    tokens: torch.Tensor,
    documented: tuple[int, ...],
    other: tuple[int, ...],
    draft_logits: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor],
    draft_to_target: torch.Tensor | None,
) -> LayerReading:
    """Run the target over a text, and the head by both readings.

    Args:
        target: the target.
        tokens: the text. [N] int64, on the target's device.
        documented: hidden states as the folder's form documents its ids. It is taken unless the other one is better by
            more than chance.
        other: the other reading.
        draft_logits: the head: takes tokens of rows [R] and their features, [R, width] each, gives logits [R, Vd].
        draft_to_target: the target's token for each of the head's; None where they are the first ones. [Vd] int64.
    """
    wanted = dict.fromkeys((*documented, *other), torch.empty(0))
    cache_lens = torch.zeros(1, dtype=torch.int32, device=tokens.device)
    step = causal_step(len(tokens), tokens.device)
    logits = target.forward(
        tokens[None], target.new_cache(1, len(tokens)), cache_lens, step, hidden_states=wanted
    )  # fmt: skip
    target_probs = logits[0, 1:].float().softmax(-1)

    def overlaps(layers: tuple[int, ...]) -> torch.Tensor:
        # Row t holds token t + 1 with the feature of token t, and scores what the target scores behind token t + 1.
        probs = draft_logits(tokens[1:], [wanted[number][0, :-1] for number in layers]).float().softmax(-1)
        if draft_to_target is None:
            width = min(probs.shape[-1], target_probs.shape[-1])
            return torch.minimum(probs[:, :width], target_probs[:, :width]).sum(-1)
        return torch.minimum(probs, target_probs.index_select(1, draft_to_target)).sum(-1)

    mine, its = overlaps(documented).double(), overlaps(other).double()
    gains, num_rows = its - mine, len(tokens) - 1
    gain, error = float(gains.mean()), float(gains.std()) / num_rows**0.5
    readings = [(documented, float(mine.mean())), (other, float(its.mean()))]
    is_documented = not gain > max(_LEAST_GAIN, _STANDARD_ERRORS * error)  # a NaN says nothing
    (layers, overlap), (others, other_overlap) = readings if is_documented else reversed(readings)
    return LayerReading(layers, others, overlap, other_overlap, num_rows, is_documented)
