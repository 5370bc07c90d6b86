"""Trees of requests anywhere in a batch are verified as alone; what is emitted is the path and the token behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sequoia_kernels.ops import VerifiedPath, verify_tree
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm.cut_trees import first_nodes
from sequoia_kernels.vllm.drafting import DraftedBatch
from sequoia_kernels.vllm.verification import PADDING, Warping, emitted_tokens, verify_drafted

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
VOCAB = 11


@dataclass
class Drafted:
    batch: DraftedBatch
    target_logits: torch.Tensor


def drafted(num_requests: int, seed: int = 0) -> Drafted:
    """Trees with tokens that the draft may have drawn, of mixed temperatures."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_requests, TREE.num_nodes)
    tokens = torch.zeros(shape, dtype=torch.int64)
    for node in range(TREE.num_nodes):
        children = TREE.children(node)
        for request in range(num_requests):
            order = torch.randperm(VOCAB, generator=generator)
            for child, token in zip(children, order.tolist()):
                tokens[request, child] = token
    logits = 2 * torch.randn(*shape, VOCAB, generator=generator)
    batch = DraftedBatch(
        TREE,
        {f"r{index}": index for index in range(num_requests)},
        [9] * num_requests,
        tokens,
        logits,
        torch.tensor([0.0, 0.7, 1.0, 1.3] * num_requests)[:num_requests],
        torch.arange(num_requests) + 50,
        torch.arange(num_requests) * 8,
    )
    # close to the draft, so that paths of all lengths are accepted
    return Drafted(batch, logits + 0.7 * torch.randn(logits.shape, generator=generator))


def alone(case: Drafted, place: int, num_nodes: int, warping: Warping, rule: str) -> VerifiedPath:
    batch, part = case.batch, slice(place, place + 1)
    return verify_tree(
        batch.tokens[part, :num_nodes].contiguous(),
        case.target_logits[part, :num_nodes].contiguous(),
        batch.draft_logits[part, :num_nodes].contiguous(),
        TokenTree(TREE.parents[:num_nodes]),
        batch.temperature[part],
        batch.seeds[part],
        batch.offsets[part],
        top_k=torch.tensor([warping.top_k], dtype=torch.int32),
        top_p=torch.tensor([warping.top_p], dtype=torch.float32),
        rule=rule,
    )


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("num_nodes", [8, 5, 2])
@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4, 5], [4, 0, 3], [5], [1, 2]])
@pytest.mark.parametrize("cut", [False, True])
def test_requests_are_verified_as_alone(rule, num_nodes, places, cut):
    case = drafted(6)
    cuts = [Warping(3 * (place % 2), 0.8 if place % 3 else 1.0) if cut else Warping(0, 1.0) for place in places]
    path = verify_drafted(case.batch, places, num_nodes, case.target_logits[places, :num_nodes], cuts, rule)
    for row, (place, warping) in enumerate(zip(places, cuts)):
        expected = alone(case, place, num_nodes, warping, rule)
        count = int(expected.num_accepted)
        assert int(path.num_accepted[row]) == count
        assert path.nodes[row, :count].tolist() == expected.nodes[0, :count].tolist()
        assert int(path.next_token[row]) == int(expected.next_token)


def test_paths_of_several_lengths_were_seen():
    lengths = set()
    for seed in range(20):
        case = drafted(6, seed)
        path = verify_drafted(case.batch, range(6), 8, case.target_logits, [Warping(0, 1.0)] * 6, "sequoia")
        lengths |= {*path.num_accepted.tolist()}
    assert lengths == {1, 2, 3, 4}


def test_a_cut_tree_is_its_first_nodes():
    assert first_nodes(TREE, 8) is TREE
    for count in range(1, 8):
        assert first_nodes(TREE, count).parents == TREE.parents[:count]


def test_emitted_are_the_accepted_tokens_and_the_one_behind_them():
    tokens = np.array([90, 91, 92, 93, 94, 80, 81, 82, 83, 84, 70, 71, 72, 73, 74], dtype=np.int32)
    nodes, next_tokens = np.array([[0, 2, 4, -1], [0, -1, -1, -1], [0, 1, 3, 4]]), np.array([5, 6, 7])
    before = tokens.copy()
    emitted = emitted_tokens(tokens, np.array([0, 5, 10]), nodes, next_tokens)
    assert emitted.tolist() == [[92, 94, 5, PADDING], [6, PADDING, PADDING, PADDING], [71, 73, 74, 7]]
    assert emitted.dtype == np.int64 and np.array_equal(tokens, before)
    # of drafted tokens alone, where the root's place is another tree's, or none
    drafted = np.delete(tokens, [0, 5, 10])
    assert np.array_equal(emitted_tokens(drafted, np.array([-1, 3, 7]), nodes, next_tokens), emitted)
