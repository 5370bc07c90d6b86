"""What the probe reads out of transformers' mask rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import masking_utils

from sequoia_kernels.models.attention_probe import describe_mask

FULL, WINDOW, CHUNKS, OTHER = range(4)


def described(rule: Callable[..., torch.Tensor]) -> tuple[int, int]:
    description = describe_mask(batch_size=1, q_length=4, mask_function=rule, device="cpu", kv_length=4, dtype=None)
    assert description.shape == (1, 1, 1, 2)
    kind, size = description.flatten().tolist()
    return kind, size


def chunked(size: int) -> Callable[..., torch.Tensor]:
    overlay = masking_utils.chunked_overlay(size, torch.zeros(1, dtype=torch.int64))
    return masking_utils.and_masks(overlay, masking_utils.causal_mask_function)


def test_full_attention() -> None:
    assert described(masking_utils.causal_mask_function) == (FULL, 0)


@pytest.mark.parametrize("window", [1, 2, 3, 127, 4096, 1 << 20])
def test_sliding_window(window: int) -> None:
    assert described(masking_utils.sliding_window_causal_mask_function(window)) == (WINDOW, window)


@pytest.mark.parametrize("size", [2, 3, 5, 1000, 8192])
def test_chunks(size: int) -> None:
    assert described(chunked(size)) == (CHUNKS, size)


@pytest.mark.parametrize(
    "rule",
    [
        masking_utils.bidirectional_mask_function,
        lambda batch, head, query, key: (key <= query + 1) & (key > query - 8),
        lambda batch, head, query, key: key < query,
    ],
    ids=["both directions", "one token ahead", "not itself"],
)
def test_other_rules(rule: Callable[..., torch.Tensor]) -> None:
    assert described(rule) == (OTHER, 0)
