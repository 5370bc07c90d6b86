"""The step of a chain."""

from __future__ import annotations

import pytest
import torch
from support.sequential import packed_mask

from sequoia_kernels.models import causal_step


@pytest.mark.parametrize("num_rows", [1, 2, 31, 32, 33, 64, 65, 200, 1024])
def test_row_i_sees_the_slots_up_to_i(num_rows: int) -> None:
    step = causal_step(num_rows)
    expected = packed_mask([row - 1 for row in range(num_rows)]) if num_rows <= 200 else None
    bits = (step.tree_mask[:, :, None] >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(1)[:, :num_rows], torch.ones(num_rows, num_rows, dtype=torch.int32).tril())
    assert expected is None or torch.equal(step.tree_mask, expected)
    assert step.node_ids.tolist() == step.depths.tolist() == list(range(num_rows))
    assert (step.num_tree_rows, step.first_node) == (num_rows, 0)
    assert {step.tree_mask.dtype, step.node_ids.dtype, step.depths.dtype} == {torch.int32}


def test_steps_are_cached_and_outlive_inference_mode() -> None:
    causal_step.cache_clear()
    with torch.inference_mode():
        step = causal_step(5)
    assert causal_step(5) is step
    assert not step.tree_mask.is_inference()


@pytest.mark.parametrize("num_rows", [0, -3, 1025])
def test_bad_number_of_rows(num_rows: int) -> None:
    with pytest.raises(ValueError, match=rf"causal_step: num_rows must be in 1\.\.1024, got {num_rows}"):
        causal_step(num_rows)
