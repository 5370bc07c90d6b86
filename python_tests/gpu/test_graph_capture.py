"""On a CUDA device: every op and the whole decoding step in a graph, no host sync, the same bits on every run.

Skipped, with the reason, where there is no device. What they share with the CPU (the calls and their inputs) is checked
there by the last tests of this file.
"""

from __future__ import annotations

import logging

import pytest
import torch
from support.eagle_heads import write_head
from support.op_scenarios import SCENARIOS, on_device, refill
from support.shaped_trees import steep_confidence
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import ShapedTree, TokenTree, adapt, generate, release_engines
from sequoia_kernels.cuda_graphs import capture
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.drafts import Eagle3Draft
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.ops import backends, sample_without_replacement, verify_tree

DEVICE_BACKENDS = ("reference", "sdpa", "triton", "cuda")


def device_calls(ops=None, *, reference=True):
    """Scenarios with each backend that may run on a CUDA device; unavailable ones are skipped and say why."""
    parameters = []
    for scenario, (op, *_) in SCENARIOS.items():
        if ops is not None and op not in ops:
            continue
        for name in backends.backend_names(op):
            if name not in DEVICE_BACKENDS or (name == "reference" and not reference):
                continue
            reason = backends.unavailable_reason(op, name)
            marks = [pytest.mark.gpu] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")]
            parameters.append(pytest.param(scenario, name, id=f"{scenario}-{name}", marks=marks))
    return parameters


def device_backends(op):
    """Backends of ours for an op on a CUDA device, likewise."""
    names = [name for name in ("triton", "cuda") if name in backends.backend_names(op)]
    reasons = {name: backends.unavailable_reason(op, name) for name in names}
    return [
        pytest.param(name, marks=pytest.mark.gpu if reason is None else pytest.mark.skip(reason=f"{name}: {reason}"))
        for name, reason in reasons.items()
    ]


def bound(scenario, inputs, backend):
    """The scenario's call on these inputs. Where a backend does not support it, running it skips the test."""
    call = SCENARIOS[scenario].bind(inputs, backend)

    def run():
        try:
            return call()
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))

    return run


def outputs_of(scenario, backend, seed, device="cuda"):
    """What a call on fresh copies of the inputs writes."""
    return bound(scenario, on_device(SCENARIOS[scenario].make(seed), device), backend)()


def assert_same_bits(got, wanted):
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("scenario", "backend"), device_calls())
def test_replays_follow_the_inputs(scenario, backend):
    """A graph is captured once; replays on other logits, lengths and streams give what fresh calls give."""
    inputs = on_device(SCENARIOS[scenario].make(0), "cuda")
    call = bound(scenario, inputs, backend)  # holds what the graph reads: a table of caches
    graph, outputs = capture(call, torch.device("cuda"))
    for seed in (1, 2, 0):
        refill(inputs, SCENARIOS[scenario].make(seed))
        graph.replay()
        assert_same_bits(outputs, outputs_of(scenario, backend, seed))


@pytest.mark.parametrize(("scenario", "backend"), device_calls())
def test_results_repeat_bit_for_bit(scenario, backend):
    """Also when memory is handed out again with other contents, and when another stream is busy."""
    wanted = outputs_of(scenario, backend, 1)
    side = torch.cuda.Stream()
    for _ in range(5):
        freed = torch.full((1 << 22,), float("nan"), device="cuda")
        with torch.cuda.stream(side):
            busy = torch.randn(1024, 1024, device="cuda")
            busy = busy @ busy
        del freed
        assert_same_bits(outputs_of(scenario, backend, 1), wanted)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("scenario", "backend"), device_calls())
def test_no_call_waits_for_the_device(scenario, backend):
    call = bound(scenario, on_device(SCENARIOS[scenario].make(0), "cuda"), backend)
    call()  # compiles, and caches what a device is asked once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("scenario", "backend"),
    device_calls(("sample_without_replacement", "verify_tree", "compact_kv_cache_"), reference=False),
)
def test_tokens_and_rows_equal_the_references(scenario, backend):
    for seed in range(8):
        got, wanted = outputs_of(scenario, backend, seed), outputs_of(scenario, "reference", seed)
        if scenario == "sample_without_replacement":
            got, wanted = got[:1], wanted[:1]  # the normaliser is a float: compared with a bound by the op's tests
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("backend", device_backends("verify_tree"))
def test_a_step_at_full_size_equals_the_references(backend):
    """85 nodes x 32003 tokens, drawn and verified from equal logits: equal tokens, nodes and next token."""
    tree = TokenTree.kary(4, 4)
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, tree.num_nodes, 32003)
    target_logits = (3 * torch.randn(shape, generator=generator, device="cuda")).to(torch.bfloat16)
    draft_logits = (target_logits + torch.randn(shape, generator=generator, device="cuda")).to(torch.bfloat16)
    for temperature in (0.0, 0.6, 1.0):
        seeds = torch.tensor([3, 4], device="cuda")
        tokens = torch.zeros(shape[:2], dtype=torch.int64, device="cuda")
        for node in range(tree.num_nodes):
            if tree.num_children[node]:
                row = draft_logits[:, node]
                drawn = [
                    sample_without_replacement(row, 4, temperature, seeds, node, backend=one).tokens
                    for one in (backend, "reference")
                ]
                assert torch.equal(*drawn)
                tokens[:, tree.children(node)] = drawn[0]
        paths = [
            verify_tree(tokens, target_logits, draft_logits, tree, temperature, seeds, 1000, backend=one)
            for one in (backend, "reference")
        ]
        assert_same_bits(*paths)


# The decoding loop


@pytest.fixture(scope="module")
def pair():
    target = tiny_llama(0, vocab_size=61)
    return target.cuda(), noisy_copy(target, 0.5).cuda()


TREES = {"plain": None, "chain": TokenTree.chain(5), "tree": TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])}


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("tree", TREES)
def test_the_captured_loop_equals_the_uncaptured_one(pair, tree, temperature, caplog):
    target, draft = pair
    prompts = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(1)).cuda()
    options = {"max_new_tokens": 40, "temperature": temperature, "eos_token_id": (), "seed": 5}
    if TREES[tree] is None:
        draft = None
    else:
        options["tree"] = TREES[tree]
    release_engines()
    with caplog.at_level(logging.WARNING, logger="sequoia_kernels"):
        graphed, launched = (generate(target, draft, prompts, cuda_graphs=on, **options) for on in (True, False))
    assert not [record for record in caplog.records if "captur" in record.getMessage()]
    (kept,) = engines._kept[target].values()
    assert kept.engine._graphed.num_captured == 1
    assert graphed.new_tokens == launched.new_tokens
    assert graphed.finish_reasons == launched.finish_reasons == ["length"] * 3
    assert graphed.stats.accepted_histogram == launched.stats.accepted_histogram
    assert torch.equal(graphed.sequences, launched.sequences)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_captured_head_reads_what_the_step_before_has_accepted(pair, temperature, tmp_path):
    """An EAGLE-3 head, whose outputs and logits behind the root go from one replay to the next."""
    target, _ = pair
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", target), adapt(target))
    prompts = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(1)).cuda()
    options = {"max_new_tokens": 40, "temperature": temperature, "eos_token_id": (), "seed": 5, "tree": TREES["tree"]}
    release_engines()
    for _ in range(2):  # the second time with the engine of the first
        graphed, launched = (generate(target, source, prompts, cuda_graphs=on, **options) for on in (True, False))
        assert graphed.new_tokens == launched.new_tokens
        assert graphed.stats.accepted_histogram == launched.stats.accepted_histogram
    (kept,) = engines._kept[target].values()
    assert kept.engine._graphed.num_captured == 1


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captured_steps_take_the_proposals_of_their_time(pair, temperature):
    """Texts that repeat, so that steps with trees of every kind follow one another."""
    target, draft = pair
    motif = torch.randint(61, (3, 4), generator=torch.Generator().manual_seed(3))
    prompts = motif.repeat(1, 6).cuda()
    options = {"max_new_tokens": 60, "temperature": temperature, "eos_token_id": (), "seed": 5, "tree": TREES["tree"]}
    release_engines()
    for _ in range(2):  # the second time with the engine of the first
        graphed, launched = (
            generate(target, draft, prompts, lookup=True, cuda_graphs=on, **options) for on in (True, False)
        )
        assert graphed.new_tokens == launched.new_tokens
        assert graphed.stats.lookup_steps == launched.stats.lookup_steps > 0
        assert graphed.stats.accepted_histogram == launched.stats.accepted_histogram
    if temperature == 0:
        assert graphed.new_tokens == generate(target, None, prompts, max_new_tokens=60, eos_token_id=()).new_tokens


@pytest.mark.gpu
def test_requests_of_a_captured_batch_end_on_their_own(pair):
    """Tokens are read one step late; none behind an end must get through, and one tree serves up to the cache's end."""
    target, draft = pair
    prompts = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(2)).cuda()
    options = {"tree": TREES["tree"], "temperature": 0.8, "seed": 6, "max_new_tokens": 60}
    free = generate(target, draft, prompts, eos_token_id=(), **options)
    stop = free.new_tokens[0][10]
    for limits in ({"eos_token_id": stop}, {"eos_token_id": stop, "max_cache_len": 50}):
        graphed, launched = (
            generate(target, draft, prompts, cuda_graphs=on, **options, **limits) for on in (True, False)
        )
        assert graphed.new_tokens == launched.new_tokens
        assert graphed.finish_reasons == launched.finish_reasons
        for tokens, reason in zip(graphed.new_tokens, graphed.finish_reasons):
            assert stop not in tokens[:-1]
            assert (tokens[-1] == stop) == (reason == "eos")
        assert list(graphed.stats.steps_by_tree) == [TREES["tree"]]


@pytest.mark.gpu
def test_a_captured_draft_goes_on_beyond_its_positions(pair):
    """Its context is filled again between two replays; a request's tokens are the same alone and among others."""
    target, draft = pair
    draft = noisy_copy(draft, 0.0).cuda()
    draft.config.max_position_embeddings = 48
    prompts = torch.randint(61, (3, 60), generator=torch.Generator().manual_seed(2)).cuda()
    mask = torch.ones_like(prompts)
    mask[0, 5:], mask[1, 40:] = 0, 0
    options = {"tree": TREES["tree"], "temperature": 0.8, "max_new_tokens": 90, "eos_token_id": ()}
    graphed, launched = (
        generate(target, draft, prompts, mask, seed=[3, 4, 5], cuda_graphs=on, **options) for on in (True, False)
    )
    assert graphed.stats.draft_restarts == launched.stats.draft_restarts > 3
    assert graphed.new_tokens == launched.new_tokens
    assert graphed.stats.accepted_histogram == launched.stats.accepted_histogram
    assert list(graphed.stats.steps_by_tree) == [TREES["tree"]]


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_a_captured_step_sets_unlikely_tokens_back(pair, rule):
    """Where the target is cut, and for others of the batch not: by the same graph for other values."""
    target, draft = pair
    prompts = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(2)).cuda()
    options = {"tree": TREES["tree"], "temperature": [0.9, 0.0, 0.7], "max_new_tokens": 60, "seed": [3, 4, 5]}
    options |= {"eos_token_id": (), "rule": rule}
    for top_p in ([0.8, 0.8, 1.0], [1.0, 0.9, 0.6]):
        graphed, launched = (
            generate(target, draft, prompts, top_p=top_p, cuda_graphs=on, **options) for on in (True, False)
        )
        assert graphed.new_tokens == launched.new_tokens
        assert graphed.stats.accepted_histogram == launched.stats.accepted_histogram


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_captured_shaped_tree_takes_its_shape_in_every_step(pair, temperature):
    target, draft = pair
    prompts = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(2)).cuda()
    tree = ShapedTree((1, 3, 5, 3), steep_confidence())
    options = {"tree": tree, "temperature": temperature, "max_new_tokens": 60, "seed": [3, 4, 5], "eos_token_id": ()}
    graphed, launched = (generate(target, draft, prompts, cuda_graphs=on, **options) for on in (True, False))
    assert graphed.new_tokens == launched.new_tokens
    assert graphed.stats.accepted_histogram == launched.stats.accepted_histogram
    if temperature == 0:
        assert graphed.new_tokens == generate(target, None, prompts, max_new_tokens=60, eos_token_id=()).new_tokens


# What of the above can be checked without a device


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_vary_with_their_seed_and_repeat(scenario):
    first, again, other = (outputs_of(scenario, "reference", seed, device="cpu") for seed in (1, 1, 2))
    assert_same_bits(first, again)
    assert any(not torch.equal(left, right) for left, right in zip(first, other))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_refilled_inputs_give_what_fresh_ones_give(scenario):
    inputs = on_device(SCENARIOS[scenario].make(0), "cpu")
    call = bound(scenario, inputs, "reference")
    call()
    refill(inputs, SCENARIOS[scenario].make(1))
    assert_same_bits(call(), outputs_of(scenario, "reference", 1, device="cpu"))
