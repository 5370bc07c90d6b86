"""Recorded steps: the worth of every smaller tree in them, against the verification rules' own numbers."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch
from support.closed_form import closed_form_decisions
from support.synthetic_profile import synthetic_profile
from support.tiny_models import noisy_copy, tiny_llama
from support.toy_models import plain_probs

from sequoia_kernels import TokenTree, TreePlan, adapt, generate, optimal_tree, plan_tree
from sequoia_kernels.decoding import RECORD_TREE, record_steps, recording
from sequoia_kernels.decoding.loop import decode
from sequoia_kernels.decoding.recording import _Recorder
from sequoia_kernels.drafts import TokenBuffers
from sequoia_kernels.ops import VerifiedPath
from sequoia_kernels.ops.verify_tree.op import VerifyTreeInputs
from sequoia_kernels.ops.verify_tree.traversal import traversal_chances
from sequoia_kernels.planner import CostModel, ModelFingerprint, StepRecords, estimate_acceptance
from sequoia_kernels.planner.evidence import visits_by_rank
from sequoia_kernels.planner.step_records import EXCESS_RATIOS, NEAR, NodeRecords

RECORDED = TokenTree([-1, 0, 0, 0, 1, 1, 1, 2, 4, 4, 5, 8, 8, 11])
WITHIN = [
    TokenTree.chain(2),
    TokenTree.chain(6),
    TokenTree([-1, 0, 0, 0]),
    TokenTree([-1, 0, 0, 1, 1, 2, 3]),
    TokenTree([-1, 0, 0, 0, 1, 1, 4, 5]),
    RECORDED,
]
STEPS, VOCAB = 40, 300


def _steps(spread, temperature, seed=0):
    """Logits of a peaked target and a related draft, and children drawn from the draft."""
    generator = torch.Generator().manual_seed(seed)
    shape = (STEPS, RECORDED.num_nodes, VOCAB)
    target = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    draft = target + torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    tokens = torch.full(shape[:2], -1)
    for node in range(RECORDED.num_nodes):
        children = RECORDED.children(node)
        if children and temperature:
            weights = (draft[:, node] / temperature).softmax(dim=1)
            tokens[:, children] = torch.multinomial(weights, len(children), generator=generator)
        elif children:
            tokens[:, children] = draft[:, node].topk(len(children), dim=1).indices
        else:
            draft[:, node] = torch.nan
    return tokens, target, draft


def _records(tokens, target, draft, temperature, top_k=None, top_p=None):
    recorder = _Recorder(RECORDED)
    warps = [[temperature], None if top_k is None else [top_k], None if top_p is None else [top_p]]
    for index in range(STEPS):
        recorder.begin(index // 4, *warps, torch.device("cpu"))
        one = slice(index, index + 1)
        recorder(TokenBuffers(tokens[one], draft[one]), target[one])
    return recorder.records(estimate_acceptance(([9, 3], [6, 1]), temperature=temperature))


def _subtree(tree):
    """The recorded nodes that stand for a tree's."""
    places = [0]
    for node, parent in enumerate(tree.parents[1:], start=1):
        places.append(RECORDED.first_child[places[parent]] + node - tree.first_child[parent])
    return places


def _walked(tree, tokens, target, draft, warp):
    """Expected tokens by the rule from the root, step by step from its closed form. [S]."""
    totals = []
    for step in range(len(tokens)):
        reached = [1.0] + [0.0] * (tree.num_nodes - 1)
        for node in range(tree.num_nodes):
            children = tree.children(node)
            probs = plain_probs(target[step, node, None], *warp)[0]
            drafted = tokens[step, children].tolist()
            if warp[0] == 0:
                chances = [float(probs[token]) for token in drafted]
            else:
                chances, _ = closed_form_decisions(probs, draft[step, node], drafted, warp[0])
            left = reached[node]
            for child, chance in zip(children, chances):
                reached[child] = left * chance
                left *= 1 - chance
        totals.append(sum(reached))
    return torch.tensor(totals, dtype=torch.float64)


def _traversed(tree, tokens, target, draft, warp):
    """Expected tokens by the rule from the leaves, from the reference's chances. [S]."""
    shape, rows = tree.tensors(), len(tokens)
    warps = [
        None if value is None else torch.full((rows,), value, dtype=dtype)
        for value, dtype in zip(warp, (torch.float32, torch.int32, torch.float32))
    ]
    zeros = torch.zeros(rows, dtype=torch.int64)
    chances = traversal_chances(
        VerifyTreeInputs(
            tokens, target, draft, shape.first_child, shape.num_children, shape.num_levels, shape.max_branching,
            warps[0], zeros, zeros, *warps[1:], "traversal",
        )
    )  # fmt: skip
    order = chances.turn.argsort(dim=1)
    chance = chances.chance.gather(1, order)
    failed = torch.cat((torch.ones(rows, 1, dtype=torch.float64), (1 - chance).cumprod(dim=1)[:, :-1]), dim=1)
    depths = torch.tensor(tree.depths)[order] + 1
    return (chance * failed * depths).sum(dim=1)


def _assert_near(values, expected):
    """Equal but for the cubics between ratios: single tokens make corners there, which a mean levels out."""
    torch.testing.assert_close(values, expected, rtol=0, atol=0.02)
    assert abs(float((values - expected).mean())) < 1e-3


WARPS = [(0.6, None, None), (1.0, None, None), (1.0, 20, None), (0.8, None, 0.8), (0.0, None, None)]


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_every_tree_within_has_its_expected_tokens(spread, warp):
    steps = _steps(spread, warp[0])
    records = _records(*steps, *warp)
    for tree in WITHIN:
        places = _subtree(tree)
        own = [part[:, places] for part in steps]
        values = torch.from_numpy(records.values(tree, "sequoia"))
        expected = _walked(tree, *own, warp)
        _assert_near(values, expected)
        traversed = torch.from_numpy(records.values(tree, "traversal"))
        expected = _traversed(tree, *own, warp) if warp[0] else expected
        _assert_near(traversed, expected)
        assert float((traversed - values).mean()) >= -1e-6  # never less in the mean
    assert records.tokens_per_step(RECORDED, "sequoia") == pytest.approx(sum(records.node_worths))


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.3])
def test_what_the_draft_says_is_recorded(temperature):
    tokens, target, draft = _steps(0.7, temperature, seed=2)
    tokens[3, 4] = -1  # no draw
    nodes = _records(tokens, target, draft, temperature).nodes
    probs = (draft / (temperature or 1.0)).softmax(dim=2)
    internal = [node for node in range(RECORDED.num_nodes) if RECORDED.children(node)]
    torch.testing.assert_close(torch.from_numpy(nodes.peak), probs[:, internal].amax(dim=2).float())
    for node in range(1, RECORDED.num_nodes):
        own = probs[:, RECORDED.parents[node]].gather(1, tokens[:, node, None].clamp(min=0))[:, 0]
        own = torch.where(tokens[:, node] < 0, 0, own)
        torch.testing.assert_close(torch.from_numpy(nodes.likelihood[:, node]), own.float())


@pytest.fixture(scope="module")
def recorded():
    target = tiny_llama(3, vocab_size=24, sharpness=6.0)
    draft = noisy_copy(target, 0.3)
    prompts = [torch.randint(0, 24, (1, 8), generator=torch.Generator().manual_seed(n)) for n in range(12)]
    return target, draft, prompts, record_steps(target, draft, prompts, temperature=1.0, max_new_tokens=48, seed=3)


def test_recording_leaves_the_output_as_it_is(recorded):
    target, draft, prompts, _ = recorded
    records = record_steps(target, draft, prompts, temperature=1.0, max_new_tokens=48, seed=3, in_turns=False)
    runs = [
        generate(target, draft, ids, tree=RECORD_TREE, temperature=1.0, max_new_tokens=48, seed=3 + n, eos_token_id=(),
                 rule="sequoia").stats
        for n, ids in enumerate(prompts)
    ]  # fmt: skip
    assert len(records) == sum(run.num_steps for run in runs)
    assert records.acceptance == estimate_acceptance(runs, temperature=1.0)
    assert records.requests.tolist() == [n for n, run in enumerate(runs) for _ in range(run.num_steps)]
    assert records.given.sum() == sum(n * count for run in runs for n, count in enumerate(run.accepted_histogram))


def test_steps_that_are_cut_emit_the_same_greedy_text(recorded, monkeypatch):
    target, draft, prompts, _ = recorded
    texts = []

    def listened(*arguments):
        decoded = decode(*arguments)
        texts.append([request.new_tokens for request in decoded.requests])
        return decoded

    monkeypatch.setattr(recording, "decode", listened)
    records = record_steps(target, draft, prompts, max_new_tokens=80)
    assert texts == [generate(target, draft, ids, max_new_tokens=80, eos_token_id=()).new_tokens for ids in prompts]
    # In turns: some steps of every request give no more than a chain of four, whatever others give.
    for request in range(len(prompts)):
        given = records.given[records.requests == request]
        is_cut = ((given.cumsum() - given) // 32 + request) % 2 == 1
        assert set(is_cut) == {False, True} and given[is_cut].max() <= 4
        assert 80 <= 1 + given.sum() < 80 + RECORD_TREE.num_levels
    assert records.given.max() > 4


@pytest.mark.parametrize(
    ("nodes", "end", "next_token"),
    [
        ([0, 1, 4, 8, 11, 13], 4, 1011),  # as far as the chain of four goes
        ([0, 1, 5, 10], 2, 1005),  # off it by a second child
        ([0, 2, 7], 1, 1002),  # at once
        ([0, 1, 4], 3, 7),  # it ends before
    ],
)
def test_a_path_is_cut_where_it_leaves_the_short_chain(nodes, end, next_token):
    recorder = _Recorder(RECORDED, TokenTree.chain(4))
    tokens = 1000 + torch.arange(RECORDED.num_nodes)[None]
    buffers = types.SimpleNamespace(tokens=tokens)
    levels = RECORDED.num_levels
    path = VerifiedPath(
        torch.tensor([nodes + [-1] * (levels - len(nodes))], dtype=torch.int32),
        torch.tensor([len(nodes)], dtype=torch.int32), torch.tensor([7]),
    )  # fmt: skip
    counts = visits_by_rank(RECORDED, nodes, len(nodes))
    for request, shown in ((0, path), (1, None)):  # of every other request the first steps are whole
        recorder.begin(request, [1.0], None, None, torch.device("cpu"))
        cut = recorder.shorten(buffers, path)
        if shown is not None:
            assert cut is shown
        assert tuple(recorder.visits[request].values()) == counts  # of the whole path either way
    assert recorder.given == [len(nodes), end]
    assert cut.nodes[0, :end].tolist() == nodes[:end] and (cut.nodes[0, end:] == -1).all()
    assert (int(cut.num_accepted), int(cut.next_token)) == (end, next_token)
    assert path.nodes[0].tolist()[: len(nodes)] == nodes  # unmutated


def _texts_in_turns(correct, tree, short=None):
    """Greedy records of texts in which the draft is right at some places, as chains would decode them."""
    steps = []
    for request, text in enumerate(correct):
        position = 0
        while position + tree.num_nodes < len(text):
            is_cut = short is not None and (position // 32 + request) % 2 == 1
            guesses = text[position : position + tree.num_nodes - 1]
            given = 1 + int(guesses[: (short if is_cut else tree).num_nodes - 1].cumprod().sum())
            steps.append((request, given, guesses))
            position += given
    requests, given, guesses = (np.array(part) for part in zip(*steps))
    target = np.concatenate((np.zeros((len(steps), 1)), guesses), axis=1).astype(np.float32)
    excess = np.zeros((len(steps), tree.num_nodes - 1, len(EXCESS_RATIOS)), dtype=np.float32)
    peak = np.zeros((len(steps), tree.num_nodes - 1), dtype=np.float32)
    nodes = NodeRecords(target, target, excess, excess, target, peak)
    return StepRecords(tree, nodes, requests, estimate_acceptance(([9], [6]), temperature=0.0), given)


def test_trees_are_valued_in_the_steps_that_they_would_make():
    """Easy and hard passages by turns: a short chain makes many steps in easy ones, a long chain few."""
    generator = np.random.Generator(np.random.PCG64(0))
    correct = []
    for _ in range(40):
        lengths, chances = generator.integers(20, 80, size=200), generator.choice([0.5, 0.97], size=200)
        correct.append(generator.random(int(lengths.sum())) < np.repeat(chances, lengths))
    tree, short = TokenTree.chain(16), TokenTree.chain(4)
    records = _texts_in_turns(correct, tree, short)
    for length in (2, 3, 4, 6, 8, 12, 16):
        chain = TokenTree.chain(length)
        measured = _texts_in_turns(correct, chain).values(chain).mean()  # as it decodes itself
        foretold = records.tokens_per_step(chain)
        assert foretold == pytest.approx(measured, rel=0.035)
        assert records.sample(len(records) // 8).tokens_per_step(chain) == pytest.approx(measured, rel=0.1)
        lower, upper = records.tokens_per_step_interval(chain)
        assert lower < foretold < upper
    assert records.values(tree).mean() > 1.2 * measured  # of the last: where all steps count alike


def test_a_step_counts_as_the_steps_of_the_tree_around_it():
    correct = np.random.Generator(np.random.PCG64(3)).random((3, 90)) < 0.8
    records = _texts_in_turns([*correct, correct[0][:9]], TokenTree.chain(8), TokenTree.chain(3))
    requests = records.requests.tolist()
    assert requests.count(3) == 1
    values = records.values(TokenTree.chain(5))
    weights = []
    for place, request in enumerate(requests):
        near = range(max(place - NEAR, 0), min(place + NEAR + 1, len(records)))
        others = [other for other in near if other != place and requests[other] == request]
        weights.append(records.given[others].sum() / values[others].sum() if others else 1.0)
    expected = sum(weight * value for weight, value in zip(weights, values)) / sum(weights)
    assert records.mean_of(values) == pytest.approx(expected, rel=1e-12)
    tokens, steps = records.by_request(values)
    assert len(tokens) == 4 and tokens.sum() / steps.sum() == pytest.approx(expected, rel=1e-12)
    first = [place for place, request in enumerate(requests) if request == 0]
    assert steps[0] == pytest.approx(sum(weights[place] for place in first))
    assert tokens[0] == pytest.approx(sum(weights[place] * values[place] for place in first))
    uncounted = StepRecords(records.tree, records.nodes, records.requests, records.acceptance)
    assert uncounted.mean_of(values) == pytest.approx(values.mean())


def test_a_part_keeps_the_order_of_the_text(recorded):
    records = recorded[3]
    tree, every_other = TokenTree.chain(4), np.arange(0, len(records), 2)
    part = records.part(every_other)
    assert np.array_equal(part.values(tree), records.values(tree)[every_other])
    assert np.array_equal(part.given, records.given[every_other]) and len(records.part(every_other[:0])) == 0
    assert len(records.sample(1)) >= 1 and records.sample(len(records)) is records


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([3, 2, 5], "be in ascending order, each once, got 2 behind 3"),
        ([0, 4, 4], "be in ascending order, each once, got 4 behind 4"),
        ([0, -1], r"be in 0\.\.\d+, got -1"),
        ([0, 1 << 40], r"be in 0\.\.\d+, got 1099511627776"),
        ([[0, 1]], r"have shape \[number of steps\], got \[1, 2\]"),
    ],
)
def test_parts_out_of_order_are_refused(recorded, steps, message):
    with pytest.raises(ValueError, match=f"^StepRecords.part: steps must {message}"):
        recorded[3].part(np.array(steps))


def test_parts_and_samples_of_what_is_no_number_are_refused(recorded):
    records = recorded[3]
    with pytest.raises(ValueError, match=r"^StepRecords.sample: num_steps must be at least 1, got 0"):
        records.sample(0)
    with pytest.raises(TypeError, match=r"^StepRecords.sample: num_steps must be an integer, got float"):
        records.sample(2.0)
    with pytest.raises(TypeError, match=r"^StepRecords.part: steps must be an array of integers, got bool"):
        records.part(records.given > 1)


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_what_is_foretold_is_measured(recorded, rule):
    """On other prompts, within what the intervals say of both."""
    target, draft, _, records = recorded
    tree = TokenTree([-1, 0, 0, 1, 1, 3, 5])
    lower, upper = records.tokens_per_step_interval(tree, rule)
    assert lower < records.tokens_per_step(tree, rule) < upper
    prompts = torch.randint(0, 24, (64, 8), generator=torch.Generator().manual_seed(99))
    stats = generate(
        target, draft, prompts, tree=tree, temperature=1.0, max_new_tokens=64, eos_token_id=(), rule=rule
    ).stats
    assert abs(stats.tokens_per_step - records.tokens_per_step(tree, rule)) < 1.5 * (upper - lower)


def test_trees_that_were_not_recorded_are_refused(recorded):
    records = recorded[3]
    tree = TokenTree.kary(9, 2)
    assert not records.holds(tree) and records.holds(RECORD_TREE)
    with pytest.raises(ValueError, match=r"^StepRecords: tree must lie within the recorded tree, got one of 10 nodes"):
        records.values(tree)
    with pytest.raises(ValueError, match=r"^StepRecords.values: rule must be one of sequoia, traversal, got 'other'"):
        records.values(TokenTree.chain(3), "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must be at least one"),
        ({"tree": TokenTree.single()}, "tree must have 2 to 1024 nodes, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(recorded, changes, message):
    target, draft, prompts, _ = recorded
    with pytest.raises(ValueError, match=f"^record_steps: {message}"):
        record_steps(**{"target": target, "draft": draft, "prompts": prompts} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": torch.ones(1, 3).long()}, "prompts must be a sequence of tensors, got Tensor"),
        ({"tree": "auto"}, "tree must be a TokenTree, got str"),
    ],
)
def test_arguments_of_wrong_types_are_refused(recorded, changes, message):
    target, draft, prompts, _ = recorded
    with pytest.raises(TypeError, match=f"^record_steps: {message}"):
        record_steps(**{"target": target, "draft": draft, "prompts": prompts} | changes)


def test_records_are_kept_in_a_file(recorded, tmp_path):
    records = recorded[3]
    path = tmp_path / "records.npz"
    records.save(path)
    read = StepRecords.load(path)
    assert read.tree == records.tree and read.acceptance == records.acceptance
    parts = [(*entry.nodes, entry.requests, entry.given) for entry in (read, records)]
    assert all(np.array_equal(*pair) for pair in zip(*parts))
    tree = TokenTree.chain(4)
    assert read.tokens_per_step(tree, "traversal") == records.tokens_per_step(tree, "traversal")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, "the file must hold recorded steps, got one that does not: .*target"),
        ({"draft": lambda array: array.astype(np.float64)}, r"draft must be \[.*\] float32, got \[.*\] float64"),
        ({"excess": lambda array: array[:, 1:]}, r"excess must be \[.*\] float32, got"),
        ({"slope": lambda array: array - 2}, "slope must hold probabilities, got entries that are none"),
        ({"target": lambda array: array * np.float32("nan")}, "target must hold probabilities"),
        ({"requests": lambda array: array[:0]}, "requests must be"),
        ({"requests": lambda array: array.astype(np.int32)}, "requests must be .* int32"),
        ({"given": lambda array: array[:1]}, r"given must be \[.*\] int64 or \[0\], at least 1 each, got \[1\] int64"),
        ({"given": lambda array: array.astype(np.int8)}, r"given must be \[.*\] int64 .*, got .* int8"),
        ({"given": lambda array: array * 0}, "given must be .* at least 1 each"),
        ({"given": lambda array: array + (1 << 62)}, "given must be at most the tree's 16 levels each, got 46"),
        ({"header": lambda array: array[:-9]}, "the document must be JSON"),
        ({"header": lambda array: np.array([255], dtype=np.uint8)}, "the header must be JSON text"),
        ({"header": lambda array: _header(array, format="other")}, 'must have "format"'),
        ({"header": lambda array: _header(array, parents=[-1, 0, 9])}, "parents must be a tree"),
        ({"header": lambda array: _header(array, excess_ratios=[1, 2])}, "excess_ratios must be those of this"),
        ({"header": lambda array: _header(array, acceptance={})}, "acceptance"),
        ({"nodes": lambda array: np.array([object()], dtype=object)}, "Object arrays"),
    ],
)
def test_files_that_are_no_records_are_refused(recorded, tmp_path, changes, message):
    path = tmp_path / "records.npz"
    recorded[3].save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    for name, change in changes.items():
        if name == "nodes":
            arrays["header"] = change(None)
        elif change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name])
    np.savez(path, **arrays, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        StepRecords.load(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not an archive", b"PK\x05\x06" + bytes(18)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "records.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^StepRecords.load: .*: the file must hold recorded steps"):
        StepRecords.load(path)
    with pytest.raises(FileNotFoundError):
        StepRecords.load(tmp_path / "none.npz")


def _header(array, **changes):
    fields = json.loads(array.tobytes()) | changes
    return np.frombuffer(json.dumps(fields).encode(), dtype=np.uint8)


# plan_tree on records


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile()


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_a_plan_from_records_is_the_best_of_a_grid(recorded, profile, rule):
    """Of all chains and of optimal trees none is predicted to be faster by more than the tolerance."""
    records = recorded[3]
    plan = plan_tree(records, profile, rule=rule)
    assert plan.rule == rule and records.holds(plan.tree)
    assert plan.tokens_per_step == pytest.approx(records.tokens_per_step(plan.tree, rule))
    assert plan.tokens_per_step_interval == records.tokens_per_step_interval(plan.tree, rule)
    cost = CostModel(profile, temperature=1.0)
    single = cost.step_ms(TokenTree.single(), plan.context_len)
    grid = [TokenTree.chain(length) for length in range(2, 12)]
    grid += [optimal_tree(records.acceptance.vector, nodes) for nodes in (4, 8, 16, 32)]
    grid += [candidate.tree for candidate in plan_tree(records.acceptance, profile).candidates]
    for tree in grid:
        if records.holds(tree):
            speedup = records.tokens_per_step(tree, rule) * single / cost.step_ms(tree, plan.context_len)
            assert speedup <= plan.speedup * 1.011, (tree.parents, speedup, plan.speedup)
    assert plan.speedup == max(candidate.speedup for candidate in plan.candidates) or plan.tolerance
    assert {candidate.kind for candidate in plan.candidates} >= {"no speculation", "chain"}
    assert TreePlan.from_json(plan.to_json()) == plan


def test_a_plan_from_records_keeps_its_bounds(recorded, profile):
    plan = plan_tree(recorded[3], profile, rule="traversal", max_budget=6, max_levels=3, tolerance=0.0)
    assert plan.tree.num_nodes <= 6 and plan.tree.num_levels <= 3
    assert all(candidate.tree.num_nodes <= 6 and candidate.tree.num_levels <= 3 for candidate in plan.candidates)
    assert plan_tree(recorded[3], profile, max_budget=1).kind == "no speculation"


def test_generate_takes_records(recorded):
    target, draft, prompts, records = recorded
    profile = synthetic_profile(target=ModelFingerprint.of(adapt(target)), draft=ModelFingerprint.of(adapt(draft)))
    settings = {"max_new_tokens": 8, "temperature": 1.0, "profile": profile, "acceptance": records}
    for tree in ("auto", "adaptive"):
        output = generate(target, draft, prompts[0], tree=tree, rule="traversal", **settings)
        assert len(output.new_tokens[0]) == 8
