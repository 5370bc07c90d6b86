"""The C++ backends of the ops: agreement with the reference on many random cases, and what only they could get wrong.

The tests of the ops run on these backends as well. Here: the random streams bit for bit, the shortcuts (bounds that
leave out work, selection without sorting, two-number residuals, in-place moves), every pattern of the 16-bit types.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from support import philox as oracle
from support.packed_masks import RANDOM, pack, pack_tree, tree_parents, unpack
from support.plain_verifier import plain_verify
from support.tolerances import LOG_NORMALISER, assert_close

from sequoia_kernels import TokenTree, rng
from sequoia_kernels.ops import (
    CacheTable,
    compact_kv_cache_,
    sample_without_replacement,
    verify_tree,
    warped_logsumexp,
)
from sequoia_kernels.ops.host_calls import BOOLEAN, ELEMENT_TYPES
from sequoia_kernels.ops.tree_attention.op import num_tree_slots
from sequoia_kernels.ops.verify_tree.reference import node_decisions

_host = pytest.importorskip("sequoia_kernels._host", reason="the C++ module sequoia_kernels._host is not built")

SEEDS = [0, 1, -1, 2**32, -(2**63), 2**63 - 1]
OFFSETS = [0, 2**32 - 1, 2**40 + 3, -1, 5, 6]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _streams(generator, count):
    return tuple(torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) for _ in range(2))


# ---- random streams ----


@pytest.mark.parametrize("vocab", [1, 3, 4, 63, 64, 65, 515])
def test_token_words_are_those_of_the_oracle(vocab):
    for seed, offset in zip(SEEDS, OFFSETS):
        for tag in (rng.DRAFT_TAG, rng.RESIDUAL_TAG):
            words = np.full(vocab + 1, 0xDEADBEEF, dtype=np.uint32)
            _host.token_words(seed, offset, tag, vocab, words.ctypes.data)
            assert np.array_equal(words[:vocab], oracle.token_words(seed, offset, vocab, tag))
            assert words[vocab] == 0xDEADBEEF


def test_coins_equal_those_of_torch_and_noise_differs_by_the_logarithm_only():
    seeds, offsets = torch.tensor(SEEDS), torch.tensor(OFFSETS)
    coins = torch.empty(len(SEEDS), 67)
    _host.node_coins(seeds.data_ptr(), offsets.data_ptr(), len(SEEDS), 67, coins.data_ptr())
    assert torch.equal(coins, rng.node_coins(seeds, offsets, 67))
    noise = torch.empty(len(SEEDS), 4099)
    _host.token_gumbel(seeds.data_ptr(), offsets.data_ptr(), len(SEEDS), 4099, rng.RESIDUAL_TAG, noise.data_ptr())
    # both take two float32 logarithms, each good to a unit in the last place of numbers below 32
    torch.testing.assert_close(noise, rng.token_gumbel(seeds, offsets, 4099, rng.RESIDUAL_TAG), rtol=3e-7, atol=5e-7)


# ---- loading ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_16_bit_logit_is_loaded_exactly(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = patterns[torch.isfinite(patterns)][:, None]
    log_normaliser, cut = warped_logsumexp(logits, 0.0, backend="host")
    assert torch.equal(log_normaliser, logits[:, 0].float())
    assert torch.equal(cut, logits[:, 0].float())


# ---- sample_without_replacement ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab, num_rows", [(1, 4), (2, 8), (3, 8), (64, 8), (65, 8), (512, 12), (32003, 3)])
def test_draws_equal_the_reference(vocab, num_rows, dtype):
    generator = torch.Generator().manual_seed(vocab)
    for temperature in (0.0, 0.1, 1.0, 3.0):
        for num_samples in (1, 4, 128):
            logits = (torch.randn(num_rows, vocab, generator=generator) * 3).to(dtype)
            streams = _streams(generator, num_rows)
            got, wanted = (
                sample_without_replacement(logits, num_samples, temperature, *streams, backend=backend)
                for backend in ("host", "reference")
            )
            assert torch.equal(got.tokens, wanted.tokens)
            assert_close(got.log_normaliser, wanted.log_normaliser, LOG_NORMALISER, dtype)


def test_stretches_without_a_chance_are_left_out_without_changing_a_draw():
    generator = torch.Generator().manual_seed(0)
    # A few tokens that lead by more than the noise spans, tokens that trail them by nearly as much, and masked ones.
    logits = torch.randn(40, 2000, generator=generator) - 40
    logits[:, [3, 700, 701, 1999]] += 40
    logits[:, 64:256] = -math.inf
    logits[:, 300:310] += 20
    streams = _streams(generator, 40)
    for num_samples in (1, 4, 6, 20):
        got, wanted = (
            sample_without_replacement(logits, num_samples, 1.0, *streams, backend=backend)
            for backend in ("host", "reference")
        )
        assert torch.equal(got.tokens, wanted.tokens)


def test_equal_logits_are_drawn_by_their_noise_alone():
    logits = torch.zeros(200, 1000)
    streams = _streams(torch.Generator().manual_seed(1), 200)
    got = sample_without_replacement(logits, 128, 1.0, *streams, backend="host")
    noise = rng.token_gumbel(*streams, 1000, rng.DRAFT_TAG)
    assert torch.equal(got.tokens, noise.sort(dim=1, descending=True, stable=True).indices[:, :128])


# ---- warped_logsumexp ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 64, 1000, 5003])
def test_cuts_equal_the_reference(vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    num_rows = 12
    top_k = torch.tensor([0, 1, 2, 5, 50, 10**6] * 2, dtype=torch.int32)
    top_p = torch.tensor([0.05, 0.3, 0.5, 0.9, 0.99, 1.0]).repeat_interleave(2)
    temperature = torch.tensor([0.0, 0.1, 0.7, 1.0, 2.0, 5.0]).repeat(2)
    for logits in (
        torch.randn(num_rows, vocab, generator=generator) * 3,
        torch.randint(-3, 3, (num_rows, vocab), generator=generator).float(),  # many ties
        torch.randn(num_rows, vocab, generator=generator).masked_fill(torch.arange(vocab) % 3 == 1, -math.inf),
    ):
        rounded = logits.to(dtype)
        for warps in ((None, None), (top_k, None), (None, top_p), (top_k, top_p)):
            got = warped_logsumexp(rounded, temperature, *warps, backend="host")
            # float64 on the same rounded logits decides, since these sums are float64 in C++
            wanted = warped_logsumexp(rounded.double(), temperature, *warps, backend="reference")
            assert torch.equal(got.cut.double(), wanted.cut)
            assert_close(got.log_normaliser, wanted.log_normaliser, LOG_NORMALISER, dtype)


# ---- verify_tree ----


def _random_step(generator, choices, tree, batch_size, vocab, temperature):
    """Related logits with children drawn from the draft, and NaN where nothing may be read."""
    shape = (batch_size, tree.num_nodes, vocab)
    target_logits = torch.randn(shape, generator=generator) * choices.choice([0.5, 2, 6])
    draft_logits = target_logits + torch.randn(shape, generator=generator) * choices.choice([0.1, 1, 3])
    dtype = choices.choice(DTYPES)
    target_logits, draft_logits = target_logits.to(dtype), draft_logits.to(choices.choice([dtype, torch.float32]))
    if choices.random() < 0.3:
        draft_logits[..., 1::3] = -math.inf
    tokens = torch.full((batch_size, tree.num_nodes), -1)
    for node in range(tree.num_nodes):
        children = tree.children(node)
        if children:
            drawn = sample_without_replacement(
                draft_logits[:, node], len(children), temperature, *_streams(generator, batch_size), backend="reference"
            )
            tokens[:, children] = drawn.tokens
        else:
            draft_logits[:, node] = math.nan
    return tokens, target_logits, draft_logits


@pytest.mark.parametrize("seed", range(8))
def test_paths_equal_the_reference(seed):
    choices, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_accepted = 0
    for _ in range(40):
        tree = TokenTree(tree_parents(RANDOM, choices.choice([1, 2, 5, 16, 40]), seed=choices.randrange(10**6)))
        batch_size, vocab = choices.choice([1, 2, 5]), choices.choice([1, 2, 3, 17, 512, 2000])
        temperature = torch.tensor([choices.choice([0.0, 0.1, 0.6, 1.0, 2.0]) for _ in range(batch_size)])
        top_k = torch.tensor([choices.choice([0, 1, 5, 50]) for _ in range(batch_size)], dtype=torch.int32)
        top_p = torch.tensor([choices.choice([0.1, 0.9, 1.0]) for _ in range(batch_size)])
        warp = choices.choice([{}, {}, {"top_k": top_k}, {"top_p": top_p}, {"top_k": top_k, "top_p": top_p}])
        step = _random_step(generator, choices, tree, batch_size, vocab, temperature)
        streams = _streams(generator, batch_size)
        got, wanted = (
            verify_tree(*step, tree, temperature, *streams, backend=backend, **warp)
            for backend in ("host", "reference")
        )
        for field, left, right in zip(got._fields, got, wanted, strict=True):
            assert torch.equal(left, right), field
        num_accepted += int((got.num_accepted - 1).sum())
    assert num_accepted > 20  # both branches of every decision were taken


def test_siblings_are_renormalised_where_the_first_held_all_of_the_mass():
    """Each rejected token outweighs those behind it by e^60: weights relative to the first one would all be 0."""
    tree = TokenTree.kary(7, 2)
    vocab = 40
    draft_logits = torch.full((200, tree.num_nodes, vocab), math.nan, dtype=torch.float64)
    draft_logits[:, 0] = -60.0 * torch.arange(vocab)
    generator = torch.Generator().manual_seed(0)
    target_logits = torch.randn(200, tree.num_nodes, vocab, generator=generator, dtype=torch.float64)
    target_logits[:, 0, 3:7] += 2  # what earlier siblings leave over goes to later ones often enough
    tokens = torch.arange(-1, 7).expand(200, 8).contiguous()
    for dtype in (torch.float64, torch.float32):
        for temperature in (1.0, 0.1):
            streams = _streams(generator, 200)
            logits = (target_logits.to(dtype), draft_logits.to(dtype))
            got, wanted = (
                verify_tree(tokens, *logits, tree, temperature, *streams, backend=backend)
                for backend in ("host", "reference")
            )
            assert torch.equal(got.nodes, wanted.nodes)
            assert torch.equal(got.next_token, wanted.next_token)
            if temperature == 1.0:
                assert len(got.nodes[:, 1].unique()) == 8  # no child, and each of the seven


def test_earlier_drafts_still_count_where_later_siblings_were_renormalised():
    """Target and draft differ by little, so what the first draft takes from later siblings is a large part of it."""
    tree = TokenTree.kary(5, 2)
    vocab = 12
    # Rejecting the first child takes a coin near 1: keep the streams that have one.
    seeds, offsets = torch.arange(400_000), torch.zeros(400_000, dtype=torch.int64)
    seeds = seeds[rng.node_coins(seeds, offsets, 2)[:, 1] > 0.9994]
    assert len(seeds) > 200
    draft_logits = torch.full((len(seeds), tree.num_nodes, vocab), math.nan, dtype=torch.float64)
    draft_logits[:, 0] = torch.cat((torch.zeros(1), torch.linspace(-9.5, -10.5, vocab - 1)))
    target_logits = torch.zeros_like(draft_logits)
    # The residual of token x is (ratio(x) - 1) draft(x) where that is positive: about 0.0007 all together.
    ratios = torch.tensor([1.0, 1.5, 0.5, 1.2, 4.0, 1.1] + [3.0] * (vocab - 6), dtype=torch.float64)
    target_logits[:, 0] = draft_logits[:, 0] + ratios.log()
    tokens = torch.arange(-1, 5).expand(len(seeds), 6).contiguous()
    got, wanted = (
        verify_tree(tokens, target_logits, draft_logits, tree, 1.0, seeds, offsets[: len(seeds)], backend=backend)
        for backend in ("host", "reference")
    )
    assert torch.equal(got.nodes, wanted.nodes)
    assert torch.equal(got.next_token, wanted.next_token)
    assert len(got.nodes[:, 1].unique()) > 1


def test_an_empty_residual_is_the_target_without_the_drawn_tokens():
    """The draft's only token that the target lacks is too rare to show in a sum: what is left over is 0 everywhere."""
    tree = TokenTree.chain(2)
    logits = torch.zeros(300, 2, 5)
    logits[:, 0, 4] = -60.0
    tokens = torch.tensor([[0, 4]]).expand(300, 2).contiguous()
    streams = _streams(torch.Generator().manual_seed(3), 300)
    got, wanted = (
        verify_tree(tokens, logits, logits, tree, 1.0, *streams, top_k=4, backend=backend)
        for backend in ("host", "reference")
    )
    assert torch.equal(got.next_token, wanted.next_token)
    assert (got.num_accepted == 1).all()
    assert got.next_token.unique().tolist() == [0, 1, 2, 3]


RULES = ["sequoia", "traversal"]


def _assert_decided_plainly(rule, tree, step, temperature, streams, top_k=None, top_p=None):
    """Host and plain verifier decide alike; returns the path."""
    got = verify_tree(*step, tree, temperature, *streams, top_k=top_k, top_p=top_p, rule=rule, backend="host")
    wanted = plain_verify(*step, tree, temperature, *streams, top_k, top_p, rule=rule)
    for field, left, right in zip(got._fields, got, wanted, strict=True):
        assert torch.equal(left, right), field
    return got


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(8))
def test_random_trees_are_decided_as_by_the_plain_verifier(rule, seed):
    choices, generator = random.Random(100 + seed), torch.Generator().manual_seed(100 + seed)
    num_accepted = 0
    for _ in range(25):
        tree = TokenTree(tree_parents(RANDOM, choices.choice([1, 2, 6, 12, 40, 90]), seed=choices.randrange(10**6)))
        batch_size = choices.choice([1, 2, 4])
        vocab = choices.choice([1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 511, 513, 1500, 5003])
        temperature = torch.tensor([choices.choice([0.0, 0.1, 0.6, 1.0, 2.0]) for _ in range(batch_size)])
        top_k = torch.tensor([choices.choice([0, 1, 2, 5, 50, 4000]) for _ in range(batch_size)], dtype=torch.int32)
        top_p = torch.tensor([choices.choice([0.05, 0.5, 0.9, 0.99, 1.0]) for _ in range(batch_size)])
        warp = choices.choice([(None, None), (None, None), (top_k, None), (None, top_p), (top_k, top_p)])
        step = _random_step(generator, choices, tree, batch_size, vocab, temperature)
        path = _assert_decided_plainly(rule, tree, step, temperature, _streams(generator, batch_size), *warp)
        num_accepted += int((path.num_accepted - 1).sum())
    assert num_accepted > 20


@pytest.mark.parametrize("top_k", [None, (300_000, 50)])
def test_nodes_whose_rows_were_lent_meanwhile_load_them_again(top_k):
    """The rows of ten nodes of this size are kept; the first four are come back to when theirs are other nodes'."""
    tree, vocab = TokenTree.chain(14), 400_003
    generator = torch.Generator().manual_seed(5)
    target_logits = (torch.randn(2, tree.num_nodes, vocab, generator=generator) * 3).to(torch.bfloat16)
    draft_logits = (target_logits + torch.randn(target_logits.shape, generator=generator) * 2).to(torch.bfloat16)
    temperature, streams = torch.tensor([0.6, 1.0]), (torch.tensor([3, 11]), torch.tensor([0, 7]))
    tokens = torch.zeros(2, tree.num_nodes, dtype=torch.int64)
    for node in range(tree.num_nodes - 1):
        own = (streams[0], streams[1] + 1 + node)  # a child needs noise of its own
        drawn = sample_without_replacement(draft_logits[:, node], 1, temperature, *own, backend="host")
        tokens[:, node + 1] = drawn.tokens[:, 0]
    cut = None if top_k is None else torch.tensor(top_k, dtype=torch.int32)
    step = (tokens, target_logits, draft_logits)
    path = _assert_decided_plainly("traversal", tree, step, temperature, streams, cut)
    assert int(path.num_accepted.min()) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_acceptance_is_as_precise_as_the_logits(dtype):
    """Many coins against one chance; those that are nearer to it than weights can be told apart are left out."""
    generator = torch.Generator().manual_seed(0)
    tree, vocab, batch_size = TokenTree.chain(2), 70, 20_000
    margin = 1e-9 if dtype == torch.float64 else 1e-5
    for temperature in (0.3, 0.6, 1.0, 3.0):
        target_logits = (torch.randn(1, 2, vocab, generator=generator, dtype=torch.float64) * 2).to(dtype)
        draft_logits = (target_logits + torch.randn(1, 2, vocab, generator=generator)).to(dtype)
        token = int((draft_logits - target_logits)[0, 0].argmax())  # likelier in the draft: the chance is below 1
        decisions = node_decisions(
            (target_logits[:, 0].double() / temperature).softmax(dim=1),
            draft_logits[:, 0].double(),
            torch.tensor([[token]]),
            torch.tensor([temperature]).double(),
        )
        chance = float(decisions.acceptance())
        streams = (torch.arange(batch_size), torch.zeros(batch_size, dtype=torch.int64))
        coins = rng.node_coins(*streams, 2)[:, 1].double()
        path = verify_tree(
            torch.tensor([[0, token]]).expand(batch_size, 2).contiguous(),
            target_logits.expand(batch_size, 2, vocab),
            draft_logits.expand(batch_size, 2, vocab),
            tree,
            temperature,
            *streams,
            backend="host",
        )
        told_apart = (coins - chance).abs() > margin * chance
        assert torch.equal((path.num_accepted == 2)[told_apart], (coins < chance)[told_apart])
        assert int(told_apart.sum()) > 0.99 * batch_size and 0 < chance < 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("top_k", [None, 5, 30])
def test_drafts_that_lose_all_their_mass_are_decided_plainly(rule, top_k):
    """The weights of each later sibling are e^-40 of those before it, whatever the target keeps."""
    tree = TokenTree([-1, 0, 0, 0, 0, 0, 1, 2, 3])
    batch_size, vocab = 300, 40
    generator = torch.Generator().manual_seed(2)
    target_logits = torch.randn(batch_size, tree.num_nodes, vocab, generator=generator)
    target_logits[:, 0, 2:7] += 2
    draft_logits = torch.randn(batch_size, tree.num_nodes, vocab, generator=generator)
    draft_logits[:, 0] = -40.0 * torch.arange(vocab)
    draft_logits[:, 1, 1:] = -math.inf  # one child empties it
    tokens = torch.tensor([0, 0, 1, 2, 3, 4, 0, 5, 6]).expand(batch_size, 9).contiguous()
    cut = None if top_k is None else torch.full((batch_size,), top_k, dtype=torch.int32)
    temperature, streams = torch.full((batch_size,), 1.0), _streams(generator, batch_size)
    path = _assert_decided_plainly(rule, tree, (tokens, target_logits, draft_logits), temperature, streams, cut)
    assert len(path.nodes[:, 1].unique()) > 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_of_a_row_is_checked(dtype):
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}.get(dtype, torch.int16)
    negative_nan = (torch.tensor([-math.inf], dtype=dtype).view(bits) | 1).view(dtype).item()
    assert math.isnan(negative_nan)
    for vocab in (1, 7, 130, 515):
        for place in sorted({0, 1, vocab // 4, vocab // 2, vocab - 2, vocab - 1} & set(range(vocab))):
            for bad in (math.nan, negative_nan, math.inf):
                for others in (-1.0, 1.0, -math.inf):
                    row = torch.full((1, 1, vocab), others, dtype=dtype)
                    row[0, 0, place] = bad
                    with pytest.raises(ValueError, match=r"target_logits must hold neither NaN nor \+inf"):
                        verify_tree(torch.zeros(1, 1).long(), row, None, TokenTree.single(), 1.0, 0, 0, backend="host")
        row = torch.full((1, 1, vocab), -math.inf, dtype=dtype)
        with pytest.raises(ValueError, match="target_logits must have a finite entry in every row"):
            verify_tree(torch.zeros(1, 1).long(), row, None, TokenTree.single(), 1.0, 0, 0, backend="host")


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_finds_the_first_of_the_largest(dtype):
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 2, 31, 64, 65, 129, 513, 3001):
        random_rows = torch.randn(6, vocab, generator=generator) * 4
        rows = torch.cat((random_rows, -random_rows.abs() - 0.5, random_rows.round(), -random_rows.abs().round()))
        rows[::5, : vocab // 2] = -math.inf
        rows = torch.cat((rows, torch.tensor([[-0.0, 0.0] * vocab])[:, :vocab])).to(dtype)
        path = verify_tree(
            torch.zeros(len(rows), 1).long(), rows[:, None], None, TokenTree.single(), 0.0, 0, 0, backend="host"
        )
        largest = rows == rows.max(dim=1, keepdim=True).values
        assert torch.equal(path.next_token, largest.int().argmax(dim=1))


# ---- compact_kv_cache_ ----


def _random_paths(choices, batch_size, num_levels, num_slots):
    counts = [choices.randint(0, num_levels) for _ in range(batch_size)]
    paths = torch.full((batch_size, num_levels), -1, dtype=torch.int32)
    lens = []
    for request, count in enumerate(counts):
        nodes = sorted(choices.sample(range(2 * num_levels), count))
        if count and choices.random() < 0.7:
            nodes[0] = 0  # the root
        paths[request, :count] = torch.tensor(nodes, dtype=torch.int32)
        lens.append(choices.randint(0, num_slots - 2 * num_levels))
    return paths, torch.tensor(counts, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32)


@pytest.mark.parametrize("paged", [False, True])
def test_moved_rows_equal_the_reference(paged):
    choices, generator = random.Random(0), torch.Generator().manual_seed(0)
    for case in range(40):
        batch_size, num_levels, num_slots, page_size = choices.choice([1, 3]), choices.choice([1, 4, 9]), 36, 4
        shape = (batch_size * num_slots // page_size + 2, page_size) if paged else (batch_size, num_slots)
        original = [
            torch.randn(*shape, 2, 8, generator=generator),
            torch.randn(shape[0], 3, shape[1], 5, generator=generator)
            .transpose(1, 2)
            .to(torch.bfloat16),  # heads first
            torch.randint(0, 255, (*shape, 1, 3), generator=generator).to(torch.uint8)[..., :2],
        ]
        block_table = None
        if paged:
            pages = torch.randperm(shape[0], generator=generator)[: batch_size * num_slots // page_size]
            block_table = pages.to(torch.int32).reshape(batch_size, -1)
        paths, counts, lens = _random_paths(choices, batch_size, num_levels, num_slots)
        results = []
        for backend in ("host", "reference"):
            caches = [cache.clone(memory_format=torch.preserve_format) for cache in original]
            advanced = lens.clone()
            moved = [*caches[:2], caches[2][..., :2]]  # the third column must stay as it is
            given = CacheTable(moved, paged=paged) if case % 2 else moved
            compact_kv_cache_(given, paths, counts, advanced, block_table=block_table, backend=backend)
            results.append([*caches, advanced])
        for left, right in zip(*results, strict=True):
            assert torch.equal(left, right)


# ---- expand_tree_mask ----


def _expanded(mask, cache_lens, window, num_slots, code, dtype):
    per_request = mask.dim() == 3
    num_rows, num_words = mask.shape[-2:]
    out = torch.full((len(cache_lens), 1, num_rows, num_slots), 7, dtype=dtype)
    packed = mask.contiguous().numpy().tobytes()
    flags = _host.expand_tree_mask(
        packed, num_words, num_rows, cache_lens, window or 0, out.data_ptr(), code, num_slots
    )
    rows = [unpack(mask[b] if per_request else mask) for b in range(len(cache_lens))]
    expected = torch.zeros(out.shape, dtype=torch.bool)
    for b, cache_len in enumerate(cache_lens):
        for i, tree_slots in enumerate(rows[b]):
            depth = len(tree_slots) - 1
            seen = [slot for slot in range(cache_len) if window is None or cache_len + depth - slot < window]
            seen += [cache_len + slot for slot in (tree_slots if window is None else tree_slots[-window:])]
            expected[b, 0, i, [slot for slot in seen if slot < num_slots]] = True
    return out, flags, expected


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("cache_lens", [(0,), (9,), (50, 0, 7)])
def test_dense_masks_show_each_row_its_slots(cache_lens, window):
    trees = [tree_parents(RANDOM, 40, seed) for seed in range(len(cache_lens))]
    masks = [
        pack_tree(trees[0]),
        pack_tree(trees[0], nodes=[0, 5, 39], num_words=3),
        torch.stack([pack_tree(parents) for parents in trees]),
        pack([[], [0, 31, 32]]),
        pack([[0], [0]]),
    ]
    for mask in masks:
        num_slots = max(cache_lens) + max(num_tree_slots(mask.numpy(), len(cache_lens)))
        for dtype, code in [*ELEMENT_TYPES.items(), (torch.bool, BOOLEAN)]:
            out, flags, expected = _expanded(mask, cache_lens, window, num_slots, code, dtype)
            wanted = torch.zeros(out.shape, dtype=dtype).masked_fill_(~expected, -math.inf)
            assert torch.equal(out, expected if dtype == torch.bool else wanted)
            assert flags == (bool(expected.all()), not bool(expected.any(dim=2).all()))


@pytest.mark.parametrize("rows, expected", [([[]], 0), ([[0]], 1), ([[0, 31], [2]], 32), ([[0], [0, 32]], 33)])
def test_tree_slots_end_at_the_highest_bit(rows, expected):
    mask = pack(rows, num_words=3)
    assert num_tree_slots(mask.numpy(), 2) == [expected, expected]
    of_each = torch.stack([torch.zeros_like(mask), mask])
    assert num_tree_slots(of_each.numpy(), 2) == [0, expected]


def test_masks_of_a_wrong_size_are_refused():
    out = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"packed must hold rows of 2 words, got 4 bytes"):
        _host.expand_tree_mask(b"\0" * 4, 2, 1, (0,), 0, out.data_ptr(), 0, 4)
    with pytest.raises(ValueError, match=r"packed must hold 2 rows, or as many for each request, got 3"):
        _host.expand_tree_mask(b"\0" * 12, 1, 2, (0,), 0, out.data_ptr(), 0, 4)
    with pytest.raises(ValueError, match=r"type must be in 0..4, got 9"):
        _host.expand_tree_mask(b"\0" * 8, 1, 2, (0,), 0, out.data_ptr(), 9, 4)
    assert torch.equal(out, torch.zeros_like(out))


def test_attention_masks_are_the_same_without_the_module(monkeypatch):
    sdpa = pytest.importorskip("sequoia_kernels.ops.tree_attention.sdpa")
    mask = pack_tree(tree_parents(RANDOM, 20, 1))
    for cache_lens in ((6,), (6, 6), (6, 0, 3)):
        for window in (None, 4):
            key = (mask.numpy().tobytes(), tuple(mask.shape), cache_lens, window, torch.float32)
            with monkeypatch.context() as patch:
                patch.setattr(sdpa, "_host", None)
                wanted = sdpa.dense_mask(*key)
            got = sdpa.dense_mask(*key)
            assert (got.num_slots, got.has_unseen_slots) == (wanted.num_slots, wanted.has_unseen_slots)
            assert torch.equal(got.additive, wanted.additive)
