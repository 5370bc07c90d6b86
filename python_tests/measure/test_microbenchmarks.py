"""measure_microbenchmarks on tiny shapes: every part is there, a configuration can be planned from it."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_llama
from transformers import LlamaConfig

from sequoia_kernels.measure import measure_microbenchmarks, measure_profile
from sequoia_kernels.measure.layer_models import LayerShape, hollow_llama
from sequoia_kernels.measure.microbenchmarks import Microbenchmarks
from sequoia_kernels.models import causal_step
from sequoia_kernels.planner import CostModel, HardwareProfile, ModelFingerprint, plan_tree
from sequoia_kernels.planner.compose import COMPOSED_OPS, can_compose

ONCE = {"seconds": 0.0, "min_repeats": 1, "max_repeats": 1}
CPU = torch.device("cpu")


def config(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def profile():
    return measure_microbenchmarks("cpu", torch.bfloat16, shapes=[config()], rows=[1, 4], **ONCE)


def test_every_part_is_measured_at_the_models_shapes(profile):
    fingerprint = ModelFingerprint.from_config(config(), "bfloat16")
    shapes = {
        (point.parameters["in_features"], point.parameters["out_features"], point.parameters["rows"])
        for point in profile.ops["linear"]
    }
    assert shapes == {(inputs, outputs, rows) for inputs, outputs, _ in fingerprint.linears for rows in (1, 4)}
    heads = {tuple(point.parameters[name] for name in ("q_heads", "kv_heads", "head_dim"))
             for point in profile.ops["tree_attention"]}  # fmt: skip
    assert heads == {(2, 1, 8)}
    assert {point.parameters["hidden_size"] for point in profile.ops["decoder_layer_rest"]} == {16}
    assert len(profile.ops["decoder_layer_overhead"]) == 1
    for op in COMPOSED_OPS:
        assert all(point.parameters["dtype"] == "bfloat16" for point in profile.ops[op])
        assert all(0 <= point.p20_ms <= point.p50_ms <= point.p80_ms for point in profile.ops[op])
    assert {point.parameters["vocab"] for point in profile.ops["verify_tree"]} == {64}
    assert can_compose(profile, fingerprint) is None


def test_it_survives_a_file(profile, tmp_path):
    profile.save(tmp_path / "profile.json")
    assert HardwareProfile.load(tmp_path / "profile.json") == profile


def test_a_plan_needs_nothing_but_configurations(profile):
    plan = plan_tree([0.6, 0.2], profile, target=config(6), draft=config(1), dtype="bfloat16", max_budget=4)
    assert plan.no_speculation.stages["target"] > 0
    assert len([note for note in plan.notes if "composed" in note]) == 2


def test_it_adds_to_a_measured_profile(profile):
    target, draft = tiny_llama(0, num_layers=2), tiny_llama(1, num_layers=1)
    measured = measure_profile(target, draft, context_lens=[8], node_counts=[2, 4], bandwidth=False, **ONCE)
    both = measured.merged(profile)
    assert (both.target_key, both.draft_key) == (measured.target_key, measured.draft_key)
    assert CostModel(both).composed == []
    assert CostModel(both, target=config(), dtype="bfloat16").composed == ["target"]


def test_the_default_grid_leaves_out_what_takes_long():
    bench = Microbenchmarks(CPU, torch.float32, rows=[1, 1024], ops=False)
    linear = {
        (dict(items)["in_features"], dict(items)["out_features"], dict(items)["rows"])
        for op, items in bench.calls
        if op == "linear"
    }
    assert (4096, 16384, 1) in linear
    assert (128, 128, 1024) in linear
    assert not bench._fits(1e6 * bench.flops_per_ms)


def test_weights_and_caches_take_turns():
    bench = Microbenchmarks(
        CPU, torch.float32, [ModelFingerprint.from_config(config(), "float32")], rows=[1], ops=False
    )
    for key, timed in bench._timed.items():
        if key[0] in ("linear", "tree_attention"):
            assert timed.times >= 1
            assert dict(key[1]).get("working_set_bytes", 1) >= 1


def test_a_hollow_model_runs_without_linear_layers_and_attention():
    model = hollow_llama(LayerShape(32, 64, 4, 2, 8), 2, torch.bfloat16, CPU)
    assert not [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    cache = model.new_cache(1, 16)
    lens = torch.full((1,), 3, dtype=torch.int32)
    logits = model.forward(torch.tensor([[1, 2, 3]]), cache, lens, causal_step(3))
    assert logits.shape == (1, 3, 64)
    written = cache.layers[1].keys[0].abs().sum((1, 2))
    assert (written > 0).tolist() == [3 <= row < 6 for row in range(16)]


def test_progress_ends_at_the_end():
    seen: list[tuple[int, int]] = []
    measure_microbenchmarks("cpu", shapes=[config()], rows=[1], ops=False, **ONCE,
                            progress=lambda done, total, what: seen.append((done, total)))  # fmt: skip
    assert seen[0] == (0, 100)
    assert seen[-1] == (100, 100)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
