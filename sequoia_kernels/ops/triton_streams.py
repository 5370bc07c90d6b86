"""The random streams of ``rng.py`` inside Triton kernels: Philox4x32-10 words, coins and Gumbel noise.

Only ``triton_*.py`` files import this. Words and coins equal those of ``rng.py`` bit for bit. Gumbel noise does so
on a CUDA device in kernels launched with ``enable_fp_fusion=False``: both sides then take the same float32 steps and
the same library logarithm. Elsewhere it may differ in the last place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sequoia_kernels import rng
from sequoia_kernels.ops import triton_device

__all__ = ["coin", "gumbel", "open_uniform", "stream_words", "token_gumbel"]

INTERPRETED = tl.constexpr(triton_device.INTERPRETED)
DRAFT_TAG = tl.constexpr(rng.DRAFT_TAG)
ACCEPT_TAG = tl.constexpr(rng.ACCEPT_TAG)
RESIDUAL_TAG = tl.constexpr(rng.RESIDUAL_TAG)


@triton.jit
def _product(x, FACTOR: tl.constexpr):  # uint32 -> uint32, uint32
    """The low and the high half of x * FACTOR."""
    if INTERPRETED:
        product = x.to(tl.uint64) * FACTOR
        return product.to(tl.uint32), (product >> 32).to(tl.uint32)
    else:
        # One instruction. The compiler makes two or three of every third such product that it sees as plain arithmetic.
        return tl.inline_asm_elementwise(
            "{ .reg .b64 product; mul.wide.u32 product, $2, $3; mov.b64 {$0, $1}, product; }",
            "=r,=r,r,r",
            [x, FACTOR],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def stream_words(
    seed,  # int64
    offset,  # int64
    TAG: tl.constexpr,
    index,  # int32, not negative, any shape: which Philox blocks
):
    """The four words (uint32, the shape of index) of each Philox block."""
    c0 = index.to(tl.uint32)
    zero = c0 & 0
    c1 = zero + offset.to(tl.uint32)
    c2 = zero + TAG
    c3 = zero + (offset >> 32).to(tl.uint32)
    key_0 = seed.to(tl.uint32)
    key_1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        low_0, high_0 = _product(c0, 0xD2511F53)
        low_1, high_1 = _product(c2, 0xCD9E8D57)
        c0 = high_1 ^ c1 ^ key_0
        c2 = high_0 ^ c3 ^ key_1
        c1 = low_1
        c3 = low_0
        key_0 = tl.add(key_0, 0x9E3779B9, sanitize_overflow=False)
        key_1 = tl.add(key_1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def coin(word):  # uint32 -> fp32 in [0, 1), exact
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def open_uniform(word):  # uint32 -> fp32 in (0, 1)
    uniform = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    return tl.minimum(uniform, 0.999999940395355224609375)


@triton.jit
def gumbel(word):  # uint32 -> fp32
    """Standard Gumbel noise; the exponentials of the largest come from a series, as rng.py tells."""
    uniform = open_uniform(word)
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333432674407958984375 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.0078125, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def token_gumbel(
    seed,  # int64
    offset,  # int64
    TAG: tl.constexpr,
    first_token,  # a multiple of 4
    NUM_TOKENS: tl.constexpr,  # a power of 2, at least 4
):
    """The noise of NUM_TOKENS consecutive tokens, fp32 [NUM_TOKENS]: one Philox block serves four of them."""
    block = first_token // 4 + tl.arange(0, NUM_TOKENS // 4)
    word_0, word_1, word_2, word_3 = stream_words(seed, offset, TAG, block)
    # [blocks, 2, 2]: the last dimension is the low bit of a token, the one before it the next bit.
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    return gumbel(tl.reshape(words, [NUM_TOKENS]))
