"""Philox4x32-10 streams: one stream of random numbers that every backend draws alike.

Randomness is an input of the ops, never a hidden state. A number is named by four things: the request's ``seed``, its
``offset`` (which advances every step), a domain tag (what the number is for) and an index (a token id or a tree node).
Reference, C++ and GPU kernels compute the same 32-bit words from that name, so their decisions can be compared exactly.

Layout of one Philox block:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (index, offset & 0xffffffff, domain tag, offset >> 32)

- Token streams (``DRAFT_TAG``, ``RESIDUAL_TAG``): a block serves four tokens, index = token // 4 and
  output word = token % 4.
- Node coins (``ACCEPT_TAG``): index = node, output word 0.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the constants are those of Random123's
philox4x32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ACCEPT_TAG", "DRAFT_TAG", "RESIDUAL_TAG", "coin", "gumbel", "node_coins", "philox4x32", "token_gumbel"]

DRAFT_TAG = 1  # Gumbel noise of the children that a draft row draws
ACCEPT_TAG = 2  # the coin that accepts or rejects a node
RESIDUAL_TAG = 3  # Gumbel noise of the token drawn from the residual

_ROUNDS = 10
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK = 0xFFFFFFFF

# Below this uniform, 1 - u has lost the bits that decide between the largest keys: use the series of -log(1 - u) there.
_SERIES_BELOW = 2.0**-7


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product: int64 wraps, and its 64 bits are those of the unsigned product."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10 blocks in int64 arithmetic, on any device.

    Args:
        counter: the four counter words, int64 tensors that broadcast against each other and the key. In [0, 2**32).
        key: the two key words, int64 tensors. In [0, 2**32).

    Returns:
        The four output words, int64 tensors of the broadcast shape. Values in [0, 2**32).

    Notes:
        Mutates nothing, never syncs with the host, can be captured in a CUDA graph.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [hex(word.item()) for word in philox4x32((zero, zero, zero, zero), (zero, zero))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIER_0)
        high1, low1 = _multiply(c2, _MULTIPLIER_1)
        round_key0 = (k0 + round_index * _WEYL_0) & _MASK
        round_key1 = (k1 + round_index * _WEYL_1) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ round_key0, low1, high0 ^ c3 ^ round_key1, low0
    return c0, c1, c2, c3


def coin(words: Tensor) -> Tensor:
    """Turn 32-bit words into float32 coins in [0, 1): the upper 24 bits times 2**-24, exact in float32."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def gumbel(words: Tensor) -> Tensor:
    """Turn 32-bit words into float32 standard Gumbel noise, always finite.

    The largest keys win a draw, and they come from the smallest exponentials E = -log(1 - u). Those are computed by a
    series, so that a winner carries the full precision of u and not that of 1 - u.

    Args:
        words: int64, any shape. Values in [0, 2**32).

    Returns:
        float32, the shape of ``words``, in about [-2.82, 22.88].
    """
    uniform = (words.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=1.0 - 2.0**-24)
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0 + uniform * 0.25)))
    exponential = torch.where(uniform < _SERIES_BELOW, series, -torch.log(1.0 - uniform))
    return -torch.log(exponential)


def _blocks(seeds: Tensor, offsets: Tensor, indices: Tensor, tag: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox blocks [rows, indices] of a tag; seeds and offsets are 64-bit patterns, so a negative int64 is fine."""
    seeds, offsets = seeds.unsqueeze(-1), offsets.unsqueeze(-1)
    key = (seeds & _MASK, (seeds >> 32) & _MASK)
    tags = torch.full_like(indices, tag)
    return philox4x32((indices.unsqueeze(0), offsets & _MASK, tags, (offsets >> 32) & _MASK), key)


def token_gumbel(seeds: Tensor, offsets: Tensor, vocab: int, tag: int) -> Tensor:
    """Compute the Gumbel noise of every token of a vocabulary.

    Args:
        seeds: request seeds. [R], int64.
        offsets: stream offsets. [R], int64.
        vocab: number of tokens, at least 1.
        tag: ``DRAFT_TAG`` or ``RESIDUAL_TAG``.

    Returns:
        Noise. [R, vocab], float32.

    Example:
        >>> noise = token_gumbel(torch.tensor([7]), torch.tensor([0]), 5, DRAFT_TAG)
        >>> noise.shape, noise.dtype
        (torch.Size([1, 5]), torch.float32)
    """
    indices = torch.arange((vocab + 3) // 4, dtype=torch.int64, device=seeds.device)
    # [R, ceil(vocab / 4), 4]: token = 4 * index + word
    words = torch.stack(_blocks(seeds, offsets, indices, tag), dim=-1)
    return gumbel(words.flatten(1)[:, :vocab])


def node_coins(seeds: Tensor, offsets: Tensor, num_nodes: int) -> Tensor:
    """Compute the acceptance coin of every tree node.

    Args:
        seeds: request seeds. [B], int64.
        offsets: stream offsets. [B], int64.
        num_nodes: number of tree nodes, root included (its coin is never used).

    Returns:
        Coins in [0, 1). [B, num_nodes], float32.

    Example:
        >>> coins = node_coins(torch.tensor([7, 8]), torch.tensor([0, 0]), 3)
        >>> coins.shape, bool((coins < 1).all())
        (torch.Size([2, 3]), True)
    """
    indices = torch.arange(num_nodes, dtype=torch.int64, device=seeds.device)
    return coin(_blocks(seeds, offsets, indices, ACCEPT_TAG)[0])
