"""Calls as replays of CUDA graphs, with a stand-in for CUDA; on a device: python_tests/gpu/test_measured_graphs.py."""

from __future__ import annotations

import torch

from sequoia_kernels import cuda_graphs
from sequoia_kernels.cuda_graphs import as_replay, new_memory

DEVICE = torch.device("cuda", 1)


class Model:
    """As much of a `TreeModel` as is asked for when its forward is captured."""

    dtype = torch.float32
    ranks = None

    def __init__(self, capturable=True):
        self.model, self.capturable = torch.nn.Module(), capturable
        self.weights = self.model.parameters


def test_without_a_gpu_a_call_stays_as_it_is():
    def call() -> None:
        pass

    assert as_replay(call, torch.device("cpu"), new_memory(torch.device("cpu"))) is call


def test_a_replay_does_what_the_call_does(fake_cuda):
    done = []
    memory = new_memory(DEVICE)
    replays = [
        as_replay(lambda name=name: fake_cuda.launch(DEVICE, lambda: done.append(name)), DEVICE, memory)
        for name in "ab"
    ]
    done.clear()
    for replay in (*replays, *replays):
        replay()
    assert done == list("abab")
    # other threads may go on, such as one that stages an offloaded target's layers
    assert fake_cuda.log.count("capture side stream of cuda:1, thread_local") == 2


def test_what_cannot_be_captured_is_timed_as_it_is(fake_cuda, caplog):
    def call():
        fake_cuda.wait()

    assert as_replay(call, DEVICE) is call
    assert "a call is timed uncaptured: it waits for the device" in caplog.text
    fake_cuda.assert_untouched()


def test_a_model_that_cannot_be_captured_is_tried_once(fake_cuda, caplog):
    runs = []

    def forward():
        runs.append(1)
        fake_cuda.wait()

    model = Model()
    assert [as_replay(forward, DEVICE, model=model) for _ in range(3)] == [forward] * 3
    assert len(runs) == 2 and len(caplog.records) == 1
    assert as_replay(forward, DEVICE, model=Model(capturable=False)) is forward
    assert len(runs) == 2
    cuda_graphs.forget_refusals()


def test_a_lack_of_memory_is_not_remembered_of_a_model(fake_cuda):
    model = Model()

    def forward():
        raise torch.cuda.OutOfMemoryError("out of memory")

    assert as_replay(forward, DEVICE, model=model) is forward
    assert not cuda_graphs.refused(model)
