"""Timed calls as CUDA graphs: a replay does the work of the call, and what cannot be captured runs as it is."""

from __future__ import annotations

import pytest
import torch

from sequoia_kernels.measure.graphs import captured, new_memory

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_without_a_gpu_a_call_stays_as_it_is():
    def call() -> None:
        pass

    assert captured(call, torch.device("cpu"), new_memory(torch.device("cpu"))) is call


@needs_cuda
def test_a_replay_does_what_the_call_does():
    device = torch.device("cuda")
    memory = new_memory(device)
    numbers = torch.zeros(4, device=device)
    replays = [captured(lambda step=step: numbers.add_(step), device, memory) for step in (1, 10)]
    numbers.zero_()
    for replay in (*replays, *replays):
        replay()
    torch.cuda.synchronize()
    assert numbers.tolist() == [22.0] * 4


@needs_cuda
def test_what_waits_for_the_device_is_timed_uncaptured(caplog):
    device = torch.device("cuda")
    numbers = torch.zeros(1, device=device)

    def call() -> float:
        return numbers.item()

    assert captured(call, device) is call
    assert "timed uncaptured" in caplog.text
