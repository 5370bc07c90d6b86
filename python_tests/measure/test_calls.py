"""The timed calls do the work of a decoding step: right rows, right sizes, nothing outside the cache."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_llama

from sequoia_kernels.measure import calls
from sequoia_kernels.models import adapt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return adapt(tiny_llama(0))


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 64, 128])
def test_typical_trees_have_their_size_and_branch(num_nodes):
    tree = calls.typical_tree(num_nodes)
    assert tree.num_nodes == num_nodes
    assert num_nodes < 4 or not tree.is_chain


def test_a_target_step_feeds_the_whole_tree():
    step = calls.target_step(40, CPU)
    assert step.node_ids.tolist() == list(range(40))
    assert (step.num_tree_rows, step.first_node) == (40, 0)
    assert torch.equal(step.tree_mask, calls.typical_tree(40).ancestor_mask())


@pytest.mark.parametrize(("num_rows", "nodes", "first"), [(1, [1], 1), (2, [0, 1], 0), (4, [1, 3, 5, 7], None)])
def test_a_draft_step_feeds_rows_of_a_level(num_rows, nodes, first):
    step = calls.draft_step(num_rows, CPU)
    assert step.node_ids.tolist() == nodes
    assert (step.num_tree_rows, step.first_node) == (nodes[-1] + 1, first)
    for row, node in enumerate(nodes):  # every row sees itself
        assert (int(step.tree_mask[row, node // 32]) >> (node % 32)) & 1


@pytest.mark.parametrize("context_len", [0, 20])
def test_a_forward_call_is_a_forward(model, context_len):
    cache = model.new_cache(3, 64)
    logits = calls.forward_call(model, cache, context_len, calls.draft_step(8, CPU))()
    assert logits.shape == (3, 8, model.vocab_size)
    written = cache.tensors()[0][0].abs().sum(dim=(1, 2)).nonzero().flatten()
    assert written.tolist() == [context_len + node for node in range(1, 16, 2)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_call_draws(temperature):
    drawn = calls.sample_call(6, 4, 32, temperature, torch.float32, CPU)()
    assert drawn.tokens.shape == (6, 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("num_nodes", "vocab"), [(1, 32), (24, 32), (24, 2)])
def test_a_verify_call_verifies_and_often_accepts(num_nodes, vocab, temperature):
    path = calls.verify_call(16, num_nodes, vocab, temperature, (torch.float32, torch.float32), CPU)()
    assert path.nodes.shape == (16, calls.typical_tree(num_nodes).num_levels)
    assert (float(path.num_accepted.float().mean()) > 1.3) == (num_nodes > 1)


def test_a_compact_call_can_be_repeated(model):
    cache = model.new_cache(2, 32)
    for tensor in cache.tensors():
        tensor.copy_(torch.arange(32.0)[None, :, None, None].expand_as(tensor))
    call = calls.compact_call(cache.tensors(), 10, 4, 16)
    call()
    expected = [*range(10), 10, 15, 20, 25, *range(14, 32)]  # nodes 0, 5, 10, 15 moved to rows 10..13
    for tensor in cache.tensors():
        assert tensor[1, :, 0, 0].tolist() == expected
    call()  # starts from the same committed length again
    assert cache.tensors()[0][0, :10, 0, 0].tolist() == list(range(10))
