"""Composed forwards: known formulas come back, shapes are interpolated, copies overlap, refusals say why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import pytest
from support.synthetic_profile import DRAFT, TARGET, forward_table, synthetic_profile
from transformers import LlamaConfig, MixtralConfig

from sequoia_kernels.errors import ProfileError
from sequoia_kernels.planner import CostModel, HardwareProfile, ModelFingerprint, OpPoint, plan_tree
from sequoia_kernels.planner.compose import COMPOSED_OPS, can_compose, compose_forwards, layer_parts_ms, transfer_ms
from sequoia_kernels.planner.cost_model import StepShape
from sequoia_kernels.tree import TokenTree

ROWS = (1, 4, 16, 64, 256, 1024)
CONTEXTS = (128, 1024, 8192)
ACCEPTANCE = (0.6, 0.12, 0.05, 0.03, 0.02, 0.015, 0.012, 0.01, 0.008, 0.007, 0.006, 0.005, 0.004, 0.003, 0.002)


def linear_ms(rows: float, inputs: int, outputs: int) -> float:
    """Reading the weights at 1e6 elements a millisecond, then arithmetic at 1e8 products."""
    return 0.001 + inputs * outputs * 1e-6 + rows * inputs * outputs * 1e-8


def attention_ms(nodes: float, context_len: float, kv_heads: int, head_dim: int) -> float:
    return kv_heads * head_dim * (1e-6 * context_len + 1e-5 * nodes)


def layer_ms(rows: float) -> float:
    return 0.05 + 0.0001 * rows


def point(value: float, **parameters: float | str) -> OpPoint:
    return OpPoint(parameters, 0.9 * value, value, 1.1 * value)


def microbenchmarks(
    profile: HardwareProfile | None = None,
    *,
    widths: Iterable[int] = (64, 256, 1024),
    working_sets: dict[int, float] | None = None,
    dtype: str = "bfloat16",
    speed: float = 1.0,
) -> HardwareProfile:
    """Microbenchmarks made from the formulas above, on top of a synthetic profile."""
    sets = working_sets or {1 << 20: 1.0, 1 << 30: 1.0}
    profile = profile or synthetic_profile(node_counts=ROWS)
    widths = tuple(widths)
    profile = profile.with_op(
        "linear",
        [
            point(
                speed * factor * linear_ms(rows, inputs, outputs),
                rows=rows,
                in_features=inputs,
                out_features=outputs,
                working_set_bytes=size,
                dtype=dtype,
            )
            for size, factor in sets.items()
            for inputs in widths
            for outputs in widths
            for rows in ROWS
        ],
    )
    profile = profile.with_op(
        "tree_attention",
        [
            point(
                speed * attention_ms(nodes, context, heads, 64),
                nodes=nodes,
                context_len=context,
                batch_size=1,
                q_heads=heads,
                kv_heads=heads,
                head_dim=64,
                dtype=dtype,
            )
            for heads in (2, 8)
            for context in CONTEXTS
            for nodes in ROWS
        ],
    )
    sizes = {"intermediate_size": 256, "q_heads": 2, "kv_heads": 2, "head_dim": 64}
    profile = profile.with_op(
        "decoder_layer_rest",
        [
            point(speed * layer_ms(rows), rows=rows, hidden_size=hidden, **sizes, dtype=dtype)
            for hidden in (64, 256)
            for rows in ROWS
        ],
    )
    profile = profile.with_op(
        "model_rest",
        [point(0.5 * speed, rows=rows, hidden_size=hidden, dtype=dtype) for hidden in (64, 256) for rows in ROWS],
    )
    return profile.with_op("decoder_layer_overhead", [point(0.02 * speed, dtype=dtype)])


def llama(hidden: int = 256, layers: int = 3, heads: int = 4, intermediate: int = 512, vocab: int = 512) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
    )


def formula(fingerprint: ModelFingerprint, rows: float, nodes: float, context_len: float, batch_size: int = 1) -> float:
    linear = sum(count * linear_ms(rows, inputs, outputs) for inputs, outputs, count in fingerprint.linears)
    heads = batch_size * fingerprint.num_kv_heads
    layer = attention_ms(nodes, context_len, heads, fingerprint.head_dim) + layer_ms(rows) + 0.02
    return linear + fingerprint.num_layers * layer + 0.5


# ---- composition ----


def test_a_forward_is_the_sum_of_its_parts():
    fingerprint = ModelFingerprint.from_config(llama(), "bfloat16")
    contexts, counts, times = compose_forwards(microbenchmarks(), fingerprint, 1)
    assert (contexts, counts, times.shape) == (CONTEXTS, ROWS, (3, 6))
    wanted = [[formula(fingerprint, nodes, nodes, context) for nodes in ROWS] for context in CONTEXTS]
    np.testing.assert_allclose(times, wanted, rtol=1e-9)


def test_a_batch_feeds_more_rows_and_attends_with_more_heads():
    fingerprint = ModelFingerprint.from_config(llama(), "bfloat16")
    _, counts, times = compose_forwards(microbenchmarks(), fingerprint, 8)
    wanted = [[formula(fingerprint, 8 * nodes, nodes, context, 8) for nodes in counts] for context in CONTEXTS]
    np.testing.assert_allclose(times, wanted, rtol=1e-9)  # 8192 rows lie on the last segment's line


@pytest.mark.parametrize("hidden", [64, 100, 640, 2048], ids=lambda hidden: f"hidden {hidden}")
def test_shapes_between_and_above_the_measured_ones_are_read_off_the_same_formula(hidden):
    fingerprint = ModelFingerprint.from_config(llama(hidden=hidden, intermediate=3 * hidden), "bfloat16")
    _, _, times = compose_forwards(microbenchmarks(), fingerprint, 1)
    wanted = [[formula(fingerprint, nodes, nodes, context) for nodes in ROWS] for context in CONTEXTS]
    np.testing.assert_allclose(times, wanted, rtol=1e-6)


def test_a_measured_shape_counts_as_it_was_measured():
    fingerprint = ModelFingerprint.from_config(llama(hidden=192), "bfloat16")
    base = microbenchmarks()
    odd = [
        point(100.0, rows=rows, in_features=512, out_features=192, working_set_bytes=1 << 30, dtype="bfloat16")
        for rows in ROWS
    ]
    with_odd = base.with_op("linear", odd)
    before, after = (compose_forwards(profile, fingerprint, 1)[2] for profile in (base, with_odd))
    for column, rows in enumerate(ROWS):
        step = fingerprint.num_layers * (100.0 - linear_ms(rows, 512, 192))
        np.testing.assert_allclose(after[:, column] - before[:, column], step, rtol=1e-9)


def test_weights_are_as_cold_as_the_model_is_large():
    """Working sets of 1 MiB and 16 MiB, the larger four times as slow; a model of 4 MiB lies half way."""
    profile = microbenchmarks(working_sets={1 << 20: 1.0, 1 << 24: 4.0})
    small, middle, large = (
        dataclasses.replace(
            ModelFingerprint.from_config(llama(), "bfloat16"),
            num_parameters=size // 2,
            vocab_size=size,
            linears=((64, 64, 10),),
        )
        for size in (1 << 19, 1 << 22, 1 << 26)
    )
    times = [compose_forwards(profile, model, 1)[2][0, 0] for model in (small, middle, large)]
    warm = 10 * linear_ms(1, 64, 64)
    assert times[1] - times[0] == pytest.approx(1.5 * warm)
    assert times[2] - times[0] == pytest.approx(3 * warm)


def test_interruptions_are_charged_part_by_part():
    fingerprint = ModelFingerprint.from_config(llama(), "bfloat16")
    plain = microbenchmarks()
    busy = plain.with_slowdowns({"linear": 2.0})
    linear = sum(count * linear_ms(1, inputs, outputs) for inputs, outputs, count in fingerprint.linears)
    before, after = (compose_forwards(profile, fingerprint, 1)[2][0, 0] for profile in (plain, busy))
    assert after - before == pytest.approx(linear)


def test_noise_between_widths_does_not_make_wider_rows_cheaper():
    profile = microbenchmarks()
    sizes = {"intermediate_size": 256, "q_heads": 2, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16"}
    noisy = profile.with_op(
        "decoder_layer_rest", [point(3 * layer_ms(rows), rows=rows, hidden_size=64, **sizes) for rows in ROWS]
    )
    narrow, wide = (
        dataclasses.replace(ModelFingerprint.from_config(llama(), "bfloat16"), hidden_size=size, intermediate_size=256,
                            num_heads=2, num_kv_heads=2, num_parameters=1, linears=((64, 64, 1),))
        for size in (64, 256)
    )  # fmt: skip
    times = [compose_forwards(noisy, model, 1)[2][0, 0] for model in (narrow, wide)]
    assert times[0] == pytest.approx(times[1])


def test_the_parts_of_a_layer_leave_out_the_head():
    fingerprint = ModelFingerprint.from_config(llama(layers=2), "bfloat16")
    parts = layer_parts_ms(microbenchmarks(), fingerprint, 1024, [1, 64])
    for rows, part in zip((1, 64), parts, strict=True):
        linear = 4 * linear_ms(rows, 256, 256) + 2 * linear_ms(rows, 256, 512) + linear_ms(rows, 512, 256)
        assert part == pytest.approx(linear + attention_ms(rows, 1024, 4, 64) + layer_ms(rows))


# ---- what the planner does with it ----


def test_a_plan_from_configurations_alone(tmp_path):
    llama(layers=8).save_pretrained(tmp_path)
    profile = microbenchmarks().with_overhead(0.01, 0.001)
    plan = plan_tree(
        ACCEPTANCE, profile, target=tmp_path, draft=llama(64, 1, 2, 128), dtype="bfloat16", context_len=512
    )
    fingerprint = ModelFingerprint.from_config(tmp_path, "bfloat16")
    assert plan.target == fingerprint.key
    assert plan.no_speculation.stages["target"] == pytest.approx(formula(fingerprint, 1, 1, 512))
    assert any("forwards of the target are composed" in note for note in plan.notes)
    assert any("forwards of the draft are composed" in note for note in plan.notes)
    assert type(plan).from_json(plan.to_json()) == plan


def test_a_measured_forward_replaces_the_composed_one():
    profile = microbenchmarks()
    fingerprint = ModelFingerprint.from_config(llama(), "bfloat16")
    measured = profile.with_forwards(fingerprint, forward_table(lambda nodes, context: 7.0, ROWS))
    composed, direct = CostModel(profile, target=fingerprint), CostModel(measured, target=llama(), dtype="bfloat16")
    assert (composed.composed, direct.composed) == (["target"], [])
    assert float(direct.target_ms(16, 128)) == 7.0
    forced = CostModel(measured, target=fingerprint, draft=fingerprint, compose=True)
    assert forced.composed == ["target", "draft"]
    assert float(forced.target_ms(16, 128)) == float(composed.target_ms(16, 128))


def test_a_batch_that_was_not_measured_is_composed():
    fingerprint = ModelFingerprint.from_config(llama(), "bfloat16")
    profile = microbenchmarks().with_forwards(fingerprint, forward_table(lambda nodes, context: 7.0, ROWS))
    model = CostModel(profile, target=fingerprint, draft=fingerprint, batch_size=4)
    assert model.composed == ["target", "draft"]
    assert float(model.target_ms(16, 128)) == pytest.approx(formula(fingerprint, 64, 16, 128, 4))


# ---- offloaded targets ----


def streaming(profile: HardwareProfile, gigabytes: float = 25.0) -> HardwareProfile:
    return dataclasses.replace(profile, bandwidth={"host_to_device": gigabytes})


def test_an_offloaded_forward_takes_the_longer_of_computing_and_copying():
    resident = ModelFingerprint.from_config(llama(), "bfloat16")
    offloaded = dataclasses.replace(resident, streamed_bytes=500_000_000)
    profile = streaming(microbenchmarks())
    assert transfer_ms(profile, resident) == 0
    assert transfer_ms(profile, offloaded) == pytest.approx(20.0)
    alone, beside = (CostModel(profile, target=model, draft=DRAFT) for model in (resident, offloaded))
    sizes = np.arange(1, 1025)
    times = alone.target_ms(sizes, 512)
    assert times[0] < 20 < times[-1]
    assert beside.target_ms(sizes, 512).tolist() == np.maximum(times, 20.0).tolist()
    shape = StepShape.of(TokenTree.chain(4))
    assert beside.at_context(512).stages(shape)["target"] == 20.0


def test_a_seventy_billion_target_behind_a_slow_link_wants_several_hundred_nodes():
    """A GPU of 500 TFLOP/s and 2 TB/s with 24 GB; 25 GB/s to the host."""
    target = ModelFingerprint.from_config(
        LlamaConfig(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                    num_attention_heads=64, num_key_value_heads=8),
        "bfloat16",
    )  # fmt: skip
    draft = ModelFingerprint.from_config(
        LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                    num_attention_heads=32),
        "bfloat16",
    )  # fmt: skip

    def gpu_ms(rows: float, inputs: int, outputs: int) -> float:
        return 0.002 + max(2 * inputs * outputs / 2e9, 2 * rows * inputs * outputs / 5e11)

    profile = microbenchmarks(widths=(1024, 4096, 8192, 28672))
    sizes = ("rows", "in_features", "out_features")
    points = [
        dataclasses.replace(old, p50_ms=gpu_ms(*(int(old.parameters[name]) for name in sizes)))
        for old in profile.ops["linear"]
    ]  # fmt: skip
    # attention and the rest: little beside the weights
    small = {
        name: tuple(dataclasses.replace(old, p50_ms=old.p50_ms * factor) for old in profile.ops[name])
        for name, factor in (("tree_attention", 1e-3), ("decoder_layer_rest", 1e-2), ("model_rest", 1e-1))
    }
    profile = streaming(dataclasses.replace(profile, ops={**profile.ops, **small, "linear": tuple(points)}))
    resident = plan_tree(ACCEPTANCE, profile, target=target, draft=draft, context_len=256)
    streamed_bytes = target.weight_bytes - 8 * 10**9
    offloaded = plan_tree(
        ACCEPTANCE, profile, target=dataclasses.replace(target, streamed_bytes=streamed_bytes), draft=draft,
        context_len=256,
    )  # fmt: skip
    assert offloaded.stages["target"] == pytest.approx(streamed_bytes / 25e6)
    assert 300 <= offloaded.tree.num_nodes <= 1024
    assert resident.tree.num_nodes < 200
    assert offloaded.speedup > 2 * resident.speedup
    assert any("streams its weights" in note for note in offloaded.notes)


def test_without_the_links_bandwidth_an_offloaded_forward_is_refused():
    offloaded = dataclasses.replace(ModelFingerprint.from_config(llama(), "bfloat16"), streamed_bytes=1)
    with pytest.raises(ProfileError, match="must hold the bandwidth host_to_device"):
        CostModel(microbenchmarks(), target=offloaded)


def test_a_measured_offloaded_forward_has_its_copies_in_it():
    offloaded = dataclasses.replace(ModelFingerprint.from_config(llama(), "bfloat16"), streamed_bytes=500_000_000)
    profile = streaming(microbenchmarks()).with_forwards(offloaded, forward_table(lambda nodes, context: 3.0, ROWS))
    assert float(CostModel(profile, target=offloaded).target_ms(4, 128)) == 3.0


# ---- refusals ----


def test_without_microbenchmarks_only_measured_models_are_planned():
    with pytest.raises(ProfileError, match="must be a measured model"):
        CostModel(synthetic_profile(), target=llama(), dtype="bfloat16")


def test_another_dtype_is_another_set_of_microbenchmarks():
    with pytest.raises(ProfileError, match=r"holds no float32 times of linear.*profile --microbenchmarks"):
        CostModel(microbenchmarks(), target=llama(), dtype="float32")


def test_shapes_that_are_not_known_are_refused():
    profile = microbenchmarks(dtype="float32")
    with pytest.raises(ProfileError, match="its linear layers are not known"):
        CostModel(profile, target=dataclasses.replace(TARGET, num_layers=3))


def test_experts_are_refused():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    reason = can_compose(microbenchmarks(), ModelFingerprint.from_config(config, "bfloat16"))
    assert reason is not None
    assert "experts" in reason


def test_points_without_their_sizes_are_refused():
    profile = microbenchmarks()
    broken = dataclasses.replace(
        profile, ops={**profile.ops, "linear": (OpPoint({"dtype": "bfloat16", "rows": 1}, 1, 1, 1),)}
    )
    with pytest.raises(ProfileError, match="must have the parameter in_features"):
        CostModel(broken, target=llama(), dtype="bfloat16")


@pytest.mark.parametrize("value", [None, "", "x", 0, -3, 0.5, 1e-320, 10**30, True], ids=repr)
@pytest.mark.filterwarnings("error")
def test_sizes_that_are_none_are_refused(value):
    """A parameter of a microbenchmark that no measurement writes: told, not crashed, wherever it is read."""
    profile = microbenchmarks(widths=(64, 256))
    target, draft = (ModelFingerprint.from_config(llama(layers=layers), "bfloat16") for layers in (3, 1))
    sizes = {(op, name) for op in COMPOSED_OPS for name in profile.ops[op][0].parameters if name != "dtype"}
    for op, name in sorted(sizes):
        first, *others = profile.ops[op]
        parameters = {**first.parameters, name: value}
        if value is None:
            del parameters[name]
        broken = {**profile.ops, op: (dataclasses.replace(first, parameters=parameters), *others)}
        with pytest.raises(ProfileError, match=f"must have the parameter {name}, a positive integer, got"):
            plan_tree(ACCEPTANCE, dataclasses.replace(profile, ops=broken), target=target, draft=draft, max_budget=4)
