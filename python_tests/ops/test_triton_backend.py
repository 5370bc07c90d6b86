"""What only the Triton backend has: launch configurations, splits and tiles, float8 as bits, one word for two counts.

The ops' own tests run this backend like every other one; here its block sizes are forced small, so that inputs of a few
rows already cross their borders. Where there is no GPU, triton interprets the kernels.
"""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from support.attention import attention_inputs, poison_unseen
from support.launch_memory import LaunchMemory
from support.op_backends import op_backends
from support.packed_masks import CHAIN, RANDOM, STAR, pack_tree, tree_parents
from support.plain_verifier import plain_verify
from support.tolerances import ATTENTION, LOG_NORMALISER, LOG_SUM_EXP, assert_close
from support.trees import all_parents
from support.triton_compile import DEVICES

from sequoia_kernels import TokenTree, VocabularyMap
from sequoia_kernels.measure.calls import typical_tree
from sequoia_kernels.ops import (
    CacheTable,
    compact_kv_cache_,
    tree_attention,
    triton_device,
    triton_warping,
    warped_logsumexp,
)
from sequoia_kernels.ops.compact_kv_cache_ import triton_launch as compaction
from sequoia_kernels.ops.compact_kv_cache_.op import CompactInputs
from sequoia_kernels.ops.sample_without_replacement import triton_launch as sampling
from sequoia_kernels.ops.sample_without_replacement.op import OPERATOR as sampling_operator
from sequoia_kernels.ops.sample_without_replacement.op import SampleInputs
from sequoia_kernels.ops.tree_attention import triton_kernels as programs
from sequoia_kernels.ops.tree_attention import triton_launch as attention
from sequoia_kernels.ops.tree_attention.op import OPERATOR as attention_operator
from sequoia_kernels.ops.tree_attention.op import TreeAttentionInputs
from sequoia_kernels.ops.tree_attention.triton_launch import LaunchConfig, TileShape
from sequoia_kernels.ops.verify_tree import reference as specification
from sequoia_kernels.ops.verify_tree import triton_launch as verification
from sequoia_kernels.ops.verify_tree.op import OPERATOR as verification_operator
from sequoia_kernels.ops.verify_tree.op import VerifyTreeInputs
from sequoia_kernels.ops.warped_logsumexp import triton_launch as warping
from sequoia_kernels.ops.warped_logsumexp.op import OPERATOR as warping_operator
from sequoia_kernels.ops.warped_logsumexp.op import WarpInputs

H200 = DEVICES[90]
HALF, SINGLE = 2, 4


def llama3_8b_config(num_nodes, batch_size=1, max_slots=8192 + 64, traits=H200):
    return attention._launch_config(batch_size, num_nodes, 8, 4, 128, 128, HALF, HALF, max_slots, False, traits)


# tree_attention: launch configurations


@pytest.mark.parametrize("capability", DEVICES)
def test_every_configuration_fits_the_device(capability):
    traits = DEVICES[capability]
    dims = [(8, 8), (32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (64, 256), (256, 256)]
    item_sizes = [(HALF, HALF), (HALF, 1), (SINGLE, SINGLE), (SINGLE, 1)]
    nodes = (1, 5, 8, 9, 16, 17, 64, 1024)
    for (head_dim, value_dim), sizes, num_nodes, paged in itertools.product(dims, item_sizes, nodes, (False, True)):
        config = attention._launch_config(1, num_nodes, 8, 4, head_dim, value_dim, *sizes, 8192, paged, traits)
        tile = config.tile
        padded = [attention._padded_dim(dim) for dim in (head_dim, value_dim)]
        needed = attention.shared_bytes(config.block_rows, tile, *padded, *sizes, paged, capability)
        assert needed <= traits.shared_bytes, (head_dim, value_dim, sizes, num_nodes, paged, config)
        assert tile.block_slots % tile.masked_slots == 0 and tile.masked_slots % 32 == 0
        assert config.block_rows >= 16 and tile.num_stages >= tile.masked_stages >= 1
        assert padded[0] % config.dim_chunk == 0
        assert 1 <= config.num_splits <= attention.MAX_SPLITS


@pytest.mark.parametrize(
    ("num_nodes", "batch_size"), [(1, 1), (1, 4), (8, 1), (16, 1), (32, 1), (64, 1), (128, 1), (256, 1)]
)
def test_splits_share_the_cache_evenly_over_the_device(num_nodes, batch_size):
    """The longest split of the last wave, in tiles, against every multiprocessor busy all the time."""
    config = llama3_8b_config(num_nodes, batch_size)
    num_programs = triton.cdiv(num_nodes * 4, config.block_rows) * 8 * batch_size
    slots = H200.num_sms * config.tile.programs_per_sm
    num_tiles = triton.cdiv(8192 + 64, config.tile.block_slots)
    waves = triton.cdiv(num_programs * config.num_splits, slots)
    longest = waves * triton.cdiv(num_tiles, config.num_splits)
    assert num_programs * num_tiles / slots / longest >= 0.85


@pytest.mark.parametrize(("num_nodes", "batch_size"), [(1024, 1), (512, 1), (1, 64), (64, 32)])
def test_a_grid_that_fills_the_device_is_not_split(num_nodes, batch_size):
    assert llama3_8b_config(num_nodes, batch_size).num_splits == 1


@pytest.mark.parametrize("max_slots", [1, 32, 65, 300])
def test_a_short_cache_has_no_more_splits_than_tiles(max_slots):
    config = llama3_8b_config(1, max_slots=max_slots)
    assert config.num_splits <= triton.cdiv(max_slots, config.tile.block_slots)


def test_a_device_with_little_shared_memory_gets_a_smaller_tile():
    small = llama3_8b_config(64, traits=H200._replace(shared_bytes=64 * 1024))
    large = llama3_8b_config(64)
    assert small.block_rows == large.block_rows
    assert (small.tile.num_stages, small.tile.block_slots) < (large.tile.num_stages, large.tile.block_slots)


# tree_attention: tiles and splits


@pytest.fixture(params=[backend for backend in op_backends("tree_attention") if "triton" in backend.id])
def device(request):
    """Where the Triton backend runs."""
    return request.param.device


def attend(device, inputs, config, window=None, softcap=None, sinks=None):
    moved = [tensor.to(device) for tensor in inputs]
    sinks = None if sinks is None else sinks.to(device)
    scale = inputs.q.shape[3] ** -0.5
    given = TreeAttentionInputs(*moved, scale, softcap, window, sinks, None, None, None, True)
    outputs = attention_operator.new_outputs(given)
    attention.run(given, outputs, config)
    return outputs.out.cpu(), outputs.lse.cpu()


def launch_config(block_rows, block_slots, masked_slots, num_splits, merge_rows=1, merge_chunk=2, dim_chunk=32):
    tile = TileShape(block_slots, masked_slots, 4, 2, 1, 1)
    return LaunchConfig(block_rows, tile, num_splits, dim_chunk, merge_rows, merge_chunk)


CONFIGS = [
    launch_config(16, 32, 32, 1),
    launch_config(16, 32, 32, 3),
    launch_config(16, 64, 32, 2, merge_rows=4),
    launch_config(32, 128, 64, 7, merge_rows=2, merge_chunk=4),  # more splits than tiles
    launch_config(32, 64, 64, 2, merge_chunk=1, dim_chunk=16),
]


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.block_rows}x{config.tile.block_slots}x{config.num_splits}"
)
def test_any_tiles_and_splits_give_the_same_result(device, config, window):
    inputs = attention_inputs(pack_tree(tree_parents(RANDOM, 9)), [95, 31], num_slots=140, heads=(6, 2))
    inputs = poison_unseen(inputs, window)
    sinks = torch.linspace(-1, 1, 6)
    expected = tree_attention(
        *inputs.double(), sliding_window=window, sinks=sinks.double(), return_lse=True, backend="reference"
    )
    out, lse = attend(device, inputs, config, window, sinks=sinks)
    assert_close(out, expected.out, ATTENTION, torch.float32)
    assert_close(lse, expected.lse, LOG_SUM_EXP, torch.float32)


@pytest.mark.parametrize("cache_len", [0, 1, 31, 32, 33, 63, 64])
def test_a_prefix_that_ends_anywhere_in_a_tile(device, cache_len):
    """The mask's words are cut at every bit offset, in one word and across two."""
    inputs = attention_inputs(pack_tree(tree_parents(STAR, 40)), [cache_len], num_slots=cache_len + 40, heads=(1, 1))
    inputs = poison_unseen(inputs)
    expected = tree_attention(*inputs.double(), backend="reference").out
    out, _ = attend(device, inputs, launch_config(64, 64, 32, 1))
    assert_close(out, expected, ATTENTION, torch.float32)


@pytest.mark.parametrize("window", [1, 5, 31, 32, 33, 64])
def test_a_window_inside_a_long_chain(device, window):
    """Rows deep in a chain see none of the prefix, and their window begins at every bit of a word."""
    inputs = attention_inputs(pack_tree(tree_parents(CHAIN, 70)), [20], num_slots=90, heads=(1, 1))
    inputs = poison_unseen(inputs, window)
    expected = tree_attention(*inputs.double(), sliding_window=window, backend="reference").out
    out, _ = attend(device, inputs, launch_config(64, 64, 32, 2), window)
    assert_close(out, expected, ATTENTION, torch.float32)


# tree_attention: float8 without conversion instructions


@triton.jit
def _decode_kernel(
    bytes_ptr,  # [256] uint8
    values_ptr,  # [256] fp32
):
    codes = tl.arange(0, 256)
    values = programs._as_type(tl.load(bytes_ptr + codes), tl.float32, True)
    tl.store(values_ptr + codes, values)


def test_every_float8_code_is_decoded_from_its_bits(device):
    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.empty(256, device=device)
    _decode_kernel[(1,)](codes.to(device), values)
    expected = codes.view(torch.float8_e4m3fn).float()
    is_number = ~expected.isnan()
    assert is_number.sum() == 254
    assert torch.equal(values.cpu()[is_number] * 256, expected[is_number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float8_caches_on_a_device_without_float8(device, dtype, monkeypatch):
    traits = attention.triton_device.device_traits(device)
    monkeypatch.setattr(attention.triton_device, "device_traits", lambda _: traits._replace(capability=80))
    inputs = attention_inputs(pack_tree(tree_parents(RANDOM, 5)), [11], num_slots=40, dtype=dtype)
    rounded = inputs._replace(
        k_cache=inputs.k_cache.to(torch.float8_e4m3fn), v_cache=inputs.v_cache.to(torch.float8_e4m3fn)
    )
    exact = rounded._replace(k_cache=rounded.k_cache.double(), v_cache=rounded.v_cache.double(), q=rounded.q.double())
    expected = tree_attention(*exact, backend="reference").out
    out, _ = attend(device, rounded, None)
    assert_close(out, expected, ATTENTION, dtype)


# compact_kv_cache_


def test_the_length_and_the_count_of_programs_share_a_word():
    config = compaction._launch_config(64, 8, 2048, 8192)
    assert config.num_slices * 64 < 2 ** (31 - config.length_bits)
    assert (8192).bit_length() <= config.length_bits
    # Many caches leave fewer bits for the length: then fewer programs share it, and in the end the call is refused.
    crowded = compaction._launch_config(512, 8, 2**16, 2**20)
    assert crowded.num_slices == 1
    assert compaction._launch_config(512, 8, 2**16, 2**21) is None


def test_a_cache_too_long_to_share_the_word_is_refused_with_a_reason():
    cache = torch.zeros(1, 1, 1, 1).expand(1, 2**30, 1, 1)
    path, count = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    reason = compaction.supports(CompactInputs([cache], path, count, count, None, None, 4, 2**30, True))
    assert reason == "takes up to 2**30 slots times caches"


@pytest.mark.parametrize(("num_levels", "row_shape"), [(5, (8, 64)), (40, (2, 8)), (70, (1, 33))])
def test_many_programs_and_long_paths(device, num_levels, row_shape):
    """Several slices of columns a cache, and paths longer than a block of levels."""
    generator = torch.Generator().manual_seed(num_levels)
    caches = [torch.randn(2, 200, *row_shape, generator=generator).to(device) for _ in range(3)]
    paths = torch.stack([torch.randperm(120, generator=generator)[:num_levels].sort().values for _ in range(2)])
    paths[:, 0] = 0
    arguments = [paths.int().to(device), torch.tensor([num_levels, num_levels - 2]).int().to(device)]
    lens = torch.tensor([3, 60]).int().to(device)
    expected, expected_lens = [cache.clone() for cache in caches], lens.clone()
    compact_kv_cache_(expected, *arguments, expected_lens, backend="reference")
    compact_kv_cache_(CacheTable(caches), *arguments, lens, backend="triton")
    assert torch.equal(lens, expected_lens)
    for cache, moved in zip(caches, expected):
        assert torch.equal(cache, moved)


# verify_tree: waves of the rule "traversal"


def waves_of(tree):
    """How many nodes come before each one: left siblings and ancestors, of which the root is none."""
    waves = [-1]
    for node in range(1, tree.num_nodes):
        parent = tree.parents[node]
        waves.append(waves[parent] + 1 + node - tree.children(parent)[0])
    return waves


# Eight children at once in the fourth wave, for which the launch has six programs a chunk.
CROWDED = TokenTree([-1] + [0] * 12 + [1, 1, 1, 2, 2, 3, 13, 13, 14, 16, 19])


@pytest.mark.parametrize("most", [0, 1, 5, verification.MAX_WAVE_LAUNCHES])
def test_waves_have_launches_of_their_own_or_share_the_last(most):
    trees = [TokenTree(parents) for num_nodes in range(2, 9) for parents in all_parents(num_nodes)]
    trees += [CROWDED, TokenTree.chain(40), TokenTree.kary(100, 2), TokenTree.kary(3, 5), typical_tree(64)]
    for tree in trees:
        launches = verification._wave_launches(tree.num_nodes, tree.num_levels, tree.max_branching, most)
        waves = waves_of(tree)[1:]
        has_rest = launches[-1] == verification._REST
        assert verification._REST not in launches[:-1]
        assert len(launches) - has_rest <= most
        assert has_rest or max(waves) < len(launches), tree.parents
        for wave in range(max(waves) + 1):
            assert waves.count(wave) <= min(2**wave, tree.num_nodes - 1 - wave)


def test_a_tree_as_it_is_drafted_leaves_no_wave_for_the_last_launch():
    for num_nodes in (2, 8, 16, 32, 64, 128):
        tree = typical_tree(num_nodes)
        launches = verification._wave_launches(
            tree.num_nodes, tree.num_levels, tree.max_branching, verification.MAX_WAVE_LAUNCHES
        )
        waves = waves_of(tree)[1:]
        assert max(waves) < len(launches) - (launches[-1] == verification._REST)
        assert all(waves.count(wave) <= children for wave, children in enumerate(launches[: max(waves) + 1]))


def traversal_step(seed):
    """A random tree and step: cuts, masked tokens, tokens that cannot be draws, drafts far from the target or near."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    parents = [-1]
    for _ in range(pick.randint(1, 9)):
        parents.append(min(max(parents[-1], 0) + pick.choice([0, 0, 1, 1, 2]), len(parents) - 1))
    tree = CROWDED if seed % 12 == 3 else TokenTree(parents)
    vocab, batch_size = (2, 5, 20, 60)[seed % 4], 2
    shape = (batch_size, tree.num_nodes, vocab)
    target_logits = torch.randn(shape, generator=generator) * pick.choice([1.0, 3.0])
    draft_logits = target_logits + torch.randn(shape, generator=generator) * pick.choice([0.2, 1.0, 3.0])
    for logits, kept in ((target_logits, 0), (draft_logits, 1)):
        if pick.random() < 0.4:
            logits.masked_fill_(torch.rand(shape, generator=generator) < 0.3, -torch.inf)
            logits[..., kept] = 0.0
    temperature = torch.tensor([pick.choice([0.0, 0.2, 0.7, 1.0, 1.0, 1.6]) for _ in range(batch_size)])
    tokens = torch.zeros(shape[:2], dtype=torch.int64)
    for node, request in itertools.product(range(tree.num_nodes), range(batch_size)):
        if children := tree.children(node):
            # At its own temperature: behind draws that the draft would not make, decisions hang on rounding.
            divisor = temperature[request] if temperature[request] > 0 else 1.0
            weights = (draft_logits[request, node].double() / divisor).softmax(dim=0)
            num_drawn = min(len(children), int((weights > 0).sum()))
            drawn = torch.multinomial(weights, num_drawn, generator=generator)
            tokens[request, children] = torch.nn.functional.pad(drawn, (0, len(children) - num_drawn), value=-1)
    if pick.random() < 0.3:
        tokens[:, pick.randrange(1, tree.num_nodes)] = pick.choice([-1, 0])
    streams = torch.arange(batch_size) + 1000 * seed
    cuts = (None, None)
    if pick.random() < 0.4:
        cuts = (torch.tensor([pick.choice([0, 1, 3]), 0]).int(), torch.tensor([1.0, pick.choice([0.6, 0.9])]))
    return tree, tokens, target_logits, draft_logits, temperature, streams, streams, *cuts


@pytest.mark.parametrize("part", range(6))
def test_traversal_decides_as_the_plain_verifier(device, part):
    """Over many trees, with chunks and waves at which launches and programs take turns."""
    num_steps = 3 if device.type == "cpu" else 100
    for seed in range(part * num_steps, (part + 1) * num_steps):
        tree, *step = traversal_step(seed)
        expected = plain_verify(*step[:3], tree, *step[3:], rule="traversal")
        topology, moved = tree.tensors(device), [None if tensor is None else tensor.to(device) for tensor in step]
        sizes = (topology.first_child, topology.num_children, tree.num_levels, tree.max_branching)
        inputs = VerifyTreeInputs(*moved[:3], *sizes, *moved[3:], "traversal")
        chunk = (16, 32, 128)[seed % 3]
        config = verification.LaunchConfig(
            chunk, triton.cdiv(step[1].shape[2], chunk), 1, 32, 1, wave_launches=(24, 0, 2)[seed % 3], candidates=8
        )
        outputs = verification_operator.new_outputs(inputs)
        verification.run(inputs, outputs, config)
        for got, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(got.cpu(), wanted), (seed, tree.parents)


# verify_tree: drafts of a smaller vocabulary, and certain children

PARTIAL_FORMS = ("map", "certain", "map and certain", "no draft")


def partial_step(seed, form, rule):
    """The step of `traversal_step` whose draft knows part of the tokens, or whose children are certain in part.

    Certain tokens are the target's likely ones, any others, repeats of a sibling, drawn or not, and none.
    """
    tree, tokens, target_logits, draft_logits, temperature, *streams_and_cuts = traversal_step(seed)
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    vocab = target_logits.shape[2]
    target_to_draft = certain = None
    if "map" in form:
        known = torch.cat([torch.tensor([1]), torch.randperm(vocab, generator=generator)[: vocab * 2 // 3]]).unique()
        known = known[torch.randperm(len(known), generator=generator)]
        draft_logits = draft_logits[..., known].contiguous()
        target_to_draft = VocabularyMap.of(known, vocab).target_to_draft
        # A place outside of the draft's row, of a token that it does not know.
        target_to_draft[target_to_draft < 0] = pick.choice([-1, -7, len(known), 2**31 - 1])
    if form != "map":
        # Flags of a row for all, of every second column, or with requests behind nodes.
        layout = pick.choice(["row", "columns", "requests last"])
        certain = torch.rand(tokens.shape, generator=generator) < pick.choice([0.3, 0.7])
        if layout == "row":
            certain = certain[0]
        elif layout == "columns":
            certain = certain.repeat_interleave(2, dim=1)[:, ::2]
        else:
            certain = certain.T.contiguous().T
        flags = certain.expand(tokens.shape)
        for node, request in itertools.product(range(tree.num_nodes), range(len(tokens))):
            children = tree.children(node)
            for rank, child in enumerate(children):
                if flags[request, child]:
                    likely = int(target_logits[request, node].topk(min(vocab, rank + 1)).indices[-1])
                    sibling = int(tokens[request, pick.choice(children)])
                    tokens[request, child] = pick.choice([likely, likely, pick.randrange(vocab), sibling, -1])
    if form == "no draft":
        draft_logits = None
    topology = tree.tensors()
    sizes = (topology.first_child, topology.num_children, tree.num_levels, tree.max_branching)
    logits = (target_logits, draft_logits)
    return VerifyTreeInputs(
        tokens, *logits, *sizes, temperature, *streams_and_cuts, rule, target_to_draft, certain
    )  # fmt: skip


def specified(inputs):
    """What the reference decides in float64; places outside of the draft's row are unknown tokens there."""
    target_to_draft, draft_logits = inputs.target_to_draft, inputs.draft_logits
    if target_to_draft is not None:
        outside = (target_to_draft < 0) | (target_to_draft >= draft_logits.shape[2])
        target_to_draft = target_to_draft.masked_fill(outside, -1)
    if draft_logits is not None:
        draft_logits = draft_logits.double()
    wide = inputs._replace(
        target_logits=inputs.target_logits.double(), draft_logits=draft_logits, target_to_draft=target_to_draft
    )
    outputs = verification_operator.new_outputs(wide)
    specification.run(wide, outputs)
    return outputs


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("form", PARTIAL_FORMS)
def test_partial_drafts_decide_as_the_reference(device, form, rule):
    """Over many trees, with chunks, ranks and waves at which launches and programs take turns."""
    num_steps = 6 if device.type == "cpu" else 300
    num_accepted = 0
    for seed in range(num_steps):
        inputs = partial_step(seed, form, rule)
        expected = specified(inputs)
        vocab = inputs.target_logits.shape[2]
        chunk = (16, 32, 128)[seed % 3]
        config = verification.LaunchConfig(
            chunk, triton.cdiv(vocab, chunk), 1, 32, 1,
            rank_launches=(1, 8, 2)[seed % 3], wave_launches=(24, 0, 2)[seed % 3], candidates=8,
        )  # fmt: skip
        moved = VerifyTreeInputs(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in inputs))
        outputs = verification_operator.new_outputs(moved)
        verification.run(moved, outputs, config)
        for got, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(got.cpu(), wanted), (seed, inputs)
        num_accepted += int((expected.num_accepted - 1).sum())
    assert num_accepted > 0


# Tokens of four siblings, which of them are certain, and what the draft and the target mask.
CERTAIN_CORNERS = {
    "passed over as drawn, then certain": ([2, 2, 0, 1], [1], [2], []),
    "masked by the target, likely for the draft": ([3, 0, 1, 2], [0], [], [3]),
    "certain, then drawn again": ([1, 1, 0, 2], [0], [], []),
    "drawn, then certain again": ([1, 1, 0, 2], [1], [], []),
    "twice passed over, then certain twice": ([2, 2, 2, 2], [2, 3], [2], []),
    "behind the end of the draft": ([0, 1, 3, 4], [2, 3], [2, 3, 4], []),
    "no token": ([-1, 5, 0, 1], [0, 1], [], []),
}


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("corner", CERTAIN_CORNERS)
def test_corners_of_certain_children(device, corner, rule):
    """A dozen requests, whose coins fall either way; by "traversal" the siblings' parent has chances of 1 and below."""
    children, are_certain, draft_masks, target_masks = CERTAIN_CORNERS[corner]
    generator, tree, batch_size = torch.Generator().manual_seed(1), TokenTree([-1, 0, 1, 1, 1, 1]), 12
    shape = (batch_size, tree.num_nodes, 5)
    target_logits, draft_logits = (torch.randn(shape, generator=generator) for _ in range(2))
    draft_logits[:, 1, children[0]] += 2.0
    draft_logits[:, 1, draft_masks] = target_logits[:, 1, target_masks] = -torch.inf
    certain = torch.zeros(tree.num_nodes, dtype=torch.bool)
    certain[[2 + rank for rank in are_certain]] = True
    tokens = torch.tensor([0, 4, *children]).repeat(batch_size, 1)
    topology, streams = tree.tensors(), torch.arange(batch_size)
    inputs = VerifyTreeInputs(
        tokens, target_logits, draft_logits, topology.first_child, topology.num_children, 3, 4,
        torch.ones(batch_size), streams, streams, None, None, rule, None, certain,
    )  # fmt: skip
    expected = specified(inputs)
    moved = VerifyTreeInputs(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in inputs))
    outputs = verification_operator.new_outputs(moved)
    verification.run(moved, outputs, verification.LaunchConfig(16, 1, 1, 16, 1, rank_launches=2, wave_launches=2))
    for got, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(got.cpu(), wanted)
    assert len(expected.nodes[:, 2].unique()) > 1


# warped_logsumexp: rows whose cut is among what many programs collect, and rows that one program reads itself


def ordinary_row(generator):
    """Few likely tokens, many unlikely ones, some of them masked, and ties of 0.0 and -0.0."""
    logits = torch.randn(2, 600, generator=generator) * 2.0
    logits[:, ::7] += 6.0
    logits[:, 100:140] = -torch.inf
    logits[0, 200:220] = torch.tensor([0.0, -0.0]).repeat(10)
    return logits.bfloat16().float()


# Sizes of which a chunk of 32 tokens has two groups, and the cuts of a row: top-k, top-p, temperature.
COLLECTED = {
    "top-k": (4, 1.0, 0.8),
    "top-p": (0, 0.9, 0.8),
    "both": (12, 0.6, 1.0),
    "top-p of almost all": (0, 0.999999, 0.3),
    "a small temperature": (0, 0.5, 1e-5),
    "the likeliest token": (0, 1e-9, 1.0),
    "as many as there are groups": (15, 1.0, 1.0),
}
READ = {
    "more tokens than peaks": (40, 1.0, 1.0),
    "more candidates than room": (0, 0.97, 3.0),
    "all but the last token": (599, 1.0, 1.0),
}


@pytest.mark.parametrize("case", [*COLLECTED, *READ])
@pytest.mark.parametrize("room", [256, 512])
def test_cuts_of_collected_and_of_read_rows(device, case, room, monkeypatch):
    monkeypatch.setattr(triton_warping, "PEAK_TOKENS", 16)
    num_read = []
    if triton_device.INTERPRETED:
        search = triton_warping._search_row
        monkeypatch.setattr(triton_warping, "_search_row", lambda *all_: num_read.append(1) or search(*all_))
    top_k, top_p, temperature = {**COLLECTED, **READ}[case]
    logits = ordinary_row(torch.Generator().manual_seed(3))
    if case == "more candidates than room":
        logits = torch.rand(2, 600, generator=torch.Generator().manual_seed(4))
    if case == "as many as there are groups":
        logits[:] = -torch.inf
        logits[:, 5::40] = torch.linspace(-4, 4, 15)
    if case == "more tokens than peaks":
        logits[:, 37 * 16 :] = -torch.inf
    options = torch.full((2,), top_k).int(), torch.full((2,), top_p)
    inputs = WarpInputs(logits, torch.full((2,), temperature), *options)
    moved = WarpInputs(*(tensor.to(device) for tensor in inputs))
    outputs = warping_operator.new_outputs(moved)
    warping.run(moved, outputs, warping.LaunchConfig(32, 19, 1, 64, 1, candidates=room))
    expected = warped_logsumexp(logits.double(), *inputs[1:], backend="reference")
    assert torch.equal(outputs.cut.cpu().double(), expected.cut)
    assert_close(outputs.log_normaliser.cpu(), expected.log_normaliser, LOG_NORMALISER, torch.float32)
    if triton_device.INTERPRETED:
        assert len(num_read) == (2 if case in READ else 0)


def test_rows_that_differ_in_what_is_on(device):
    """Greedy rows, rows without a cut, and cuts of either kind, in one launch."""
    logits = ordinary_row(torch.Generator().manual_seed(3)).repeat(3, 1)
    inputs = WarpInputs(
        logits, torch.tensor([0.0, 1.0, 0.7, 0.7, 1.0, 2.0]), torch.tensor([3, 0, 5, 0, 600, 1]).int(),
        torch.tensor([0.5, 1.0, 1.0, 0.8, 0.9, 1.0]),
    )  # fmt: skip
    moved = WarpInputs(*(tensor.to(device) for tensor in inputs))
    outputs = warping_operator.new_outputs(moved)
    warping.run(moved, outputs, warping.LaunchConfig(32, 19, 1, 64, 1, candidates=512))
    expected = warped_logsumexp(logits.double(), *inputs[1:], backend="reference")
    assert torch.equal(outputs.cut.cpu().double(), expected.cut)
    assert_close(outputs.log_normaliser.cpu(), expected.log_normaliser, LOG_NORMALISER, torch.float32)


# All ops: what the programs of a launch share


def attend_in_splits(generator):
    inputs = attention_inputs(pack_tree(tree_parents(RANDOM, 9)), [37, 31], num_slots=64, heads=(4, 2))
    attend(torch.device("cpu"), inputs, launch_config(16, 32, 32, 2))


def warp(generator):
    logits, cuts = torch.randn(2, 40, generator=generator), (torch.tensor([3, 9]).int(), torch.tensor([1, 0.9]))
    config = warping.LaunchConfig(16, 3, 1, 32, 1, candidates=8)
    inputs = WarpInputs(logits, torch.tensor([0.0, 1.0]), *cuts)
    warping.run(inputs, warping_operator.new_outputs(inputs), config)


def sample(generator):
    logits, streams = torch.randn(2, 300, generator=generator), torch.arange(2)
    config = sampling._launch_config(2, 300, 4, H200)
    assert config.num_chunks > 1
    inputs = SampleInputs(logits, 4, torch.tensor([0.0, 1.0]), streams, streams)
    sampling.run(inputs, sampling_operator.new_outputs(inputs))


def verify(generator, warped=True, rule="sequoia", form=""):
    """A greedy request and one whose children mostly fail; the last two ranks of the root, or waves, share a launch."""
    target_logits, tokens = torch.randn(2, 7, 40, generator=generator), torch.arange(7).expand(2, 7).contiguous()
    draft_logits = target_logits + torch.randn(2, 7, 40, generator=generator)
    draft_logits[..., :7] += 4.0  # drawn far more often than the target would
    tree, streams = TokenTree([-1, 0, 0, 0, 0, 1, 1]).tensors(), torch.arange(2)
    cuts = (torch.tensor([0, 30]).int(), torch.tensor([1, 0.9])) if warped else (None, None)
    target_to_draft = certain = None
    if "map" in form:
        known = torch.arange(39, -1, -2)
        draft_logits, target_to_draft = draft_logits[..., known], VocabularyMap.of(known, 40).target_to_draft
    if "certain" in form:
        certain = torch.tensor([False, True, False, False, True, False, True])
    config = verification.LaunchConfig(32, 2, 1, 64, 1, rank_launches=2, wave_launches=2, candidates=8)
    inputs = VerifyTreeInputs(
        tokens, target_logits, draft_logits, tree.first_child, tree.num_children, 3, 4,
        torch.tensor([0.0, 1.0]), streams, streams, *cuts, rule, target_to_draft, certain,
    )  # fmt: skip
    if form == "certain alone":
        inputs = inputs._replace(draft_logits=None)
    verification.run(inputs, verification_operator.new_outputs(inputs), config)


def compact(generator):
    caches = [torch.randn(2, 20, 8, 64, generator=generator) for _ in range(3)]
    path, counts = torch.tensor([[0, 2, 5], [0, 1, 3]]).int(), torch.tensor([3, 2]).int()
    compact_kv_cache_(caches, path, counts, torch.tensor([3, 6]).int(), backend="triton")


CALLS = {
    "tree_attention": attend_in_splits,
    "warped_logsumexp": warp,
    "sample_without_replacement": sample,
    "verify_tree": verify,
    "verify_tree, unwarped": functools.partial(verify, warped=False),
    "verify_tree, traversal": functools.partial(verify, rule="traversal"),
    "verify_tree, traversal, unwarped": functools.partial(verify, warped=False, rule="traversal"),
    **{
        f"verify_tree, {rule}, {form}": functools.partial(verify, warped=warped, rule=rule, form=form)
        for rule, warped in (("sequoia", False), ("traversal", True))
        for form in ("map", "map and certain", "certain alone")
    },
    "compact_kv_cache_": compact,
}


@pytest.mark.skipif(not triton_device.INTERPRETED, reason="only the interpreter tells what a program reads and writes")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_program_hangs_on_another_one_or_reads_what_nobody_wrote(monkeypatch, call):
    """The interpreter runs the programs one by one; a GPU runs them in any order and at the same time."""
    with LaunchMemory(monkeypatch) as memory:
        call(torch.Generator().manual_seed(3))
    assert memory.num_launches > 0
    assert (memory.conflicts, memory.unwritten, memory.outside) == ([], [], [])


@triton.jit
def copy_kernel(source, target, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(target + places, tl.load(source + places))


@pytest.mark.skipif(not triton_device.INTERPRETED, reason="only the interpreter tells what a program reads and writes")
@pytest.mark.parametrize(("num_read", "num_written", "outside"), [(8, 8, 0), (7, 8, 4), (8, 6, 8), (6, 7, 12)])
def test_accesses_outside_of_a_launchs_tensors_are_told(monkeypatch, num_read, num_written, outside):
    # Parts of one storage that lie apart: what lies between belongs to neither.
    storage = torch.zeros(32)
    with LaunchMemory(monkeypatch) as memory:
        copy_kernel[(1,)](storage[:num_read], storage[16 : 16 + num_written], COUNT=8)
    expected = [f"copy_kernel: {outside} bytes outside of its tensors"] if outside else []
    assert memory.outside == expected
