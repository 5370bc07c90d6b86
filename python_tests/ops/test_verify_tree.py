"""verify_tree: the decisions themselves, their edges and what is refused.

That the emitted tokens have the target's distribution is tested in test_lossless.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.buffers import Unchanged
from support.op_backends import op_backends
from support.operators import check_fake_matches_real
from support.plain_verifier import plain_verify
from torch._subclasses.fake_tensor import FakeTensorMode

from sequoia_kernels import TokenTree, Topology, VocabularyMap
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.ops import VerifiedPath, backends, verify_tree
from sequoia_kernels.rng import RESIDUAL_TAG, node_coins, token_gumbel
from sequoia_kernels.tree import VerificationRule, register_rule, rules

INF = math.inf
NAN = math.nan

MIXED = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
TREES = {
    "single": TokenTree.single(),
    "chain": TokenTree.chain(6),
    "star": TokenTree.kary(9, 2),
    "full": TokenTree.kary(3, 3),
    "mixed": MIXED,
    "many words": TokenTree.kary(2, 7),  # 127 nodes
}


@pytest.fixture(params=["sequoia", "traversal"])
def rule(request):
    return request.param


@pytest.fixture(params=op_backends("verify_tree"))
def backend(request, rule):
    return request.param.with_always(rule=rule)


def _random_step(tree, batch_size, vocab, seed=0, dtype=torch.float32, spread=1.0):
    """Inputs of a step: related logits, children drawn from the draft, NaN in the rows of leaves."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, tree.num_nodes, vocab)
    target_logits = (torch.randn(shape, generator=generator) * 2).to(dtype)
    draft_logits = (target_logits + torch.randn(shape, generator=generator) * spread).to(dtype)
    tokens = torch.randint(vocab, (batch_size, tree.num_nodes), generator=generator)
    for node in range(tree.num_nodes):
        children = tree.children(node)
        num_drawn = min(len(children), vocab)
        if children:
            weights = draft_logits[:, node].double().softmax(dim=1)
            tokens[:, children] = -1
            tokens[:, children[:num_drawn]] = torch.multinomial(weights, num_drawn, generator=generator)
        else:
            draft_logits[:, node] = NAN
    return tokens, target_logits, draft_logits


def _affordable(backend, batch_size):
    """That many requests, or a few where each costs interpreted kernels a tenth of a second."""
    return batch_size if backend.at_scale else min(batch_size, 5)


def _plain(backend, *step):
    return plain_verify(*step, rule=backend.always["rule"])


def _equal(path, expected):
    return all(torch.equal(got, wanted) for got, wanted in zip(path, expected, strict=True))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_decides_as_the_plain_verifier(backend, tree, dtype):
    if not backend.at_scale and (tree == "many words" or dtype == torch.float16):
        pytest.skip("interpreted kernels run fewer cases of this grid")
    tree = TREES[tree]
    for seed, vocab in enumerate((2, 7, 33) if backend.at_scale else (7,)):
        step = _random_step(tree, 8, vocab, seed, dtype)
        temperature = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0, 1.0, 1.7, 1.0])
        top_k = torch.tensor([0, 2, 3, 0, 0, 5, 1, vocab], dtype=torch.int32)
        top_p = torch.tensor([1.0, 0.9, 1.0, 0.7, 1.0, 0.5, 1.0, 0.95])
        seeds, offsets = torch.arange(8) - 3, torch.arange(8) * 2**31
        streams = (temperature, seeds, offsets)
        assert _equal(backend(*step[:3], tree, *streams), _plain(backend, *step, tree, *streams))
        warped = backend(*step[:3], tree, *streams, top_k=top_k, top_p=top_p)
        assert _equal(warped, _plain(backend, *step, tree, *streams, top_k, top_p))


def test_results_have_their_shapes_and_dtypes(backend):
    path = backend(*_random_step(MIXED, 5, 11), MIXED, 1.0, 1, 1)
    assert path.nodes.shape == (5, 4) and path.nodes.dtype == torch.int32
    assert path.num_accepted.shape == (5,) and path.num_accepted.dtype == torch.int32
    assert path.next_token.shape == (5,) and path.next_token.dtype == torch.int64


def test_greedy_follows_the_largest_logits(backend):
    #        0
    #     1     2
    #    3 4    5
    tree = TokenTree([-1, 0, 0, 1, 1, 2])
    target_logits = torch.zeros(3, 6, 4)
    for node, best in enumerate([2, 0, 1, 3, 3, 0]):
        target_logits[:, node, best] = 5.0
    tokens = torch.tensor([[9, 0, 2, 1, 3, 1], [9, 2, 0, 3, 0, 1], [9, 1, 3, 2, 2, 2]])
    path = backend(tokens, target_logits, torch.full((3, 6, 4), 7.0), tree, 0.0, 1, 1)
    assert path.nodes.tolist() == [[0, 2, 5], [0, 1, 4], [0, -1, -1]]
    assert path.num_accepted.tolist() == [3, 3, 1]
    assert path.next_token.tolist() == [0, 3, 2]


def test_greedy_takes_the_lowest_of_tied_tokens(backend):
    tree = TokenTree([-1, 0, 0])
    target_logits = torch.tensor([[[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, 0.0, 9.0]]])
    path = backend(torch.tensor([[0, 2, 1]]), target_logits, torch.zeros(1, 3, 3), tree, 0.0, 1, 1)
    assert path.nodes.tolist() == [[0, 2]] and path.next_token.tolist() == [2]
    path = backend(torch.tensor([[0, 1, 2]]), target_logits, torch.zeros(1, 3, 3), tree, 0.0, 1, 1)
    assert path.nodes.tolist() == [[0, 1]] and path.next_token.tolist() == [0]


def test_greedy_ignores_the_draft_and_the_noise(backend):
    tokens, target_logits, draft_logits = _random_step(MIXED, 6, 5)
    plain = backend(tokens, target_logits, draft_logits, MIXED, 0.0, 1, 1)
    other = backend(tokens, target_logits, draft_logits.flip(2), MIXED, 0.0, torch.arange(6), 99, top_k=2, top_p=0.3)
    assert _equal(plain, other)


def test_a_draft_equal_to_the_target_is_accepted_whole(backend):
    tree = TokenTree.chain(5)
    batch_size = _affordable(backend, 64)
    tokens, target_logits, draft_logits = _random_step(tree, batch_size, 17, spread=0.0)
    path = backend(tokens, target_logits, draft_logits, tree, 0.8, torch.arange(batch_size), 0)
    assert path.num_accepted.tolist() == [5] * batch_size
    assert path.nodes.tolist() == [[0, 1, 2, 3, 4]] * batch_size


def test_a_draft_disjoint_from_the_target_is_rejected_whole(backend):
    batch_size = _affordable(backend, 64)
    tokens, target_logits, draft_logits = _random_step(MIXED, batch_size, 16)
    target_logits[:, :, ::2] = -INF
    tokens = torch.where(tokens % 2 == 1, tokens - 1, tokens)
    tokens[:, [2, 3]] = torch.tensor([4, 6])  # different siblings
    tokens[:, 1] = 2
    path = backend(tokens, target_logits, draft_logits, MIXED, 1.0, torch.arange(batch_size), 0)
    assert path.num_accepted.tolist() == [1] * batch_size
    assert path.nodes.tolist() == [[0, -1, -1, -1]] * batch_size
    assert bool((path.next_token % 2 == 1).all())


def test_a_single_node_samples_from_the_target(backend):
    tree = TokenTree.single()
    batch_size = _affordable(backend, 32)
    tokens, target_logits, draft_logits = _random_step(tree, batch_size, 19)
    seeds = torch.arange(batch_size)
    path = backend(tokens, target_logits, None, tree, 0.7, seeds, 3)
    noise = token_gumbel(seeds, torch.full((batch_size,), 3), 19, RESIDUAL_TAG)
    keys = torch.log_softmax(target_logits[:, 0].double() / 0.7, dim=1) + noise.double()
    assert path.next_token.tolist() == keys.argmax(dim=1).tolist()
    assert path.nodes.tolist() == [[0]] * batch_size and path.num_accepted.tolist() == [1] * batch_size
    assert _equal(backend(tokens, target_logits, draft_logits, tree, 0.7, seeds, 3), path)


# Seeds, found by search, whose coin of node 1 at offset 0 is the smallest and the largest that there are.
SEED_OF_COIN_0 = 7450826
SEED_OF_COIN_JUST_UNDER_1 = 883477


def test_the_extreme_coins(backend):
    tree = TokenTree([-1, 0])
    seeds = torch.tensor([SEED_OF_COIN_0, SEED_OF_COIN_JUST_UNDER_1])
    assert node_coins(seeds, torch.zeros(2, dtype=torch.int64), 2)[:, 1].tolist() == [0.0, 1.0 - 2.0**-24]
    tokens = torch.tensor([[0, 1], [0, 1]])
    draft_logits = torch.tensor([0.0, 0.0, -INF, 0.0]).expand(2, 2, 4)
    # probability 0 under the target: a coin of 0 does not help
    path = backend(tokens, torch.tensor([0.0, -INF, 0.0, 0.0]).expand(2, 2, 4), draft_logits, tree, 1.0, seeds, 0)
    assert path.num_accepted.tolist() == [1, 1] and 1 not in path.next_token.tolist()
    # positive, if tiny: a coin of 0 accepts it
    path = backend(tokens, torch.tensor([0.0, -60.0, 0.0, 0.0]).expand(2, 2, 4), draft_logits, tree, 1.0, seeds, 0)
    assert path.num_accepted.tolist() == [2, 1]
    # as probable under both: every coin accepts it
    one_hot = torch.tensor([-INF, 0.0, -INF, -INF]).expand(2, 2, 4)
    path = backend(tokens, one_hot, one_hot, tree, 1.0, seeds, 0)
    assert path.num_accepted.tolist() == [2, 2] and path.next_token.tolist() == [1, 1]


def test_children_that_cannot_be_draws_are_passed_over(backend):
    tree = TokenTree.kary(4, 2)
    batch_size = _affordable(backend, 256)
    generator = torch.Generator().manual_seed(0)
    target_logits = torch.randn(batch_size, 5, 6, generator=generator)
    draft_logits = torch.randn(batch_size, 5, 6, generator=generator)
    draft_logits[:, :, 5] = -INF
    seeds = torch.arange(batch_size)

    def verify(*children):
        tokens = torch.tensor([[0, *children]]).expand(batch_size, 5)
        return backend(tokens.contiguous(), target_logits, draft_logits, tree, 1.0, seeds, 0)

    # none, and a token that the draft masks: as if the tree had no children
    nothing = backend(tokens_of_root(batch_size), target_logits[:, :1], None, TokenTree.single(), 1.0, seeds, 0)
    for path in (verify(-1, -1, -1, -1), verify(5, -1, 5, 5)):
        assert path.num_accepted.tolist() == [1] * batch_size
        assert torch.equal(path.next_token, nothing.next_token)
    # a repeat decides nothing, wherever it stands
    without = verify(3, -1, 2, -1)
    assert _equal(verify(3, 3, 2, 3), without)
    assert _equal(verify(3, 5, 2, 2), without)
    accepted = without.nodes[:, 1]
    assert set(accepted.tolist()) <= {-1, 1, 3}
    if backend.at_scale:
        assert set(accepted.tolist()) == {-1, 1, 3}


def tokens_of_root(batch_size):
    return torch.zeros(batch_size, 1, dtype=torch.int64)


def test_tokens_of_probability_zero_are_never_emitted(backend):
    # One-hot, masked and cut targets against drafts that agree with them up to rounding or not at all.
    tree = TokenTree.kary(3, 2)
    batch_size, vocab = _affordable(backend, 512), 4
    seeds = torch.arange(batch_size)
    one_hot = torch.tensor([0.0, -INF, -INF, -INF])
    pair = torch.tensor([0.0, 1e-3, -INF, -INF])
    spread = torch.tensor([0.3, 0.2, 0.1, 0.0])
    tokens = torch.tensor([[0, 0, 1, 2]]).repeat(batch_size, 1)
    for target_row, possible in ((one_hot, {0}), (pair, {0, 1})):
        for draft_row in (one_hot, pair, spread, spread - 90 * torch.tensor([0.0, 1.0, 1.0, 1.0])):
            target_logits, draft_logits = (row.expand(batch_size, 4, vocab) for row in (target_row, draft_row))
            path = backend(tokens, target_logits, draft_logits, tree, 1.0, seeds, 0)
            last = path.nodes.gather(1, path.num_accepted[:, None].long() - 1).long()
            emitted = set(path.next_token.tolist())
            emitted |= {int(token) for token in tokens.gather(1, last)[last > 0]}
            assert emitted <= possible
    cut = backend(
        tokens, spread.expand(batch_size, 4, vocab), spread.expand(batch_size, 4, vocab), tree, 1.0, seeds, 0, top_k=2
    )
    assert set(cut.next_token.tolist()) <= {0, 1}


def test_a_request_depends_on_its_own_inputs_only(backend):
    step = _random_step(MIXED, 6, 9)
    temperature, seeds = torch.tensor([0.0, 0.1, 0.5, 1.0, 1.0, 2.0]), torch.arange(6)
    top_k, top_p = torch.tensor([0, 3, 0, 4, 0, 9], dtype=torch.int32), torch.tensor([1.0, 1.0, 0.6, 0.9, 1.0, 0.8])
    together = backend(*step, MIXED, temperature, seeds, seeds, top_k=top_k, top_p=top_p)
    for row in range(6):
        one = slice(row, row + 1)
        alone = backend(
            *(tensor[one] for tensor in step),
            MIXED,
            *(values[one] for values in (temperature, seeds, seeds)),
            top_k=top_k[one],
            top_p=top_p[one],
        )
        assert _equal(alone, [result[one] for result in together])


def test_numbers_stand_for_the_same_value_in_every_request(backend):
    step = _random_step(MIXED, 4, 9)
    numbers = backend(*step, MIXED, 0.7, 5, 6, top_k=4, top_p=0.8)
    tensors = backend(
        *step,
        MIXED,
        torch.full((4,), 0.7),
        torch.full((4,), 5),
        torch.full((4,), 6),
        top_k=torch.full((4,), 4, dtype=torch.int32),
        top_p=torch.full((4,), 0.8),
    )
    assert _equal(numbers, tensors)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, None), (-3, None), (9, None), (100, None), (None, 1.0), (0, 1.0)])
def test_values_that_cut_nothing_are_off(backend, top_k, top_p):
    batch_size = _affordable(backend, 32)
    step = _random_step(MIXED, batch_size, 9)
    seeds = torch.arange(batch_size)
    off = backend(*step, MIXED, 1.0, seeds, 0)
    assert _equal(backend(*step, MIXED, 1.0, seeds, 0, top_k=top_k, top_p=top_p), off)


def test_rows_of_leaves_are_never_used(backend):
    seeds = torch.arange(_affordable(backend, 32))
    tokens, target_logits, draft_logits = _random_step(MIXED, len(seeds), 9)
    poisoned = [backend(tokens, target_logits, draft_logits, MIXED, 1.0, seeds, 0)]
    for poison in (0.0, INF, -INF, 3e38):
        draft_logits[:, [3, 5, 6, 7]] = poison
        poisoned.append(backend(tokens, target_logits, draft_logits, MIXED, 1.0, seeds, 0))
    assert all(_equal(path, poisoned[0]) for path in poisoned[1:])


def test_the_roots_token_is_not_looked_at(backend):
    tokens, target_logits, draft_logits = _random_step(MIXED, 8, 9)
    expected = backend(tokens, target_logits, draft_logits, MIXED, 1.0, 1, 1)
    tokens[:, 0] = 10**9
    assert _equal(backend(tokens, target_logits, draft_logits, MIXED, 1.0, 1, 1), expected)


def test_inputs_may_be_strided(backend):
    tokens, target_logits, draft_logits = _random_step(MIXED, 5, 9)
    seeds = torch.arange(5)
    expected = backend(tokens, target_logits, draft_logits, MIXED, 1.0, seeds, 0)
    wide_tokens = torch.full((5, 20), 10**6)
    wide_tokens[:, 4:12] = tokens
    wide_target = torch.full((8, 5, 30), NAN)
    wide_target[:, :, 3:12] = target_logits.transpose(0, 1)
    wide_draft = torch.full((10, 11, 9), NAN)
    wide_draft[::2, 1:9] = draft_logits
    on_device = [tensor.to(backend.device) for tensor in (wide_tokens, wide_target, wide_draft)]
    path = backend(
        on_device[0][:, 4:12], on_device[1].transpose(0, 1)[:, :, 3:12], on_device[2][::2, 1:9], MIXED, 1.0, seeds, 0
    )
    assert _equal(path, expected)


def test_logits_may_differ_in_dtype(backend):
    batch_size = _affordable(backend, 16)
    tokens, target_logits, draft_logits = _random_step(MIXED, batch_size, 9, dtype=torch.bfloat16)
    streams = (torch.full((batch_size,), 0.9), torch.arange(batch_size), torch.arange(batch_size))
    expected = _plain(backend, tokens, target_logits, draft_logits, MIXED, *streams)
    assert _equal(backend(tokens, target_logits, draft_logits.float(), MIXED, *streams), expected)
    assert _equal(backend(tokens, target_logits.float(), draft_logits, MIXED, *streams), expected)


@pytest.mark.parametrize("vocab", [1, 2, 31, 513])
def test_vocabularies_of_odd_sizes(backend, vocab):
    batch_size = _affordable(backend, 16)
    step = _random_step(MIXED, batch_size, vocab)
    streams = (torch.full((batch_size,), 1.0), torch.arange(batch_size), torch.arange(batch_size))
    assert _equal(backend(*step, MIXED, *streams), _plain(backend, *step, MIXED, *streams))
    cuts = (torch.full((batch_size,), 2, dtype=torch.int32), torch.full((batch_size,), 0.8))
    warped = backend(*step, MIXED, *streams, top_k=cuts[0], top_p=cuts[1])
    assert _equal(warped, _plain(backend, *step, MIXED, *streams, *cuts))


def test_trees_of_1024_nodes(backend):
    if not backend.at_scale:
        pytest.skip("thousands of nodes are too many for interpreted kernels")
    streams = (torch.tensor([1.0, 0.3, 0.0]), torch.arange(3), torch.arange(3))
    for tree, vocab in ((TokenTree.kary(1023, 2), 1031), (TokenTree([-1] + [node // 4 for node in range(1023)]), 7)):
        step = _random_step(tree, 3, vocab)
        assert _equal(backend(*step, tree, *streams), _plain(backend, *step, tree, *streams))


def test_out_is_written_and_nothing_beside_it(backend):
    step = [tensor.to(backend.device) for tensor in _random_step(MIXED, 3, 9)]
    expected = backend(*step, MIXED, 1.0, 1, 2)
    nodes = torch.full((3, 8), -77, dtype=torch.int32, device=backend.device)
    num_accepted = torch.full((6,), -77, dtype=torch.int32, device=backend.device)
    next_token = torch.full((3, 2), -77, device=backend.device)
    out = VerifiedPath(nodes[:, 2:6], num_accepted[::2], next_token[:, 1])
    result = backend(*step, MIXED, 1.0, 1, 2, out=out, raw=True)
    assert all(got is given for got, given in zip(result, out, strict=True))
    assert _equal([buffer.cpu() for buffer in out], expected)
    assert bool((nodes[:, [0, 1, 6, 7]] == -77).all())
    assert bool((num_accepted[1::2] == -77).all()) and bool((next_token[:, 0] == -77).all())


def test_buffers_that_share_memory_are_refused(backend):
    inputs = [tensor.to(backend.device) for tensor in _random_step(MIXED, 3, 9)]
    seeds = torch.arange(3, device=backend.device)
    numbers = torch.full((3, 5), -77, dtype=torch.int32, device=backend.device)
    next_token = torch.full((3,), -77, device=backend.device)
    for out, message in (
        ((numbers[:, :4], numbers[:, 3], next_token), "out.nodes must share no memory with out.num_accepted"),
        ((numbers[:, :4], numbers[:, 4], seeds), "out.next_token must share no memory with seeds"),
        ((numbers[:, :4], numbers[:, 4], inputs[0][:, 5]), "out.next_token must share no memory with tokens"),
        ((numbers[:1, :4].expand(3, 4), numbers[:, 4], next_token), "out.nodes must have memory of its own"),
    ):
        with Unchanged(*inputs, seeds, numbers, next_token), pytest.raises(ValueError, match=message):
            backend(*inputs, MIXED, 1.0, seeds, 2, out=out, raw=True)


def test_inputs_are_not_changed(backend):
    inputs = [tensor.to(backend.device) for tensor in _random_step(MIXED, 3, 9)]
    streams = [tensor.to(backend.device) for tensor in (torch.ones(3), torch.arange(3), torch.arange(3))]
    copies = [tensor.clone() for tensor in (*inputs, *streams)]
    backend(*inputs, MIXED, *streams, top_k=3, top_p=0.8)
    for tensor, copy in zip((*inputs, *streams), copies, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def test_no_requests_give_no_paths(backend):
    path = backend(*_random_step(MIXED, 0, 9), MIXED, 1.0, 1, 1)
    assert path.nodes.shape == (0, 4) and path.num_accepted.shape == (0,) and path.next_token.shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("which", "row", "message"),
    [
        ("target_logits", [0.0, NAN, 1.0], r"must hold neither NaN nor \+inf, got nan in row \[1, 2\]"),
        ("target_logits", [0.0, INF, 1.0], r"must hold neither NaN nor \+inf, got inf in row \[1, 2\]"),
        ("target_logits", [-INF] * 3, r"must have a finite entry in every row, got only -inf in row \[1, 2\]"),
        ("draft_logits", [0.0, NAN, 1.0], r"must hold neither NaN nor \+inf, got nan in row \[1, 2\]"),
        ("draft_logits", [0.0, INF, 1.0], r"must hold neither NaN nor \+inf, got inf in row \[1, 2\]"),
        ("draft_logits", [-INF] * 3, r"must have a finite entry in every row, got only -inf in row \[1, 2\]"),
    ],
)
def test_bad_logits_are_refused_before_anything_is_written(backend, which, row, message, temperature):
    tree = TokenTree([-1, 0, 0, 2])
    logits = {name: torch.zeros(2, 4, 3) for name in ("target_logits", "draft_logits")}
    logits[which][1, 2] = torch.tensor(row)
    out = tuple(
        torch.full(shape, -77, dtype=dtype, device=backend.device)
        for shape, dtype in (((2, 3), torch.int32), ((2,), torch.int32), ((2,), torch.int64))
    )
    tokens = torch.tensor([[0, 1, 2, 0]] * 2)
    with pytest.raises(ValueError, match=f"^verify_tree: {which} {message}"):
        backend(tokens, *logits.values(), tree, temperature, 1, 1, out=out, debug=True)
    assert all(bool((buffer == -77).all()) for buffer in out)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("temperature must be 0 or a finite number", {"temperature": -0.5}),
        ("temperature must be 0 or a finite number", {"temperature": torch.tensor([1.0, NAN])}),
        ("temperature must be 0 or a finite number", {"temperature": INF}),
        (r"top_p must be in \(0, 1\], got 0.0", {"top_p": 0.0}),
        (r"top_p must be in \(0, 1\], got 1.5", {"top_p": torch.tensor([1.0, 1.5])}),
        (r"top_p must be in \(0, 1\], got nan", {"top_p": NAN}),
        (r"tokens must be in 0..4, or -1 for none, got 5", {"tokens": torch.tensor([[0, 1], [0, 5]])}),
        (r"tokens must be in 0..4, or -1 for none, got -2", {"tokens": torch.tensor([[0, -2], [0, 1]])}),
    ],
)
def test_bad_values_are_refused(backend, message, changes):
    with pytest.raises(ValueError, match=f"^verify_tree: {message}"):
        backend(**_arguments(changes), debug=True)


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_what_a_loop_cannot_mean_is_refused_under_debug(backend, rule):
    tree = TokenTree([-1, 0, 0, 1])
    generator = torch.Generator().manual_seed(0)
    target_logits, draft_logits = (torch.randn(2, 4, 5, generator=generator) for _ in range(2))
    draft_logits[1, 0, 3] = -INF
    draft_logits[:, 2:] = NAN  # leaves
    tokens = torch.tensor([[0, 3, 2, 2], [0, 4, 2, -1]])
    good = {
        "tokens": tokens, "target_logits": target_logits, "draft_logits": draft_logits, "tree": tree,
        "temperature": 1.0, "seeds": torch.tensor([5, 5]), "offsets": torch.tensor([0, 4]), "rule": rule,
    }  # fmt: skip
    masked, repeated = tokens.clone(), tokens.clone()
    masked[1, 1], repeated[0, 1] = 3, 2
    refused = [
        (
            {"offsets": torch.tensor([4, 4])},
            r"offsets must differ between requests of one seed above temperature 0, "
            r"got offset 4 of seed 5 in requests \[0, 1\], which would share their noise; pass a seed of its own",
        ),
        (
            {"tokens": masked},
            "tokens must be draws from their parents' draft_logits above temperature 0, "
            "got token 3 at node 1 of request 1, whose draft logit is -inf; pass the logits that",
        ),
        (
            {"tokens": repeated},
            "tokens must differ between siblings above temperature 0, got 2 at the nodes 1 and 2 of request 0; draw",
        ),
    ]
    for stacked in (False, True):
        good["tree"] = _topology([tree, tree], backend.device) if stacked else tree
        plain = backend(**good)
        assert all(torch.equal(part, again) for part, again in zip(plain, backend(**good, debug=True)))
        for changes, message in refused:
            out = tuple(torch.full_like(part, -77, device=backend.device) for part in plain)
            with pytest.raises(ValueError, match=f"^verify_tree: {message}"):
                backend(**{**good, **changes}, out=out, debug=True)
            assert all(bool((buffer == -77).all()) for buffer in out)
            backend(**{**good, **changes})  # not unless asked for
            backend(**{**good, **changes, "temperature": 0.0}, debug=True)  # any tokens may be offered, without noise


def test_children_that_could_not_be_drawn_pass_under_debug(backend):
    """Any number of siblings may be -1, and what stands at the vocabulary's first token says nothing about them."""
    draft_logits = torch.full((1, 4, 5), -INF)
    draft_logits[:, 0, 3] = 0.0
    tokens = torch.tensor([[0, 3, -1, -1]])
    path = backend(tokens, torch.zeros(1, 4, 5), draft_logits, TokenTree([-1, 0, 0, 0]), 1.0, 1, 2, debug=True)
    assert int(path.num_accepted) <= 2


def test_a_topology_that_contradicts_itself_is_refused_under_debug(backend):
    tree = _topology([TokenTree([-1, 0, 0, 1]), TokenTree([-1, 0, 1, 1])], backend.device)
    mask = tree.ancestor_mask.clone()
    mask[1, 3] = 0b1101
    arguments = _arguments({"tokens": torch.tensor([[0, 1, 2, 3]] * 2), "temperature": 0.0})
    arguments |= {"target_logits": torch.zeros(2, 4, 5), "draft_logits": torch.zeros(2, 4, 5)}
    backend(**{**arguments, "tree": tree}, debug=True)
    message = r"tree.ancestor_mask must be \[11\], as its parents say, at node 3 of request 1, got \[13\]"
    with pytest.raises(ValueError, match=f"^verify_tree: {message}"):
        backend(**{**arguments, "tree": tree._replace(ancestor_mask=mask)}, debug=True)


LOGITS = torch.zeros(2, 2, 5)


def _arguments(changes):
    arguments = {
        "tokens": torch.zeros(2, 2, dtype=torch.int64),
        "target_logits": LOGITS,
        "draft_logits": LOGITS,
        "tree": TokenTree([-1, 0]),
        "temperature": 1.0,
        "seeds": 0,
        "offsets": 0,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "tokens must be a tensor, got list", {"tokens": [[0, 1]]}),
        (TypeError, "tokens must have dtype int64, got int32", {"tokens": torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, r"tokens must have shape \[batch, nodes\], got \[2\]", {"tokens": torch.zeros(2).long()}),
        (ValueError, r"tokens must have shape .* = \[2, 2\], got \[2, 3\]", {"tokens": torch.zeros(2, 3).long()}),
        (TypeError, "target_logits must be a tensor, got NoneType", {"target_logits": None}),
        (TypeError, "target_logits must have dtype", {"target_logits": LOGITS.int()}),
        (ValueError, r"target_logits must have shape .*, got \[2, 5\]", {"target_logits": LOGITS[0]}),
        (
            ValueError,
            r"target_logits must have shape .* = \[2, 2, 5\], got \[2, 1, 5\]",
            {"target_logits": LOGITS[:, :1]},
        ),
        (ValueError, "target_logits must be contiguous in its last", {"target_logits": torch.zeros(2, 5, 2).mT}),
        (ValueError, "target_logits must have at least one token", {"target_logits": LOGITS[:, :, :0]}),
        (ValueError, "target_logits must be on cpu, got meta", {"target_logits": LOGITS.to("meta")}),
        (TypeError, "draft_logits must be a tensor for a tree of 2 nodes, got None", {"draft_logits": None}),
        (TypeError, "draft_logits must have dtype", {"draft_logits": LOGITS.bool()}),
        (
            ValueError,
            r"draft_logits must have shape \[batch, nodes, vocab\] = \[2, 2, 5\], got \[2, 2, 4\]; pad",
            {"draft_logits": LOGITS[:, :, :4]},
        ),
        (ValueError, r"draft_logits must have shape .*, got \[1, 2, 5\]$", {"draft_logits": LOGITS[:1]}),
        (ValueError, "draft_logits must be on cpu, got meta", {"draft_logits": LOGITS.to("meta")}),
        (TypeError, "tree must be a TokenTree or a Topology, got list", {"tree": [-1, 0]}),
        (ValueError, "tree must have at most 1024 nodes, got 1025", {"tree": TokenTree.kary(1024, 2)}),
        (TypeError, "temperature must have dtype float32", {"temperature": torch.ones(2, dtype=torch.float16)}),
        (ValueError, r"temperature must have shape \[batch\] = \[2\]", {"temperature": torch.ones(1)}),
        (TypeError, "seeds must be an integer", {"seeds": "7"}),
        (ValueError, "offsets must fit into int64", {"offsets": -(2**63) - 1}),
        (TypeError, "top_k must be an integer", {"top_k": 2.5}),
        (TypeError, "top_k must have dtype int32", {"top_k": torch.ones(2, dtype=torch.int64)}),
        (ValueError, r"top_k must have shape \[batch\]", {"top_k": torch.ones(3, dtype=torch.int32)}),
        (TypeError, "top_p must be a number", {"top_p": "0.9"}),
        (TypeError, "out must be a triple", {"out": torch.zeros(2)}),
        (
            TypeError,
            "out.num_accepted must be a tensor",
            {"out": (torch.zeros(2, 2).int(), None, torch.zeros(2).long())},
        ),
        (
            ValueError,
            r"out.nodes must have shape \[batch, levels\] = \[2, 2\], got \[2, 3\]",
            {"out": (torch.zeros(2, 3).int(), torch.zeros(2).int(), torch.zeros(2).long())},
        ),
        (
            TypeError,
            "out.next_token must have dtype int64",
            {"out": (torch.zeros(2, 2).int(), torch.zeros(2).int(), torch.zeros(2).int())},
        ),
        (ValueError, "temperature must fit into float32, got 1e[+]39", {"temperature": 1e39}),
        (ValueError, "temperature must be 0 or a finite number of at least 1e-05, got 1e-46", {"temperature": 1e-46}),
        (ValueError, "top_p must fit into float32, got 1e-50", {"top_p": 1e-50}),
        (ValueError, "top_k must fit into int32, got an integer of 1329 bits", {"top_k": 10**400}),
        (TypeError, "backend must be a string, got NoneType", {"backend": None}),
        (TypeError, "debug must be a bool, got int", {"debug": 1}),
        (ValueError, "backend must be one of auto, .*, got 'fastest'", {"backend": "fastest"}),
    ],
)
def test_bad_arguments_are_refused_by_name(error, message, changes):
    with pytest.raises(error, match=f"^verify_tree: {message}"):
        verify_tree(**_arguments(changes))


# A tree for each request, and rules

OWN_TREES = [MIXED, TokenTree.chain(8), TokenTree.kary(7, 2), TokenTree([-1, 0, 0, 1, 1, 1, 3, 3])]


def _topology(trees, device="cpu"):
    return Topology.stack([tree.tensors(device) for tree in trees])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("warps", [{}, {"top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_request_is_decided_by_its_own_tree(backend, temperature, warps, dtype):
    """A batch with a tree for each request gives what each request alone gives with its tree, as it would shared."""
    trees = OWN_TREES if backend.at_scale else OWN_TREES[::3]
    steps = [_random_step(tree, 1, 13, seed, dtype) for seed, tree in enumerate(trees)]
    step = [torch.cat(parts) for parts in zip(*steps)]
    seeds = torch.arange(len(trees)) + 3
    topology = _topology(trees, backend.device)
    path = backend(*step, topology, temperature, seeds, 5, **warps)
    assert path.nodes.shape == (len(trees), topology.num_levels)
    for index, (alone, tree) in enumerate(zip(steps, trees)):
        expected = backend(*alone, tree, temperature, seeds[index : index + 1], 5, **warps)
        assert path.nodes[index, : tree.num_levels].tolist() == expected.nodes[0].tolist()
        assert (path.nodes[index, tree.num_levels :] == -1).all()
        assert path.num_accepted[index] == expected.num_accepted[0]
        assert path.next_token[index] == expected.next_token[0]


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_unused_nodes_decide_nothing(backend, temperature, rule):
    """Trees of fewer nodes than the others leave the last ones unused, with whatever tokens."""
    trees = [MIXED, TokenTree.chain(3), TokenTree.single(), TokenTree([-1, 0, 0, 1])]
    num_nodes = max(map(len, trees))
    steps = [_random_step(tree, 1, 13, seed) for seed, tree in enumerate(trees)]
    padded = [
        torch.cat(
            [torch.cat((part, part[:, :1].expand(-1, num_nodes - part.shape[1], *part.shape[2:])), 1) for part in parts]
        )
        for parts in zip(*steps)
    ]
    padded[2][2] = torch.nan  # no node of the lone root's has children
    parents = torch.tensor([tree.parents + [-1] * (num_nodes - len(tree)) for tree in trees])
    topology = Topology.from_parents(parents.to(backend.device))
    seeds = torch.arange(len(trees)) + 3
    path = backend(*padded, topology, temperature, seeds, 5, rule=rule, debug=temperature == 0)
    for index, (alone, tree) in enumerate(zip(steps, trees)):
        expected = backend(*alone, tree, temperature, seeds[index : index + 1], 5, rule=rule)
        assert path.nodes[index, : tree.num_levels].tolist() == expected.nodes[0].tolist()
        assert (path.nodes[index, tree.num_levels :] == -1).all()
        assert path.num_accepted[index] == expected.num_accepted[0]
        assert path.next_token[index] == expected.next_token[0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_copies_of_a_tree_are_as_good_as_one(backend, temperature):
    step = _random_step(MIXED, 3, 13)
    copies = _topology([MIXED] * 3, backend.device)
    shared = MIXED.tensors(backend.device)
    expected = backend(*step, MIXED, temperature, torch.arange(3), 5, top_p=0.9)
    assert _equal(backend(*step, copies, temperature, torch.arange(3), 5, top_p=0.9), expected)
    assert _equal(backend(*step, shared, temperature, torch.arange(3), 5, top_p=0.9), expected)
    strided = copies._replace(
        first_child=copies.first_child.T.contiguous().T, num_children=copies.num_children.T.contiguous().T
    )
    assert _equal(backend(*step, strided, temperature, torch.arange(3), 5, top_p=0.9), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 3}, "tree.num_levels must be at least 4, got 3"),
        ({"max_branching": 2}, "tree.max_branching must be at least 3, got 2"),
        ({"first_child": -1}, "tree must have the children of node 0 behind it and below node 8, got 3 from node 0"),
        ({"first_child": 7}, "tree must have the children of node 0 behind it and below node 8, got 3 from node 8"),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_a_topology_that_is_no_tree_is_refused(backend, changes, message, shared):
    if backend.device.type != "cpu":
        pytest.skip("values are checked on a CPU only")
    step = _random_step(MIXED, 2, 13)
    topology = MIXED.tensors() if shared else _topology([TokenTree.chain(8), MIXED])
    if "first_child" in changes:
        changes = {"first_child": topology.first_child + changes["first_child"]}
    if not shared and "first_child" in changes:
        changes["first_child"][0] = topology.first_child[0]
    if not shared and "num_levels" in changes:
        topology = _topology([MIXED, MIXED])
    with pytest.raises(ValueError, match=f"^verify_tree: {message}"):
        backend(*step, topology._replace(**changes), 0.7, 0, 0)


@pytest.mark.parametrize("num_nodes", [9, 1023])
def test_a_node_with_two_parents_is_refused(backend, num_nodes):
    """Its depth would be that of the last one: a walk through the others is longer than the outputs."""
    if backend.device.type != "cpu":
        pytest.skip("values are checked on a CPU only")
    chain = TokenTree.chain(num_nodes).tensors()
    first_child, num_children = chain.first_child.clone(), chain.num_children.clone()
    first_child[2], num_children[2] = 3, 1
    num_children[1] = 2  # nodes 2 and 3, and node 3 is a child of node 2, too
    hostile = chain._replace(first_child=first_child, num_children=num_children, max_branching=2)
    step = _random_step(TokenTree.chain(num_nodes), 1, 5)
    message = (
        "^verify_tree: tree must have the children of node 2 behind those of the nodes before it, got 1 from node 3"
    )
    with pytest.raises(ValueError, match=message):
        backend(*step, hostile, 0.7, 0, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_levels": 1.5}, TypeError, "tree.num_levels must be an integer, got float"),
        ({"num_levels": -1}, ValueError, r"tree.num_levels must be in 1..8, got -1"),
        ({"num_levels": 1 << 45}, ValueError, r"tree.num_levels must be in 1..8, got"),
        ({"max_branching": None}, TypeError, "tree.max_branching must be an integer, got NoneType"),
        ({"parents": None}, TypeError, "tree.parents must be a tensor, got NoneType"),
        ({"first_child": torch.tensor(3)}, ValueError, r"tree.first_child must have shape \[nodes\] or"),
    ],
)
def test_fields_of_a_topology_are_checked_by_name(changes, error, message):
    with pytest.raises(error, match=f"^verify_tree: {message}"):
        verify_tree(*_random_step(MIXED, 2, 13), MIXED.tensors()._replace(**changes), 0.7, 0, 0)


def test_topologies_of_wrong_structure_are_refused():
    step, topology = _random_step(MIXED, 2, 13), _topology([MIXED] * 3)
    with pytest.raises(ValueError, match=r"tree.first_child must have shape \[nodes\] or \[batch, nodes\] with 8"):
        verify_tree(*step, topology, 0.7, 0, 0)
    with pytest.raises(TypeError, match=r"tree.num_children must have dtype int32, got int64"):
        verify_tree(*step, MIXED.tensors()._replace(num_children=MIXED.tensors().num_children.long()), 0.7, 0, 0)


def test_a_rule_of_ones_own_is_a_backend_that_knows_it(monkeypatch):
    """A toy rule: nothing is accepted, and the next token is token 1."""
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
    step = _random_step(MIXED, 2, 13)
    with pytest.raises(ValueError, match=r"^verify_tree: rule must be one of sequoia, traversal, got 'toy'"):
        verify_tree(*step, MIXED, 1.0, 0, 0, rule="toy")
    with pytest.raises(TypeError, match=r"^verify_tree: rule must be a string, got int"):
        verify_tree(*step, MIXED, 1.0, 0, 0, rule=1)
    register_rule(VerificationRule("toy", lambda tree, acceptance: 1.0))
    for name in ("auto", "reference", "host"):
        if name in ("auto", "reference") or backends.unavailable_reason("verify_tree", name) is None:
            with pytest.raises(BackendUnavailableError, match="knows the rule"):
                verify_tree(*step, MIXED, 1.0, 0, 0, rule="toy", backend=name)

    def run(inputs, outputs):
        outputs.nodes.fill_(-1)
        outputs.nodes[:, 0] = 0
        outputs.num_accepted.fill_(1)
        outputs.next_token.fill_(1)

    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", (*backends.AUTO_ORDER["cpu"], "toy"))
    try:
        backends.register_backend(
            "verify_tree", "toy", lambda inputs: None if inputs.rule == "toy" else "knows the rule toy", run
        )
        path = verify_tree(*step, MIXED, 1.0, 0, 0, rule="toy")
        assert path.nodes.tolist() == [[0, -1, -1, -1]] * 2 and path.next_token.tolist() == [1, 1]
        expected = verify_tree(*step, MIXED, 1.0, 0, 0, backend="reference")
        assert _equal(verify_tree(*step, MIXED, 1.0, 0, 0), expected)
    finally:
        backends.register_room("verify_tree", package="sequoia_kernels.ops.verify_tree")


def _operator_inputs(partial=False):
    tokens, target_logits, draft_logits = _random_step(MIXED, 3, 9)
    topology = MIXED.tensors("cpu")
    seeds = torch.arange(3)
    warps = (torch.tensor([0.0, 0.7, 1.0]), seeds, seeds, torch.tensor([2, 0, 5], dtype=torch.int32), torch.ones(3))
    shape = (topology.first_child, topology.num_children, MIXED.num_levels, MIXED.max_branching)
    draft_logits, options = draft_logits.nan_to_num(), (None, None)
    if partial:
        ids = torch.tensor([4, 8, 0, 1])
        draft_logits = draft_logits[:, :, ids].contiguous()
        options = VocabularyMap.of(ids, 9).target_to_draft, torch.arange(MIXED.num_nodes) % 3 == 1
    return (tokens, target_logits, draft_logits, *shape, *warps, "sequoia", *options, False, "reference")


@pytest.mark.parametrize("partial", [False, True])
def test_the_torch_operators_keep_their_promises(partial):
    operators = torch.ops.sequoia.verify_tree
    inputs = _operator_inputs(partial)
    check_fake_matches_real(operators.default, *inputs)
    torch.library.opcheck(operators.default, inputs)
    out = (torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64))
    torch.library.opcheck(operators.out, (*inputs, *out))


def test_it_traces_without_a_graph_break():
    inputs = _operator_inputs()

    def verify(*tensors):
        return torch.ops.sequoia.verify_tree(*tensors, *inputs[3:])

    compiled = torch.compile(verify, backend="eager", fullgraph=True)
    assert _equal(compiled(*inputs[:3]), verify(*inputs[:3]))


def test_a_tree_whose_tensors_are_not_made_yet_traces_too():
    """And one function that gets several trees takes each for what it is."""

    def verify(tree, *tensors):
        return verify_tree(*tensors, tree, 0.8, 1, 2)

    compiled = torch.compile(verify, backend="eager", fullgraph=True)
    parents = [[-1, 0, 0, 1], [-1, 0, 1, 2], [-1, 0, 0, 0], [-1, *range(39)]]
    for _ in range(2):
        for listed in parents:
            tree = TokenTree(listed)
            step = [part.nan_to_num() for part in _random_step(tree, 2, 9)]
            assert _equal(compiled(tree, *step), verify(TokenTree(listed), *step))
            assert _equal(compiled(tree, *step), verify(tree, *step))


def test_debug_looks_for_no_values_where_there_are_none():
    step, topology = [part.nan_to_num() for part in _random_step(MIXED, 3, 9)], _topology([MIXED] * 3)
    temperature, seeds = torch.tensor([0.0, 0.7, 1.0]), torch.arange(3)

    def verify(*arguments):
        return verify_tree(*arguments, topology, temperature, seeds, seeds, debug=True)

    compiled = torch.compile(verify, backend="eager", fullgraph=True)
    assert _equal(compiled(*step), verify(*step))
    with FakeTensorMode() as mode:
        *step, temperature, seeds = (mode.from_tensor(part) for part in (*step, temperature, seeds))
        topology = Topology(*map(mode.from_tensor, topology[:-2]), *topology[-2:])
        assert verify(*step).nodes.shape == (3, MIXED.num_levels)
    meta = Topology(*(part.to("meta") for part in MIXED.tensors()[:-2]), *MIXED.tensors()[-2:])
    tokens = torch.empty(3, len(MIXED), dtype=torch.int64, device="meta")
    logits = torch.empty(3, len(MIXED), 9, device="meta")
    assert verify_tree(tokens, logits, logits, meta, 1.0, 1, 2, debug=True).nodes.shape == (3, MIXED.num_levels)
