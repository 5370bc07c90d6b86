"""Lookup: what is found in a text, what it is worth, and generation with it."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from support.synthetic_profile import synthetic_profile
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import (
    AdaptivePlan,
    TokenTree,
    _host,
    adapt,
    generate,
    load_offloaded,
    measure_profile,
    plan_tree,
)
from sequoia_kernels.decoding import record_steps
from sequoia_kernels.drafts import (
    DecodingState,
    LookupDraft,
    StageClock,
    TokenBuffers,
    TreeLayout,
    draft_source,
    host_growth,
)
from sequoia_kernels.drafts.source import put_first
from sequoia_kernels.planner.lookup import (
    MOST_MATCH,
    BaseEvidence,
    LookupCosts,
    LookupEvidence,
    MergedValue,
    SetUp,
    choice_of,
    lookup_trees,
)
from sequoia_kernels.tree import LONGEST_PATH, TYPICAL_ACCEPTANCE, LookupTree, MergedTree, ShapedTree

TREE = TokenTree([-1, 0, 0, 1, 1, 2])


# ---- the index ----


def _best_place(tokens, least, most, places):
    """The same by looking at every place."""
    best, found = 0, None
    for place in range(len(tokens) - 2, -1, -1):
        match = 0
        while match < min(most, place + 1) and tokens[place - match] == tokens[len(tokens) - 1 - match]:
            match += 1
        if match >= least and places > 0:
            places -= 1
            if match > best:
                best, found = match, place
    return best, found


def test_the_index_finds_the_longest_agreement_and_the_newest_of_equals():
    rng = random.Random(0)
    for trial in range(300):
        least, most = rng.choice([(1, 4), (2, 6), (3, 32)])
        tokens = [rng.randrange(rng.choice([2, 3, 50])) for _ in range(rng.randrange(1, 60))]
        index = _host.TextIndex(least, most)
        cut = rng.randrange(len(tokens) + 1)
        index.append(tokens[:cut])
        index.append(tokens[cut:])
        assert len(index) == len(tokens)
        match, proposed = index.propose(7)
        wanted, place = _best_place(tokens, least, most, 64)
        assert match == wanted, (trial, tokens)
        if place is None:
            assert proposed == []
            continue
        text = list(tokens)
        for _ in range(7):  # what stands there, going on with itself
            text.append(text[place + 1 + len(text) - len(tokens)])
        assert proposed == text[len(tokens) :], (trial, tokens)


def test_an_empty_text_and_bad_bounds():
    assert _host.TextIndex(2, 4).propose(3) == (0, [])
    for least, most in ((0, 4), (3, 2)):
        with pytest.raises(ValueError, match="least_match must be at least 1"):
            _host.TextIndex(least, most)


# ---- trees and their value ----


def test_a_lookup_tree_is_a_path_with_siblings_and_nobody_elses_tree():
    tree = LookupTree(3, 2)
    assert tree.parents == [-1, 0, 0, 0, 1, 1, 1, 4, 4, 4]
    assert tree.path == (1, 4, 7) and [tree.rank(node) for node in tree.path] == [0, 0, 0]
    chain = TokenTree.chain(4)
    assert LookupTree(3).parents == chain.parents and LookupTree(3) != chain and chain != LookupTree(3)
    assert len({chain, LookupTree(3), LookupTree(3), LookupTree(3, 1)}) == 3
    assert pickle.loads(pickle.dumps(tree)) == tree and pickle.loads(pickle.dumps(tree)).path == tree.path


def test_a_merged_tree_is_the_drafts_with_a_path_of_first_children():
    base = TokenTree([-1, 0, 0, 1, 1, 2, 3])
    tree = MergedTree(base)
    assert tree.parents == base.parents and tree.path == (1, 3, 6)
    assert MergedTree(TokenTree([-1, 0, 0, 2])).path == (1,)  # the first node of the next level hangs elsewhere
    assert MergedTree(TokenTree.chain(64)).path == tuple(range(1, LONGEST_PATH + 1))
    assert tree == MergedTree(base) and tree != base and base != tree and tree != MergedTree(TREE)
    assert len({base, tree, MergedTree(base), LookupTree(3)}) == 3
    assert pickle.loads(pickle.dumps(tree)) == tree and pickle.loads(pickle.dumps(tree)).path == tree.path


def lookup_value(tree, reach, sibling_chance):
    """Expected tokens of a step with one tree and request; what is not proposed is not accepted."""
    through = reach[tree.length - 1] if tree.length <= len(reach) else 0.0
    return 1.0 + sum(reach[: tree.length]) + (1.0 - through) * sibling_chance * bool(tree.siblings)


def test_values_are_those_of_a_simulation():
    rng = np.random.default_rng(0)
    evidence = LookupEvidence()
    reach = np.array(evidence.reach(5, 4))
    chances = np.concatenate((reach[:1], reach[1:] / reach[:-1]))
    for siblings in (0, 1):
        coins = rng.random((200_000, 4, 2))
        right = (coins[:, :, 0] < chances).cumprod(axis=1)
        length = right.sum(axis=1)
        saved = (coins[np.arange(len(coins)), np.minimum(length, 3), 1] < 0.4) & (length < 4) & (siblings == 1)
        mean = float((1 + length + saved).mean())
        assert abs(mean - lookup_value(LookupTree(4, siblings), reach.tolist(), 0.4)) < 0.01


def test_evidence_learns_by_agreement_and_stops_at_the_first_wrong_token():
    evidence = LookupEvidence()
    before = evidence.reach(2, 3)
    for _ in range(200):
        evidence.note(2, [5, 6, 7], [5, 6, 8, 9])
    first, second, third = evidence.reach(2, 3)
    assert first > 0.98 and second / first > 0.98 and third / second < 0.05
    assert before[0] < 0.5
    tried = sum(evidence.tried)
    evidence.note(2, [1, 2, 3], [9])
    evidence.note(2, [], [9])
    assert sum(evidence.tried) == tried + 1
    before = evidence.sibling_chance
    evidence.note_sibling(False)
    assert evidence.sibling_chance < before


def test_the_fastest_tree_is_long_where_much_agrees_and_none_is_made_beyond_the_budget():
    trees = lookup_trees(9, [0, 1])
    assert max(tree.num_nodes for tree in trees) == 9 and LookupTree(4, 1) in trees and LookupTree(6, 1) not in trees
    evidence = LookupEvidence()
    step_ms = {tree: 1.0 + 0.1 * tree.num_nodes for tree in trees}
    costs = LookupCosts(trees, step_ms, {}, {})
    sure, unsure = (costs.fastest([evidence.reach(match, 32)], 0.6) for match in (30, 2))
    assert sure.tree.length > unsure.tree.length and sure.speed > unsure.speed
    for match in (2, 7, 30):  # one request is what lookup_value says, several are their sum
        reaches = [evidence.reach(match, 5), None, evidence.reach(4, 32)]
        speeds = {
            tree: sum(lookup_value(tree, reach or [], 0.6) for reach in reaches) / step_ms[tree] for tree in trees
        }
        picked = costs.fastest(reaches, 0.6)
        assert picked.speed == pytest.approx(max(speeds.values()))
        assert speeds[picked.tree] == pytest.approx(picked.speed)
        unread = costs.fastest(reaches, 0.6, read=False)
        assert unread.speed == pytest.approx(max(speed for tree, speed in speeds.items() if not tree.siblings))
    assert LookupCosts([], {}, {}, {}).fastest([None], 0.6) is None
    assert sorted(tree.num_nodes + 2 * tree.num_levels for tree in costs.within(12).trees) == [6, 7, 9, 11, 12]


def test_the_draft_counts_for_what_it_does_where_as_much_agrees():
    base = BaseEvidence(LookupCosts.alike([TREE, TokenTree.single()], 4, [0]))
    expected = TREE.expected_tokens((0.6, 0.12))
    assert base.tokens_to_beat(TREE, 0) == pytest.approx(expected)
    assert base.tokens_to_beat(TREE, 9) == pytest.approx(1.5 * expected)  # never tried where 9 agree: with a doubt
    assert base.tokens_to_beat(TokenTree.single(), 9) == 1.0
    for _ in range(400):
        base.note(0, 1)
        base.note(9, 4)
    assert base.tokens_to_beat(TREE, 0) == pytest.approx(1.0, abs=0.03)
    assert base.tokens_to_beat(TREE, 9) == pytest.approx(4.0, abs=0.03)
    assert 2.4 < base.tokens_to_beat(TREE, 3) < 1.5 * 2.6
    assert base.merged_tokens(TREE, 9, [0.9, 0.8]) == MergedValue(TREE, TYPICAL_ACCEPTANCE).expected_tokens([0.9, 0.8])
    for _ in range(400):
        base.note_merged(9, 2)
    assert base.merged_tokens(TREE, 9, [0.9, 0.8]) == pytest.approx(2.0, abs=0.05)
    assert base.tokens_to_beat(TREE, 9) == pytest.approx(4.0, abs=0.03)  # what was merged is no evidence of the draft


def test_the_value_of_a_merged_tree_is_that_of_a_simulation():
    tree, acceptance, rng = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4]), (0.5, 0.2, 0.1), np.random.default_rng(0)
    path = MergedTree(tree).path
    for chances in ([0.7, 0.4, 0.9], [0.7, 0.4], [0.3, 0.3, 0.3, 0.3], []):
        value, total, count = MergedValue(tree, acceptance).expected_tokens(chances), 0, 40_000
        for coin in rng.random((count, 8)):
            node, depth = 0, 0
            while True:
                total += 1
                children = [child for child in range(tree.num_nodes) if tree.parents[child] == node]
                on_path = node == (0, *path)[depth] if depth <= len(path) else False
                odds = list(acceptance[: len(children)])
                if on_path and depth < min(len(chances), len(path)):
                    odds = [chances[depth], *((1 - chances[depth]) * chance for chance in acceptance)][: len(children)]
                rank = int(np.searchsorted(np.cumsum(odds), coin[depth], side="right"))
                if rank >= len(children):
                    break
                node, depth = children[rank], depth + 1
        assert abs(total / count - value) < 0.03, chances
    assert MergedValue(tree, acceptance).expected_tokens([]) == pytest.approx(tree.expected_tokens(acceptance))


def test_what_is_proposed_is_left_out_of_the_draws():
    rng = random.Random(0)
    drawn = [rng.sample(range(6), 4) for _ in range(200)]
    drawn[0][2:] = [-1, -1]  # there was nothing left to draw
    proposed = [rng.randrange(-1, 7) for _ in drawn]
    wanted = [
        row if token < 0 else [token, *(other for other in row if other != token)][:4]
        for row, token in zip(drawn, proposed, strict=True)
    ]
    given = torch.tensor(drawn)
    put_first(torch.tensor(proposed)[:, None], given)
    assert given.tolist() == wanted


class SpecifiedChoice:
    """What `_host.LookupChoice` does, of the classes that specify it."""

    def __init__(self, costs, num_requests, known_tokens):
        self.costs, self.evidence, self.base, self.known = costs, LookupEvidence(), BaseEvidence(costs), known_tokens
        self.texts = [_host.TextIndex(2, MOST_MATCH) for _ in range(num_requests)]
        self.found = [(0, [])] * num_requests
        self.set_up = SetUp(costs.set_up_ms)

    def choose(self, tree, active):
        self.found, self.proposed = [], [[] for _ in active]
        for text, alive in zip(self.texts, active, strict=True):
            match, path = text.propose(LONGEST_PATH) if alive else (0, [])
            path = list(itertools.takewhile(lambda token: token < self.known, path))
            self.found.append((match, path) if path else (0, []))
        if tree is None or not any(path for _, path in self.found):
            return None
        own, merged, reaches = [], [], []
        for (match, path), alive in zip(self.found, active, strict=True):
            own.append(self.base.tokens_to_beat(tree, match) if alive else 0.0)
            takes = bool(path) and tree.num_nodes > 1
            chances = self.evidence.chances(match, len(path))
            merged.append(self.base.merged_tokens(tree, match, chances) if takes else 0.0)
            if alive:
                reaches.append(self.evidence.reach(match, len(path)) if path else None)
        best = sum(map(max, own, merged)) / self.costs.base_ms[tree]
        ms_per_token = self.costs.base_ms[tree] / sum(own)
        pick = self.costs.fastest(reaches, self.evidence.sibling_chance, read=tree.num_nodes > 1)
        paths = [path for _, path in self.found]
        if pick is not None and pick.speed > best:
            rate = 1.0 / self.costs.step_ms[pick.tree]
            if not self.set_up.pays((pick.speed * ms_per_token - 1.0) / rate):
                return None
            self.proposed = [path[: pick.tree.length] for path in paths]
            return pick.tree
        gained = sum(max(one - other, 0.0) for one, other in zip(merged, own, strict=True))
        tree = MergedTree(tree)
        if gained == 0 or not self.set_up.pays(gained * ms_per_token):
            return None
        self.proposed = [
            path[: len(tree.path)] if one > other else [] for path, one, other in zip(paths, merged, own, strict=True)
        ]
        return tree

    def take(self, request, tokens, kind):
        match, found = self.found[request]
        if kind != _host.LookupChoice.PROMPT:
            self.evidence.note(match, found, tokens)
            if kind == _host.LookupChoice.AFTER_MERGED and self.proposed[request]:
                self.base.note_merged(match, len(tokens))
            elif kind != _host.LookupChoice.AFTER_OTHER:
                self.base.note(match, len(tokens))
        self.texts[request].append(tokens)


@pytest.mark.parametrize("seed", range(12))
def test_choices_are_those_of_the_specification(seed):
    rng = random.Random(seed)
    bases = [TREE, TokenTree.kary(2, 4), TokenTree.single()]
    trees = lookup_trees(rng.choice([1, 9, 40]), rng.choice([(0,), (0, 1)]))
    step_ms = {tree: rng.uniform(1.0, 1.5) for tree in [*trees, *bases]}
    tokens = {tree: tree.expected_tokens(TYPICAL_ACCEPTANCE) for tree in bases}
    costs = LookupCosts(trees, step_ms, step_ms, tokens, (0.5, 0.2), set_up_ms=rng.choice([0.0, 0.7, 4.0]))
    count, vocab = rng.choice([1, 1, 3]), rng.choice([2, 4, 30])
    known = rng.choice([vocab, vocab - 1])
    both = choice_of(costs, count, known), SpecifiedChoice(costs, count, known)
    for request in range(count):
        prompt = [rng.randrange(vocab) for _ in range(rng.randrange(20))] * rng.choice([1, 2])
        for one in both:
            one.take(request, prompt, _host.LookupChoice.PROMPT)
    ours, specified = both
    numbers = {
        tree: ours.add_base(step_ms[tree], tokens[tree], tree.num_nodes > 1, MergedValue(tree, (0.5, 0.2)).nodes)
        for tree in bases
    }
    kinds = set()
    for step in range(300):
        base = rng.choice([*bases, None]) if step % 3 == 0 else bases[0]
        active = [rng.random() < 0.9 for _ in range(count)]
        wanted = specified.choose(base, active)
        chosen = ours.choose(numbers.get(base, -1), active)
        kinds.add(type(wanted))
        assert ours.found() == specified.found and ours.proposed() == specified.proposed
        if isinstance(wanted, LookupTree):
            assert trees[chosen] == wanted
        else:
            assert chosen == (ours.BASE if wanted is None else ours.MERGED)
        kind = ours.AFTER_DRAFTED if base is not None and base.num_nodes > 1 else ours.AFTER_OTHER
        kind = {LookupTree: ours.AFTER_OTHER, MergedTree: ours.AFTER_MERGED}.get(type(wanted), kind)
        for request in range(count):
            if not active[request]:
                continue
            right = specified.found[request][1][: rng.randrange(6)]
            emitted = [*right, rng.randrange(vocab)] if rng.random() < 0.6 else [rng.randrange(vocab)]
            for one in both:
                one.take(request, emitted, kind)
        if rng.random() < 0.2:
            accepted = rng.random() < 0.5
            ours.note_sibling(accepted)
            specified.evidence.note_sibling(accepted)
    assert len(kinds) > 1


def test_a_choice_refuses_what_is_not_a_batch():
    choice = choice_of(LookupCosts.alike([TREE], 4, [0]), 2, 40)
    with pytest.raises(ValueError, match="active must have an entry a request"):
        choice.choose(-1, [True])
    with pytest.raises(ValueError, match="paths must have an entry a request"):
        choice.propose([[]])
    with pytest.raises(IndexError):
        choice.take(2, [1], choice.PROMPT)


def test_on_a_cpu_no_siblings_are_drawn_beside_a_path():
    """They would be read along op by op, which takes longer than the levels that this saves."""
    target, draft = _pair()
    source = LookupDraft(adapt(target), draft_source(draft))
    assert source.siblings == (0,)
    output = generate(target, draft, _prompts(2)[1:], tree=TREE, lookup=True, max_new_tokens=60)
    assert not any(isinstance(tree, LookupTree) and tree.siblings for tree in output.stats.steps_by_tree)


# ---- generation ----


def _pair():
    target = tiny_llama(3, vocab_size=40, sharpness=4.0, num_layers=2)
    return target, noisy_copy(target, 0.3)


def _prompts(count):
    generator = torch.Generator().manual_seed(1)
    motif = torch.randint(40, (count, 5), generator=generator)
    prompts = motif.repeat(1, 4)
    prompts[0] = torch.arange(20)  # nothing to find there at first
    return prompts


def _variants(target, draft):
    return {
        "lookup": {"draft": "lookup", "tree": TokenTree.chain(9)},
        "draft and lookup": {"draft": draft, "lookup": True, "tree": TokenTree.kary(2, 4)},
        "planned": {"draft": draft, "lookup": True, "tree": "auto"},
        "planned alone": {"draft": None, "lookup": True},
        "a source": {"draft": LookupDraft(adapt(target), draft_source(draft)), "tree": TREE},
    }


@pytest.mark.parametrize("name", ["lookup", "draft and lookup", "planned", "planned alone", "a source"])
def test_greedy_text_is_the_targets(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQUOIA_CACHE_DIR", str(tmp_path))
    target, draft = _pair()
    prompts = _prompts(4)
    wanted = generate(target, None, prompts, max_new_tokens=40).new_tokens
    output = generate(target, input_ids=prompts, max_new_tokens=40, **_variants(target, draft)[name])
    assert output.new_tokens == wanted
    assert output.stats.lookup_steps > 0 and output.stats.copied_tokens > 0
    assert sum(output.stats.steps_by_tree.values()) == output.stats.num_steps
    single = [
        generate(target, input_ids=row[None], max_new_tokens=40, **_variants(target, draft)[name]) for row in prompts
    ]
    assert [entry.new_tokens[0] for entry in single] == wanted


def test_repeated_text_takes_fewer_steps_and_equal_calls_are_equal():
    target, draft = _pair()
    prompt = _prompts(2)[1:]
    runs = [
        generate(target, draft, prompt, tree=TREE, lookup=lookup, max_new_tokens=60, temperature=0.0)
        for lookup in (False, True, True)
    ]
    assert runs[1].stats.num_steps < runs[0].stats.num_steps
    assert runs[1].new_tokens == runs[2].new_tokens and runs[1].stats.num_steps == runs[2].stats.num_steps
    drawn = [generate(target, draft, prompt, lookup=True, tree=TREE, max_new_tokens=60, temperature=1.0) for _ in "ab"]
    assert drawn[0].new_tokens == drawn[1].new_tokens


def test_a_text_without_repeats_is_decoded_as_without_lookup():
    target, draft = _pair()
    prompt = torch.arange(12)[None]
    with_lookup, without = (
        generate(target, draft, prompt, tree=TREE, lookup=lookup, max_new_tokens=3, temperature=1.0, seed=5)
        for lookup in (True, False)
    )
    assert with_lookup.stats.lookup_steps == 0 and with_lookup.new_tokens == without.new_tokens


def test_ranks_are_counted_of_drawn_trees_only():
    target, draft = _pair()
    output = generate(target, draft, _prompts(2)[1:], tree=TREE, lookup=True, max_new_tokens=60)
    drawn_steps = output.stats.steps_by_tree.get(TREE, 0)
    assert output.stats.lookup_steps == output.stats.num_steps - drawn_steps > 0
    assert (
        output.stats.visited_by_rank[:1] == [] if drawn_steps == 0 else output.stats.visited_by_rank[0] >= drawn_steps
    )


def test_drafts_with_few_positions_and_hooks_go_with_lookup():
    target, draft = _pair()
    draft.config.max_position_embeddings = 24
    prompts = _prompts(3)
    hook_calls = []

    def hook(paths, logits):
        hook_calls.append(logits.shape[1])
        return logits

    plain = generate(target, None, prompts, max_new_tokens=60)
    output = generate(target, draft, prompts, tree=TREE, lookup=True, max_new_tokens=60, logits_hook=hook)
    assert output.new_tokens == plain.new_tokens and output.stats.draft_restarts > 0 and hook_calls


def test_what_is_refused():
    target, draft = _pair()
    prompt = _prompts(1)
    with pytest.raises(FileNotFoundError, match="draft must be a model, a draft source, 'lookup' or the folder or hub"):
        generate(target, "./look", prompt)
    with pytest.raises(TypeError, match="lookup must be True or False, got 1"):
        generate(target, draft, prompt, lookup=1)
    with pytest.raises(TypeError, match="target must be given for lookup"):
        draft_source("lookup")
    with pytest.raises(TypeError, match="base must be a draft source that draws, got LookupDraft"):
        LookupDraft(adapt(target), LookupDraft(adapt(target)))


def test_misuse_is_refused_before_anything_runs():
    target, draft = _pair()
    with pytest.raises(TypeError, match="LookupDraft: target must be a TreeModel, as adapt gives, got Llama"):
        LookupDraft(target)
    with pytest.raises(TypeError, match="base must be a draft source that draws, got LlamaForCausalLM"):
        LookupDraft(adapt(target), draft)
    with pytest.raises(TypeError, match="tree must be no tree of proposals"):
        generate(target, draft, _prompts(1), tree=LookupTree(3), lookup=True)
    for measure in (
        lambda given: record_steps(target, given, [_prompts(1)]),
        lambda given: measure_profile(target, given),
    ):
        for given in ("lookup", LookupDraft(adapt(target), draft_source(draft))):
            with pytest.raises(TypeError, match="draft must be one that draws its tokens, got"):
                measure(given)


def test_a_draft_that_was_given_up_is_not_read_again():
    """Whose positions end meanwhile: it is fed nothing behind them."""
    target, draft = _pair()[0], tiny_llama(77, vocab_size=40, num_layers=1)
    draft.config.max_position_embeddings = 24
    prompts = _prompts(2)
    wanted = generate(target, None, prompts, max_new_tokens=80).new_tokens
    speculating = plan_tree([0.5, 0.1], synthetic_profile(), max_budget=4)
    single = dataclasses.replace(speculating, tree=TokenTree.single(), tokens_per_step=1.0)
    plan = AdaptivePlan(
        (single, dataclasses.replace(speculating, tree=TREE, stages={"target": 50.0})),
        1,
        np.array([0.5, 0.1]),
        patience=2,
        margin=0.0,
    )
    for temperature in (0.0, 1.0):
        output = generate(target, draft, prompts, tree=plan, lookup=True, max_new_tokens=80, temperature=temperature)
        if temperature == 0:
            assert output.new_tokens == wanted
        assert output.stats.lookup_steps > 0 and output.stats.steps_by_tree.get(TokenTree.single(), 0) > 0


def test_tokens_of_the_prompt_that_the_head_does_not_know_are_not_proposed():
    target, _ = _pair()
    target.lm_head = torch.nn.Linear(target.config.hidden_size, 36, bias=False).requires_grad_(False)
    prompt = torch.tensor([[3, 7, 7, 38, 9, 7, 7, 38, 9, 7, 7, 38, 9, 7]])
    wanted = generate(target, None, prompt, max_new_tokens=20).new_tokens
    for backend in ("auto", "reference"):
        output = generate(target, "lookup", prompt, tree=TokenTree.chain(9), max_new_tokens=20, backend=backend)
        assert output.new_tokens == wanted


def test_copied_tokens_are_those_of_the_text():
    target, draft = _pair()
    prompt = _prompts(2)[1:]
    output = generate(target, draft, prompt, tree=TokenTree.kary(2, 5), lookup=True, max_new_tokens=60)
    end = output.new_tokens[0][30]
    cut = generate(target, draft, prompt, tree=TokenTree.kary(2, 5), lookup=True, max_new_tokens=60, eos_token_id=end)
    assert 0 < cut.stats.copied_tokens <= len(cut.new_tokens[0])
    few = generate(target, "lookup", prompt, tree=TokenTree.chain(17), max_new_tokens=3)
    assert few.stats.copied_tokens <= 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_with_proposals_are_grown_in_one_call_as_level_by_level(temperature, monkeypatch):
    target, draft = (adapt(model) for model in _pair())
    tree = MergedTree(TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4]))
    layout = TreeLayout.build(tree, "cpu")
    found = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(host_growth.HostGrowth, "bind", classmethod(lambda cls, *args: None))
        state = DecodingState.create(
            3, torch.device("cpu"), seeds=[4, 5, 6], temperature=[temperature] * 3, top_k=None, top_p=None
        )
        source = LookupDraft(target, draft_source(draft, target))
        drafting = source.start(target, state, 64, backend="auto", clock=StageClock(False))
        tokens = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
        drafting.prefill([0, 1, 2], tokens, torch.full((3,), 9, dtype=torch.int32), [])
        state.draft_lens.fill_(9)
        state.last_tokens.copy_(tokens[:, -1])
        state.root_tokens.copy_(torch.tensor([1, 2, 3]))
        buffers = TokenBuffers.allocate(layout, 3, 40, torch.float32, torch.device("cpu"), proposes=True)
        buffers.tokens[:, 0] = state.root_tokens
        drafting.prepare(layout, buffers)
        for paths in ([[7, 8, 9, 10], [], [11]], [[], [], []]):
            drafting.propose(paths)
            drafting.grow(layout, buffers)
            certain = [[tree.path[level] for level in range(min(len(path), len(tree.path)))] for path in paths]
            assert [row.nonzero()[:, 0].tolist() for row in buffers.certain] == certain
            for row, path in zip(buffers.tokens.tolist(), paths, strict=True):
                assert [row[node] for node in tree.path[: len(path)]] == path[: len(tree.path)]
                for node in range(tree.num_nodes):
                    children = [row[child] for child in range(tree.num_nodes) if tree.parents[child] == node]
                    assert len(set(children)) == len(children)
            found.append((buffers.tokens.clone(), buffers.draft_logits[:, [0, 1, 2, 4]].clone()))
    for (tokens, logits), (by_levels, their_logits) in zip(found[:2], found[2:], strict=True):
        assert tokens.tolist() == by_levels.tolist()
        torch.testing.assert_close(logits, their_logits)


def test_a_captured_step_finds_its_proposals_where_they_were():
    target, _ = _pair()
    state = DecodingState.create(1, torch.device("cpu"), seeds=[0], temperature=[0.0], top_k=None, top_p=None)
    drafting = LookupDraft(adapt(target)).start(adapt(target), state, 64, backend="auto", clock=StageClock(False))
    place = drafting.proposals.data_ptr()
    drafting.propose([[1, 2, 3]])
    drafting.propose([[*range(LONGEST_PATH)]])
    drafting.restart()
    drafting.propose([[4]])
    assert drafting.proposals.data_ptr() == place
    assert drafting.proposals[0].tolist() == [4, *[-1] * (LONGEST_PATH - 1)]


def test_an_offloaded_target_has_trees_that_its_memory_holds(tmp_path):
    target, draft = _pair()
    target.save_pretrained(tmp_path)
    prompts = _prompts(1)
    wanted = generate(target, None, prompts, max_new_tokens=30).new_tokens
    with load_offloaded(tmp_path, resident_layers=1) as offloaded:
        longest = prompts.shape[1] + 30
        offloaded.max_cache_rows = lambda batch_size: longest + 24  # as a budget says
        for given in ("lookup", draft):
            output = generate(offloaded, given, prompts, tree=TokenTree.chain(17) if given == "lookup" else TREE,
                              lookup=True, max_new_tokens=30)  # fmt: skip
            assert output.new_tokens == wanted
            sizes = [tree.num_nodes + 2 * tree.num_levels for tree in output.stats.steps_by_tree]
            assert max(sizes) <= 24


def test_shaped_trees_and_trees_a_request_are_left_alone():
    from support.shaped_trees import steep_confidence

    target, draft = _pair()
    prompts = _prompts(2)
    for tree in (ShapedTree((1, 2, 3, 2), steep_confidence()), (TREE, TREE)):
        output = generate(target, draft, prompts, tree=tree, lookup=True, max_new_tokens=10)
        assert output.stats.lookup_steps == 0
        assert output.new_tokens == generate(target, None, prompts, max_new_tokens=10).new_tokens


@pytest.mark.parametrize("positions", [None, 48])
def test_a_draft_that_is_asked_again_has_read_every_token(positions, monkeypatch):
    """Its rows are those of a prefill, whatever steps came before."""
    from sequoia_kernels.decoding import loop
    from sequoia_kernels.models import prefill

    target, draft = _pair()
    draft.config.max_position_embeddings = positions or draft.config.max_position_embeddings
    trees = [LookupTree(3), LookupTree(2), TREE, LookupTree(2, 1), LookupTree(1), LookupTree(4), TREE, TREE]
    seen = []

    def chosen(self, base, requests):
        tree = trees[len(seen) % len(trees)]
        seen.append(tree)
        if isinstance(tree, LookupTree):
            self.choice.choose(self.choice.BASE, [True] * len(requests))
            self._propose(tree, [path[: tree.length] for _, path in self.choice.found()])
        return tree

    def checked(self, base, requests):
        tree = original(self, base, requests)
        if self.drafting.reads(tree):
            checks.append(_rows_differ(self.drafting, requests))
        return tree

    def _rows_differ(drafting, requests):
        model, cache = drafting.base.source.model, drafting.base.cache
        worst = 0.0
        for index, (request, length) in enumerate(zip(requests, drafting.state.draft_lens.tolist())):
            if not request.is_active:
                continue
            tokens = torch.tensor([request.committed[-length:]])
            own = model.new_cache(1, length)
            prefill(model, own, tokens, torch.tensor([length], dtype=torch.int32))
            for mine, wanted in zip(cache.tensors(), own.tensors()):  # the last row is fed with the root
                worst = max(worst, float((mine[index, : length - 1] - wanted[0, : length - 1]).abs().max()))
        return worst

    checks = []
    original = loop.LookupSteps.tree
    monkeypatch.setattr(loop.LookupSteps, "_chosen", chosen)
    monkeypatch.setattr(loop.LookupSteps, "tree", checked)
    prompts = _prompts(3)
    output = generate(target, draft, prompts, tree=TREE, lookup=True, max_new_tokens=60)
    assert output.new_tokens == generate(target, None, prompts, max_new_tokens=60).new_tokens
    assert len(checks) > 8 and max(checks) < 1e-5
    assert (output.stats.draft_restarts > 0) == (positions is not None)
