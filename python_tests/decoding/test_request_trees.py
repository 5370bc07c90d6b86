"""A tree of its own for each request of a batch."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, generate

# Three trees of four levels, of 1, 3, 3 and 2 nodes
TREES = [
    TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 5]),
    TokenTree([-1, 0, 0, 0, 2, 2, 2, 4, 4]),
    TokenTree([-1, 0, 0, 0, 1, 2, 3, 6, 6]),
]
MODELS = tiny_llama(3, vocab_size=24, sharpness=6.0)
DRAFT = noisy_copy(MODELS, 0.4)


def prompts(batch_size: int) -> torch.Tensor:
    return torch.randint(24, (batch_size, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_request_decodes_as_it_would_alone_with_its_tree(temperature, backend):
    batch = prompts(3)
    options = {"temperature": temperature, "max_new_tokens": 40, "backend": backend}
    together = generate(MODELS, DRAFT, batch, tree=TREES, seed=[5, 6, 7], **options)
    for index, tree in enumerate(TREES):
        alone = generate(MODELS, DRAFT, batch[index : index + 1], tree=tree, seed=5 + index, **options)
        assert together.new_tokens[index] == alone.new_tokens[0]
    assert together.stats.tree is None
    assert set(together.stats.steps_by_tree) == set(TREES)
    if temperature == 0:
        assert together.new_tokens == generate(MODELS, None, batch, max_new_tokens=40).new_tokens


def test_any_sequence_of_trees_will_do():
    one, other = (generate(MODELS, DRAFT, prompts(3), tree=kind(TREES), max_new_tokens=9) for kind in (deque, tuple))
    assert one.new_tokens == other.new_tokens


def test_counts_are_of_each_requests_own_tree():
    together = generate(MODELS, DRAFT, prompts(3), tree=TREES, max_new_tokens=40).stats
    alone = [
        generate(MODELS, DRAFT, prompts(3)[index : index + 1], tree=tree, max_new_tokens=40).stats
        for index, tree in enumerate(TREES)
    ]
    for name in ("visited_by_rank", "accepted_by_rank", "accepted_histogram"):
        rows = [getattr(stats, name) for stats in alone]
        longest = max(map(len, rows))
        assert getattr(together, name) == [sum(column) for column in zip(*(r + [0] * (longest - len(r)) for r in rows))]
    assert together.to_dict()["tree"] is None


def test_equal_trees_give_what_one_tree_gives():
    options = {"temperature": 0.9, "max_new_tokens": 40, "seed": 3, "top_p": 0.9}
    for tree in TREES:
        one = generate(MODELS, DRAFT, prompts(2), tree=tree, **options)
        assert generate(MODELS, DRAFT, prompts(2), tree=[tree, tree], **options).new_tokens == one.new_tokens


def test_a_draft_beyond_its_positions_with_trees_of_their_own():
    short = noisy_copy(MODELS, 0.4)
    short.config.max_position_embeddings = 32
    output = generate(MODELS, short, prompts(3), tree=TREES, max_new_tokens=60)
    assert output.stats.draft_restarts > 0
    assert output.new_tokens == generate(MODELS, None, prompts(3), max_new_tokens=60).new_tokens


@pytest.mark.parametrize(
    ("trees", "error", "message"),
    [
        (TREES[:2], ValueError, r"generate: tree must be one tree or one for each of 3 requests.*got 2 of widths"),
        ([TREES[0], TREES[1], TokenTree.chain(9)], ValueError, "all of the same widths, got 3 of widths"),
        ([], TypeError, "generate: tree must be a TokenTree"),
        ([TREES[0], "auto", TREES[1]], TypeError, "generate: tree must be a TokenTree"),
    ],
)
def test_trees_that_do_not_fit_are_refused(trees, error, message):
    with pytest.raises(error, match=message):
        generate(MODELS, DRAFT, prompts(3), tree=trees)
