"""Whether a runtime gives what its own weights say: its greedy text, and the distribution of what it samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

SIGNIFICANCE = 1e-4  # a runtime whose samples are less probable than this is not exact
EXPECTED = 5.0  # samples that a cell of the test expects, at least

# Where greedy texts part, both tokens' logits must lie within this share of the largest one: runtimes round elsewhere.
NEAR_TIE = {"float32": 2.0**-16, "float16": 2.0**-9, "bfloat16": 2.0**-6}

Text = tuple[int, ...]


class SampleTest(NamedTuple):
    """Pearson's test of sampled sequences."""

    p_value: float
    cells: int
    samples: int
    worst: tuple[list[int], float, float]  # the sequence furthest off: its share expected, and seen

    @property
    def exact(self) -> bool:
        """Whether the samples may be of the distribution."""
        return self.p_value >= SIGNIFICANCE


@torch.inference_mode()
def probable_sequences(
    model: Any, prompt: Sequence[int], length: int, temperature: float, least: float
) -> dict[Text, float]:
    """All continuations of a length that are at least this probable, with their probabilities.

    The model is a Hugging Face model in float32. Every beginning of such a continuation is as probable, so few
    beginnings are followed.
    """
    beginnings: dict[Text, float] = {(): 1.0}
    for _ in range(length):
        longer: dict[Text, float] = {}
        for beginning, probability in beginnings.items():
            logits = model(torch.tensor([[*prompt, *beginning]])).logits[0, -1]
            probabilities = probability * torch.softmax(logits.double() / temperature, dim=-1)
            for token in (probabilities >= least).nonzero().flatten().tolist():
                longer[(*beginning, token)] = float(probabilities[token])
        beginnings = longer
    return beginnings


def chi_square(sampled: Sequence[Sequence[int]], probabilities: Mapping[Text, float]) -> SampleTest:
    """Compare samples with the probable sequences; all others together are one cell more."""
    counts = Counter(tuple(sequence) for sequence in sampled)
    number = len(sampled)
    cells = [(probability * number, counts[sequence]) for sequence, probability in probabilities.items()]
    rest_expected = number * max(0.0, 1.0 - sum(probabilities.values()))
    rest_seen = number - sum(seen for _, seen in cells)
    cells.sort()
    if rest_expected >= EXPECTED or not cells:
        cells.append((rest_expected, rest_seen))
    else:  # too few to be told apart from the least probable ones
        cells[0] = (cells[0][0] + rest_expected, cells[0][1] + rest_seen)
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells if expected > 0)
    freedom = max(len(cells) - 1, 1)
    p_value = float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))
    shares = {sequence: (probability, counts[sequence] / number) for sequence, probability in probabilities.items()}
    furthest = max(shares, key=lambda sequence: abs(shares[sequence][0] - shares[sequence][1]), default=())
    worst = (list(furthest), *shares.get(furthest, (0.0, 0.0)))
    return SampleTest(p_value, len(cells), number, worst)


@torch.inference_mode()
def parts_at(model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> tuple[int, float] | None:
    """Where two greedy texts part, and how far the two tokens' logits lie below the largest, as a share of it."""
    where = next((index for index, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), None)
    if where is None:
        return None
    logits = model(torch.tensor([[*prompt, *one[:where]]])).logits[0, -1].double()
    largest = logits.max()
    return where, float((largest - logits[[one[where], other[where]]].min()) / largest.abs())
