"""Everything on a device that is not the current one. Needs two; written without one."""

from __future__ import annotations

import pytest
import torch
from support.op_scenarios import SCENARIOS, on_device
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, backends, generate, release_engines
from sequoia_kernels.cuda_graphs import capture
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.measure import measure_bandwidth, time_calls
from sequoia_kernels.measure.graphs import captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

OTHER = torch.device("cuda", 1)
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])


@pytest.fixture(autouse=True)
def current_device():
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0
    assert all(torch.cuda.current_stream(index) == torch.cuda.default_stream(index) for index in range(2))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton", "cuda"])
def test_ops(scenario, backend):
    op = SCENARIOS[scenario].op
    if backend not in backends.backend_names(op) or backends.unavailable_reason(op, backend):
        pytest.skip("the op has no such backend here")
    outputs = []
    for device in ("cuda:0", OTHER):
        try:
            outputs.append(SCENARIOS[scenario].bind(on_device(SCENARIOS[scenario].make(1), device), backend)())
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))
    for here, there in zip(*outputs, strict=True):
        assert there.device == OTHER
        torch.testing.assert_close(here.cpu(), there.cpu(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation(temperature):
    release_engines()
    models = [tiny_llama(0, vocab_size=61)]
    models.append(noisy_copy(models[0], 0.5))
    prompts = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(1))
    options = {"tree": TREE, "max_new_tokens": 40, "temperature": temperature, "eos_token_id": (), "seed": 5}
    found = []
    for device in ("cuda:0", OTHER):
        for model in models:
            model.to(device)
        for graphs in (False, True, True):
            found.append(generate(*models, prompts.to(device), cuda_graphs=graphs, **options).new_tokens)
        assert any(TREE in entry.engine._graphed._captured for entry in engines._kept[models[0]].values())
        release_engines()
    assert found == [found[0]] * len(found)


def test_captured_calls_and_times():
    numbers = torch.zeros(4, device=OTHER)
    graph, result = capture(lambda: numbers.add_(1), OTHER, undo=numbers.zero_)
    assert numbers.tolist() == [0.0] * 4
    graph.replay()
    graph.replay()
    assert result.tolist() == numbers.tolist() == [2.0] * 4
    replay = captured(lambda: numbers.add_(1), OTHER)
    times = time_calls({"replay": replay}, OTHER, seconds=0, min_repeats=3, warmup=0)
    assert times["replay"].p50_ms > 0


def test_bandwidth():
    assert all(value > 0 for value in measure_bandwidth(OTHER, num_bytes=1 << 26, seconds=0.05).values())
