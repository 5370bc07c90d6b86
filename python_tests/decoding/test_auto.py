"""tree="auto" and "adaptive": what is measured, how often, what is kept, and the edges of the positions."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from support.synthetic_profile import synthetic_profile
from support.tiny_models import noisy_copy, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from sequoia_kernels import generate
from sequoia_kernels.decoding import auto
from sequoia_kernels.measure import pair_times as measuring
from sequoia_kernels.models import TreeModel, adapt
from sequoia_kernels.planner import AcceptanceEvidence, ModelFingerprint, store

OPTIONS = {"eos_token_id": (), "max_new_tokens": 12}


def prompt(length, batch_size=1):
    return torch.randint(32, (batch_size, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def target():
    """A model whose second layer adds little."""
    model = tiny_llama(0)
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.3)
    return model


@pytest.fixture(scope="module")
def draft(target):
    """The target without that layer."""
    model = tiny_llama(0, num_layers=1)
    model.load_state_dict({name: value for name, value in target.state_dict().items() if ".layers.1." not in name})
    return model


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder and a process of one's own, and no time spent on repeats."""
    monkeypatch.setenv("SEQUOIA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.02)
    new_process(monkeypatch)
    return tmp_path


def new_process(monkeypatch):
    monkeypatch.setattr(auto, "_profiles", type(auto._profiles)())
    monkeypatch.setattr(auto, "_pairs", type(auto._pairs)())


@pytest.fixture
def measured(monkeypatch):
    """Batch sizes and contexts that would be measured; times of a target that is ten times its draft instead."""
    calls = []

    def measure(target, draft, arguments, context_len, rows):
        calls.append((arguments.batch_size, context_len))
        return synthetic_profile(
            lambda nodes, context: 10 + 0.3 * nodes,
            lambda rows, context: 1.0,
            batch_size=arguments.batch_size,
            context_lens=(context_len,),
            target=ModelFingerprint.of(target),
            draft=draft.fingerprint,
        )

    monkeypatch.setattr(auto, "_measure", measure)
    return calls


def test_it_gives_the_targets_text_with_times_as_they_are(target, draft):
    for length in (9, 14):
        output = generate(target, draft, prompt(length), **OPTIONS)
        assert output.new_tokens == generate(target, None, prompt(length), **OPTIONS).new_tokens
    (profile,) = auto._profiles.values()
    profile.check_device()
    assert profile.forward_table(profile.target_key).context_lens == (128,)


def test_it_learns_from_every_call(target, draft, measured):
    visits = 0
    for length in (9, 14):
        stats = generate(target, draft, prompt(length), **OPTIONS).stats
        visits += stats.visited_by_rank[0]
        (kept,) = auto._pairs.values()
        assert kept.evidence.num_visits == visits > 0


def test_times_are_measured_once_whatever_the_process_the_length_and_the_weights(target, draft, measured, monkeypatch):
    for ids in (prompt(9), prompt(30), prompt(9)):
        generate(target, draft, ids, **OPTIONS)
    new_process(monkeypatch)
    generate(target, noisy_copy(draft, 0.4, seed=1), prompt(9), **OPTIONS)
    generate(target, draft, prompt(9), **OPTIONS, temperature=1.0, tree="adaptive")
    assert measured == [(1, 128)]
    generate(target, draft, prompt(200), eos_token_id=(), max_new_tokens=56)
    assert measured[1:] == []  # 228 tokens in the middle are nearer to 128 than to 512
    new_process(monkeypatch)
    monkeypatch.setenv("SEQUOIA_CACHE", "0")
    generate(target, draft, prompt(9), **OPTIONS)
    assert len(measured) == 2


def test_longer_contexts_are_measured_apart_and_no_longer_than_the_call(measured):
    target, draft = tiny_llama(0, max_positions=2048), tiny_llama(0, max_positions=2048, num_layers=1)
    for length, tokens in ((9, 12), (300, 12), (280, 60), (500, 12)):
        generate(target, draft, prompt(length), eos_token_id=(), max_new_tokens=tokens)
    assert measured == [(1, 128), (1, 311)]


def test_other_threads_and_other_modules_have_other_times(target, draft, measured):
    generate(target, draft, prompt(9), **OPTIONS)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        generate(target, draft, prompt(9), **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2


def test_batches_between_two_measured_sizes_are_interpolated(target, draft, measured):
    for batch_size in (1, 2, 4, 3, 8, 6, 5, 7):
        output = generate(target, draft, prompt(9, batch_size), **OPTIONS)
        assert output.new_tokens == generate(target, None, prompt(9, batch_size), **OPTIONS).new_tokens
    assert [batch_size for batch_size, _ in measured] == [1, 2, 4, 8]


def test_evidence_is_kept_for_the_weights_and_the_sampling_and_not_for_the_batch(target, draft, measured, monkeypatch):
    def evidence():
        return sorted(
            (entry.key["draft"], entry.key["sampling"]) for entry in store.list_cache() if entry.kind == "acceptance"
        )

    generate(target, draft, prompt(9), **OPTIONS)
    generate(target, draft, prompt(9, 2), **OPTIONS)
    assert len(evidence()) == 1
    generate(target, draft, prompt(9), **OPTIONS, temperature=0.7, top_k=5)
    generate(target, draft, prompt(9, 2), **OPTIONS, temperature=[0.7, 0.7], top_k=5)
    assert [sampling for _, sampling in evidence()] == [[[0.0, 0, 1.0]], [[0.7, 5, 1.0]]]
    generate(target, noisy_copy(draft, 0.3, seed=9), prompt(9), **OPTIONS)
    assert len({weights for weights, _ in evidence()}) == 2
    visits = {digest: kept.evidence.num_visits for digest, kept in auto._pairs.items()}
    new_process(monkeypatch)
    generate(target, draft, prompt(9), **OPTIONS)
    ((digest, kept),) = auto._pairs.items()
    assert kept.evidence.num_visits > visits[digest]


def test_every_tensor_of_a_model_counts_for_its_identity(target):
    model = adapt(noisy_copy(target, 0.0))
    before = auto._weights_digest(model)
    assert before == auto._weights_digest(adapt(noisy_copy(target, 0.0)))
    for parameter in model.model.parameters():
        row = parameter.data
        while row.ndim > 1:
            row = row[row.shape[0] // 2]
        row[0] += 1.0
        after = auto._weights_digest(model)
        assert after != before
        before = after


def test_adapters_count_too(target):
    model = adapt(noisy_copy(target, 0.0))
    digests = [auto._weights_digest(model)]
    layer = model.model.model.layers[0].self_attn.q_proj
    for name, value in (("_active_adapter", ["a"]), ("_active_adapter", ["b"]), ("scaling", {"b": 2.0})):
        setattr(layer, name, value)
        digests.append(auto._weights_digest(model))
    assert len(set(digests)) == 4


def test_a_broken_file_is_no_error(target, draft, folder, measured, monkeypatch, caplog):
    generate(target, draft, prompt(9), **OPTIONS)
    for path in folder.iterdir():
        path.write_text("{")
    new_process(monkeypatch)
    generate(target, draft, prompt(9), **OPTIONS)
    assert len(measured) == 2
    assert caplog.text.count("passed over") == 2


def test_each_measurement_is_one_line_and_a_bar_on_a_terminal_only(target, draft, caplog, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", plain := io.StringIO())
    with caplog.at_level(logging.WARNING, "sequoia_kernels"):
        for _ in range(2):
            generate(target, draft, prompt(9), **OPTIONS)
        assert caplog.text.count("measuring") == 1
        assert plain.getvalue().count("%") == 0
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        generate(target, draft, prompt(9, 2), **OPTIONS)
    assert caplog.text.count("measuring") == 2
    assert "100%" in terminal.getvalue()


def test_what_is_given_is_neither_measured_nor_learnt(target, draft, folder, measured):
    generate(target, draft, prompt(9), **OPTIONS)
    profile = next(iter(auto._profiles.values()))
    generate(target, draft, prompt(9), **OPTIONS, profile=profile, acceptance=[0.6, 0.1], temperature=0.5)
    assert len(measured) == 1
    assert len(auto._pairs) == 1


def test_it_is_planned_anew_when_the_evidence_has_grown(target, draft, measured, caplog):
    with caplog.at_level(logging.INFO, "sequoia_kernels"):
        for _ in range(12):
            generate(target, draft, prompt(9), **OPTIONS)
    (kept,) = auto._pairs.values()
    plans = caplog.text.count("planned from")
    assert 2 <= plans < 12
    assert kept.evidence.num_visits > 0


def test_a_hopeless_draft_is_left_alone_in_the_end(target, draft, measured):
    hopeless = noisy_copy(draft, 0.0)
    with torch.no_grad():
        hopeless.lm_head.weight.neg_()  # it proposes what the target would say last
    steps = []
    for index in range(12):
        stats = generate(target, hopeless, prompt(9 + index), eos_token_id=(), max_new_tokens=64).stats
        steps.append(sum(count for tree, count in stats.steps_by_tree.items() if tree.num_nodes > 1))
    assert 0 < steps[0] < 32
    assert steps[-1] < 16


@pytest.mark.parametrize("tree", ["auto", "adaptive"])
def test_a_plan_is_not_taken_for_requests_that_leave_its_trees_no_room(target, draft, measured, monkeypatch, tree):
    model, needed = adapt(target), []
    monkeypatch.setattr(TreeModel, "max_cache_rows", lambda self, batch_size: 150)
    monkeypatch.setattr(auto, "_learn", lambda kept, key, stats: None)  # more evidence would be planned from anew
    plain = TreeModel.new_cache

    def noted(self, batch_size, max_cache_len, **options):
        needed.extend([max_cache_len] if self.model is target else [])
        return plain(self, batch_size, max_cache_len, **options)

    monkeypatch.setattr(TreeModel, "new_cache", noted)
    for length, max_new_tokens in ((66, 64), (2, 140), (3, 140), (4, 140)):
        generate(model, draft, prompt(length), tree=tree, eos_token_id=(), max_new_tokens=max_new_tokens)
    assert 141 < max(needed) <= 150


def test_few_plans_are_kept(target, draft):
    kept = auto._Kept(AcceptanceEvidence(), 0)
    times = synthetic_profile(lambda nodes, context: 10.0 + nodes, lambda rows, context: 1.0)
    for budget in range(2, auto.MOST_PLANS + 6):
        settings = {"context_len": 128, "batch_size": 1, "temperature": 0.0, "max_budget": budget, "max_levels": 2}
        auto._planned(kept, times, False, True, settings)
    assert len(kept.plans) == auto.MOST_PLANS


# Positions


def tiny_gpt2(seed, positions):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=32, n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("tree", ["auto", "adaptive"])
@pytest.mark.parametrize(("length", "max_new_tokens"), [(40, 10), (4, 200), (63, 4), (64, 1)])
def test_the_end_of_the_positions_is_no_error(tree, length, max_new_tokens):
    target, draft = tiny_gpt2(0, 64), tiny_gpt2(1, 64)
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": ()}
    output = generate(target, draft, prompt(length), tree=tree, **options)
    plain = generate(target, None, prompt(length), **options)
    assert output.new_tokens == plain.new_tokens
    assert output.finish_reasons == plain.finish_reasons


@pytest.mark.parametrize("tree", ["auto", "adaptive"])
def test_a_draft_of_few_positions_limits_neither_the_text_nor_the_plan(tree):
    target, draft = tiny_llama(0), tiny_llama(1, max_positions=16)
    options = {"max_new_tokens": 60, "eos_token_id": ()}
    output = generate(target, draft, prompt(30), tree=tree, **options)
    assert output.new_tokens == generate(target, None, prompt(30), **options).new_tokens


# What there is time for


def test_sizes_that_take_too_long_are_not_measured(target, monkeypatch):
    model = adapt(target)
    monkeypatch.setattr(measuring, "largest_cache_bytes", lambda: 16)

    def times(milliseconds):
        def timed(calls, device, **options):
            return {count: measuring.Timing(1, milliseconds(count), 1, milliseconds(count), 1) for count in calls}

        monkeypatch.setattr(measuring, "time_calls", timed)
        return measuring.affordable_node_counts(model, 16, 1, least_seconds=3.0, num_forwards=6.0)

    fast, budget = times(lambda count: 1.0 + 0.1 * count)
    assert (fast, budget) == (list(measuring.QUICK_NODE_COUNTS), 3.0)
    slow, budget = times(lambda count: 100.0 + 5 * count)
    assert budget == 3.0
    assert slow == [1, 2, 4, 6, 8]
    slower, budget = times(lambda count: 2000.0 + 10 * count)
    assert budget == pytest.approx(6 * 2.01)
    assert slower == [1, 2, 4, 6, 8]  # a few are measured whatever they take
    assert times(lambda count: 6.0)[0] == list(measuring.QUICK_NODE_COUNTS)


def test_time_counts_several_times_where_forwards_are_timed_in_a_row(target, monkeypatch):
    """Sizes are chosen so that the rounds that are run whatever they take are within the budget."""
    model, rounds = adapt(target), 4  # the one that is not counted among them
    monkeypatch.setattr(measuring, "largest_cache_bytes", lambda: 1 << 40)
    monkeypatch.setattr(
        measuring, "time_calls",
        lambda calls, device, **options: {count: measuring.Timing(12.0, 12.0, 12.0, 12.0, 1) for count in calls},
    )  # fmt: skip
    counts, budget = measuring.affordable_node_counts(model, 16, 1, least_seconds=3.0)
    assert len(measuring.QUICK_NODE_COUNTS) > len(counts) > measuring.LEAST_NODE_COUNTS
    assert rounds * (measuring.SETTLING + measuring.TIMED) * len(counts) * 0.012 <= budget


def test_a_streamed_target_keeps_its_own_sizes(target, monkeypatch):
    monkeypatch.setattr(
        measuring.ModelFingerprint, "of", lambda model: type("Fingerprint", (), {"streamed_bytes": 1})()
    )
    model = adapt(target)
    assert measuring.affordable_node_counts(model, 16, 1, least_seconds=3.0)[0] == list(measuring.OFFLOADED_NODE_COUNTS)
    assert measuring.affordable_node_counts(model, 16, 1, least_seconds=3.0, max_nodes=70) == ([1, 16, 64], 3.0)


def test_a_tree_grows_no_deeper_than_the_evidence_bears():
    """Even where a level costs next to nothing and everything was accepted."""
    cheap = synthetic_profile(lambda nodes, context: 10.0, lambda rows, context: 0.001)
    settings = {"context_len": 128, "batch_size": 1, "temperature": 0.0}
    lucky = AcceptanceEvidence()
    deepest = []
    for _ in range(3):
        plan = auto._planned(auto._Kept(lucky, 0), cheap, False, True, settings)
        deepest.append(max(tree.num_levels for tree in plan.trees))
        lucky = lucky.with_run([64], [64])
    assert deepest == [
        auto.LEAST_LEVELS + int(runs * 64 / (1 + 63 * 0.08) / auto.VISITS_PER_LEVEL) for runs in range(3)
    ]
