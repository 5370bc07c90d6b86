"""Calls of every op with sizes and values that make no sense: refused in words or answered, and never a crash.

Sizes of 0, wrong counts, negative numbers, the ends of the integer types, empty lists, strides of 0. Whatever arrives,
a backend answers like the reference or refuses with its words. `python_tests/sanitize_host.py` runs this file, among
others, on C++ built with sanitizers, which see a stray read that does no harm.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from support.op_backends import op_backends

import sequoia_kernels.ops
from sequoia_kernels import TokenTree
from sequoia_kernels.errors import BackendUnavailableError

EXTREMES = {
    torch.int32: [-(2**31), -(2**31) + 1, -65, -2, -1, 0, 1, 2, 31, 32, 63, 1023, 2**16, 2**30, 2**31 - 2, 2**31 - 1],
    torch.int64: [-(2**63), -(2**32), -2, -1, 0, 1, 3, 2**31, 2**32, 2**63 - 1],
}
NUMBERS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-5,
    1e-6,
    1e-46,
    1e39,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    10**400,
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Chance:
    """Draws the arguments of a call; most are good ones, or nothing but the first check would be met."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def odd(self, probability: float = 0.08) -> bool:
        return self.random.random() < probability

    def pick(self, good, bad=()):
        return self.random.choice(list(bad)) if bad and self.odd() else self.random.choice(list(good))

    def size(self, *good: int) -> int:
        return self.pick(good, (0, 1, 2, 3, 7))

    def integers(self, shape, low: int, high: int, dtype=torch.int32, odd: float = 0.02) -> torch.Tensor:
        """Values in low..high, some of them far outside; now and then another dtype or strides of 0."""
        values = torch.tensor(
            [
                self.random.choice(EXTREMES[dtype]) if self.odd(odd) else self.random.randint(low, max(low, high))
                for _ in range(torch.Size(shape).numel())
            ],
            dtype=dtype,
        ).reshape(shape)
        if self.odd(0.02):
            values = values[..., :1].expand(shape) if shape and shape[-1] else values
        return values.float() if self.odd(0.01) else values

    def shares(self, count: int) -> torch.Tensor:
        """Numbers in (0, 1]."""
        return torch.tensor([1 - self.random.random() for _ in range(count)])

    def floats(self, shape, dtype) -> torch.Tensor:
        """A tensor with gaps between its rows; now and then NaN, infinities or another layout."""
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        padded = (*shape[:-1], shape[-1] + self.random.randint(0, 3))
        values = torch.randn(padded, generator=generator).to(dtype)[..., : shape[-1]]
        if values.numel() and self.odd():
            where = tuple(self.random.randrange(size) for size in shape)
            values[where] = self.random.choice([math.nan, math.inf, -math.inf, torch.finfo(dtype).max])
        return values.mT if values.dim() > 1 and self.odd(0.02) else values


def attention_call(chance: Chance):
    batch, nodes, kv_heads, group = chance.size(1, 2, 3), chance.size(1, 5, 9), chance.size(1, 2), chance.size(1, 3)
    head_dim, value_dim, slots = chance.size(8, 24, 5), chance.size(8, 17), chance.size(40, 70)
    page, words = chance.size(1, 4, 16), chance.pick((1, 2, 3), (0, 33))
    dtype = chance.random.choice(FLOATS)
    paged = chance.odd(0.5)
    caches = (chance.size(9, 30), page) if paged else (chance.pick((batch,), (0, 1)), slots)
    mask = (batch, nodes, words) if chance.odd(0.4) else (nodes, words)
    pages = chance.size(4, 20)
    room = pages * page if paged else slots
    few_bits = chance.integers(mask, 0, 255 if words else 0, odd=0.03)
    options = {
        "scale": chance.pick((None, 0.3, -1.0, 0, 1e18), NUMBERS),
        "softcap": chance.pick((None, None, 3.0, 1e-18, 1e18), NUMBERS),
        "sliding_window": chance.pick((None, 1, 7, 2**31, 2**63 - 1), (0, -1, 2**63, 10**400)),
        "sinks": chance.pick((None, chance.floats((kv_heads * group,), torch.float32))),
        "block_table": chance.integers((batch, pages), 0, caches[0] - 1, odd=0.01) if paged else None,
        "return_lse": chance.odd(0.5),
    }
    q = chance.floats((batch, nodes, kv_heads * group, head_dim), dtype)
    keys = chance.floats((*caches, kv_heads, head_dim), dtype)
    values = chance.floats((*caches, kv_heads, value_dim), dtype)
    return (q, keys, values, few_bits, chance.integers((batch,), 0, room - 8)), options


def compaction_call(chance: Chance):
    batch, levels, slots = chance.size(1, 2, 3), chance.size(1, 3, 6), chance.size(20, 30)
    page, pages = chance.size(1, 4), chance.size(8, 12)
    paged = chance.odd(0.4)
    shape = (chance.size(36, 40), page) if paged else (batch, slots)
    caches = [
        chance.floats((*shape, chance.size(1, 3), chance.size(1, 8)), chance.random.choice(FLOATS))
        for _ in range(chance.random.choice((0, 0, 1, 3)))
    ]
    paths = torch.stack(
        [torch.tensor(sorted(chance.random.sample(range(12), levels)), dtype=torch.int32) for _ in range(batch)]
        or [torch.zeros(levels, dtype=torch.int32)]
    )[:batch]
    if paths.numel() and chance.odd(0.2):
        paths.view(-1)[chance.random.randrange(paths.numel())] = chance.random.choice(EXTREMES[torch.int32])
    block_table = None
    if paged:  # no page twice, where a row would be moved through two names
        block_table = torch.tensor(chance.random.sample(range(batch * pages), batch * pages), dtype=torch.int32)
        if chance.odd(0.3) and batch * pages:
            block_table[chance.random.randrange(batch * pages)] = chance.random.choice(EXTREMES[torch.int32])
    options = {"block_table": block_table.reshape(batch, pages) if paged else None}
    return (caches, paths, chance.integers((batch,), 0, levels), chance.integers((batch,), 0, 10)), options


def warping_call(chance: Chance):
    rows, vocab = chance.size(1, 3), chance.size(1, 17, 64, 300)
    temperature = chance.pick((0, 0.7, 1e-5, chance.shares(rows) + 0.05), NUMBERS)
    top_k = chance.pick((None, 5, chance.integers((rows,), 0, vocab)), (-1, 2**31 - 1, -(2**31), 2**31))
    return (chance.floats((rows, vocab), chance.random.choice(FLOATS)), temperature, top_k), {
        "top_p": chance.pick((None, 0.9, 1, chance.shares(rows)), NUMBERS)
    }


def sampling_call(chance: Chance):
    rows, vocab = chance.size(1, 3), chance.size(1, 17, 64, 300)
    temperature = chance.pick((0, 0.7, 1e-5, chance.shares(rows) + 0.05), NUMBERS)
    num_samples = chance.pick((1, 4, 128), (0, -1, 129, 2**63, 10**400))
    streams = [chance.pick((7, chance.integers((rows,), 0, 99, torch.int64, odd=0.2)), (2**63, -(2**63))) for _ in "so"]
    return (chance.floats((rows, vocab), chance.random.choice(FLOATS)), num_samples, temperature, *streams), {}


def verification_call(chance: Chance):
    batch, vocab = chance.size(1, 2, 3), chance.size(1, 17, 64, 300)
    tree = TokenTree([-1, *sorted(chance.random.randrange(node) for node in range(1, chance.random.choice((1, 2, 9))))])
    shape = (batch, chance.pick((tree.num_nodes,), (0, 1, 2)))
    temperature = chance.pick((0, 0.7, 1e-5, chance.shares(batch) + 0.05), NUMBERS)
    streams = [chance.pick((7, chance.integers((batch,), 0, 99, torch.int64, odd=0.2)), (2**63,)) for _ in "so"]
    logits = [chance.floats((*shape, vocab), chance.random.choice(FLOATS)) for _ in range(2)]
    tokens = chance.integers(shape, -1, vocab - 1, torch.int64, odd=0.01)
    draft_to_target = certain = None
    if chance.odd(0.4):
        ids = chance.random.sample(range(vocab), max(0, vocab - chance.random.choice((0, 0, 1, 9))))
        draft_to_target = chance.pick((torch.tensor(ids, dtype=torch.int64),), (torch.arange(vocab) - 1,))
        if chance.odd(0.9):
            logits[1] = chance.floats((*shape, len(ids)), chance.random.choice(FLOATS))
    if chance.odd(0.4):
        flags = chance.pick(((tree.num_nodes,), (batch, tree.num_nodes)), ((), (vocab,), (1, 2, 3)))
        certain = chance.integers(flags, 0, 1, odd=0.0) > 0
    return (tokens, logits[0], chance.pick(logits[1:], (None,)), tree, temperature, *streams), {
        "draft_to_target": draft_to_target,
        "certain": certain,
        "top_k": chance.pick((None, 5, chance.integers((batch,), 0, vocab)), (-1, 2**31 - 1, 2**31)),
        "top_p": chance.pick((None, 0.9, chance.shares(batch)), NUMBERS),
    }


CALLS = {
    "tree_attention": attention_call,
    "compact_kv_cache_": compaction_call,
    "warped_logsumexp": warping_call,
    "sample_without_replacement": sampling_call,
    "verify_tree": verification_call,
}


def outcome(op, backend, seed):
    """What comes of a call: its results and what it wrote, or the words of the refusal."""
    arguments, options = CALLS[op](Chance(seed))
    try:
        results = getattr(sequoia_kernels.ops, op)(*arguments, **options, backend=backend)
    except (TypeError, ValueError) as refusal:
        assert str(refusal).startswith(f"{op}: "), refusal
        return str(refusal)
    written = [*arguments[0], arguments[3]] if op == "compact_kv_cache_" else []
    return [result for result in (*(results or ()), *written) if result is not None]


BACKENDS = [
    pytest.param(op, *parameter.values, id=f"{op}-{parameter.id}", marks=parameter.marks)
    for op in CALLS
    for parameter in op_backends(op)
    if parameter.values[0].name != "reference"
]


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_any_call_is_answered_like_the_reference_or_refused(op, backend):
    if backend.device.type != "cpu":
        pytest.skip("values are checked on CPU tensors only")
    num_calls = 600 if backend.at_scale else 24
    num_answers = num_compared = 0
    for seed in range(num_calls):
        expected = outcome(op, "reference", seed)
        num_answers += not isinstance(expected, str)
        try:
            got = outcome(op, backend.name, seed)
        except BackendUnavailableError:
            continue
        num_compared += 1
        if isinstance(expected, str) or isinstance(got, str):
            assert got == expected, seed
            continue
        for result, wanted in zip(got, expected, strict=True):
            assert result.shape == wanted.shape and result.dtype == wanted.dtype, seed
            if op == "compact_kv_cache_" or not wanted.is_floating_point():
                torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True, msg=f"seed {seed}")
    assert num_compared > num_calls // 20
    assert num_calls // 10 < num_answers < num_calls, "calls are either all refused or all answered"
