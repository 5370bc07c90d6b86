"""The Philox streams: known answers, agreement of torch, NumPy, Triton and C++, and the maps from words."""

import sys
import textwrap

import numpy as np
import pytest
import torch
from scipy import stats
from support import philox as oracle
from support.processes import python_environment, run_process

from sequoia_kernels import rng

EXTREME_WORDS = [0, 1, 2, 255, 256, 2**25 - 1, 2**25, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1]
# Just above u = 2^-7 the rounding of 1 - u (2^-25) is 2^-18 of E, and so the absolute error of -log(E); the logarithms
# add a few units in the last place of a value below 23.
GUMBEL_ATOL = 4e-6
GUMBEL_RTOL = 3e-7
SEEDS = [0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), 0x243F6A8885A308D3 - 2**62]


def as_words(values):
    return tuple(torch.tensor([value], dtype=torch.int64) for value in values)


@pytest.mark.parametrize("counter, key, output", oracle.KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    words = rng.philox4x32(as_words(counter), as_words(key))
    assert tuple(word.item() for word in words) == output
    assert tuple(int(word) for word in oracle.philox4x32(counter, key)) == output


def test_torch_equals_numpy_for_random_words():
    generator = np.random.default_rng(0)
    counter = generator.integers(0, 2**32, size=(4, 500), dtype=np.uint64)
    for key in generator.integers(0, 2**32, size=(5, 2), dtype=np.uint64):
        expected = oracle.philox4x32(counter, key)
        words = rng.philox4x32(
            tuple(torch.from_numpy(word.astype(np.int64)) for word in counter), as_words([int(k) for k in key])
        )
        for got, want in zip(words, expected):
            assert np.array_equal(got.numpy().astype(np.uint64), want)


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 127, 512])
@pytest.mark.parametrize("tag", [rng.DRAFT_TAG, rng.RESIDUAL_TAG])
def test_token_gumbel_follows_the_stream(vocab, tag):
    offsets = [0, 1, 2**32 - 1, 2**32, 2**40 + 3, -1, 5, 6]
    noise = rng.token_gumbel(torch.tensor(SEEDS), torch.tensor(offsets), vocab, tag)
    assert noise.shape == (len(SEEDS), vocab) and noise.dtype == torch.float32
    expected = np.stack([oracle.gumbels_float64(oracle.token_words(s, o, vocab, tag)) for s, o in zip(SEEDS, offsets)])
    np.testing.assert_allclose(noise.numpy(), expected, rtol=GUMBEL_RTOL, atol=GUMBEL_ATOL)


def test_node_coins_follow_the_stream_exactly():
    offsets = [0, 1, 2**32 - 1, 2**32, 2**40 + 3, -1, 5, 6]
    got = rng.node_coins(torch.tensor(SEEDS), torch.tensor(offsets), 67)
    expected = np.stack([oracle.coins(oracle.node_words(s, o, 67, rng.ACCEPT_TAG)) for s, o in zip(SEEDS, offsets)])
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), expected)


def test_coin_bounds_are_exact():
    values = rng.coin(torch.tensor(EXTREME_WORDS))
    assert values[0] == 0.0
    assert values[-1] == 1.0 - 2.0**-24
    assert np.array_equal(values.numpy(), oracle.coins(np.array(EXTREME_WORDS, dtype=np.uint64)))


def test_gumbel_is_finite_monotone_and_precise_everywhere():
    words = np.unique(
        np.concatenate([EXTREME_WORDS, np.geomspace(1, 2**32 - 1, 4001).astype(np.uint64)]).astype(np.uint64)
    )
    values = rng.gumbel(torch.from_numpy(words.astype(np.int64)))
    assert torch.isfinite(values).all()
    assert (values.diff() <= 0).all()  # a larger word never gives a larger key, also across the switch to the logarithm
    np.testing.assert_allclose(values.numpy(), oracle.gumbels_float64(words), rtol=GUMBEL_RTOL, atol=GUMBEL_ATOL)
    winners = words < 2**24  # the series: full precision where the largest keys come from
    np.testing.assert_allclose(values.numpy()[winners], oracle.gumbels_float64(words)[winners], rtol=GUMBEL_RTOL)


def test_streams_of_seed_offset_and_tag_differ():
    base = rng.token_gumbel(torch.tensor([5]), torch.tensor([9]), 64, rng.DRAFT_TAG)
    for seed, offset, tag in [(6, 9, 1), (5, 10, 1), (5, 9, 3), (5 + 2**32, 9, 1), (5, 9 + 2**32, 1), (9, 5, 1)]:
        assert (base != rng.token_gumbel(torch.tensor([seed]), torch.tensor([offset]), 64, tag)).sum() > 60


def test_a_row_does_not_depend_on_its_neighbours():
    seeds, offsets = torch.tensor([3, 4, 5]), torch.tensor([7, 8, 9])
    together = rng.token_gumbel(seeds, offsets, 33, rng.DRAFT_TAG)
    for row in range(3):
        alone = rng.token_gumbel(seeds[row : row + 1], offsets[row : row + 1], 33, rng.DRAFT_TAG)
        assert torch.equal(together[row], alone[0])


def test_distributions():
    seeds = torch.full((40,), 11)
    offsets = torch.arange(40)
    coins = rng.node_coins(seeds, offsets, 500).double().flatten().numpy()
    noise = rng.token_gumbel(seeds, offsets, 500, rng.DRAFT_TAG).double().flatten().numpy()
    assert stats.kstest(coins, "uniform").pvalue > 1e-3
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3


def test_triton_generator_is_the_same():
    """`tl.philox` in the interpreter, in its own process: the interpreter must be chosen before triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    program = textwrap.dedent("""
        import torch, triton, triton.language as tl

        @triton.jit
        def draw(seed_ptr, counter_ptr, out_ptr):
            row = tl.program_id(0)
            c0 = tl.load(counter_ptr + 4 * row).to(tl.uint32)
            c1 = tl.load(counter_ptr + 4 * row + 1).to(tl.uint32)
            c2 = tl.load(counter_ptr + 4 * row + 2).to(tl.uint32)
            c3 = tl.load(counter_ptr + 4 * row + 3).to(tl.uint32)
            w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr + row), c0, c1, c2, c3)
            tl.store(out_ptr + 4 * row, w0.to(tl.int64))
            tl.store(out_ptr + 4 * row + 1, w1.to(tl.int64))
            tl.store(out_ptr + 4 * row + 2, w2.to(tl.int64))
            tl.store(out_ptr + 4 * row + 3, w3.to(tl.int64))

        from sequoia_kernels import rng
        torch.manual_seed(0)
        seeds = torch.tensor([0, -1, 0x299F31D0A4093822, 12345, 2**40 + 1])
        counters = torch.randint(0, 2**32, (5, 4))
        counters[0] = 0
        counters[1] = 2**32 - 1
        counters[2] = torch.tensor([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344])
        out = torch.empty(5, 4, dtype=torch.int64)
        draw[(5,)](seeds, counters, out)
        mask = 0xFFFFFFFF
        words = rng.philox4x32(tuple(counters.unbind(1)), (seeds & mask, (seeds >> 32) & mask))
        assert torch.equal(out & mask, torch.stack(words, 1)), (out, words)
    """)
    run_process([sys.executable, "-c", program], env=python_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


def test_cpp_generator_is_the_same():
    host = pytest.importorskip("sequoia_kernels._host", reason="the C++ module sequoia_kernels._host is not built")
    if not hasattr(host, "philox4x32"):
        pytest.skip("this build of sequoia_kernels._host has no philox4x32")
    generator = np.random.default_rng(1)
    cases = [(counter, key) for counter, key, _ in oracle.KNOWN_ANSWERS]
    cases += [
        (tuple(map(int, words[:4])), tuple(map(int, words[4:]))) for words in generator.integers(0, 2**32, (200, 6))
    ]
    for counter, key in cases:
        expected = tuple(int(word) for word in oracle.philox4x32(counter, key))
        assert tuple(host.philox4x32(counter, key)) == expected
