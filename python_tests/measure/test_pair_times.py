"""measure_profile on tiny random models: the tables are filled, the plan can be made, bad arguments are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.tiny_models import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from sequoia_kernels.measure import measure_profile
from sequoia_kernels.measure import pair_times as profile_module
from sequoia_kernels.measure.calls import typical_tree
from sequoia_kernels.measure.timing import Timing, Turn, time_calls
from sequoia_kernels.models import TreeModel, adapt
from sequoia_kernels.offload import load_offloaded
from sequoia_kernels.planner import HardwareProfile, ModelFingerprint, plan_tree

FAST = {"seconds": 0.0, "min_repeats": 1, "max_repeats": 1, "bandwidth": False}


@pytest.fixture(scope="module")
def target():
    return tiny_llama(0, num_layers=2)


@pytest.fixture(scope="module")
def draft():
    return tiny_llama(1, num_layers=1)


@pytest.fixture(scope="module")
def short():
    """A model with a table of 256 positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=256, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def profile(target, draft):
    return measure_profile(
        target,
        draft,
        context_lens=[64, 16],
        node_counts=[8, 2, 4],
        draft_node_counts=[4],
        seconds=0.0,
        min_repeats=2,
        max_repeats=2,
        bandwidth=False,
    )


def test_forward_tables_are_filled(profile, target, draft):
    keys = [ModelFingerprint.of(model).key for model in (target, draft)]
    assert [profile.target_key, profile.draft_key] == keys
    rounds, in_a_row = 2, profile_module.TIMED  # of a target that the caches hold
    for key, counts, repeats in zip(keys, [(1, 2, 4, 8), (1, 2, 4)], [rounds * in_a_row, rounds], strict=True):
        table = profile.forward_table(key)
        assert (table.context_lens, table.node_counts, table.repeats) == ((16, 64), counts, repeats)
        for low, middle, high in zip(table.p20_ms, table.p50_ms, table.p80_ms, strict=True):
            assert all(0 < a <= b <= c for a, b, c in zip(low, middle, high, strict=True))


def test_op_times_cover_what_a_step_does(profile):
    def settings(op: str, *names: str) -> set[tuple[float, ...]]:
        return {tuple(point.parameters[name] for name in names) for point in profile.ops[op]}

    assert settings("verify_tree", "nodes", "vocab", "temperature") == {
        (nodes, 32, temperature) for nodes in (1, 2, 4, 8) for temperature in (0.0, 1.0)
    }
    by_rule = [point for point in profile.ops["verify_tree"] if point.parameters.get("rule") == "traversal"]
    assert [(point.parameters["nodes"], point.parameters["temperature"]) for point in by_rule] == [
        (nodes, 1.0) for nodes in (1, 2, 4, 8)
    ]
    assert settings("sample_without_replacement", "rows", "num_samples", "vocab", "temperature") == {
        (rows, samples, 32, temperature)
        for rows in (1, 2, 4)
        for samples in (1, 2, 4, 8, 16, 32)
        for temperature in (0.0, 1.0)
    }
    row_bytes = (2 + 1) * 2 * 2 * 8 * 4  # layers of both models x (keys and values) x heads x width x float32
    assert settings("compact_kv_cache_", "levels", "row_bytes", "batch_size") == {
        (levels, row_bytes, 1) for levels in (1, 2, 4, 8)
    }
    assert set(profile.mean_over_median) == {profile.target_key, profile.draft_key, *profile.ops}
    (ratio,) = set(profile.mean_over_median.values())
    assert ratio > 0
    assert all(point.p50_ms > 0 for points in profile.ops.values() for point in points)


def test_the_profile_is_of_this_device_and_survives_a_file(profile, tmp_path):
    profile.check_device()
    profile.save(tmp_path / "profile.json")
    assert HardwareProfile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_plan_can_be_made_from_it(profile, target, draft, temperature):
    plan = plan_tree([0.6, 0.2], profile, target=target, draft=adapt(draft), temperature=temperature)
    assert plan.tree.num_nodes <= 8
    assert plan.no_speculation.step_ms > 0


def test_without_a_draft_there_is_only_the_target(target):
    profile = measure_profile(target, context_lens=[8], node_counts=[2], **FAST)
    assert profile.draft_key is None
    assert list(profile.ops) == ["verify_tree"]


def test_batches_are_measured_at_their_size(target, draft):
    profile = measure_profile(target, draft, context_lens=[8], node_counts=[4], batch_size=3, **FAST)
    assert profile.forward_table(profile.target_key, 3).batch_size == 3
    assert {point.parameters["rows"] for point in profile.ops["sample_without_replacement"]} == {3, 6}
    assert plan_tree([0.6], profile, batch_size=3).batch_size == 3


def test_a_draft_of_the_targets_shapes_shares_its_table(target):
    profile = measure_profile(target, tiny_llama(5, num_layers=2), context_lens=[8], node_counts=[4], **FAST)
    assert profile.target_key == profile.draft_key
    assert profile.forward_table(profile.draft_key).node_counts == (1, 4)
    plan_tree([0.6], profile)


def test_quick_defaults(target, draft):
    profile = measure_profile(target, draft, quick=True, **{**FAST, "bandwidth": True})
    table = profile.forward_table(profile.target_key)
    assert table.node_counts == (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    assert table.context_lens == (128, 512)
    assert profile.forward_table(profile.draft_key).node_counts == (1, 2, 4, 8, 16)
    assert profile.bandwidth["memory_copy"] > 0


def test_targets_that_stream_their_weights_are_measured_on_large_trees(target, tmp_path):
    target.save_pretrained(tmp_path)
    options = {name: value for name, value in FAST.items() if name != "min_repeats"}
    with load_offloaded(tmp_path, resident_layers=0) as offloaded:
        profile = measure_profile(offloaded, context_lens=[8], **options)
        table = profile.forward_table(profile.target_key)
        assert table.node_counts == (1, 16, 64, 128, 256, 512, 768, 1024)
        assert table.repeats == 2
        fingerprint = profile.models[profile.target_key]
        assert fingerprint.streamed_bytes == offloaded.memory.streamed_bytes > 0
        assert fingerprint == dataclasses.replace(
            ModelFingerprint.of(target), streamed_bytes=offloaded.memory.streamed_bytes
        )


@pytest.mark.parametrize(("context_lens", "contexts"), [(None, (127, 255)), ([200, 100], (100, 200)), ([255], (255,))])
def test_every_tree_is_timed_behind_every_context_that_the_target_serves(short, draft, context_lens, contexts):
    profile = measure_profile(short, draft, context_lens=context_lens, quick=True, **FAST)
    table = profile.forward_table(profile.target_key)
    assert (table.context_lens, table.node_counts[-1]) == (contexts, 64)


def test_contexts_beyond_the_targets_positions_are_refused(short, draft):
    with pytest.raises(ValueError, match="context_lens must be below the target's 256 positions, got 256"):
        measure_profile(short, draft, context_lens=[100, 256], **FAST)


def test_a_draft_is_timed_within_its_own_positions(short, draft, monkeypatch):
    seen = {}
    plain = TreeModel.forward

    def noted(model, input_ids, cache, cache_lens, step):
        seen.setdefault(model.family, set()).add(int(cache_lens))
        return plain(model, input_ids, cache, cache_lens, step)

    monkeypatch.setattr(TreeModel, "forward", noted)
    options = {"node_counts": [4], "draft_node_counts": [2], **FAST}
    profile = measure_profile(draft, short, context_lens=[100, 1000], **options)
    assert seen == {"llama": {100, 1000}, "gpt2": {100, 255}}
    assert profile.forward_table(profile.draft_key).context_lens == (100, 1000)


def test_nothing_of_the_callers_is_changed(target, draft):
    state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in target.state_dict().items()}
    measure_profile(target, draft, context_lens=[8], node_counts=[2], **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in target.state_dict().items())
    assert target(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 32)


def test_progress_is_reported_to_the_end(target):
    seen: list[tuple[int, int, str]] = []
    measure_profile(target, context_lens=[8], node_counts=[2], progress=lambda *report: seen.append(report), **FAST)
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})


@pytest.mark.parametrize("cache_bytes", [1 << 40, 16])
def test_forwards_are_timed_behind_what_they_follow_in_decoding(target, draft, monkeypatch, cache_bytes):
    """In plain decoding forwards of one node follow one another, and levels lie between forwards of a tree."""
    monkeypatch.setattr(profile_module, "largest_cache_bytes", lambda: cache_bytes)
    given = {}

    def timed(calls, device, turns, **options):
        given.update(turns, calls=calls)
        return time_calls(calls, device, turns=turns, **options)

    monkeypatch.setattr(profile_module, "time_calls", timed)
    profile = measure_profile(target, draft, context_lens=[8], node_counts=[1, 4], draft_node_counts=[1, 2], **FAST)
    calls = given.pop("calls")
    levels = {("forward", "draft", 8, rows): Turn(before=calls["forward", "draft", 8, rows]) for rows in (1, 2)}
    assert {key: turn for key, turn in given.items() if key[1] == "draft"} == levels
    targets = {key[3]: turn for key, turn in given.items() if key[1] == "target"}
    if cache_bytes == 16:
        assert not targets
        return
    assert targets[1] == Turn(None, profile_module.SETTLING, profile_module.TIMED)
    assert profile.forward_table(profile.target_key).repeats == profile_module.TIMED
    assert targets[4][1:] == targets[1][1:]
    level, num_levels = targets[4].before.args
    assert level is calls["forward", "draft", 8, 1]
    assert num_levels == typical_tree(4).num_levels - 1


def test_in_a_quick_profile_more_rows_do_not_take_less_time(target, draft, monkeypatch):
    noisy = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])

    def timed(calls, device, **options):
        times = {key: next(noisy) if key[:2] == ("forward", "target") else 1.0 for key in calls}
        return {key: Timing(time, time, time, time, 1) for key, time in times.items()}

    monkeypatch.setattr(profile_module, "time_calls", timed)
    options = {"context_lens": [8], "node_counts": [1, 2, 3, 4, 5, 6], **FAST}
    profile = measure_profile(target, draft, quick=True, **options)
    assert profile.forward_table(profile.target_key).p50_ms == ((2.0, 2.0, 2.0, 4.5, 4.5, 6.0),)
    noisy = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    profile = measure_profile(target, draft, **options)
    assert profile.forward_table(profile.target_key).p50_ms == ((3.0, 1.0, 2.0, 5.0, 4.0, 6.0),)


def test_in_a_quick_profile_an_interruption_does_not_make_one_size_look_slow(target, draft, monkeypatch):
    def timed(calls, device, **options):
        """Four rows were interrupted in two of three calls."""
        hit = [("forward", "target", 8, 4)]
        return {key: Timing(2.0, 6.0 if key in hit else 2.0, 8.0, 5.0 if key in hit else 2.0, 3) for key in calls}

    monkeypatch.setattr(profile_module, "time_calls", timed)
    options = {"context_lens": [8], "node_counts": [1, 2, 4, 8], **FAST}
    profile = measure_profile(target, draft, quick=True, **options)
    (row,) = profile.forward_table(profile.target_key).p50_ms
    assert max(row) == min(row) > 2.0
    profile = measure_profile(target, draft, **options)
    assert profile.forward_table(profile.target_key).p50_ms == ((2.0, 2.0, 6.0, 2.0),)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"node_counts": [0, 1]}, ValueError, r"node_counts must be in 1\.\.1024, got 0"),
        ({"node_counts": [2048]}, ValueError, r"node_counts must be in 1\.\.1024, got 2048"),
        ({"node_counts": [1.5]}, TypeError, "node_counts must hold integers, got 1.5"),
        ({"node_counts": 8}, TypeError, "node_counts must be a sequence of integers"),
        ({"draft_node_counts": [-1]}, ValueError, r"draft_node_counts must be in 1\.\.512"),
        ({"context_lens": []}, ValueError, "context_lens must hold at least one entry"),
        ({"context_lens": [-8]}, ValueError, "context_lens must be >= 0, got -8"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"min_repeats": 0}, ValueError, "min_repeats must be a positive integer"),
        ({"seconds": -1.0}, ValueError, "seconds must be a finite time >= 0"),
    ],
)
def test_bad_arguments_are_refused(target, draft, arguments, error, message):
    with pytest.raises(error, match=message):
        measure_profile(target, draft, **{"context_lens": [8], "node_counts": [2], **FAST, **arguments})


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel"):
        measure_profile(torch.nn.Linear(2, 2))
