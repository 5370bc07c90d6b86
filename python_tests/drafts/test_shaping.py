"""Shaped trees: exact whatever their shape, the same in C++, Triton and torch, shaped as their specification says."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from support.chi_square import joint_probs
from support.shaped_trees import shaped_emitted_distribution, steep_confidence
from support.tiny_models import noisy_copy, tiny_llama
from support.toy_models import chain_probs, toy_pair

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.drafts import TreeLayout, host_growth
from sequoia_kernels.drafts.shaping import LEAST_REACH, LevelShape, ShapedReach, shaped_topology
from sequoia_kernels.ops.backends import unavailable_reason
from sequoia_kernels.tree import PROBABILITY_EDGES, Confidence, ShapedTree, Topology

_REASON = unavailable_reason("sample_without_replacement", "triton")
# Where the Triton kernels run.
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
needs_triton = pytest.mark.skipif(_REASON is not None, reason=f"triton: {_REASON}")
needs_interpreter = pytest.mark.skipif(
    _REASON is not None or DEVICE != "cpu", reason="its tensors are on the CPU: needs TRITON_INTERPRET=1"
)
TRITON = pytest.param("triton", marks=needs_triton)
TREE = ShapedTree((1, 2, 3), steep_confidence())
KINDS = [
    "unrelated",
    "near",
    "same",
    "one-hot draft",
    "draft misses tokens",
    "target misses tokens",
    "disjoint",
    "tied",
]
WARPS = [(0.0, None, None), (0.3, 2, None), (0.6, None, 0.8), (1.0, None, None), (1.7, 3, 0.95)]


def exact_error(tree, kind, warp, rule, seed=0, **options):
    target, draft = toy_pair(kind, 3, context=3, seed=seed)
    emitted, num_trees = shaped_emitted_distribution(tree, target, draft, 1, *warp, rule=rule, **options)
    expected = joint_probs(chain_probs(target, 1, tree.num_levels, *warp))
    return float((emitted - expected).abs().max()), num_trees


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("kind", KINDS)
def test_shaped_trees_are_exact(kind, rule):
    for warp in WARPS:
        error, num_trees = exact_error(TREE, kind, warp, rule)
        assert error <= 1e-12, (warp, error)
        assert kind != "unrelated" or warp[0] == 0 or num_trees >= 2  # or nothing was shaped


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_deeper_shaped_trees_are_exact(rule):
    tree = ShapedTree((1, 2, 2, 1), steep_confidence(2))
    error, num_trees = exact_error(tree, "unrelated", (1.0, None, None), rule, seed=3)
    assert error <= 1e-12
    assert num_trees >= 2  # or nothing was shaped


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("kind", KINDS)
def test_trees_that_are_shaped_by_what_a_head_foretells_are_exact(kind, rule):
    tree = ShapedTree((1, 2, 3), steep_confidence(foretold=True))
    for warp in WARPS:
        error, num_trees = exact_error(tree, kind, warp, rule)
        assert error <= 1e-12, (warp, error)
        assert kind != "unrelated" or warp[0] == 0 or num_trees >= 2  # or nothing was shaped
    deep = ShapedTree((1, 2, 2, 1), steep_confidence(2, foretold=True))
    assert exact_error(deep, kind, (1.0, None, None), rule, seed=3)[0] <= 1e-12


@needs_interpreter
@pytest.mark.parametrize(("kind", "temperature"), [("unrelated", 1.0), ("draft misses tokens", 0.6), ("tied", 0.0)])
def test_trees_that_triton_shapes_are_exact(kind, temperature):
    warp = (temperature, None, None)
    error, num_trees = exact_error(TREE, kind, warp, "traversal", backend="triton")
    assert error <= 1e-12
    assert num_trees == exact_error(TREE, kind, warp, "traversal", backend="reference")[1]


def test_choosing_children_by_their_own_tokens_fails_the_exact_test():
    errors = [exact_error(TREE, "unrelated", (1.0, None, None), rule, rerank=True) for rule in ("sequoia", "traversal")]
    assert all(error > 1e-3 for error, _ in errors)


# ---- Shapes ----

MODELS = tiny_llama(3, vocab_size=24, sharpness=6.0)
DRAFT = noisy_copy(MODELS, 0.4)
DEEP = ShapedTree((1, 3, 5, 4, 2), steep_confidence())


def prompts(batch_size: int) -> torch.Tensor:
    return torch.randint(24, (batch_size, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("foretold", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_a_level_goes_to_the_largest_worths(backend, batch_size, foretold):
    generator = torch.Generator().manual_seed(0)
    device = DEVICE if backend == "triton" else "cpu"
    tree = ShapedTree(DEEP.widths, steep_confidence(foretold=foretold))
    # Of no account where it is not asked for.
    said = torch.rand(batch_size, tree.num_nodes, generator=generator).to(device)
    layout = TreeLayout.build(tree, device, batch_size)
    topology = layout.topology
    tokens = torch.zeros(batch_size, DEEP.num_nodes, dtype=torch.int64, device=device)
    temperature = torch.tensor([0.0, 0.7, 1.3], device=device)[:batch_size]
    confidence = DEEP.confidence
    reach = [[1.0] + [0.0] * (DEEP.num_nodes - 1) for _ in range(batch_size)]
    for index, level in enumerate(layout.levels):
        nodes = DEEP.level_nodes(index)
        logits = (torch.randn(batch_size, len(nodes), 24, generator=generator) * 3).to(device)
        probs = (logits / torch.where(temperature == 0, 1, temperature)[:, None, None]).double().softmax(dim=2)
        level.shape.give_out(logits, temperature, backend, foretold=said)
        children = range(level.first_child, level.first_child + level.num_children)
        drawn = torch.randint(-1, 24, (batch_size, len(children)), generator=generator)
        tokens[:, list(children)] = drawn.to(device)
        level.shape.note_draws(logits, temperature, tokens, backend)
        for request in range(batch_size):
            slots = []
            for row, node in enumerate(nodes):
                peak = said[request, node] if foretold else probs[request, row].max()
                column = Confidence.bin_of(float(peak))
                for rank in range(min(3, len(children))):
                    slots.append((-reach[request][node] * confidence.undrawn[rank][column], row, rank))
            chosen = sorted((row, rank) for _, row, rank in sorted(slots)[: len(children)])
            stride = level.num_samples
            assert [(int(p) // stride, int(p) % stride) for p in level.drawn[request]] == chosen
            for child, (row, rank) in zip(children, chosen):
                assert int(topology.parents[request, child]) == nodes[row]
                assert int(topology.ranks[request, child]) == rank
                token = int(tokens[request, child])
                chance = 0.0 if token < 0 else float(probs[request, row, token])
                drawn = confidence.drawn[min(rank, len(confidence.drawn) - 1)][Confidence.bin_of(chance)]
                reach[request][child] = reach[request][nodes[row]] * drawn
        torch.testing.assert_close(
            level.shape.shared.reach[:, list(children)].cpu(), torch.tensor(reach)[:, list(children)], rtol=1e-5, atol=0
        )
    topology.check()
    for index, level in enumerate(layout.levels):
        own = topology.ancestor_mask[:, list(DEEP.level_nodes(index))]
        assert torch.equal(level.step.tree_mask.expand_as(own), own)


def test_a_topology_begins_as_an_even_one():
    topology = shaped_topology(DEEP, 2, "cpu")
    topology.check()
    assert topology.parents[1].tolist() == list(DEEP.even().parents)
    assert DEEP.even().widths == list(DEEP.widths)


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_chances_of_deep_paths_stay_numbers(backend):
    confidence = Confidence([[1e-4] * 19], [[1e-4] * 19, [5e-5] * 19])
    tree = ShapedTree((1,) + (2,) * (40 if backend == "reference" else 8), confidence)
    device = DEVICE if backend == "triton" else "cpu"
    layout, one = TreeLayout.build(tree, device, 1), torch.ones(1, device=device)
    tokens = torch.zeros(1, tree.num_nodes, dtype=torch.int64, device=device)
    for level in layout.levels:
        logits = torch.zeros(1, len(level.nodes), 8, device=device)
        level.shape.give_out(logits, one, backend)
        level.shape.note_draws(logits, one, tokens, backend)
    assert float(layout.levels[0].shape.shared.reach.min()) == pytest.approx(LEAST_REACH)
    layout.topology.check()


def both_layouts(tree, batch_size):
    """A layout for Triton, and one for torch on the same device."""
    return [TreeLayout.build(tree, DEVICE, batch_size) for _ in range(2)]


def assert_alike(layouts, logits_of, temperature, tokens):
    """Grow both, level by level: the same integers, and reaches up to rounding."""
    for pair in zip(*(layout.levels for layout in layouts)):
        logits = logits_of(len(pair[0].nodes)).to(DEVICE)
        for level, backend in zip(pair, ("triton", "reference")):
            level.shape.give_out(logits, temperature, backend)
            level.shape.note_draws(logits, temperature, tokens, backend)
        triton, reference = (level.shape for level in pair)
        for name, part, right in zip(Topology._fields, triton.topology[:-2], reference.topology[:-2]):
            assert torch.equal(part, right), name
        assert torch.equal(triton.places, reference.places)
        if triton.own_mask is not None:
            assert torch.equal(triton.own_mask, reference.own_mask)
        torch.testing.assert_close(triton.shared.reach, reference.shared.reach, rtol=1e-6, atol=0)
        finite = reference.log_normaliser.isfinite()
        assert torch.equal(triton.log_normaliser.isfinite(), finite)
        normalisers = (triton.log_normaliser[finite], reference.log_normaliser[finite])
        torch.testing.assert_close(*normalisers, rtol=1e-6, atol=1e-5)
    layouts[0].topology.check()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("widths", "ranks", "vocab"),
    [((1, 1, 1), 3, 7), ((1, 3, 5, 4, 2), 3, 24), ((1, 8, 20, 37, 1), 8, 4100), ((1, 2, 2), 2, 1)],
)
def test_triton_gives_out_what_torch_does(widths, ranks, vocab, dtype):
    """Several words of masks and chunks of rows; rows whose draft has run out of tokens; temperature 0."""
    tree = ShapedTree(widths, steep_confidence(ranks))
    generator = torch.Generator().manual_seed(vocab)
    tokens = torch.randint(-1, vocab, (4, tree.num_nodes), generator=generator).to(DEVICE)
    tokens[2] = -1
    temperature = torch.tensor([0.0, 0.7, 1.3, 0.01], device=DEVICE)

    def logits_of(width):
        rows = 3 * torch.randn(4, width, vocab, generator=generator)
        if vocab > 1:
            rows[1, 0, 1:] = -torch.inf  # all the draft knows is one token
        return rows.to(dtype)

    assert_alike(both_layouts(tree, 4), logits_of, temperature, tokens)


@needs_triton
def test_triton_reads_rows_of_any_strides_and_of_numbers_that_are_none():
    tree, generator = ShapedTree((1, 3, 4, 2), steep_confidence()), torch.Generator().manual_seed(0)
    tokens = torch.zeros(4, tree.num_nodes, dtype=torch.int64, device=DEVICE)
    temperature = torch.ones(4, device=DEVICE)
    one, wide = torch.randn(4, 1, 30, generator=generator), torch.randn(4, 9, 60, generator=generator)
    assert_alike(both_layouts(tree, 4), lambda width: one.expand(-1, width, -1), temperature, tokens)
    rows = wide.to(DEVICE)[:, 1:, 1::2]
    assert_alike(both_layouts(tree, 4), lambda width: rows[:, :width], temperature, tokens)
    broken = wide.clone()
    broken[0, :, 3], broken[1, 1, 5], broken[2] = torch.nan, torch.inf, -torch.inf
    layouts = both_layouts(tree, 4)
    assert_alike(layouts, lambda width: broken[:, :width], temperature, tokens.fill_(-1))


@needs_triton
def test_triton_gives_ties_to_the_lower_node_and_rank():
    """Rows that are all alike, and worths that are too small for a number: a level of equal places."""
    flat = Confidence([[0.5] * 19], [[2e-30] * 19, [1e-30] * 19])
    for tree in (ShapedTree((1, 2, 3, 5, 6), flat), ShapedTree((1, 2, 3, 5, 6), steep_confidence(2))):
        layouts = both_layouts(tree, 1)
        for layout in layouts:
            layout.levels[0].shape.shared.reach.fill_(LEAST_REACH)
        tokens = torch.zeros(1, tree.num_nodes, dtype=torch.int64, device=DEVICE)
        assert_alike(layouts, lambda width: torch.zeros(1, width, 9), torch.ones(1, device=DEVICE), tokens)


@needs_triton
def test_levels_of_very_many_places_are_left_to_torch():
    tables = [[0.9**rank] * 19 for rank in range(1, 65)]
    tree = ShapedTree((1, 64, 600, 300), Confidence(tables, tables))
    layouts, generator = both_layouts(tree, 1), torch.Generator().manual_seed(0)
    assert [level.shape._kernels("triton") is not None for level in layouts[0].levels] == [True, True, False]
    tokens = torch.zeros(1, tree.num_nodes, dtype=torch.int64, device=DEVICE)
    assert_alike(
        layouts, lambda width: torch.randn(1, width, 5, generator=generator), torch.ones(1, device=DEVICE), tokens
    )  # fmt: skip


# ---- In the loop ----


@pytest.mark.parametrize("temperature", [0.0, 0.7, [0.0, 0.9, 1.2]])
def test_growing_in_cpp_is_growing_in_torch(monkeypatch, temperature):
    options = {"tree": DEEP, "temperature": temperature, "max_new_tokens": 40, "seed": [5, 6, 7]}
    grown = []
    bind = host_growth.HostGrowth.bind.__func__
    monkeypatch.setattr(
        host_growth.HostGrowth, "bind", classmethod(lambda cls, *args: grown.append(bind(cls, *args)) or grown[-1])
    )
    native = generate(MODELS, DRAFT, prompts(3), **options)
    assert grown and all(grown)
    monkeypatch.setattr(host_growth.HostGrowth, "bind", classmethod(lambda cls, *args: None))
    torchs = generate(MODELS, DRAFT, prompts(3), **options)
    assert native.new_tokens == torchs.new_tokens
    assert native.stats.accepted_histogram == torchs.stats.accepted_histogram


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=needs_interpreter)])
def test_greedy_output_is_plain_decodings(backend):
    length = 50 if backend != "triton" else 8
    plain = generate(MODELS, None, prompts(3), max_new_tokens=length)
    output = generate(MODELS, DRAFT, prompts(3), tree=DEEP, max_new_tokens=length, backend=backend)
    assert output.new_tokens == plain.new_tokens
    assert output.stats.tree is DEEP
    assert output.stats.tokens_per_step > 1
    assert output.stats.visited_by_rank == []
    assert output.stats.to_dict()["tree"] == {"widths": [1, 3, 5, 4, 2]}


@needs_interpreter
@pytest.mark.parametrize("temperature", [0.7, [0.0, 0.9, 1.2]])
def test_growing_in_triton_is_growing_in_torch(temperature):
    options = {"tree": DEEP, "temperature": temperature, "max_new_tokens": 6, "seed": [5, 6, 7]}
    triton, reference = (
        generate(MODELS, DRAFT, prompts(3), **options, backend=backend) for backend in ("triton", "reference")
    )
    assert triton.new_tokens == reference.new_tokens
    assert triton.stats.accepted_histogram == reference.stats.accepted_histogram


@pytest.mark.parametrize("widths", [(1,), (1, 1), (1, 1, 1), (1, 3), (1, 2, 1)])
def test_small_trees_decode_as_plain(widths):
    plain = generate(MODELS, None, prompts(2), max_new_tokens=20)
    tree = ShapedTree(widths, steep_confidence())
    assert tree.max_branching == min(3, max(widths[1:], default=0))
    for hook in (None, lambda paths, logits: logits):
        output = generate(MODELS, DRAFT, prompts(2), tree=tree, max_new_tokens=20, logits_hook=hook)
        assert output.new_tokens == plain.new_tokens


def test_a_draft_beyond_its_positions_with_a_shaped_tree():
    short = noisy_copy(MODELS, 0.4)
    short.config.max_position_embeddings = 32
    output = generate(MODELS, short, prompts(3), tree=DEEP, max_new_tokens=60)
    assert output.stats.draft_restarts > 0
    assert output.new_tokens == generate(MODELS, None, prompts(3), max_new_tokens=60).new_tokens


def test_requests_shape_their_trees_alone():
    options = {"temperature": 0.9, "max_new_tokens": 40, "tree": DEEP}
    together = generate(MODELS, DRAFT, prompts(3), seed=[5, 6, 7], **options)
    for index in range(3):
        alone = generate(MODELS, DRAFT, prompts(3)[index : index + 1], seed=5 + index, **options)
        assert together.new_tokens[index] == alone.new_tokens[0]


def test_shapes_differ_from_step_to_step():
    seen = set()
    give_out = LevelShape.give_out

    def watched(self, *args, **kwargs):
        give_out(self, *args, **kwargs)
        seen.add(tuple(self.topology.parents[0].tolist()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LevelShape, "give_out", watched)
        generate(MODELS, DRAFT, prompts(1), tree=DEEP, max_new_tokens=40, backend="reference")
    assert len(seen) > 5


# ---- What is no shaped tree ----


def flat(*entries):
    return [[entry] * 19 for entry in entries]


@pytest.mark.parametrize(
    ("drawn", "undrawn", "error", "message"),
    [
        ([], flat(0.5), ValueError, r"Confidence: drawn must be 1 to 64 rows of 19, got 0 of \[\]"),
        ([[0.5] * 18], flat(0.5), ValueError, r"drawn must be 1 to 64 rows of 19, got 1 of \[18\]"),
        (flat(0.5), flat("0.5"), TypeError, "undrawn must hold numbers, got str"),
        (flat(True), flat(0.5), TypeError, "drawn must hold numbers, got bool"),
        (flat(0.0), flat(0.5), ValueError, r"drawn must have entries in \(0, 1\], got 0.0"),
        (flat(0.5), flat(float("nan")), ValueError, r"undrawn must have entries in \(0, 1\], got nan"),
        (flat(0.5), flat(0.5, 0.5), ValueError, "undrawn must fall from rank to rank"),
    ],
)
def test_tables_that_are_no_confidence(drawn, undrawn, error, message):
    with pytest.raises(error, match=message):
        Confidence(drawn, undrawn)


@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [
        ((), ValueError, r"ShapedTree: widths must begin with 1, for the root, got \[\]"),
        ((2, 3), ValueError, r"begin with 1, for the root, got \[2, 3\]"),
        ((1, 4), ValueError, "be 1 to 3 times the level above, got 4 below 1"),
        ((1, 2, 0), ValueError, "be 1 to 3 times the level above, got 0 below 2"),
        ((1, 2.0), TypeError, "be a sequence of integers"),
        ("12", TypeError, "be a sequence of integers"),
        ((1, 3, *[9] * 114), ValueError, "add up to at most 1024 nodes, got 1030"),
    ],
)
def test_widths_of_no_tree(widths, error, message):
    with pytest.raises(error, match=message):
        ShapedTree(widths, steep_confidence())


def test_a_confidence_goes_by_what_is_foretold_or_not():
    with pytest.raises(TypeError, match="Confidence: foretold must be a boolean, got int"):
        Confidence(flat(0.5), flat(0.5), 1)


def test_a_tree_is_what_its_file_says(tmp_path):
    DEEP.save(tmp_path / "tree.json")
    loaded = ShapedTree.load(tmp_path / "tree.json")
    assert loaded == DEEP and hash(loaded) == hash(DEEP)
    text = DEEP.to_json()
    by_head = ShapedTree(DEEP.widths, steep_confidence(foretold=True))
    assert ShapedTree.from_json(by_head.to_json()) == by_head != DEEP
    with pytest.raises(ValueError, match="foretold must be a boolean"):
        ShapedTree.from_json(by_head.to_json().replace('"foretold": true', '"foretold": 1'))
    for wrong, message in [
        (text.replace('"widths": [1, 3', '"widths": [2, 3'), "widths must be those of a shaped tree"),
        (text.replace(f"[{PROBABILITY_EDGES[0]}", "[0.25"), "edges must be those of this sequoia-kernels"),
        (text.replace('"drawn": [[', '"drawn": [["x", '), "drawn must be rows of numbers"),
    ]:
        assert wrong != text
        with pytest.raises(ValueError, match=message):
            ShapedTree.from_json(wrong)


def test_edges_belong_to_the_bin_above():
    for place, edge in enumerate(PROBABILITY_EDGES):
        assert Confidence.bin_of(edge) == place + 1
        assert int(torch.bucketize(torch.tensor(edge), torch.tensor(PROBABILITY_EDGES), right=True)) == place + 1


def test_a_shaped_tree_is_one_for_all_requests():
    with pytest.raises(TypeError, match="generate: tree must be a TokenTree, one for each request, a ShapedTree"):
        generate(MODELS, DRAFT, prompts(2), tree=[DEEP, DEEP])
    assert isinstance(TreeLayout.build(DEEP, "cpu", 2).topology, Topology)
    assert generate(MODELS, None, prompts(1), tree=DEEP, max_new_tokens=4).stats.tree == TokenTree.single()


def test_every_width_fits_below_the_one_above():
    for widths in itertools.product([1, 2, 3], repeat=3):
        if widths[1] <= 3 * widths[0]:
            tree = ShapedTree((1, *widths), steep_confidence())
            assert tree.even().widths == [1, *widths]
            assert ShapedReach(tree, 2, "cpu").reach.shape == (2, tree.num_nodes)
