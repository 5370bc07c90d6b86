"""The launch for few rows against its specification: on a CPU the kernel's own source, a thread being a fiber.

What a GPU adds, mostly that its caches tell blocks apart, is in the tests marked so.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from support.cuda_on_cpu import COMPILER, few_rows_on_cpu
from support.native_models import case_model, lens_of, random_tree, score_tree, tokens_of

from sequoia_kernels import generate
from sequoia_kernels.cuda_graphs import capture
from sequoia_kernels.models import TreeStep, adapt, causal_step
from sequoia_kernels.models.adapter import TreeModel
from sequoia_kernels.tree import TokenTree

pytest.importorskip("triton", reason="triton is not installed")

from support.few_rows_forwards import CASES, Forward, Sizes, assert_same, forward_of

from sequoia_kernels.models.fused import few_rows, fused_forward
from sequoia_kernels.models.fused.few_rows import FewRowsCall
from sequoia_kernels.ops import triton_device

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16)
FEW_BYTES = 68 << 10  # of shared memory: room for few stages, which come round several times
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def in_float32(given: Forward) -> torch.Tensor:
    """The specification's logits where nothing is rounded to two bytes; call it before what is given has changed."""

    def wide(tensors: Any) -> Any:
        return tensors.float() if isinstance(tensors, torch.Tensor) else type(tensors)(*map(wide, tensors))

    layers = tuple(map(wide, given.model.layers))
    head = {name: wide(getattr(given.model, name)) for name in ("embedding", "final_norm", "head")}
    model = given.model._replace(layers=layers, **head)
    caches = [(keys.float(), values.float()) for keys, values in given.caches]
    return given._replace(model=model, caches=caches).expected()[0]


def assert_as_exact_as_its_specification(call: FewRowsCall, specified: torch.Tensor, exact: torch.Tensor) -> None:
    """Sums of thousands of numbers through several layers: what matters is how far both are from what is right."""
    errors = [float((logits.float() - exact).abs().mean()) for logits in (call.logits, specified)]
    assert 0 < errors[0] <= 1.1 * errors[1], errors


@needs_compiler
def test_sums_of_many_numbers_are_as_exact_as_the_specifications():
    given = forward_of(Sizes(1, 9, 512, 1536, 4, 2, vocab=400, slots=120))
    exact, expected = in_float32(given), given.expected()
    call = given.call()
    few_rows_on_cpu(call)
    assert_as_exact_as_its_specification(call, expected[0], exact)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_trees", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_its_specification(case, own_trees, dtype):
    given = forward_of(CASES[case], dtype, own_trees=own_trees)
    expected, counters = given.expected(), torch.zeros(2, dtype=torch.int32)
    call = given.call(counters)
    few_rows_on_cpu(call)
    assert_same(given, call, expected)
    assert counters.tolist() == [0, 0]


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_the_shared_memory_that_a_model_asks_for_is_enough(case):
    given = forward_of(CASES[case])
    expected, call = given.expected(), given.call()
    few_rows_on_cpu(call, shared_bytes=given.model.shared_bytes(call.logits.shape[0]))
    assert_same(given, call, expected)


@needs_compiler
def test_bits_depend_neither_on_blocks_nor_on_the_order_of_threads_nor_on_stages():
    found = []
    for number, settings in enumerate(({}, {"num_blocks": 1}, {"num_blocks": 4}, {"shared_bytes": FEW_BYTES}, {})):
        given = forward_of(CASES["two requests, a head of keys each"])
        call = given.call()
        few_rows_on_cpu(call, seed=number, **settings)
        found.append([call.logits, *(rows.nan_to_num(3.0) for pair in given.caches for rows in pair)])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        ("wait_until(given.counters, barriers * gridDim.x);", ""),
        ("meet();\n#pragma unroll\n        for (int i = 0; i < kOfThread", "for (int i = 0; i < kOfThread"),
        ("wait_for(ring.filled[ring.stage], ring.parity);", ""),
        ("wait_for(ring.emptied[ring.stage], ring.parity ^ 1);", ""),
        (" & inside & ~written", " & inside"),
    ],
    ids=[
        "blocks do not meet",
        "sums before they are there",
        "weights before they have come",
        "weights over those that are multiplied",
        "fresh slots read",
    ],
)
def test_what_waits_for_nothing_is_seen(change):
    """The fibers tell: each of these passes somewhere else than on a machine that runs threads in order."""
    assert not _differs(None, 0)
    assert any(_differs(change, seed) for seed in range(6))


def _differs(change: tuple[str, str] | None, seed: int) -> bool:
    given = forward_of(CASES["two requests, a head of keys each"])
    expected, call = given.expected(), given.call()
    try:
        few_rows_on_cpu(call, num_blocks=4, shared_bytes=FEW_BYTES, seed=seed, change=change)
        assert_same(given, call, expected)
    except (AssertionError, RuntimeError):
        return True
    return False


@needs_compiler
def test_tokens_without_embedding_and_rows_without_room():
    """A token that could not be drawn is fed as the first one, one behind the vocabulary as the last."""
    given = forward_of(Sizes(requests=3, nodes=2))
    given.tokens.copy_(torch.tensor([[-1, 0], [10**12, 49], [3, 4]]))
    lens = given.places.cache_lens
    lens.copy_(torch.tensor([5, 2**30, -(2**30)]))
    before = [[rows.clone() for rows in pair] for pair in given.caches]
    call = given.call()
    few_rows_on_cpu(call)
    for pair, kept in zip(given.caches, before, strict=True):
        for rows, wanted in zip(pair, kept, strict=True):
            assert torch.equal(rows[1:].nan_to_num(7.0), wanted[1:].nan_to_num(7.0))
            assert torch.equal(rows[0, :6].nan_to_num(7.0), wanted[0, :6].nan_to_num(7.0))
            assert not torch.equal(rows[0, 6:8].nan_to_num(7.0), wanted[0, 6:8].nan_to_num(7.0))
    lens.copy_(torch.tensor([37, 0, 5]))
    again = forward_of(Sizes(requests=3, nodes=2))
    again.tokens.copy_(torch.tensor([[-1, 0], [10**12, 49], [3, 4]]))
    expected, call = again.expected(), again.call()
    few_rows_on_cpu(call)
    assert_same(again, call, expected)


# ---- in a model


def small_llama(dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU, **changes: Any) -> Any:
    """A Llama that the launch takes."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    return case_model("llama", **{**sizes, "head_dim": 64, **changes}).to(device, dtype)


def with_launches(model: Any, device: torch.device = CPU) -> TreeModel:
    """A model with fused forwards, whatever the device."""
    plan = adapt(model, forward="modules")._plan
    return TreeModel(model, plan._replace(own=fused_forward(model, plan.calls, plan.logits_dtype, device)))


@pytest.fixture
def launches(monkeypatch):
    """Forwards of few rows as fibers, one launch an entry."""
    if COMPILER is None or not triton_device.INTERPRETED:
        pytest.skip("needs g++, and Triton's interpreter for the forwards of many rows")
    calls: list[FewRowsCall] = []

    def launch(call: FewRowsCall) -> None:
        calls.append(call)
        few_rows_on_cpu(call)

    monkeypatch.setenv("SEQUOIA_SINGLE_LAUNCH", "1")
    monkeypatch.setattr(few_rows, "launch", launch)
    monkeypatch.setattr(few_rows, "unavailable_reason", lambda device: None)
    return calls


def test_a_model_takes_it_for_few_rows_and_scores_as_its_modules_do(launches, monkeypatch):
    monkeypatch.setattr(few_rows, "MAX_ROWS", 8)
    model = small_llama()
    fused, exact = with_launches(model), adapt(copy.deepcopy(model).float(), forward="modules")
    tree, nodes = random_tree(random.Random(3), 6), tokens_of(5, 1, 6)
    prompt = tokens_of(3, 1, 9)  # more than 8 rows
    scored = score_tree(fused, prompt, tree, nodes)
    assert len(launches) == 1 and launches[0].logits.shape[0] == 6
    wanted = score_tree(exact, prompt, tree, nodes)
    by_modules = score_tree(adapt(copy.deepcopy(model), forward="modules"), prompt, tree, nodes)
    errors = [float((logits.float() - wanted).abs().mean()) for logits in (scored, by_modules)]
    assert errors[0] <= 1.2 * errors[1] + 1e-3


def test_hidden_states_last_rows_and_weights_that_change(launches):
    """The first two are left to the forward of many rows; new weights are read by the next launch."""
    fused = with_launches(small_llama())
    cache, lens, tokens = fused.new_cache(1, 40), lens_of(0), tokens_of(1, 1, 3)
    first = fused.forward(tokens, cache, lens, causal_step(3)).clone()
    fused.forward(tokens, cache, lens, causal_step(3), last_row=torch.tensor([1]))
    fused.forward(tokens, cache, lens, causal_step(3), hidden_states={0: torch.empty(0)})
    assert len(launches) == 1
    with torch.no_grad():
        fused.model.model.norm.weight.mul_(2.0)
        fused.model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
            fused.model.model.layers[0].mlp.down_proj.weight.clone()
        )
    second = fused.forward(tokens, cache, lens, causal_step(3))
    assert len(launches) == 2
    torch.testing.assert_close(second.float(), 2 * first.float(), rtol=0.02, atol=0.02)


def test_tokens_and_steps_of_other_dtypes_and_strides_count_as_their_numbers(launches):
    fused = with_launches(small_llama())
    tokens, lens, step = tokens_of(1, 2, 3), lens_of(2, 4), causal_step(3)
    caches = [fused.new_cache(2, 16) for _ in range(2)]
    expected = fused.forward(tokens, caches[0], lens, step)
    spread = tokens.to(torch.int32).repeat_interleave(2, 1)[:, ::2]
    same = step._replace(depths=step.depths.long(), tree_mask=step.tree_mask.repeat_interleave(2, 1)[:, ::2])
    assert torch.equal(fused.forward(spread, caches[1], lens.long(), same), expected) and len(launches) == 2
    assert all(map(torch.equal, *(cache.tensors() for cache in caches)))


def test_more_rows_are_left_to_the_other_forward_where_that_is_faster(launches):
    """Of wide models from 9 rows on, of others from 17."""
    for width, most in ((64, 16), (1056, 8)):
        fused = with_launches(small_llama(hidden_size=width, num_hidden_layers=1))
        cache = fused.new_cache(1, 40)
        for rows in (most, most + 1):
            launches.clear()
            fused.forward(tokens_of(1, 1, rows), cache, lens_of(0), causal_step(rows))
            assert len(launches) == (rows == most)


def test_a_loop_drafts_with_it(launches):
    target, draft = adapt(small_llama(torch.float32)), with_launches(small_llama())
    prompt, tree = tokens_of(4, 1, 7), TokenTree([-1, 0, 0, 1, 1, 3])
    options = {"max_new_tokens": 12, "temperature": 0.0, "eos_token_id": ()}
    output = generate(target, draft, prompt, tree=tree, **options)
    assert output.new_tokens == generate(target, None, prompt, **options).new_tokens
    assert len(launches) >= 3 * output.stats.num_steps  # the tree's levels that have children


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 32}, {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"hidden_size": 80},
    ],
    ids=str,
)  # fmt: skip
def test_what_it_does_not_compute_is_left_to_the_other_forward(changes, launches):
    fused = with_launches(small_llama(**changes))
    fused.forward(tokens_of(1, 1, 3), fused.new_cache(1, 40), lens_of(0), causal_step(3))
    assert not launches


def test_large_layers_and_float32_are_left_to_products_of_torch_and_so_is_all_that_nobody_asked_for(
    launches, monkeypatch
):
    step, tokens = causal_step(3), tokens_of(1, 1, 3)
    fused = with_launches(small_llama(torch.float32))
    fused.forward(tokens, fused.new_cache(1, 40), lens_of(0), step)
    monkeypatch.setattr(few_rows, "MAX_WEIGHTS", 1000)
    fused = with_launches(small_llama())
    fused.forward(tokens, fused.new_cache(1, 40), lens_of(0), step)
    monkeypatch.setattr(few_rows, "MAX_WEIGHTS", 1 << 20)
    monkeypatch.delenv("SEQUOIA_SINGLE_LAUNCH")
    fused = with_launches(small_llama())
    fused.forward(tokens, fused.new_cache(1, 40), lens_of(0), step)
    assert not launches


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, "68M", "a wide one"])
def test_it_is_its_specification_on_a_gpu(case, dtype):
    """And the same bits every time."""
    device = torch.device("cuda", 0)
    larger = {
        "68M": Sizes(1, 9, 768, 3072, 12, 12, 64, 32000, 2, 640),
        "a wide one": Sizes(3, 9, 2048, 5504, 16, 4, 128, 1000, 3, 1000),
    }
    given = forward_of({**CASES, **larger}[case], dtype, device, own_trees=True)
    exact, expected, found = in_float32(given), given.expected(), []
    for _ in range(12):
        call = given.call()
        call.logits.fill_(float("nan"))
        few_rows.launch(call)
        found.append(call.logits)
    torch.cuda.synchronize()
    if case in CASES:
        assert_same(given, call, expected)
    else:
        assert_as_exact_as_its_specification(call, expected[0], exact)
    assert all(torch.equal(logits, found[0]) for logits in found)


@pytest.mark.gpu
def test_a_captured_forward_is_one_launch_and_gives_the_bits_of_the_call(monkeypatch):
    monkeypatch.setenv("SEQUOIA_SINGLE_LAUNCH", "1")
    device = torch.device("cuda", 0)
    model = adapt(small_llama(torch.bfloat16, device))
    cache, lens = model.new_cache(1, 512), lens_of(300).to(device)
    for tensor in cache.tensors():
        tensor.normal_()
    tree = TokenTree([-1, *(0 for _ in range(7))])
    tokens, step = tokens_of(1, 1, 7).to(device), TreeStep.of(tree.tensors(device), range(1, 8))
    expected = model.forward(tokens, cache, lens, step).clone()
    graph, logits = capture(lambda: model.forward(tokens, cache, lens, step), device)
    for _ in range(50):
        logits.zero_()
        graph.replay()
        assert torch.equal(logits, expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 1 and "few_rows_kernel" in names[0], names
