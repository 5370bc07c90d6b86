"""verify_tree for drafts of a smaller vocabulary and children that are certain: exact, and alike in all backends."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support.chi_square import joint_probs, p_value, sequence_counts
from support.enumeration import emitted_by_outcomes, partial_outcomes
from support.op_backends import OpBackend, op_backends
from support.toy_models import KINDS, chain_probs, toy_pair

from sequoia_kernels import TokenTree, VocabularyMap, sample_without_replacement, verify_tree

TREES = {
    "chain": [-1, 0, 1, 2],
    "star": [-1, 0, 0, 0],
    "binary": [-1, 0, 0, 1, 1, 2],
    "uneven": [-1, 0, 0, 0, 1, 4],
}
# Which children of a node are certain: by their rank.
PLACES = {"first": (0,), "behind": (1,), "all": (0, 1, 2), "around": (0, 2)}
MIXED = [-1, 0, 0, 0, 1, 1, 2, 4]
REFERENCE = OpBackend("verify_tree", "reference", "cpu")


@pytest.fixture(params=["sequoia", "traversal"])
def rule(request):
    return request.param


@pytest.fixture(params=op_backends("verify_tree"))
def backend(request):
    return request.param


# ---- exactness, by enumeration ----


def _exact_error(parents, kind, vocab, warp, rule, *, places=(), known=None, excludes=True, seed=0):
    tree = TokenTree(parents)
    target, draft = toy_pair(kind, vocab, context=3, seed=seed)
    outcomes, certain, known = partial_outcomes(
        tree, draft, 1 % vocab, warp[0], places=places, known=known, excludes=excludes
    )
    emitted = emitted_by_outcomes(tree, target, outcomes, *warp, rule=rule, certain=certain, known=known)
    expected = joint_probs(chain_probs(target, 1 % vocab, tree.num_levels, *warp))
    return float((emitted - expected).abs().max())


WARPS = [(0.0, None, None), (0.5, None, None), (1.0, None, None), (1.0, 2, None), (1.0, None, 0.6)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", PLACES)
def test_trees_with_certain_children_are_exact(places, kind, rule):
    for tree, warp, excludes in itertools.product(TREES, WARPS, (True, False)):
        error = _exact_error(TREES[tree], kind, 3, warp, rule, places=PLACES[places], excludes=excludes)
        assert error <= 1e-12, (tree, warp, excludes, error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [[0, 2], [3, 1], [2]])
def test_drafts_of_a_smaller_vocabulary_are_exact(known, kind, rule):
    for tree, warp in itertools.product(TREES, WARPS):
        error = _exact_error(TREES[tree], kind, 4, warp, rule, known=known)
        assert error <= 1e-12, (tree, warp, error)


def test_both_together_are_exact(rule):
    rng = random.Random(1)
    for seed in range(60):
        parents = [-1, *sorted(rng.randrange(node) for node in range(1, rng.randint(2, 6)))]
        known = rng.sample(range(3), rng.randint(1, 3))
        places, excludes = rng.choice(list(PLACES.values())), rng.random() < 0.5
        case = (parents, rng.choice(KINDS), 3, rng.choice(WARPS))
        error = _exact_error(*case, rule, places=places, known=known, excludes=excludes, seed=seed)
        assert error <= 1e-12, (seed, case, known, places, excludes, error)


def test_a_wrong_map_and_unmarked_certain_children_are_seen_by_the_enumeration(rule):
    tree, warp = TokenTree(TREES["star"]), (1.0, None, None)
    target, draft = toy_pair("unrelated", 3, context=3, seed=0)
    expected = joint_probs(chain_probs(target, 1, tree.num_levels, *warp))
    for places, wrong in (((0,), {"known": [0, 2]}), ((), {"known": [2, 0]})):
        outcomes, _, _ = partial_outcomes(tree, draft, 1, 1.0, places=places, known=[0, 2], excludes=False)
        emitted = emitted_by_outcomes(tree, target, outcomes, *warp, rule=rule, **wrong)
        assert float((emitted - expected).abs().max()) > 1e-3, wrong


# ---- every backend ----


def _random_call(seed, vocab=300, known=130, num_nodes=24, batch_size=3):
    """Tokens of which some were drawn, some are certain, some repeat a sibling and some are none."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    parents = [-1, *sorted(rng.randrange(min(node, 9)) for node in range(1, num_nodes))]
    tree = TokenTree(parents)
    shape = (batch_size, num_nodes)
    target_logits = torch.randn(*shape, vocab, generator=generator) * 2
    ids = torch.randperm(vocab, generator=generator)[:known].sort().values
    draft_logits = target_logits[:, :, ids] + torch.randn(*shape, known, generator=generator)
    certain = torch.rand(shape, generator=generator) < 0.4
    tokens = torch.randint(vocab, shape, generator=generator)
    for node in range(num_nodes):
        children = list(tree.children(node))
        if children:
            offsets = torch.full((batch_size,), 1000 + node)
            seeds = torch.arange(batch_size) + 77 * seed
            drawn = sample_without_replacement(draft_logits[:, node], len(children), 1.0, seeds, offsets).tokens
            place = (~certain[:, children]).cumsum(dim=1) - 1  # of a child among those that are drawn
            drawn = drawn.gather(1, place.clamp(min=0))
            own = torch.where(drawn >= 0, ids[drawn.clamp(min=0)], -1)
            likely = target_logits[:, node].topk(len(children)).indices
            tokens[:, children] = torch.where(certain[:, children], likely, own)
    gaps = torch.rand(shape, generator=generator) < 0.05
    tokens[gaps & (torch.arange(num_nodes) > 0)] = -1
    return {
        "tokens": tokens, "target_logits": target_logits, "draft_logits": draft_logits, "tree": tree,
        "draft_to_target": ids, "certain": certain,
    }  # fmt: skip


def _path(tree, node):
    """Nodes from the root to this one."""
    path = [node]
    while path[0] != 0:
        path.insert(0, tree.parents[path[0]])
    return path


def _verified(backend, call, **changes):
    given = call | {"temperature": 1.0, "seeds": torch.arange(len(call["tokens"])) + 5, "offsets": 3} | changes
    return backend(**given)


@pytest.mark.parametrize("warp", [{}, {"temperature": 0.0}, {"top_k": 20}, {"top_p": 0.7}, {"temperature": 0.3}])
def test_backends_decide_as_the_reference(backend, rule, warp):
    accepted = []
    for seed in range(6 if backend.at_scale else 2):
        call = _random_call(seed)
        got, wanted = (_verified(place, call, rule=rule, **warp) for place in (backend, REFERENCE))
        for one, other in zip(got, wanted):
            assert torch.equal(one.cpu(), other), (seed, got, wanted)
        accepted += wanted.num_accepted.tolist()
    assert max(accepted) > (2 if backend.at_scale else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_takes_a_map_and_certain_children(backend, rule, dtype):
    if dtype == torch.float64 and "triton" in backend.name:
        pytest.skip("takes float32, bfloat16 and float16")
    call = _random_call(11)
    for changes in (
        {"draft_logits": call["draft_logits"].to(dtype)},
        {"target_logits": call["target_logits"].to(dtype)},
    ):
        got, wanted = (_verified(place, call, rule=rule, **changes) for place in (backend, REFERENCE))
        assert all(torch.equal(one.cpu(), other) for one, other in zip(got, wanted))


def test_a_map_is_the_same_as_rows_that_are_filled_up(backend, rule):
    call = _random_call(3)
    whole = VocabularyMap.of(call["draft_to_target"], 300)
    by_map = _verified(backend, call, rule=rule, draft_to_target=whole)
    filled = _verified(backend, call, rule=rule, draft_logits=whole.widened(call["draft_logits"]), draft_to_target=None)
    assert all(torch.equal(one, other) for one, other in zip(by_map, filled))


def test_certain_flags_may_be_one_row_for_all_requests(backend, rule):
    call = _random_call(4)
    row = call["certain"][0]
    got = [_verified(backend, call, rule=rule, certain=flags) for flags in (row, row.expand(3, -1), row.repeat(3, 1))]
    assert all(torch.equal(one, other) for path in got[1:] for one, other in zip(got[0], path))


def test_without_a_draft_only_certain_children_count(backend, rule):
    call = _random_call(5) | {"draft_logits": None, "draft_to_target": None}
    everything = torch.ones(24, dtype=torch.bool)
    got, wanted = (_verified(place, call, rule=rule, certain=everything) for place in (backend, REFERENCE))
    assert all(torch.equal(one.cpu(), other) for one, other in zip(got, wanted))
    assert int(wanted.num_accepted.max()) > 1
    # Nodes that are not certain cannot have been drawn then.
    got, wanted = (_verified(place, call, rule=rule) for place in (backend, REFERENCE))
    assert all(torch.equal(one.cpu(), other) for one, other in zip(got, wanted))
    nothing = _verified(backend, call, rule=rule, certain=~everything)
    assert nothing.num_accepted.tolist() == [1, 1, 1]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_joint_tokens_have_the_targets_distribution(backend, rule, temperature):
    """One step of 20000 requests: drawn over three of five tokens, the first child of every node certain."""
    if not backend.at_scale:
        pytest.skip("an interpreted kernel takes hours here; that it equals the reference is tested above")
    tree, batch_size, vocab, known = TokenTree(MIXED), 20_000, 5, torch.tensor([4, 0, 2])
    target, draft = toy_pair("unrelated", vocab, context=2, seed=3)
    tokens = torch.full((batch_size, tree.num_nodes), 1)
    draft_logits = torch.zeros(batch_size, tree.num_nodes, 3)
    seeds, certain = torch.arange(batch_size), torch.zeros(tree.num_nodes, dtype=torch.bool)
    for node in range(tree.num_nodes):
        children = list(tree.children(node))
        if not children:
            continue
        path = tokens[:, _path(tree, node)].clamp(min=0)
        draft_logits[:, node] = draft.logits(path)[:, known].float()
        tokens[:, children[0]] = (path.sum(dim=1) * 2) % vocab
        certain[children[0]] = True
        if children[1:]:
            count = len(children) - 1
            drawn = sample_without_replacement(draft_logits[:, node], count, temperature, seeds, 50 + node).tokens
            tokens[:, children[1:]] = known[drawn]
    paths = [tokens[:, _path(tree, node)].clamp(min=0) for node in range(tree.num_nodes)]
    target_logits = torch.stack([target.logits(path).float() for path in paths], dim=1)
    path = backend(
        tokens, target_logits, draft_logits, tree, temperature, seeds, 50, rule=rule, certain=certain,
        draft_to_target=known,
    )  # fmt: skip
    accepted = tokens.gather(1, path.nodes.clamp(min=0).long())
    first = torch.where(path.num_accepted > 1, accepted[:, 1], path.next_token)
    second = torch.where(path.num_accepted > 2, accepted[:, 2], path.next_token)
    long_enough = path.num_accepted > 1  # elsewhere the second token would come from the next step
    conditionals = chain_probs(target, 1, 2, temperature)
    assert p_value(sequence_counts(first[:, None], vocab), joint_probs(conditionals[:1])) > 1e-4
    for token in range(vocab):
        behind = second[long_enough & (first == token)]
        if len(behind) > 200 and bool(long_enough[first == token].all()):
            assert p_value(sequence_counts(behind[:, None], vocab), conditionals[1][token]) > 1e-4


# ---- bad input ----


def test_bad_maps_and_flags_are_refused():
    call = _random_call(1)
    given = {**call, "temperature": 1.0, "seeds": torch.arange(3), "offsets": 0}
    ids, certain = call["draft_to_target"], call["certain"]
    cases = [
        ({"draft_to_target": ids.float()}, TypeError, "draft_to_target must have dtype int64"),
        ({"draft_to_target": ids[:-1]}, ValueError, r"draft_to_target must have shape \[draft vocabulary\] = \[130\]"),
        ({"draft_to_target": ids + 300}, ValueError, r"draft_to_target must be in 0\.\.299"),
        ({"draft_to_target": ids * 0}, ValueError, "name each token once, got token 0 twice"),
        ({"draft_to_target": ids[:, None]}, ValueError, "draft_to_target must have shape"),
        ({"draft_to_target": None}, ValueError, "draft_logits must have shape"),
        ({"draft_to_target": VocabularyMap.of(ids, 301)}, ValueError, "draft_to_target's inverse must have shape"),
        ({"certain": certain.int()}, TypeError, "certain must have dtype bool"),
        ({"certain": certain[:2]}, ValueError, "certain must have shape"),
        ({"draft_logits": None, "certain": None}, TypeError, "draft_logits must be a tensor for a tree of 24 nodes"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            verify_tree(**(given | changes))


def test_debug_sees_a_map_made_by_hand_and_children_that_the_draft_does_not_know():
    call = _random_call(2) | {"certain": None}
    whole = VocabularyMap.of(call["draft_to_target"], 300)
    given = {**call, "temperature": 1.0, "seeds": torch.arange(3), "offsets": 0, "debug": True}
    twice = whole._replace(target_to_draft=whole.target_to_draft.masked_fill(whole.target_to_draft == 1, 0))
    with pytest.raises(ValueError, match="draft_to_target must name a token for each of the draft's 130"):
        verify_tree(**(given | {"draft_to_target": twice}))
    unknown = int((whole.target_to_draft < 0).nonzero()[0])
    with pytest.raises(ValueError, match="tokens must be draws from their parents' draft_logits"):
        verify_tree(**(given | {"tokens": call["tokens"].index_fill(1, torch.tensor([1]), unknown)}))
