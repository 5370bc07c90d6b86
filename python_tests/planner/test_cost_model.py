"""The cost model: monotone interpolation, stages of a step, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synthetic_profile import DEVICE, DRAFT, TARGET, forward_table, synthetic_profile

from sequoia_kernels.errors import ProfileError
from sequoia_kernels.planner import plan_tree
from sequoia_kernels.planner.cost_model import STAGES, CostModel, MonotoneGrid, StepShape, brackets
from sequoia_kernels.planner.profile import HardwareProfile, OpPoint
from sequoia_kernels.tree import TokenTree

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 6])  # widths 1, 3, 3, 3; internal 1, 2, 2, 0


# ---- interpolation ----


def test_grid_gives_its_knots_and_straight_lines_between():
    grid = MonotoneGrid([0, 100], [1, 4], [[1.0, 2.5], [3.0, 6.0]])
    assert grid.at(0, [1, 2, 3, 4]).tolist() == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert float(grid.at(100, 4)) == 6.0
    assert float(grid.at(50, 2.5)) == pytest.approx((1.75 + 4.5) / 2)


def test_noise_is_pooled_to_the_mean():
    grid = MonotoneGrid([0], [1, 2, 3, 4, 5], [[1.0, 3.0, 2.0, 2.5, 5.0]])
    assert grid.values.tolist() == [[1.0, 2.5, 2.5, 2.5, 5.0]]


def test_below_the_first_knot_times_stay():
    grid = MonotoneGrid([100, 200], [4, 8], [[2.0, 3.0], [4.0, 5.0]])
    assert float(grid.at(0, 1)) == 2.0


def test_above_the_last_knot_times_go_on_with_the_steeper_slope():
    bent_up = MonotoneGrid([0], [1, 2, 4], [[1.0, 1.0, 3.0]])  # last segment 1, whole axis 2/3
    assert float(bent_up.at(0, 6)) == pytest.approx(5.0)
    bent_down = MonotoneGrid([0], [1, 2, 4], [[1.0, 4.0, 4.0]])  # last segment 0, whole axis 1
    assert float(bent_down.at(0, 6)) == pytest.approx(6.0)


def test_an_axis_of_one_knot_is_constant():
    grid = MonotoneGrid([128], [4], [[2.0]])
    assert grid.at(4096, [1, 4, 64]).tolist() == [2.0, 2.0, 2.0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda rows: st.lists(st.lists(st.floats(0.01, 100), min_size=5, max_size=5), min_size=rows, max_size=rows)
    )
)
def test_grid_is_monotone_in_both_directions_everywhere(values):
    contexts = [128 * (index + 1) for index in range(len(values))]
    grid = MonotoneGrid(contexts, [1, 2, 5, 9, 16], values)
    sizes = np.linspace(0, 24, 49)
    surface = np.array([grid.at(context, sizes) for context in np.linspace(0, 800, 17)])
    assert np.all(np.diff(surface, axis=0) >= -1e-9)
    assert np.all(np.diff(surface, axis=1) >= -1e-9)
    assert grid.values.mean() == pytest.approx(np.mean(values))  # pooling keeps the mean


def test_monotone_measurements_are_left_alone():
    values = [[1.0, 2.0, 4.0], [1.5, 2.0, 5.0]]
    assert MonotoneGrid([0, 1], [1, 2, 3], values).values.tolist() == values


# ---- shapes ----


def test_shape_of_a_tree():
    assert StepShape.of(TREE) == StepShape(10, (1, 2, 2), (3, 2, 2))
    assert StepShape.of(TREE).num_levels == TREE.num_levels
    assert StepShape.of(TokenTree.single()) == StepShape(1, (), ())
    assert StepShape.of(TokenTree.chain(4)) == StepShape(4, (1, 1, 1), (1, 1, 1))


# ---- stages ----


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile(
        lambda nodes, context: 4 + 0.1 * nodes + 0.001 * context,
        lambda nodes, context: 0.5 + 0.01 * nodes + 0.0001 * context,
    ).with_overhead(0.2, 0.03)


def test_a_step_is_the_sum_of_its_stages(profile):
    stages = CostModel(profile).stages(TREE, 256)
    assert tuple(stages) == STAGES
    # first 2 rows (last committed token and root), then the internal nodes of the two levels below
    assert stages["draft"] == pytest.approx(sum(0.5 + 0.01 * rows + 0.0256 for rows in (2, 2, 2)))
    assert stages["target"] == pytest.approx(4 + 1.0 + 0.256)
    assert stages["sample"] == pytest.approx(
        sum(0.02 + 0.001 * rows + 0.0005 * samples for rows, samples in ((1, 3), (2, 2), (2, 2)))
    )
    assert stages["verify"] == pytest.approx(0.05 + 0.001 * 10)
    assert stages["commit"] == pytest.approx(0.01 + 0.001 * 4)
    assert stages["host"] == pytest.approx(0.2 + 0.03 * 3)
    assert CostModel(profile).step_ms(TREE, 256) == pytest.approx(sum(stages.values()))


def test_no_speculation_is_target_verify_and_host(profile):
    stages = CostModel(profile).stages(TokenTree.single(), 128)
    assert stages == pytest.approx(
        {"draft": 0, "sample": 0, "target": 4.228, "verify": 0.051, "commit": 0, "host": 0.2}
    )


def test_a_chain_feeds_one_row_a_level(profile):
    stages = CostModel(profile).stages(TokenTree.chain(5), 128)
    assert stages["draft"] == pytest.approx(sum(0.5 + 0.01 * rows + 0.0128 for rows in (2, 1, 1, 1)))


def test_interruptions_are_charged_by_kind(profile):
    ratios = {TARGET.key: 1.5, DRAFT.key: 2.0, "sample_without_replacement": 3.0, "verify_tree": 4.0}
    plain = CostModel(profile).stages(TREE, 128)
    busy = CostModel(profile.with_slowdowns({**ratios, "compact_kv_cache_": 5.0})).stages(TREE, 128)
    assert {stage: busy[stage] / plain[stage] for stage in STAGES} == pytest.approx(
        {"draft": 2, "sample": 3, "target": 1.5, "verify": 4, "commit": 5, "host": 1}
    )


def test_host_overhead_can_be_given(profile):
    assert CostModel(profile, host_ms=1.5).stages(TREE, 128)["host"] == 1.5
    with pytest.raises(ValueError, match="host_ms must be a finite time >= 0, got -1"):
        CostModel(profile, host_ms=-1)


def test_times_at_one_context_are_the_models_own(profile):
    model = CostModel(profile)
    times = model.at_context(300)
    for tree in (TREE, TokenTree.chain(9), TokenTree.single(), TokenTree.kary(3, 4)):
        assert times.stages(StepShape.of(tree)) == pytest.approx(model.stages(tree, 300))


def test_greedy_decoding_takes_the_greedy_times():
    profile = synthetic_profile(greedy_factor=0.5)
    sampled, greedy = (CostModel(profile, temperature=temperature).stages(TREE, 128) for temperature in (0.7, 0))
    assert CostModel(profile).stages(TREE, 128) == sampled
    for stage in ("sample", "verify"):
        assert greedy[stage] == pytest.approx(0.5 * sampled[stage])


def test_verification_takes_what_its_rule_takes():
    """Where it was measured; greedily all rules are one."""
    profile = synthetic_profile()
    own = [
        OpPoint({**point.parameters, "rule": "traversal"}, 1.0, 1.0 + point.parameters["nodes"], 99.0)
        for point in profile.ops["verify_tree"]
        if point.parameters["temperature"] > 0
    ]
    measured = profile.with_op("verify_tree", own)
    nodes = TREE.num_nodes

    def verify_ms(profile, **settings):
        return CostModel(profile, **settings).stages(TREE, 128)["verify"]

    assert verify_ms(measured, temperature=1.0) == pytest.approx(0.05 + 0.001 * nodes)
    assert verify_ms(measured, temperature=1.0, rule="traversal") == pytest.approx(1.0 + nodes)
    assert verify_ms(measured, temperature=0.0, rule="traversal") == pytest.approx(0.05 + 0.001 * nodes)
    assert verify_ms(profile, temperature=1.0, rule="traversal") == pytest.approx(0.05 + 0.001 * nodes)


def test_batches_draw_and_verify_more_rows():
    profile = synthetic_profile(batch_size=4)
    stages = CostModel(profile, batch_size=4).stages(TREE, 128)
    assert stages["verify"] == pytest.approx(0.05 + 0.001 * 40)
    assert stages["sample"] == pytest.approx(
        sum(0.02 + 0.001 * 4 * rows + 0.0005 * samples for rows, samples in ((1, 3), (2, 2), (2, 2)))
    )


def test_a_batch_between_two_measured_ones_is_interpolated():
    def measured(batch_size, node_counts):
        return synthetic_profile(
            lambda nodes, context: 4.0 + 0.1 * batch_size * nodes + 0.001 * context,
            lambda rows, context: 0.5 + 0.01 * batch_size * rows,
            batch_size=batch_size,
            node_counts=node_counts,
        )

    profile = measured(2, (1, 2, 4, 8, 16, 32)).merged(measured(6, (1, 4, 16)))
    model = CostModel(profile, batch_size=4)
    assert model.interpolated == ["target", "draft"]
    assert model.max_nodes == 16  # as far as both go
    for nodes in (1, 3, 16):
        assert model.target_ms(nodes, 200) == pytest.approx(4.0 + 0.1 * 4 * nodes + 0.2)
        assert model.draft_ms(nodes, 200) == pytest.approx(0.5 + 0.01 * 4 * nodes)
    assert CostModel(profile, batch_size=2).interpolated == []
    notes = plan_tree([0.6, 0.1], profile, batch_size=4, context_len=200).notes
    assert "forwards of the target are interpolated between measured batch sizes" in notes


@pytest.mark.parametrize(
    ("sizes", "batch_size", "expected"),
    [
        ([1, 2, 4, 8], 3, (2, 4)),
        ([1, 4], 2, (1, 4)),
        ([1, 8], 2, None),  # too far apart
        ([2, 4], 1, None),
        ([2, 4], 5, None),
        ([], 1, None),
    ],
)
def test_batch_sizes_to_interpolate_between(sizes, batch_size, expected):
    assert brackets(sizes, batch_size) == expected


def test_op_times_of_another_vocabulary_are_scaled_up_only():
    half, twice = (dataclasses.replace(TARGET, vocab_size=size) for size in (256, 1024))
    table = forward_table(lambda nodes, context: 4.0, (1, 2, 4, 8, 16))
    base = synthetic_profile().with_forwards(half, table).with_forwards(twice, table)
    plain, small, large = (CostModel(base, target=model).stages(TREE, 128)["verify"] for model in (TARGET, half, twice))
    assert small == plain
    assert large == pytest.approx(2 * plain)


# ---- refusals ----


def test_trees_beyond_the_measured_nodes_are_refused(profile):
    with pytest.raises(ProfileError, match="at most the 64 nodes that were measured, got 65"):
        CostModel(profile).stages(TokenTree.chain(65), 128)


def test_without_a_draft_only_plain_decoding_has_a_cost():
    profile = dataclasses.replace(synthetic_profile(), draft_key=None)
    assert CostModel(profile).step_ms(TokenTree.single(), 128) > 0
    with pytest.raises(ProfileError, match=r"must have a draft model.*measure_profile"):
        CostModel(profile).step_ms(TREE, 128)


@pytest.mark.parametrize("op", ["sample_without_replacement", "verify_tree", "compact_kv_cache_"])
def test_an_op_that_was_not_measured_is_refused_with_the_fix(op):
    profile = synthetic_profile()
    profile = dataclasses.replace(profile, ops={name: points for name, points in profile.ops.items() if name != op})
    with pytest.raises(ProfileError, match=f"times of {op}, got none; measure it with measure_profile"):
        CostModel(profile)


def test_op_times_without_their_sizes_are_refused():
    profile = synthetic_profile()
    broken = dataclasses.replace(profile, ops={**profile.ops, "verify_tree": (OpPoint({"nodes": 3}, 1, 1, 1),)})
    with pytest.raises(ProfileError, match="times of verify_tree must have the parameters batch_size, nodes"):
        CostModel(broken)


def test_a_sampling_grid_with_holes_is_refused():
    profile = synthetic_profile()
    points = profile.ops["sample_without_replacement"][:-1]
    broken = dataclasses.replace(profile, ops={**profile.ops, "sample_without_replacement": points})
    with pytest.raises(ProfileError, match="got none at 64 rows and 16 samples"):
        CostModel(broken)


def test_a_missing_model_is_refused():
    with pytest.raises(ProfileError, match="must name its target"):
        CostModel(HardwareProfile(DEVICE))
    with pytest.raises(ProfileError, match="the draft must be a measured model"):
        CostModel(synthetic_profile(), draft=dataclasses.replace(DRAFT, num_layers=2))
    with pytest.raises(ProfileError, match="batch_size must be a measured one"):
        CostModel(synthetic_profile(), batch_size=3)


def test_forwards_of_more_rows_than_any_tree_has_nodes_take_no_memory():
    profile = synthetic_profile(lambda nodes, context: 1.0, node_counts=[1, 2**50], draft_counts=[1, 2**50])
    model = CostModel(profile)
    assert (model.max_nodes, model.max_draft_rows) == (65536, 65536)
    assert model.step_ms(TokenTree.chain(3), 128) > 1
