"""Timed calls as CUDA graphs: a replay does the work of the call. What cannot be captured: test_failed_captures.py."""

from __future__ import annotations

import pytest
import torch

from sequoia_kernels.cuda_graphs import as_replay, new_memory


@pytest.mark.gpu
def test_a_replay_does_what_the_call_does():
    device = torch.device("cuda")
    memory = new_memory(device)
    numbers = torch.zeros(4, device=device)
    replays = [as_replay(lambda step=step: numbers.add_(step), device, memory) for step in (1, 10)]
    numbers.zero_()
    for replay in (*replays, *replays):
        replay()
    torch.cuda.synchronize()
    assert numbers.tolist() == [22.0] * 4
