"""The robustness study: its rivals are as lossless as ours, its replays agree with enumeration, and it runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from support.bench_scripts import bench_script, replay, samplers
from support.chi_square import joint_probs, p_value, sequence_counts
from support.enumeration import emitted_distribution, ordered_draws
from support.speculative_steps import decode
from support.toy_models import chain_probs, plain_probs, toy_pair

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding.step import DecodingStep
from sequoia_kernels.demo import load_demo_pair
from sequoia_kernels.drafts import source as drafting
from sequoia_kernels.drafts import unlikely
from sequoia_kernels.ops import sample_without_replacement, verify_tree
from sequoia_kernels.ops.verify_tree import reference

robustness = bench_script("robustness")
page = robustness.robustness_page

OURS, WITH_REPLACEMENT, TOP_K = samplers.SAMPLERS
RIVALS = (WITH_REPLACEMENT, TOP_K)
KINDS = ["unrelated", "near", "same", "draft misses tokens", "target misses tokens", "disjoint", "one-hot draft"]
WARPS = [(0.0, None), (0.3, None), (0.6, 0.8), (1.0, None), (1.0, 0.5), (1.7, 0.9)]


def draws_with_replacement(scaled_logits, count):
    """Every sequence of independent draws, with its probability."""
    probs = torch.tensor(scaled_logits, dtype=torch.float64).softmax(0).tolist()
    support = [token for token, chance in enumerate(probs) if chance > 0]
    return [(drawn, math.prod(probs[token] for token in drawn)) for drawn in itertools.product(support, repeat=count)]


def draws_of_top_k(scaled_logits, count):
    order = sorted(range(len(scaled_logits)), key=lambda token: (-scaled_logits[token], token))
    kept = [token for token in order if scaled_logits[token] > -math.inf][:count]
    return [(tuple(kept) + (-1,) * (count - len(kept)), 1.0)]


DRAWS = {OURS: ordered_draws, WITH_REPLACEMENT: draws_with_replacement, TOP_K: draws_of_top_k}


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
@pytest.mark.parametrize("parents", [[-1, 0, 0, 0], [-1, 0, 0, 1, 1], [-1, 0, 1, 2], [-1, 0, 0, 0, 0, 1]], ids=str)
def test_the_rivals_are_lossless(monkeypatch, rival, parents):
    """Every draw and every way to accept it, summed in float64."""
    monkeypatch.setattr("support.enumeration.ordered_draws", DRAWS[rival])
    monkeypatch.setattr("support.enumeration.node_decisions", rival.decide)
    tree = TokenTree(parents)
    for kind, (temperature, top_p) in itertools.product(KINDS, WARPS):
        target, draft = toy_pair(kind, 3, context=2, seed=1)
        emitted = emitted_distribution(tree, target, draft, 1, temperature, None, top_p)
        expected = joint_probs(chain_probs(target, 1, tree.num_levels, temperature, None, top_p))
        assert float((emitted - expected).abs().max()) <= 1e-12, (kind, temperature, top_p)


def test_the_exact_test_fails_for_the_wrong_verifier(monkeypatch):
    """A verification that does not suit the draws loses something. Top-k's suits all: it looks at the target alone."""
    target, draft = toy_pair("unrelated", 3, context=2, seed=1)
    expected = joint_probs(chain_probs(target, 1, 2, 1.0))
    rounds = WITH_REPLACEMENT.decide
    wrong = (draws_of_top_k, rounds), (ordered_draws, rounds), (draws_of_top_k, reference.node_decisions)
    for draws, decide in wrong:
        monkeypatch.setattr("support.enumeration.ordered_draws", draws)
        monkeypatch.setattr("support.enumeration.node_decisions", decide)
        emitted = emitted_distribution(TokenTree([-1, 0, 0]), target, draft, 1, 1.0)
        assert float((emitted - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_swapped_loop_has_the_targets_distribution(rival, temperature):
    """The rivals' real draws, verified by what `in_loop` swaps in."""
    target, draft = toy_pair("unrelated", 5, context=2, seed=0)
    tree = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
    with rival.in_loop() as options:

        def verify(*arguments, **keywords):
            return verify_tree(*arguments, **keywords, backend=options["backend"])

        sequences = decode(
            tree,
            target,
            draft,
            1,
            3,
            20_000,
            temperature,
            sample=drafting.sample_without_replacement,
            verify=verify,
        )
    expected = joint_probs(chain_probs(target, 1, 3, temperature))
    assert p_value(sequence_counts(sequences, 5), expected) > 1e-4


def test_draws_with_replacement_are_independent():
    logits = torch.tensor([0.5, -0.2, 1.0, 0.1])
    drawn = WITH_REPLACEMENT.draw(logits.expand(40_000, 4), 2, torch.ones(40_000), torch.arange(40_000),
                                  torch.zeros(40_000, dtype=torch.int64)).tokens  # fmt: skip
    probs = logits.double().softmax(0)
    assert p_value(sequence_counts(drawn, 4), probs[:, None] * probs) > 1e-4


@pytest.mark.parametrize("sampler", samplers.SAMPLERS, ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("kind", ["unrelated", "near", "target misses tokens"])
def test_acceptance_of_an_emitted_token_is_what_enumeration_gives(sampler, kind):
    target, draft = toy_pair(kind, 4, context=1, seed=2)
    temperature, top_p, num_ranks, repeats = 0.7, 0.95, 3, 20_000
    probs = plain_probs(target.table[:1], temperature, None, top_p)
    scaled = (draft.table[0] / temperature).tolist()
    decide = sampler.decide or reference.node_decisions
    found = torch.zeros(4, num_ranks, dtype=torch.float64)
    for drawn, chance in DRAWS[sampler](scaled, num_ranks):
        decisions = decide(probs, draft.table[:1], torch.tensor([drawn]), torch.full((1,), temperature).double())
        left = chance
        for rank, accepted in enumerate(decisions.acceptance()[0].tolist()):
            found[drawn[rank], rank] += left * accepted
            left *= 1 - accepted
    expected = found / torch.where(probs > 0, probs, 1).T
    for token in range(4):
        if probs[0, token] == 0:
            continue
        acceptance = sampler.acceptance_of_emitted(
            probs.expand(repeats, 4), draft.table[:1].expand(repeats, 4), temperature, torch.full((repeats,), token),
            num_ranks, torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert bool((acceptance.sum(dim=1) <= 1 + 1e-9).all()) and bool((acceptance >= 0).all())
        # without replacement one rejected draw a context stands for the expectation: 20000 of them are near it
        tolerance = 0.015 if sampler is OURS else 1e-12
        assert float((acceptance.mean(dim=0) - expected[token]).abs().max()) <= tolerance


def test_at_temperature_zero_all_samplers_are_the_same():
    generator = torch.Generator().manual_seed(0)
    probs = torch.eye(5, dtype=torch.float64)
    logits = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    found = [s.acceptance_of_emitted(probs, logits, 0.0, torch.arange(5), 7, generator) for s in samplers.SAMPLERS]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0].sum(dim=1), torch.ones(5, dtype=torch.float64))  # everything is among the first 5
    tokens = [s.draw(logits.float(), 3, torch.zeros(5), torch.arange(5), torch.arange(5)).tokens for s in RIVALS]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], logits.topk(3).indices)


def test_draws_stop_where_the_drafts_tokens_end():
    draft = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    target = torch.full((1, 4), 0.25, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    acceptance = OURS.acceptance_of_emitted(target, draft, 1.0, torch.tensor([1]), 4, generator)
    assert bool(torch.isfinite(acceptance).all()) and float(acceptance[:, 2:].sum()) == 0.0


def test_constant_acceptance_gives_the_value_of_the_tree():
    vector = [0.5, 0.2, 0.1]
    acceptance = torch.tensor(vector, dtype=torch.float64).expand(3, 80, 3)
    for tree in (TokenTree.single(), TokenTree.chain(5), TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])):
        counts = replay.replay(tree, acceptance, 60)
        estimate = replay.ratio(counts.tokens, counts.steps)
        assert estimate.mean == pytest.approx(tree.expected_tokens(vector), rel=1e-12)
        assert float(counts.cut.abs().max()) == 0.0
    assert float(replay.replay(TokenTree.chain(30), acceptance, 60).cut[0]) == pytest.approx(0, abs=1e-6)
    assert float(replay.replay(TokenTree.chain(30), acceptance[:, :60], 60).cut[0]) > 0
    with pytest.raises(ValueError, match="at most 3 children a node, got 4"):
        replay.replay(TokenTree([-1, 0, 0, 0, 0]), acceptance, 60)


def test_standard_errors_are_those_of_the_texts():
    steps = torch.full((4,), 10.0, dtype=torch.float64)
    first = replay.ratio(torch.tensor([20.0, 30.0, 20.0, 30.0], dtype=torch.float64), steps)
    assert first.mean == 2.5 and first.se == pytest.approx(0.5 / math.sqrt(3))
    second = replay.ratio(torch.tensor([18.0, 28.0, 18.0, 28.0], dtype=torch.float64), steps)
    assert replay.difference(first, second) == pytest.approx((0.2, 0.0))
    words = [robustness.verdict(change, 0.1) for change in (0.4, 0.2, -0.2, -0.4)]
    assert words == ["ahead", "level", "level", "behind"] and robustness.verdict(0.0, 0.0) == "level"


def test_a_cut_draft_keeps_its_nucleus_and_puts_the_rest_behind_in_order():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    changed = samplers.cut_draft(logits, 0.5, 0.9)  # softmax(2 x): .0158 .8650 .1171 .0021; nucleus of .95
    assert torch.equal(changed[0, 1:3], logits[0, 1:3]) and torch.equal(changed[1], logits[1])
    assert changed[0].argsort(descending=True).tolist() == [1, 2, 0, 3]
    assert float(changed[0].div(0.5).softmax(0)[[0, 3]].sum()) < 1e-12
    assert torch.equal(samplers.cut_draft(logits, 0.5, 1.0), logits)


@pytest.fixture(scope="module")
def pair():
    return load_demo_pair()


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_a_rivals_loop_keeps_greedy_text_and_leaves_nothing_behind(pair, rival):
    prompt = pair.tokenizer("def main(argv):\n    ", return_tensors="pt").input_ids
    ours = drafting.sample_without_replacement, reference.node_decisions
    expected = generate(pair.target, None, prompt, max_new_tokens=12).sequences
    with rival.in_loop() as options:
        assert reference.node_decisions is rival.decide
        found = generate(pair.target, pair.draft, prompt, tree=TokenTree([-1, 0, 0, 1]), max_new_tokens=12, **options)
    assert torch.equal(found.sequences, expected)
    assert (drafting.sample_without_replacement, reference.node_decisions) == ours
    assert ours[0] is sample_without_replacement


def test_families_have_the_nodes_they_are_asked_for():
    vector = [0.6, 0.2, 0.1]
    for family, build in robustness.FAMILIES.items():
        trees = [build(vector, budget) for budget in (1, 2, 7, 64)]
        assert [tree.num_nodes for tree in trees] == [1, 2, 7, 64], family
    assert robustness.k_chains(4, 9).widths == [1, 4, 4] and robustness.k_ary(2, 6).widths == [1, 2, 3]


def test_a_quick_run_writes_document_page_and_plots(tmp_path, monkeypatch, capsys):
    target = tmp_path / "docs" / "page.md"
    target.parent.mkdir()
    target.write_text(f"# Title\n\nbefore\n\n{page.BEGIN}\nold\n{page.END}\n\nafter\n")
    few = {"prompts": 2, "calibration_prompts": 2, "starts": 6, "tail": 4, "budgets": (1, 4), "loops": ()}
    small = dataclasses.replace(robustness.QUICK, **few, loop_prompts=2, loop_tokens=6)
    monkeypatch.setattr(robustness, "QUICK", small)
    path = tmp_path / "robustness.json"
    assert robustness.main(["--quick", "--device", "cpu", "--json", str(path), "--page", str(target)]) == 0
    document = json.loads(path.read_text())
    assert document["bench"] == "robustness" and document["quick"] is True
    assert len(document["grid"]) == 2 * 2 * 4 and len(document["budgets"]) == 6 * 2 and len(document["loops"]) == 1
    assert [(row["temperature"], row["top_p"]) for row in document["cut_drafts"]] == [(0.6, 0.9)] * 3
    for row in document["grid"]:
        assert set(row["tokens_per_step"]) == {sampler.name for sampler in samplers.SAMPLERS}
        assert all(value["mean"] >= 1 for value in row["tokens_per_step"].values())
        if row["temperature"] == 0:
            assert {entry["verdict"] for entry in row["ours_against"].values()} == {"level"}
    for row in document["budgets"]:
        assert row["budget"] > 1 or (row["predicted"] == 1 and row["measured"]["mean"] == pytest.approx(1))
    text = target.read_text()
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("after\n") and "old" not in text
    assert "### Trees over the budget" in text and "--quick" in text
    for name in (page.GRID_PLOT, page.BUDGET_PLOT):
        assert (target.parent / name).stat().st_size > 5000
    assert "| 0 | any |" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", [*samplers.SAMPLERS, samplers.CUT_DRAFT], ids=lambda sampler: sampler.name)
def test_only_the_cut_draft_is_changed_in_the_loop(sampler):
    logits = torch.tensor([[[0.0, 2.0, 1.0, -1.0]]])
    settings = torch.tensor([0.5]), torch.tensor([0.9])
    with sampler.in_loop():
        changed = unlikely.set_back_unlikely(logits, *settings)
    assert torch.equal(changed, logits) != sampler.cuts_draft
    assert not torch.equal(unlikely.set_back_unlikely(logits, *settings), logits)


def test_steps_with_top_p_are_compared_in_pairs(tmp_path, capsys):
    path = tmp_path / "top_p.json"
    usual = DecodingStep.run
    assert bench_script("top_p").main(["--quick", "--json", str(path)]) == 0
    assert DecodingStep.run is usual
    document = json.loads(path.read_text())
    rows = document["results"]
    assert {(row["tree"], row["rule"]) for row in rows} == set(
        itertools.product(["chain of 4", "8 nodes"], ["sequoia", "traversal"])
    )
    for row in rows:
        assert row["steps"] > 2 and min(row["on"], row["off"]) >= 1
        assert row["ratio"] == pytest.approx(row["on"] / row["off"]) and row["standard_error"] >= 0
    assert "| 1 | chain of 4 | sequoia |" in capsys.readouterr().out


def test_predictions_stand_beside_what_was_measured(tmp_path, capsys):
    path = tmp_path / "predictions.json"
    assert bench_script("predictions").main(["--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    trees = ["chain of 3", "chain of 5", "8 nodes"]
    assert [(row["tree"], row["rule"]) for row in rows] == list(itertools.product(trees, ["sequoia", "traversal"]))
    for row in rows:
        assert row["steps"] > 2 and row["measured"] >= 1
        assert all(row[side][0] >= 1 and row[side][1] >= 0 for side in ("made from", "same prompts"))
        assert row["off_by"][0] == pytest.approx(row["made from"][0] / row["measured"] - 1) and row["off_by"][1] >= 0
    shown = capsys.readouterr().out
    assert "| 1 | chain of 3 |" in shown and "of 6 within 3 %" in shown


def test_texts_of_both_halves_count_by_their_tokens():
    together = bench_script("predictions").together
    assert together([(2.0, 0.1), (4.0, 0.0)]) == pytest.approx([8 / 3, (8 / 3) ** 2 * 0.1 / 4 / 2])
    assert together([(3.0, 0.3), (3.0, 0.4)]) == pytest.approx([3.0, 0.25])


def test_every_prompt_moves_a_prediction_by_its_part():
    """As the mean moves when a prompt counts a little more than the others."""
    script = bench_script("predictions")
    generator = np.random.Generator(np.random.PCG64(4))
    halves = [(steps * generator.uniform(1, 5, size=6), steps) for steps in generator.uniform(9, 30, size=(2, 6))]

    def together(more, prompt):
        shares = 1 + 1e-6 * (np.arange(12) == prompt) * more
        entries = [
            ((tokens * share).sum() / (steps * share).sum(), 0.0)
            for (tokens, steps), share in zip(halves, np.split(shares, 2))
        ]
        return script.together(entries)[0]

    parts = np.concatenate(script.weighed(halves))
    expected = [(together(1, prompt) / together(0, prompt) - 1) / 1e-6 for prompt in range(12)]
    assert parts == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert script.by_prompt(np.arange(6.0), 2).tolist() == [3, 5, 7]  # twice the same three prompts


def test_standard_errors_of_differences_are_those_of_many_draws():
    """Prompts that are hard for both sides do not count as noise."""
    script = bench_script("predictions")
    generator = np.random.Generator(np.random.PCG64(5))

    def drawn():
        ease = generator.uniform(2, 6, size=40)
        sides = []
        for _ in range(2):
            steps = generator.integers(20, 40, size=40).astype(np.float64)
            sides.append((steps * ease * generator.uniform(0.9, 1.1, size=40), steps))
        means = [tokens.sum() / steps.sum() for tokens, steps in sides]
        parts = [script.deviations(*side) for side in sides]
        return means[0] / means[1] - 1, np.sqrt(((parts[0] - parts[1]) ** 2).sum()), parts[0].std() * np.sqrt(40)

    differences, errors, alone = np.array([drawn() for _ in range(2000)]).T
    assert errors.mean() == pytest.approx(differences.std(), rel=0.1)
    assert errors.mean() < 0.9 * np.sqrt(2) * alone.mean()


def test_predictions_that_are_off_are_named():
    names = {"tree": "8 nodes", "rule": "sequoia", "temperature": 0.6}
    rows = [names | {"off_by": pair} for pair in ([-0.02, 0.001], [0.031, 0.015], [-0.05, 0.016])]
    assert bench_script("predictions").verdict(rows) == (
        "1 of 3 within 3 %; 8 nodes, sequoia, T = 0.6: +3.1 %; 8 nodes, sequoia, T = 0.6: -5.0 %"
    )
    rows[1]["off_by"][1] = 0.016
    assert "+3.1 %, less than 2 standard errors; 8 nodes" in bench_script("predictions").verdict(rows)


def test_shaped_trees_are_valued_beside_fixed_ones(tmp_path, capsys):
    path = tmp_path / "shaped_steps.json"
    assert bench_script("shaped_steps").main(["--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    kinds = ["optimal", "best nodes", "shaped"]
    assert [(row["rule"], row["tree"]) for row in rows] == list(itertools.product(["sequoia", "traversal"], kinds))
    for row in rows:
        assert row["tokens_per_step"] >= 1
        own = row.get(f"over {row['tree']}", [1.0, 0.0])
        assert own == pytest.approx([1.0, 0.0], abs=1e-12)
    assert "| 1 | traversal | 8 |" in capsys.readouterr().out


def test_the_page_must_have_its_marks(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Title\n")
    with pytest.raises(SystemExit, match="must hold the lines"):
        page.write_page(path, "text", with_plots=True)
    page.write_page(tmp_path / "new.md", "![plot](p.png)\ntext", with_plots=False)
    assert "![" not in (tmp_path / "new.md").read_text()


def test_a_pair_of_ones_own_needs_prompts(capsys):
    with pytest.raises(SystemExit):
        robustness.main(["--target", "somewhere"])
    assert "--prompts-file must be given together" in capsys.readouterr().err
