"""The synthetic pair: the target computes the draft inside, acceptance follows the divergence, decoding is lossless."""

from __future__ import annotations

import pytest
import torch
from support.bench_scripts import synthetic_pair as module

from sequoia_kernels import generate, optimal_tree
from sequoia_kernels.models import adapt

TINY = module.PAIRS["tiny"]
# heads wider than the draft's; query heads that share keys, with a draft whose do not; equal heads and a deep draft
SHAPES = {
    "wide heads": TINY,
    "grouped": module.PairShape(module.Shape(128, 3, 8, 256, kv_heads=2), module.Shape(32, 2, 4, 96), vocab=512),
    "deep draft": module.PairShape(module.Shape(96, 5, 6, 160), module.Shape(64, 3, 4, 160), vocab=512),
    "grouped draft": module.PairShape(
        module.Shape(128, 2, 8, 192, kv_heads=4), module.Shape(64, 1, 8, 96, kv_heads=4), vocab=512
    ),
}


def build(shape=TINY, dtype=torch.float32, **options):
    return module.synthetic_pair(shape, dtype, "cpu", **options)


def random_texts(vocab, count, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (rows,), generator=generator) for _ in range(count)]


def disagreement(pair, text):
    """Norm of the difference of the two models' logits, relative to the draft's."""
    target, draft = (module.teacher_forced_logits(adapt(model), text) for model in (pair.target, pair.draft))
    return float((target - draft).norm() / draft.norm())


@pytest.mark.parametrize("name", SHAPES)
def test_without_divergence_the_target_computes_the_draft(name):
    pair = build(SHAPES[name])
    text = random_texts(SHAPES[name].vocab, 1, 200)[0]
    pair.set_divergence(1e-6)
    assert disagreement(pair, text) < 0.01
    pair.set_divergence(1.0)
    assert disagreement(pair, text) > 0.3


def test_the_models_have_the_shapes_that_were_asked_for():
    shape = SHAPES["grouped"]
    pair = build(shape)
    for model, part in ((pair.target, shape.target), (pair.draft, shape.draft)):
        sizes = (model.config.hidden_size, model.config.num_hidden_layers, model.config.intermediate_size)
        assert sizes == (part.hidden, part.layers, part.intermediate)
        assert model.config.num_key_value_heads == part.kv_heads
        assert sum(parameter.numel() for parameter in model.parameters()) == part.parameters(shape.vocab)
    assert module.PAIRS["7B/68M"].target.parameters() == 6_738_415_616  # Llama-2-7B
    assert module.PAIRS["70B/7B"].target.parameters() == 68_976_648_192
    assert module.PAIRS["7B/68M"].draft.parameters() == 68_030_208  # Llama-68M


def test_the_target_is_dense_and_the_draft_has_weights_of_its_own():
    pair = build()
    for name, parameter in pair.target.named_parameters():
        assert (parameter != 0).all(), name
    target = {parameter.untyped_storage().data_ptr() for parameter in pair.target.parameters()}
    assert target.isdisjoint(parameter.untyped_storage().data_ptr() for parameter in pair.draft.parameters())


def test_shared_layers_take_the_memory_of_two_and_compute_the_same():
    shape = SHAPES["deep draft"]
    pair = build(shape, share_layers=True)
    matrices = shape.target.layer_parameters() - 2 * shape.target.hidden
    saved = (shape.target.layers - 2) * matrices
    assert pair.target.num_parameters() == shape.target.parameters(shape.vocab) - saved
    o_proj = pair.target.model.layers[-1].self_attn.o_proj.weight.clone()
    pair.set_divergence(0.5)  # once, however many layers share
    live = shape.draft.hidden
    torch.testing.assert_close(pair.target.model.layers[-1].self_attn.o_proj.weight[:live], 0.5 * o_proj[:live])
    pair.set_divergence(1e-6)
    assert disagreement(pair, random_texts(shape.vocab, 1, 100)[0]) < 0.01


def test_equal_seeds_give_equal_pairs_and_divergence_is_undone():
    first, second = build(), build()
    second.set_divergence(0.2)
    second.set_divergence(1.0)
    for one, other in zip(first.target.parameters(), second.target.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert not torch.equal(first.target.lm_head.weight, build(seed=1).target.lm_head.weight)
    with pytest.raises(ValueError, match="divergence must be > 0, got 0"):
        first.set_divergence(0)


@pytest.mark.parametrize(
    ("draft", "part"),
    [
        (module.Shape(256, 1, 4, 64), "hidden size"),
        (module.Shape(32, 4, 2, 64), "layers"),
        (module.Shape(32, 1, 2, 512), "intermediate size"),
        (module.Shape(64, 1, 8, 64), "heads"),
        (module.Shape(96, 1, 4, 64), "head width"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(draft, part):
    with pytest.raises(ValueError, match=f"mind its {part}"):
        build(module.PairShape(TINY.target, draft))


@pytest.mark.parametrize(
    ("goal", "temperature"),
    [
        (module.Goal(5.08, budget=128, levels=10), 0.0),
        (module.Goal(3.92, budget=128, levels=7), 0.6),
        (module.Goal(0.51), 0.0),
    ],
)
def test_the_unmodified_loop_reaches_the_goal(goal, temperature):
    pair = build()
    texts = random_texts(TINY.vocab, 1, 1064)
    acceptance = module.calibrate(pair, goal, temperature, texts)
    assert goal.of(acceptance.vector) == pytest.approx(goal.value, rel=0.02)
    tree = goal.tree(acceptance.vector) if goal.budget else optimal_tree(acceptance.vector, 16)
    expected = module.Goal(0, tree.num_nodes, tree.num_levels).of(acceptance.vector)
    prompts = torch.stack(random_texts(TINY.vocab, 4, 32, seed=1))
    stats = generate(
        pair.target, pair.draft, prompts, tree=tree, max_new_tokens=250, temperature=temperature, eos_token_id=()
    ).stats
    # some 200 steps whose counts spread about as widely as their mean, and an estimate from as many positions
    assert stats.tokens_per_step == pytest.approx(expected, rel=0.12)


def test_a_goal_that_cannot_be_met_is_refused():
    with pytest.raises(ValueError, match="goal must be within what the pair can give, got 30"):
        module.calibrate(build(), module.Goal(30.0, 64, 8), 0.0, random_texts(TINY.vocab, 1, 200), max_steps=6)


def test_greedy_output_equals_the_targets_own():
    pair = build()
    pair.set_divergence(0.3)
    prompts = torch.stack(random_texts(TINY.vocab, 2, 32))
    options = {"max_new_tokens": 150, "temperature": 0.0, "eos_token_id": ()}
    tree = optimal_tree([0.6, 0.15, 0.1, 0.05], 32)
    speculated = generate(pair.target, pair.draft, prompts, tree=tree, **options)
    assert speculated.new_tokens == generate(pair.target, None, prompts, **options).new_tokens
    assert speculated.stats.tokens_per_step > 2
    assert all(len(set(tokens)) > 60 for tokens in speculated.new_tokens)  # text that does not loop
