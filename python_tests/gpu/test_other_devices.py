"""Everything on a device that is not the current one. Needs two; written without one."""

from __future__ import annotations

import pytest
import torch
from support.op_scenarios import SCENARIOS, on_device
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, generate, release_engines
from sequoia_kernels.cuda_graphs import as_replay, capture
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.measure import measure_bandwidth, time_calls
from sequoia_kernels.ops import CacheTable, backends, compact_kv_cache_

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
    replay = as_replay(lambda: numbers.add_(1), OTHER)
    times = time_calls({"replay": replay}, OTHER, seconds=0, min_repeats=3, warmup=0)
    assert times["replay"].p50_ms > 0


def test_bandwidth():
    assert all(value > 0 for value in measure_bandwidth(OTHER, num_bytes=1 << 26, seconds=0.05).values())


def test_compaction_of_caches_on_two_devices():
    caches = [torch.randn(2, 20, 2, 8), torch.randn(2, 20, 2, 8)]
    path, counts = torch.tensor([[0, 2, 5], [1, 3, -1]]).int(), torch.tensor([3, 2]).int()
    expected, lens = [cache.clone() for cache in caches], torch.tensor([4, 9]).int()
    compact_kv_cache_(expected, path, counts, lens)
    for name in ("reference", "triton", "cuda"):
        if backends.unavailable_reason("compact_kv_cache_", name):
            continue
        for home, other in (("cuda:0", OTHER), (OTHER, "cuda:0")):
            moved = [caches[0].to(home), caches[1].to(other)]
            moved_lens = torch.tensor([4, 9]).int().to(home)
            tables = CacheTable.by_device(moved)
            compact_kv_cache_(tables, path.to(home), counts.to(home), moved_lens, backend=name)
            assert moved_lens.tolist() == lens.tolist()
            for cache, want in zip(moved, expected):
                assert torch.equal(cache.cpu(), want)


def spread(model):
    """Give a Llama on cuda:0 whose second layer lies on the other device, as accelerate spreads one."""

    def moved_to(device, value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return tuple(moved_to(device, item) for item in value) if isinstance(value, tuple) else value

    def before(layer, args, kwargs):
        return moved_to(OTHER, args), {name: moved_to(OTHER, value) for name, value in kwargs.items()}

    layer = model.to("cuda:0").model.layers[1].to(OTHER)
    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(lambda layer, args, output: moved_to("cuda:0", output))
    return model


def test_generation_with_a_target_on_two_devices():
    target = tiny_llama(0, vocab_size=61)
    draft = noisy_copy(target, 0.5).to("cuda:0")
    prompts = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(1)).to("cuda:0")
    options = {"tree": TREE, "max_new_tokens": 40, "temperature": 0.8, "eos_token_id": (), "seed": 5}
    on_one = generate(target.to("cuda:0"), draft, prompts, **options).new_tokens
    assert generate(spread(target), draft, prompts, **options).new_tokens == on_one
