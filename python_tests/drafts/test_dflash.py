"""DFlash and DSpark drafts: folders, logits against their authors' own modules, and the text of the target."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.chi_square import p_value, sequence_counts
from support.dflash_models import good_draft, memory_folder, random_config, random_draft, random_weights
from support.shaped_trees import steep_confidence
from support.tiny_models import sequence_probabilities, tiny_llama

from sequoia_kernels import TokenTree, adapt, generate, measure_profile, tree_attention
from sequoia_kernels.decoding import auto, record_steps
from sequoia_kernels.drafts import (
    DecodingState,
    StageClock,
    TokenBuffers,
    TreeLayout,
    dflash_from_model,
    draft_from_folder,
    host_growth,
)
from sequoia_kernels.drafts.dflash import load_dflash
from sequoia_kernels.drafts.dflash.backbone import block_step
from sequoia_kernels.drafts.dflash.forms import HEAD_KINDS, is_dflash, read_form
from sequoia_kernels.drafts.dflash.heads import DSparkHeads
from sequoia_kernels.measure import calls
from sequoia_kernels.models import StepContext, TreeModel
from sequoia_kernels.models.fused import fused_forward
from sequoia_kernels.ops import VerifiedPath, triton_device
from sequoia_kernels.ops.backends import unavailable_reason
from sequoia_kernels.planner import CostModel
from sequoia_kernels.tree import ShapedTree

CHAIN = TokenTree.chain(5)
DATA = Path(__file__).parent / "data" / "dflash"
FOLDERS = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def golden_target():
    """The target whose embedding and head the golden logits were computed with."""
    shared = load_file(DATA / "target.safetensors")
    target = tiny_llama(0, vocab_size=64)
    target.model.embed_tokens.weight.data = shared["embedding"].clone()
    target.lm_head.weight.data = shared["head"].clone()
    return adapt(target)


def nearly_bigram(attention: float = 0.05):
    """A target whose next token depends on the last one above all, as a good draft's rows do."""
    target = tiny_llama(3, vocab_size=12, sharpness=4.0)
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.mul_(attention)
    return target


def started(draft, target, batch_size: int = 1, rows: int = 64):
    state = DecodingState.create(
        batch_size, target.device, seeds=range(batch_size), temperature=[1.0] * batch_size, top_k=None, top_p=None
    )
    return state, draft.start(target, state, rows, backend="auto", clock=StageClock(enabled=False))


def forced(drafting, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Let levels draw these tokens of a tree; give the list that their logits are put into."""
    seen = []

    def draw(level, logits, buffers):
        seen.append(logits.clone())
        children = slice(level.first_child, level.first_child + level.num_children)
        buffers.tokens[:, children] = tokens[:, children]

    drafting.draw_children = draw
    return seen


def grow(drafting, tree: TokenTree, tokens: torch.Tensor, lens: list[int], foretold=None) -> list[torch.Tensor]:
    """Grow a tree with these tokens [B, N] behind contexts of these lengths; logits level by level.

    What the draft foretells is written to `foretold` [B, N].
    """
    state = drafting.state
    state.cache_lens.copy_(torch.tensor(lens))
    state.root_tokens.copy_(tokens[:, 0])
    layout = TreeLayout.build(tree, "cpu")
    buffers = TokenBuffers(tokens.clone(), None, foretold=foretold)
    seen = forced(drafting, tokens)
    drafting.grow(layout, buffers)
    return seen


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_equal_those_of_the_authors_modules(name):
    golden = {
        key.partition(".")[2]: value
        for key, value in load_file(DATA / "golden.safetensors").items()
        if key.startswith(f"{name}.")
    }
    target = golden_target()
    draft = draft_from_folder(DATA / name, target)
    config = json.loads((DATA / name / "config.json").read_text())
    block, first = config["block_size"], 0 if config["sample_from_anchor"] else 1
    with torch.inference_mode():
        _, drafting = started(draft, target)
        width = golden["features"].shape[1] // 2
        for anchor, logits in zip(golden["anchors"].tolist(), golden["logits"], strict=True):
            context = golden["features"][None, :anchor]
            drafting.restart()
            drafting.prefill(
                [0], golden["tokens"][None, :anchor], torch.tensor([anchor]), list(context.split(width, -1))
            )
            chain = TokenTree.chain(draft.max_levels)
            tokens = golden["tokens"][None, anchor : anchor + chain.num_nodes]
            tokens = torch.nn.functional.pad(tokens, (0, chain.num_nodes - tokens.shape[1]))
            foretold = torch.full(tokens.shape, torch.nan) if draft.foretells else None
            assert draft.foretells == ("confidence" in golden)
            seen = grow(drafting, chain, tokens, [anchor], foretold)
            assert len(seen) == block - first
            for slot, rows in enumerate(seen, start=first):
                torch.testing.assert_close(rows[0, 0], logits[slot], rtol=1e-5, atol=1e-5)
            if "confidence" in golden:
                expected = golden["confidence"][golden["anchors"].tolist().index(anchor), first:]
                torch.testing.assert_close(foretold[0, :-1], expected, rtol=1e-5, atol=1e-5)


# ---- what a tree's nodes are told ----

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 7])
KINDS = [None, *HEAD_KINDS]
SOME_TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4]])


def states_of(target, tokens: torch.Tensor, needs) -> list[torch.Tensor]:
    """The hidden states that a draft reads of a text. [B, L, width] each."""
    with torch.inference_mode():
        found = target(input_ids=tokens, output_hidden_states=True).hidden_states
    return [found[number] for number in needs]


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nodes_logits_and_confidence_depend_on_its_path_alone(kind, anchored):
    target = tiny_llama(3, vocab_size=12)
    draft = good_draft(target, kind, sample_from_anchor=anchored)
    assert draft.max_levels >= TREE.num_levels
    text = torch.tensor([[7, 1, 2, 9, 3], [2, 2, 8, 0, 0]])
    lens = [5, 3]
    with torch.inference_mode():
        _, drafting = started(draft, adapt(target), batch_size=2)
        assert draft.foretells == (kind is not None)
        confidence = None if kind is None else torch.full(SOME_TOKENS.shape, torch.nan)
        drafting.prefill([0, 1], text, torch.tensor(lens), states_of(target, text, draft.needs))
        levels = grow(drafting, TREE, SOME_TOKENS, lens, confidence)
        rows = {}
        for depth, found in enumerate(levels):
            for place, node in enumerate(TREE.internal_nodes(depth)):
                rows[node] = found[:, place]
        for node in rows:
            path = [node]
            while path[0] != 0:
                path.insert(0, TREE.parents[path[0]])
            chain = TokenTree.chain(len(path) + 1)
            tokens = torch.nn.functional.pad(SOME_TOKENS[:, path], (0, 1))
            of_chain = None if kind is None else torch.full(tokens.shape, torch.nan)
            alone = grow(drafting, chain, tokens, lens, of_chain)[-1][:, 0]
            torch.testing.assert_close(rows[node], alone, rtol=1e-5, atol=1e-5)
            if kind is not None:
                torch.testing.assert_close(confidence[:, node], of_chain[:, len(path) - 1])
        if kind is not None:
            leaves = [node for node, count in enumerate(TREE.num_children) if not count]
            assert bool(confidence[:, leaves].isnan().all()) and bool(confidence[:, list(rows)].isfinite().all())
            siblings = rows[1], rows[2]
            assert not torch.allclose(*siblings, atol=1e-3)  # each row knows its own token


def test_trees_of_each_request_and_shaped_ones_read_their_own_parents():
    """The states of an "rnn" head are handed down each request's own tree."""
    target = tiny_llama(3, vocab_size=12)
    draft = good_draft(target, "rnn")
    trees = TokenTree([-1, 0, 0, 1, 2, 3]), TokenTree([-1, 0, 0, 2, 2, 4])
    tokens = SOME_TOKENS[:, :6]
    with torch.inference_mode():
        _, drafting = started(draft, adapt(target), batch_size=2)
        layout = TreeLayout.build(trees, "cpu")
        seen = forced(drafting, tokens)
        drafting.state.cache_lens.fill_(1)
        drafting.state.root_tokens.copy_(tokens[:, 0])
        drafting.grow(layout, TokenBuffers(tokens.clone(), None))
        together = list(seen)
        for request, tree in enumerate(trees):
            _, single = started(draft, adapt(target))
            alone = grow(single, tree, tokens[request : request + 1], [1])
            for depth, rows in enumerate(alone):
                nodes = layout.levels[depth].nodes.tolist()
                for place, node in enumerate(tree.internal_nodes(depth)):
                    found = together[depth][request, nodes.index(node)]
                    torch.testing.assert_close(found, rows[0, place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forward", ["native", "modules"])
def test_context_follows_every_path_of_a_batch(forward, monkeypatch):
    """Requests accept different numbers of tokens, and their contexts equal those of their texts from the start."""
    target = nearly_bigram()
    draft = good_draft(target, "vanilla")
    draft.backbone.model = adapt(draft.backbone.model, forward=forward)
    prompts = torch.randint(12, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = 0
    checked, ahead = [], set()
    made = type(draft).start

    def start(self, *args, **options):
        drafting = made(self, *args, **options)
        committed = drafting.committed

        def check(path, hidden_states):
            committed(path, hidden_states)
            checked.append((drafting.state.cache_lens.clone(), [tensor.clone() for tensor in drafting.cache.tensors()]))
            ahead.add(len(set(path.num_accepted.tolist())))

        drafting.committed = check
        return drafting

    monkeypatch.setattr(type(draft), "start", start)
    output = generate(target, draft, prompts, mask, tree=TREE, max_new_tokens=24, temperature=0.7, eos_token_id=())
    assert max(ahead) > 1 and output.stats.tokens_per_step > 1.2
    monkeypatch.undo()
    assert len(checked) >= 6
    for lens, tensors in checked[:6]:  # before a request has ended
        for request, length in enumerate(lens.tolist()):
            if length > int(mask[request].sum()) + 24:
                continue  # the last step went on behind the request's end
            text = torch.cat((prompts[request][mask[request].bool()], torch.tensor(output.new_tokens[request])))[
                None, :length
            ]
            with torch.inference_mode():
                _, fresh = started(draft, adapt(target))
                fresh.prefill([0], text, torch.tensor([length]), states_of(target, text, draft.needs))
                for found, expected in zip(tensors, fresh.cache.tensors(), strict=True):
                    torch.testing.assert_close(found[request, :length], expected[0, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_decodes_as_its_requests_do_alone(kind):
    target = nearly_bigram()
    draft = good_draft(target, kind)
    prompts = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(1))
    options = {"tree": TREE if kind else CHAIN, "max_new_tokens": 30, "temperature": 0.8, "eos_token_id": ()}
    together = generate(target, draft, prompts, seed=[4, 5, 6], **options)
    for request, seed in enumerate((4, 5, 6)):
        alone = generate(target, draft, prompts[request : request + 1], seed=[seed], **options)
        assert alone.new_tokens[0] == together.new_tokens[request]


def test_some_lanes_alone_take_a_prompt():
    target = tiny_llama(3, vocab_size=12)
    draft = random_draft(target)
    text = torch.randint(12, (2, 6), generator=torch.Generator().manual_seed(2))
    features = states_of(target, text, draft.needs)
    with torch.inference_mode():
        _, drafting = started(draft, adapt(target), batch_size=3)
        drafting.prefill(
            [0, 1, 2], text[[0, 0, 0]], torch.tensor([6, 6, 6]), [states[[0, 0, 0]] for states in features]
        )
        drafting.prefill([1], text[1:], torch.tensor([6]), [states[1:] for states in features])
        for tensor in drafting.cache.tensors():
            assert torch.equal(tensor[0], tensor[2]) and not torch.equal(tensor[0], tensor[1])


def test_long_prompts_are_projected_in_chunks():
    target = tiny_llama(3, vocab_size=12, max_positions=1200)
    draft = random_draft(target)
    text = torch.randint(12, (1, 1100), generator=torch.Generator().manual_seed(2))
    features = states_of(target, text, draft.needs)
    with torch.inference_mode():
        _, drafting = started(draft, adapt(target), rows=1100)
        drafting.prefill([0], text, torch.tensor([1100]), features)
        positions = torch.arange(1090, 1100)[None]
        before = [tensor.clone() for tensor in drafting.cache.tensors()]
        part = [states[:, 1090:] for states in features]
        draft.backbone.write_context(drafting.cache, part, positions, positions.flatten(), drafting.rotations)
        for found, expected in zip(drafting.cache.tensors(), before, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["host", "sdpa", "triton"])
def test_every_attention_shows_a_block_what_its_mask_says(backend, causal):
    """The op was made for trees, whose rows see no rows behind them: nothing in it may rest on that."""
    reason = unavailable_reason("tree_attention", backend)
    if reason is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(1)
    for num_rows, window in ((5, None), (5, 9), (40, 44)):
        step = block_step(num_rows, causal, torch.device("cpu"))
        query, keys, values = (
            torch.randn(2, length, heads, 32, generator=generator)
            for length, heads in ((num_rows, 4), (120, 2), (120, 2))
        )
        lens = torch.tensor([37, 3], dtype=torch.int32)
        found, expected = (
            tree_attention(query, keys, values, step.tree_mask, lens, sliding_window=window, backend=name).out
            for name in (backend, "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(triton_device.unavailable_reason() is not None, reason="the kernels cannot run")
def test_fused_forwards_run_blocks_as_modules_do():
    draft = random_draft(tiny_llama(3, vocab_size=12), kind="dspark")
    modules = adapt(draft.backbone.model, forward="modules")
    device = torch.device("cpu" if triton_device.INTERPRETED else "cuda:0")
    modules.model.to(device)
    modules.refresh()
    own = fused_forward(modules.model, modules._plan.calls, modules.logits_dtype, device)
    fused = TreeModel(modules.model, modules._plan._replace(own=own))
    assert fused.runs == "fused"
    cache = modules.new_cache(2, 24)
    for tensor in cache.tensors():
        tensor.normal_(generator=torch.Generator(device).manual_seed(1))
    tokens, lens = SOME_TOKENS[:, :5].to(device), torch.tensor([7, 11], dtype=torch.int32, device=device)
    step = block_step(5, False, device)
    found, expected = (model.forward(tokens, cache, lens, step) for model in (fused, modules))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- the text stays the target's ----


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_targets(kind):
    target = nearly_bigram()
    prompts = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[2, :3] = 0
    plain = generate(target, None, prompts, mask, max_new_tokens=40).new_tokens
    draft = good_draft(target, kind)
    for tree in (CHAIN, TREE, ShapedTree((1, 2, 2, 2), steep_confidence(2))):
        output = generate(target, draft, prompts, mask, tree=tree, max_new_tokens=40)
        assert output.new_tokens == plain
        if kind is not None:
            assert output.stats.tokens_per_step > 1.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_in_halves_and_beside_lookup(kind, dtype, monkeypatch):
    """Native logits of the target are the same bits for a tree, whatever grew it."""
    target = nearly_bigram().to(dtype)
    prompts = torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = generate(target, None, prompts, max_new_tokens=40, eos_token_id=()).new_tokens
    draft = good_draft(target, kind)
    assert draft.logits_dtype == dtype and draft.backbone.model.runs == "native"
    for batch in (prompts, prompts[:1]):
        output = generate(target, draft, batch, tree=TREE if kind else CHAIN, max_new_tokens=40, eos_token_id=())
        assert output.new_tokens == plain[: len(batch)]
    both = generate(
        target, draft, prompts, tree=TREE if kind else CHAIN, lookup=True, max_new_tokens=40, eos_token_id=()
    )
    assert both.new_tokens == plain and both.stats.lookup_steps > 0
    monkeypatch.setattr(host_growth.HostGrowth, "of_block", classmethod(lambda cls, *arguments: None))
    level_by_level = generate(target, draft, prompts, tree=TREE if kind else CHAIN, max_new_tokens=40, eos_token_id=())
    assert level_by_level.new_tokens == plain


def test_a_wrong_draft_changes_the_speed_alone():
    target = nearly_bigram(attention=0.0)
    prompts = torch.randint(12, (2, 7), generator=torch.Generator().manual_seed(1))
    plain = generate(target, None, prompts, max_new_tokens=40).new_tokens
    speeds = []
    for draft in (
        good_draft(target, "vanilla"),
        good_draft(target, "vanilla", share=5.0, aux_hidden_state_layer_ids=[0, 1]),
        random_draft(target, kind="dspark", seed=4),
        random_draft(target, kind="dspark", draft_vocab_size=5),  # whose map leaves most tokens out
        random_draft(target, block_size=9, mask_token_id=0),
    ):
        output = generate(target, draft, prompts, tree=TREE, max_new_tokens=40)
        assert output.new_tokens == plain
        speeds.append(output.stats.tokens_per_step)
    assert speeds[0] > max(speeds[1:])


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_joint_distribution_is_the_targets(kind, reduced):
    target = tiny_llama(7, vocab_size=5, sharpness=8.0)
    options = {"draft_vocab_size": 3} if reduced else {}
    if kind is None:
        draft = random_draft(target, **options)
    else:
        draft = random_draft(target, kind="dspark", markov_head_type=kind, **options)
    prompt = torch.tensor([2, 0, 4])
    output = generate(
        target, draft, prompt.repeat(4000, 1), seed=range(4000), tree=TokenTree([-1, 0, 0, 1, 1, 2]), max_new_tokens=3,
        temperature=1.0,
    )  # fmt: skip
    counts = sequence_counts(torch.tensor(output.new_tokens), 5)
    assert p_value(counts, sequence_probabilities(target, prompt, 3, lambda logits: logits.softmax(-1))) > 1e-4


def test_an_engine_goes_on_with_another_batch():
    target = tiny_llama(3, vocab_size=12)
    draft = good_draft(target, "gated")
    tokens = SOME_TOKENS[:1]
    text = torch.tensor([[7, 1, 2, 9]])
    with torch.inference_mode():
        _, drafting = started(draft, adapt(target))
        layout = TreeLayout.build(TREE, "cpu")
        drafting.prepare(layout, TokenBuffers(tokens, None))
        drafting.prefill([0], text, torch.tensor([4]), states_of(target, text, draft.needs))
        first = grow(drafting, TREE, tokens, [4])
        assert drafting.bound_block(len(layout.levels)) is not None  # of a native backbone
        drafting.use(None, StageClock(enabled=False))
        assert drafting.source is None and not drafting._bound  # nobody's weights are kept
        drafting.use(draft, StageClock(enabled=False))
        drafting.restart()
        assert not any(bool(tensor.any()) for tensor in drafting.cache.tensors())
        drafting.prefill([0], text, torch.tensor([4]), states_of(target, text, draft.needs))
        for bound, unbound in zip(first, grow(drafting, TREE, tokens, [4]), strict=True):
            torch.testing.assert_close(bound, unbound, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"draft_vocab_size": 9}, {"sample_from_anchor": True}])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", [None, "vanilla", "gated", "rnn"])
def test_trees_are_grown_in_one_call_as_level_by_level(kind, batch_size, options, monkeypatch):
    target = nearly_bigram()
    kinds = {"kind": "dspark", "markov_head_type": kind} if kind else {}
    draft = random_draft(target, **kinds, **options)
    prompts = torch.randint(12, (batch_size, 7), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 24, "temperature": 0.8, "seed": 3, "eos_token_id": ()}
    grown, run = [], host_growth.HostGrowth.run
    monkeypatch.setattr(host_growth.HostGrowth, "run", lambda self, clock: grown.append(run(self, clock)) or grown[-1])
    trees = TREE, CHAIN, ShapedTree((1, 2, 2, 2), steep_confidence(2))
    in_one_call = [generate(target, draft, prompts, tree=tree, **settings) for tree in trees]
    assert grown and all(grown)
    assert all(output.stats.stage_seconds["sample"] > 0 for output in in_one_call)
    monkeypatch.setattr(host_growth.HostGrowth, "of_block", classmethod(lambda cls, *arguments: None))
    for tree, output in zip(trees, in_one_call, strict=True):
        level_by_level = generate(target, draft, prompts, tree=tree, **settings)
        assert output.new_tokens == level_by_level.new_tokens
        assert output.stats.request_steps == level_by_level.stats.request_steps


def markov_rows(draft, heads, layout, tokens, logits, slots) -> list[torch.Tensor]:
    """The rows of a grown tree's levels, of the dtype of the heads and of what the block gave. [B, W, vocab] each."""
    batch_size, num_nodes = tokens.shape
    states = torch.zeros(batch_size, num_nodes + 1, heads.rank, dtype=logits.dtype)
    first_slot = draft.backbone.first_slot
    if heads.kind == "rnn" and first_slot:
        states[:, :1] = heads.rows_states(tokens[:, :1], slots[:, :1], states[:, :1])
    topology = layout.topology.tensors("cpu") if isinstance(layout.topology, TokenTree) else layout.topology
    parents = topology.parents.expand(batch_size, -1).to(torch.int64)
    levels = []
    for depth, level in enumerate(layout.levels):
        slot = None if slots is None else slots[:, first_slot + depth, None]
        above = states.take_along_dim(parents[:, level.nodes, None] + 1, 1)
        rows = heads.rows(tokens[:, level.nodes].clamp(min=0), logits[:, depth, None], slot, above)
        if rows.states is not None:
            states[:, level.nodes + 1] = rows.states
        levels.append(rows.logits)
    return levels


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_rows_of_trees_in_one_call_are_those_of_the_specification(kind, dtype, batch_size, anchored):
    """Their error is at most twice that of torch in the same dtype, both against float64 from the same numbers."""
    target = nearly_bigram()
    config = random_config(target, kind="dspark", markov_head_type=kind, sample_from_anchor=anchored)
    weights = {name: weight.to(dtype) for name, weight in random_weights(config).items()}
    draft = load_dflash(memory_folder(config, weights), adapt(target.to(dtype)))
    exact = DSparkHeads(draft.form, {name: weight.double() for name, weight in weights.items()})
    text = torch.randint(12, (batch_size, 6), generator=torch.Generator().manual_seed(1))
    features = states_of(target, text, draft.needs)
    trees = [TREE, CHAIN, ShapedTree((1, 2, 3, 2), steep_confidence())]
    if batch_size > 1:
        trees.append((TREE, TokenTree([-1, 0, 0, 0, 2, 2, 3, 5, 5, 8]), TREE))
    for tree in trees:
        with torch.inference_mode():
            state, drafting = started(draft, adapt(target), batch_size)
            drafting.prefill(list(range(batch_size)), text, torch.tensor([6] * batch_size), features)
            state.cache_lens.fill_(6)
            state.root_tokens.copy_(torch.tensor([3, 5, 8])[:batch_size])
            layout = TreeLayout.build(tree, "cpu", batch_size)
            buffers = TokenBuffers.allocate(layout, batch_size, 12, dtype, torch.device("cpu"))
            buffers.tokens[:, 0] = state.root_tokens
            host, _ = drafting._host_growth(layout, buffers)
            assert host is not None
            drafting.grow(layout, buffers)
            numbers = drafting._block(len(layout.levels))
            eager, expected = (
                markov_rows(
                    draft, heads, layout, buffers.tokens, *(None if part is None else part.to(of) for part in numbers)
                )
                for heads, of in ((draft.heads, dtype), (exact, torch.float64))
            )
            found = [buffers.draft_logits[:, level.nodes] for level in layout.levels]
        for rows, torchs, wanted in zip(found, eager, expected, strict=True):
            error, torch_error = (float((part.double() - wanted).abs().max()) for part in (rows, torchs))
            assert error <= 2 * torch_error + 1e-6, (tree, error, torch_error)


# ---- the confidence head shapes trees ----

FORETOLD = ShapedTree((1, 2, 3, 2), steep_confidence(foretold=True))


@pytest.mark.parametrize("reads_token", [True, False])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_trees_are_shaped_by_the_head_in_one_call_as_level_by_level(
    kind, batch_size, anchored, reads_token, monkeypatch
):
    target = nearly_bigram()
    draft = random_draft(
        target, kind="dspark", markov_head_type=kind, sample_from_anchor=anchored,
        confidence_head_with_markov=reads_token,
    )  # fmt: skip
    prompts = torch.randint(12, (batch_size, 7), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 24, "temperature": 0.8, "seed": 3, "eos_token_id": ()}
    grown, run = [], host_growth.HostGrowth.run
    monkeypatch.setattr(host_growth.HostGrowth, "run", lambda self, clock: grown.append(run(self, clock)) or grown[-1])
    in_one_call = generate(target, draft, prompts, tree=FORETOLD, **settings)
    assert grown and all(grown)
    monkeypatch.setattr(host_growth.HostGrowth, "of_block", classmethod(lambda cls, *arguments: None))
    level_by_level = generate(target, draft, prompts, tree=FORETOLD, **settings)
    assert in_one_call.new_tokens == level_by_level.new_tokens
    assert in_one_call.stats.request_steps == level_by_level.stats.request_steps
    plain = generate(target, None, prompts, max_new_tokens=24, eos_token_id=()).new_tokens
    for tree in (FORETOLD, TREE):
        assert generate(target, draft, prompts, tree=tree, max_new_tokens=24, eos_token_id=()).new_tokens == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [None, *HEAD_KINDS])
def test_what_is_foretold_in_one_call_is_what_the_head_says(kind, dtype):
    target = nearly_bigram().to(dtype)
    heads = {"markov_rank": 0, "confidence_head_with_markov": False} if kind is None else {"markov_head_type": kind}
    draft = random_draft(target, kind="dspark", **heads)
    assert draft.foretells and draft.heads.kind == kind
    with torch.inference_mode():
        state, drafting = started(draft, adapt(target), batch_size=2)
        state.root_tokens.copy_(torch.tensor([3, 5]))
        for tree in (FORETOLD, TREE):
            layout = TreeLayout.build(tree, "cpu", 2)
            buffers = TokenBuffers.allocate(layout, 2, 12, dtype, torch.device("cpu"), foretells=True)
            buffers.tokens[:, 0] = state.root_tokens
            assert drafting._host_growth(layout, buffers)[0] is not None
            drafting.grow(layout, buffers)
            slots = drafting._block(len(layout.levels), foretells=True)[1]
            expected = torch.full_like(buffers.foretold, torch.nan)
            for depth, level in enumerate(layout.levels):
                slot = slots[:, draft.backbone.first_slot + depth, None]
                expected[:, level.nodes] = draft.heads.confidence(buffers.tokens[:, level.nodes].clamp(min=0), slot)
            tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
            torch.testing.assert_close(buffers.foretold, expected, rtol=0, atol=tolerance, equal_nan=True)
            if tree is TREE:
                continue
            shapes = []
            for said in (buffers.foretold, None):
                again = TreeLayout.build(tree, "cpu", 2)
                for level in again.levels:
                    rows = buffers.draft_logits[:, level.nodes]
                    level.shape.give_out(rows, state.temperature, foretold=said)
                    level.shape.note_draws(rows, state.temperature, buffers.tokens)
                shapes.append(again.topology.parents)
            assert torch.equal(layout.topology.parents, shapes[0])
            # Without a Markov head all nodes of a level are alike.
            assert kind is None or not torch.equal(*shapes)


@pytest.mark.parametrize("lookup", [False, True])
def test_the_joint_distribution_of_trees_that_the_head_shapes_is_the_targets(lookup):
    target = tiny_llama(7, vocab_size=5, sharpness=8.0)
    draft = random_draft(target, kind="dspark", markov_head_type="rnn")
    prompt = torch.tensor([2, 0, 4])
    output = generate(
        target, draft, prompt.repeat(4000, 1), seed=range(4000), max_new_tokens=3, temperature=1.0, lookup=lookup,
        tree=ShapedTree((1, 2, 3), steep_confidence(foretold=True)),
    )  # fmt: skip
    counts = sequence_counts(torch.tensor(output.new_tokens), 5)
    assert p_value(counts, sequence_probabilities(target, prompt, 3, lambda logits: logits.softmax(-1))) > 1e-4


def test_recorded_steps_keep_what_is_foretold(monkeypatch, tmp_path):
    target = nearly_bigram()
    draft = good_draft(target, "gated")
    prompts = [torch.randint(12, (1, 7), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    said = []
    confidence = DSparkHeads.confidence
    monkeypatch.setattr(DSparkHeads, "confidence", lambda self, *args: said.append(confidence(self, *args)) or said[-1])
    options = {"tree": TREE, "max_new_tokens": 24, "temperature": 0.7, "in_turns": False}
    records = record_steps(target, draft, prompts, **options)
    assert not said and records.foretold.shape == records.nodes.peak.shape
    monkeypatch.setattr(host_growth.HostGrowth, "of_block", classmethod(lambda cls, *arguments: None))
    same = record_steps(target, draft, prompts, **options)
    levels = TREE.num_levels - 1
    rows = [torch.cat(said[begin : begin + levels], 1)[0] for begin in range(0, len(said), levels)]
    np.testing.assert_array_equal(same.foretold, torch.stack(rows).numpy())
    np.testing.assert_allclose(records.foretold, same.foretold, atol=1e-5)
    assert record_steps(target, random_draft(target), prompts, **options).foretold is None
    assert np.isfinite(records.foretold).all() and len(np.unique(records.foretold)) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_timed_by_the_call_that_decoding_makes(kind, dtype, monkeypatch):
    target = nearly_bigram().to(dtype)
    for anchored, block_size in ((True, 5), (False, 2)):
        draft = good_draft(target, kind, sample_from_anchor=anchored, block_size=block_size)
        monkeypatch.setattr(DSparkHeads, "rows", lambda *args: pytest.fail("a level was multiplied from Python"))
        for batch_size in (1, 3):
            _, drafting = started(draft, adapt(target), batch_size)
            for count in (1, 2, 5):
                call = drafting.level_call(calls.draft_step(count, target.device), 8)
                assert call() is True
        monkeypatch.undo()
    draft.backbone.model = adapt(draft.backbone.model, forward="modules")
    _, drafting = started(draft, adapt(target))
    assert drafting.level_call(calls.draft_step(2, target.device), 8)().logits.shape == (1, 2, 12)


def test_nothing_of_a_step_waits_for_the_device(monkeypatch):
    """Growing a tree and taking what was accepted read no number on the host, where that would be a wait."""
    target = tiny_llama(3, vocab_size=12)
    draft = good_draft(target, "rnn")
    draft.backbone.model = adapt(draft.backbone.model, forward="modules")
    path = VerifiedPath(
        torch.tensor([[0, 1, -1, -1, -1]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32), None
    )
    with torch.inference_mode():
        _, drafting = started(draft, adapt(target))
        layout = TreeLayout.build(TREE, "cpu")
        seen = forced(drafting, SOME_TOKENS[:1])
        drafting.state.cache_lens.fill_(4)
        features = [torch.ones(1, TREE.num_nodes, 32)] * 2
        create = StepContext.create
        monkeypatch.setattr(StepContext, "create", lambda *args: create(*args[:4], may_read_row=False))
        monkeypatch.setattr(TreeModel, "_check_forward", lambda *args: None)  # it reads lengths on a CPU alone
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, lambda *args: pytest.fail("a number was read"))
        drafting.grow(layout, TokenBuffers(SOME_TOKENS[:1].clone(), None))
        drafting.committed(path, features)
        monkeypatch.undo()
    assert len(seen) == len(layout.levels)


# ---- trees and plans ----


def test_a_tree_deeper_than_the_block_is_refused_and_never_planned(monkeypatch):
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(auto, "_profiles", type(auto._profiles)())
    monkeypatch.setattr(auto, "_pairs", type(auto._pairs)())
    for name in ("save_profile", "save_evidence"):
        monkeypatch.setattr(auto.store, name, lambda *arguments: None)
    for name in ("load_profile", "load_evidence"):
        monkeypatch.setattr(auto.store, name, lambda *arguments: None)
    target = tiny_llama(3, vocab_size=12, sharpness=4.0)
    draft = good_draft(target, "vanilla", block_size=3, sample_from_anchor=False)
    assert draft.max_levels == 3
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"generate: tree must have at most the 3 levels .*block of 3.* got 4"):
        generate(target, draft, prompt, tree=TokenTree.chain(4))
    acceptance = [0.9, 0.05]
    output = generate(target, draft, prompt, tree="auto", acceptance=acceptance, max_new_tokens=20, eos_token_id=())
    assert output.stats.tree.num_levels <= 3
    plain = generate(target, None, prompt, max_new_tokens=20, eos_token_id=()).new_tokens
    assert output.new_tokens == plain
    (profile,) = auto._profiles.values()
    assert [point.parameters["draft"] for point in profile.ops["draft_step"]] == [draft.fingerprint.key]


def test_the_block_is_paid_once_a_step():
    """A profile's `draft_step` is the cost of a first level; deeper ones add what a level adds."""
    target = tiny_llama(3, vocab_size=12)
    draft = good_draft(target, "vanilla")
    profile = measure_profile(target, draft, context_lens=[16], node_counts=[1, 2, 4, 8], seconds=0.1)
    (point,) = profile.ops["draft_step"]
    assert dict(point.parameters) == {"draft": draft.fingerprint.key, "batch_size": 1, "context_len": 16}
    point = dataclasses.replace(point, p50_ms=7.0)
    profile = dataclasses.replace(profile, ops={**profile.ops, "draft_step": (point,)}, mean_over_median={})
    costs = CostModel(profile, target=target, draft=draft.fingerprint)
    level = float(costs.draft_ms(1, 16))
    assert costs.draft_root_ms(16) == pytest.approx(7.0 + level)
    assert costs.stages(TokenTree.chain(4), 16)["draft"] == pytest.approx(7.0 + 3 * level)


def test_what_is_measured_of_a_draft_belongs_to_its_weights_and_shape():
    target = tiny_llama(3, vocab_size=12)
    first, same, other = (random_draft(target, kind="dspark", seed=seed) for seed in (0, 0, 1))
    assert first.identity == same.identity != other.identity
    assert first.fingerprint.key == other.fingerprint.key != random_draft(target).fingerprint.key
    assert first.fingerprint.cache_row_bytes == 0  # nothing of it is moved with accepted rows
    assert first.graph_key != same.graph_key and first.owner is first
    assert adapt(target).model is not first.models[0].model
    longer = random_draft(target, kind="dspark", block_size=6)
    assert longer.identity != first.identity and longer.fingerprint.key != first.fingerprint.key


# ---- folders ----


def test_the_targets_embedding_and_head_are_shared():
    target = tiny_llama(3, vocab_size=12)
    model = random_draft(target).backbone.model.model
    assert model.get_input_embeddings().weight is target.get_input_embeddings().weight
    assert model.get_output_embeddings() is target.get_output_embeddings()
    config = random_config(target)
    weights = random_weights(config)
    same = {
        "embed_tokens.weight": target.model.embed_tokens.weight.data.clone(),
        "lm_head.weight": target.lm_head.weight.data.clone(),
    }
    model = load_dflash(memory_folder(config, weights | same), adapt(target)).backbone.model.model
    assert model.get_input_embeddings().weight is target.get_input_embeddings().weight
    assert model.get_output_embeddings() is target.get_output_embeddings()
    other = {name: weight + 1.0 for name, weight in same.items()}
    model = load_dflash(memory_folder(config, weights | other), adapt(target)).backbone.model.model
    assert torch.equal(model.get_input_embeddings().weight, other["embed_tokens.weight"])
    assert torch.equal(model.get_output_embeddings().weight, other["lm_head.weight"])


def test_keys_and_values_of_all_layers_are_one_tensor():
    draft = random_draft(tiny_llama(3, vocab_size=12))
    whole = draft.backbone.own_weights[1]
    for layer in draft.backbone.model.model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            assert projection.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_fused_projections_are_split():
    target = tiny_llama(3, vocab_size=12)
    config = random_config(target, layers={"attention_bias": True})
    weights = random_weights(config)
    fused = dict(weights)
    for index in range(2):
        for kind in ("weight", "bias"):
            names = [f"layers.{index}.self_attn.{side}_proj.{kind}" for side in "qkv"]
            fused[f"layers.{index}.self_attn.qkv_proj.{kind}"] = torch.cat([fused.pop(name) for name in names])
    states = [
        load_dflash(memory_folder(config, entry), adapt(target)).backbone.model.model.state_dict()
        for entry in (weights, fused)
    ]
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]), name


def test_a_z_lab_folder_numbers_layers_by_their_outputs():
    target = tiny_llama(3, vocab_size=12, num_layers=3)
    of_speculators = random_config(target, aux_hidden_state_layer_ids=[1, 3], mask_token_id=4)
    weights = random_weights(of_speculators)
    config = dict(of_speculators["transformer_layer_config"])
    config |= {"architectures": ["DFlashDraftModel"], "block_size": 5, "num_target_layers": 3}
    config["dflash_config"] = {"target_layer_ids": [0, 2], "mask_token_id": 4}
    form = read_form(config, "z-lab")
    assert form.needs == (1, 3) and form.block_size == 5 and not form.sample_from_anchor
    text = torch.tensor([[7, 1, 2, 9, 3]])
    found = []
    for entry in (of_speculators, config):
        draft = load_dflash(memory_folder(entry, weights), adapt(target))
        with torch.inference_mode():
            _, drafting = started(draft, adapt(target))
            drafting.prefill([0], text, torch.tensor([5]), states_of(target, text, draft.needs))
            found.append(torch.cat(grow(drafting, CHAIN, SOME_TOKENS[:1], [5])))
    assert torch.equal(*found)
    scaled = config | {
        "dflash_config": config["dflash_config"] | {"output_multiplier": 2.0, "final_logit_softcapping": 3.0}
    }
    draft = load_dflash(memory_folder(scaled, weights), adapt(target))
    with torch.inference_mode():
        _, drafting = started(draft, adapt(target))
        drafting.prefill([0], text, torch.tensor([5]), states_of(target, text, draft.needs))
        capped = torch.cat(grow(drafting, CHAIN, SOME_TOKENS[:1], [5]))
    torch.testing.assert_close(capped, 3.0 * torch.tanh(2.0 * found[0] / 3.0))
    scaled = config | {"dflash_config": config["dflash_config"] | {"input_embedding_scale": 2.0}}
    embedding = load_dflash(memory_folder(scaled, weights), adapt(target)).backbone.model.model.get_input_embeddings()
    assert torch.equal(embedding.weight, 2.0 * target.model.embed_tokens.weight)
    spread = {**config, "dflash_config": {"mask_token_id": 4}, "num_hidden_layers": 5, "num_target_layers": 36}
    assert read_form(spread, "z-lab").needs == (2, 10, 18, 26, 34)
    del spread["num_target_layers"]
    with pytest.raises(ValueError, match="z-lab: num_target_layers must be an integer >= 1, got None"):
        read_form(spread, "z-lab")
    sliding = {
        **config,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "use_sliding_window": True,
    }
    assert [sight[:2] for sight in read_form(sliding, "z-lab").sights] == [(6, True), (None, False)]
    assert [sight[:2] for sight in read_form(sliding | {"is_causal": False}, "z-lab").sights] == [
        (6, False),
        (None, False),
    ]


@pytest.mark.parametrize("length", [4, 20])
def test_logits_equal_those_of_transformers_own_class(length):
    classes = pytest.importorskip("transformers.models.muse_glimmer_assistant")
    from transformers.cache_utils import DFlashCache

    config = classes.MuseGlimmerAssistantConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, sliding_window=6, block_size=5, mask_token_id=30, target_layer_ids=[0, 1], pad_token_id=None,
        bos_token_id=None, eos_token_id=None, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    assistant = classes.MuseGlimmerAssistantModel(config).eval()
    for weight in assistant.parameters():
        weight.data = 1 + 0.1 * torch.randn_like(weight) if weight.dim() == 1 else 0.3 * torch.randn_like(weight)
    target = tiny_llama(3, vocab_size=32, sharpness=4.0)
    draft = dflash_from_model(assistant, target)
    assert draft.needs == (1, 2)
    context, tokens = torch.randn(1, length, 64), torch.tensor([[7, 30, 30, 30, 30]])
    with torch.inference_mode():
        cache = DFlashCache(config=config)
        cache.set_previous_accepted_tokens(length)
        hidden = assistant(
            noise_embeds=target.model.embed_tokens(tokens), context_hidden_states=context,
            position_ids=torch.arange(length + 5)[None], cache=cache,
        ).last_hidden_state  # fmt: skip
        _, drafting = started(draft, adapt(target))
        drafting.prefill([0], tokens, torch.tensor([length]), list(context.split(32, -1)))
        found = torch.cat(grow(drafting, CHAIN, torch.tensor([[7, 1, 2, 3, 4]]), [length]), 1)
        torch.testing.assert_close(found, target.lm_head(hidden)[:, 1:], rtol=1e-5, atol=1e-5)
    prompts = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = generate(target, None, prompts, max_new_tokens=20).new_tokens
    assert generate(target, draft, prompts, tree=CHAIN, max_new_tokens=20).new_tokens == plain
    with pytest.raises(ValueError, match="dflash_from_model: model must be of a DFlash class, got LlamaForCausalLM"):
        dflash_from_model(target, target)
    with pytest.raises(TypeError, match="dflash_from_model: model must be a transformers PreTrainedModel, got int"):
        dflash_from_model(3, target)


def test_what_is_missing_left_over_or_of_another_shape_is_named():
    target = adapt(tiny_llama(3, vocab_size=12))
    config = random_config(target.model, kind="dspark", markov_head_type="gated")
    weights = random_weights(config)

    def load(config=config, **changes):
        return load_dflash(
            memory_folder(config, {key: entry for key, entry in (weights | changes).items() if entry is not None}),
            target,
        )

    assert load().heads.kind == "gated"
    for name in weights:
        with pytest.raises(ValueError, match=f"must hold {name}"):
            load(**{name: None})
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            load(**{name: torch.zeros(2, 3, 4)})
    with pytest.raises(ValueError, match=r"must hold no weights beside those of its format, got aux_hidden_norms\.0"):
        load(**{"aux_hidden_norms.0": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"target must have hidden states of width 48.* as 96 numbers, got 32"):
        load(**{"fc.weight": torch.zeros(32, 96)}, config=config | {"aux_hidden_state_layer_ids": [0, 1]})
    with pytest.raises(ValueError, match="target must have at least 3 layers"):
        load(config=config | {"aux_hidden_state_layer_ids": [1, 3]})
    with pytest.raises(ValueError, match="mask_token_id must be below the 12 tokens, got 12"):
        load(config=config | {"mask_token_id": 12})
    reduced = random_config(target.model, kind="dspark", draft_vocab_size=5)
    weights = random_weights(reduced)
    assert load(reduced).vocabulary.draft_vocab_size == load(reduced).vocab_size == 5
    with pytest.raises(ValueError, match=r"must hold lm_head\.weight for a vocabulary of 5 tokens"):
        load(reduced, **{"lm_head.weight": None})
    with pytest.raises(ValueError, match="must hold d2t"):
        load(reduced, d2t=None)
    with pytest.raises(ValueError, match="d2t must map to the target's 12 tokens"):
        load(reduced, d2t=weights["d2t"] + 12, t2d=None)
    with pytest.raises(ValueError, match="t2d must mark the tokens of d2t"):
        load(reduced, t2d=~weights["t2d"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculators_model_type": "dflash2"}, "speculators_model_type must be one of dflash, dspark, got 'dflash2'"),
        ({"markov_head_type": "lstm"}, "markov_head_type must be one of vanilla, gated, rnn, got 'lstm'"),
        ({"block_size": 1}, "block_size must be an integer >= 2, got 1"),
        ({"block_size": 1 << 40}, "block_size must be at most 1024, got 1099511627776"),
        ({"mask_token_id": None}, "mask_token_id must be an integer >= 0, got None"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids must be a list of layers, got None"),
        ({"aux_hidden_state_layer_ids": [1, 1]}, "aux_hidden_state_layer_ids must name every layer once"),
        ({"markov_rank": 0}, "confidence_head_with_markov must be false where markov_rank is 0"),
        ({"transformer_layer_config": None}, "transformer_layer_config must be an object, got None"),
    ],
)
def test_options_that_are_not_understood_are_named(changes, message):
    config = random_config(tiny_llama(3, vocab_size=12), kind="dspark") | changes
    assert is_dflash(config)
    with pytest.raises(ValueError, match=f"here: {message}"):
        read_form(config, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be at most 1000"),
        ({"vocab_size": -1}, "vocab_size must be an integer >= 1, got -1"),
        ({"hidden_act": "twist"}, "hidden_act must be an activation of transformers', got 'twist'"),
        ({"rms_norm_eps": -0.5}, "rms_norm_eps must be a finite number >= 0, got -0.5"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": [1]}}, "rope_parameters must be those of a rotary"),
    ],
)
def test_numbers_that_layers_cannot_compute_with_are_named(changes, message):
    config = random_config(tiny_llama(3, vocab_size=12), kind="dspark")
    config["transformer_layer_config"] |= changes
    with pytest.raises(ValueError, match=f"here: {message}"):
        read_form(config, "here")


def test_options_of_z_lab_folders_that_are_not_understood_are_named():
    config = {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1], "selector_rank": 8}}
    with pytest.raises(
        ValueError, match=r"here: dflash_config must hold no other options than .* got \['selector_rank'\]"
    ):
        read_form(config, "here")
    with pytest.raises(ValueError, match="here: layer_types must be full_attention or sliding_attention"):
        read_form({"dflash_config": {}, "num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "here")
    assert not is_dflash({"model_type": "qwen3"})
    assert not is_dflash({"speculators_model_type": "eagle3"})
