"""Packed tree masks for tests, made from parents one bit at a time."""

import random

import torch

CHAIN = "chain"
STAR = "star"
FULL = "full"
RANDOM = "random"
SHAPES = (CHAIN, STAR, FULL, RANDOM)


def tree_parents(shape, num_nodes, seed=0):
    """Breadth-first parents: a chain, a star, a full binary tree or a random tree."""
    if shape == CHAIN:
        return [node - 1 for node in range(num_nodes)]
    if shape == STAR:
        return [-1] + [0] * (num_nodes - 1)
    if shape == FULL:
        return [(node + 1) // 2 - 1 for node in range(num_nodes)]
    generator = random.Random(seed)
    parents = [-1]
    for node in range(1, num_nodes):
        parents.append(min(max(parents[-1], 0) + generator.choice([0, 0, 0, 1, 2]), node - 1))
    return parents


def ancestors(parents, node):
    """The path from the root to a node, both included."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def pack(rows, num_words=None):
    """Lists of visible tree slots, one a query row -> [N, W] int32."""
    if num_words is None:
        num_words = max((slot for row in rows for slot in row), default=0) // 32 + 1
    packed = []
    for row in rows:
        words = [0] * num_words
        for slot in row:
            words[slot // 32] |= 1 << slot % 32
        packed.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(packed, dtype=torch.int32).reshape(len(rows), num_words)


def pack_tree(parents, nodes=None, num_words=None):
    """The ancestor mask of some nodes (default: all). [len(nodes), W] int32."""
    nodes = range(len(parents)) if nodes is None else nodes
    return pack([ancestors(parents, node) for node in nodes], num_words or (len(parents) + 31) // 32)


def unpack(mask):
    """[N, W] int32 -> visible tree slots of each row."""
    return [
        [32 * word + bit for word, value in enumerate(row) for bit in range(32) if value >> bit & 1]
        for row in mask.tolist()
    ]
