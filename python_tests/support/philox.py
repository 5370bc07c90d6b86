"""NumPy oracle of the Philox streams, written from the specification in uint64, not from the torch code."""

import numpy as np

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)

# (counter, key, output) of the Random123 distribution's kat_vectors for philox4x32 with 10 rounds.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox4x32(counter, key):
    """Four uint64 arrays holding the 32-bit output words."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [int(word) for word in key]
    for _ in range(10):
        product0, product1 = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [
            (product1 >> SHIFT) ^ c[1] ^ np.uint64(k[0]),
            product1 & LOW,
            (product0 >> SHIFT) ^ c[3] ^ np.uint64(k[1]),
            product0 & LOW,
        ]
        k = [(word + weyl) & 0xFFFFFFFF for word, weyl in zip(k, WEYL)]
    return c


def split(value):
    """Low and high 32 bits of a 64-bit pattern given as a signed or unsigned Python int."""
    return value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF


def token_words(seed, offset, vocab, tag):
    """The 32-bit word of each token. [vocab] uint64."""
    low, high = split(offset)
    index = np.arange(-(-vocab // 4), dtype=np.uint64)
    words = philox4x32(
        (index, np.full_like(index, low), np.full_like(index, tag), np.full_like(index, high)), split(seed)
    )
    return np.stack(words, axis=-1).reshape(-1)[:vocab]


def node_words(seed, offset, num_nodes, tag):
    """The 32-bit word of each node. [num_nodes] uint64."""
    low, high = split(offset)
    index = np.arange(num_nodes, dtype=np.uint64)
    return philox4x32(
        (index, np.full_like(index, low), np.full_like(index, tag), np.full_like(index, high)), split(seed)
    )[0]


def coins(words):
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def gumbels_float64(words):
    """Gumbel noise in float64 from the float32 uniform: the value that the float32 formula approximates."""
    uniform = words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    uniform = np.minimum(uniform, np.float32(1.0 - 2.0**-24)).astype(np.float64)
    return -np.log(-np.log1p(-uniform))
