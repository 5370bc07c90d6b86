"""Engines that stay behind for the next call, compiled forwards, and adaptive trees in the loop."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from support.adapters import add_adapters
from support.interrupts import interrupt_everywhere
from support.synthetic_profile import synthetic_profile
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, adapt, generate, guard, plan_adaptive, release_engines
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.decoding.engine import cache_bucket
from sequoia_kernels.decoding.step import DecodingStep
from sequoia_kernels.drafts import StageClock, draft_source

TREE = TokenTree([-1, 0, 0, 1, 1, 3])
OPTIONS = {"tree": TREE, "max_new_tokens": 12, "eos_token_id": ()}


@pytest.fixture
def pair():
    target = tiny_llama(0, vocab_size=61)
    return target, noisy_copy(target, 0.5)


@pytest.fixture
def kept_engines(monkeypatch):
    """Keep engines on a CPU as they are on a GPU; gives the list of those made."""

    class Uncaptured:
        """Stands for captured steps: runs them as they are."""

        num_captured = 1

        def __init__(self, run_step, state):
            self.step = run_step

        def capture(self, tree):
            pass

    made = []
    monkeypatch.setattr(engines, "can_capture", lambda target, draft: True)
    monkeypatch.setattr(engines, "GraphedSteps", Uncaptured)
    plain = engines.DecodingEngine.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(engines.DecodingEngine, "__init__", counted)
    release_engines()
    yield made
    release_engines()


def prompt(length, seed=0, batch_size=1):
    return torch.randint(61, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_second_call_uses_the_first_ones_engine_and_gives_the_same(pair, kept_engines, temperature):
    options = {**OPTIONS, "temperature": temperature, "seed": 3}
    first = [generate(*pair, prompt(9, seed), **options).new_tokens for seed in (0, 1)]
    again = [generate(*pair, prompt(9, seed), **options).new_tokens for seed in (0, 1)]
    longer = generate(*pair, prompt(30), **options)
    assert first == again
    assert len(kept_engines) == 1
    release_engines()
    assert longer.new_tokens == generate(*pair, prompt(30), **options).new_tokens
    assert len(kept_engines) == 2


def test_a_draft_beyond_its_positions_starts_anew_in_a_kept_engine(pair, kept_engines):
    options = {**OPTIONS, "temperature": 0.9, "max_new_tokens": 80}
    draft = copy.deepcopy(pair[1])
    draft.config.max_position_embeddings = 32
    first = [generate(pair[0], draft, prompt(length), seed=length, **options) for length in (9, 40)]
    again = [generate(pair[0], draft, prompt(length), seed=length, **options) for length in (9, 40)]
    assert len(kept_engines) == 1
    for old, new in zip(first, again, strict=True):
        assert new.new_tokens == old.new_tokens
        assert new.stats.accepted_histogram == old.stats.accepted_histogram
        assert new.stats.draft_restarts == old.stats.draft_restarts > 0


def test_rows_left_over_from_an_earlier_call_do_no_harm(pair, kept_engines):
    clean = generate(*pair, prompt(9), **OPTIONS).new_tokens
    eager = kept_engines[0].eager
    for tensor in eager.target_cache.tensors() + eager.drafting.cache_tensors():
        tensor.fill_(torch.inf)
    assert generate(*pair, prompt(9), **OPTIONS).new_tokens == clean
    assert len(kept_engines) == 1


def test_what_a_graph_would_not_fit_makes_a_new_engine(pair, kept_engines):
    target, draft = pair
    generate(target, draft, prompt(9), **OPTIONS)
    for change in (
        {"input_ids": prompt(9, batch_size=2)},
        {"top_k": 5},
        {"max_new_tokens": 600},
        {"backend": "reference"},
        {"draft": copy.deepcopy(draft)},
        {"max_new_tokens": 300},  # beyond the draft's positions
    ):
        arguments = {"draft": draft, "input_ids": prompt(9), **OPTIONS, **change}
        before = len(kept_engines)
        generate(target, **arguments)
        assert len(kept_engines) == before + 1, change
    generate(target, draft, prompt(9), **OPTIONS)  # two engines are kept, and it was used last before three others
    before = len(kept_engines)
    generate(target, draft, prompt(9), **OPTIONS)
    assert len(kept_engines) == before
    with torch.no_grad():
        target.lm_head.weight = torch.nn.Parameter(target.lm_head.weight.flip(0).contiguous())
    generate(target, draft, prompt(9), **OPTIONS)
    assert len(kept_engines) == before + 1


@pytest.mark.parametrize("adapted", [0, 1])
def test_a_captured_engine_is_not_used_for_another_forward(pair, kept_engines, adapted):
    """Whatever a graph has in it and a caller may change: adapters, scaling, hooks, forwards, settings."""
    adapter = [add_adapters(model)[0] for model in pair][adapted]
    for model in pair:
        model.eval()
    mlp = pair[adapted].model.layers[0].mlp
    generate(*pair, prompt(9), **OPTIONS)
    for change in (
        lambda: adapter.active.__setitem__(0, "b"),
        lambda: adapter.active.clear(),
        lambda: adapter.active.append("a"),
        lambda: adapter.scaling.update(a=0.5),
        adapter.merge,
        lambda: mlp.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda: setattr(mlp, "forward", lambda hidden: hidden),
        lambda: setattr(pair[adapted].config, "sliding_window", 4),
    ):
        before = len(kept_engines)
        change()
        text = generate(*pair, prompt(9), **OPTIONS).new_tokens
        assert len(kept_engines) == before + 1
        assert generate(*pair, prompt(9), **OPTIONS).new_tokens == text
        assert len(kept_engines) == before + 1
        assert text == generate(pair[0], None, prompt(9), **OPTIONS).new_tokens


def test_a_model_that_is_changed_while_an_engine_runs_gets_another_one(pair, kept_engines):
    class Changes:
        def put(self, tokens):
            pair[0].config.sliding_window = 100

        def end(self):
            pass

    generate(*pair, prompt(9), **OPTIONS, streamer=Changes())
    generate(*pair, prompt(9), **OPTIONS)
    assert len(kept_engines) == 2


def test_an_interrupt_anywhere_leaves_the_engines_unlocked(pair, kept_engines):
    generate(*pair, prompt(9), **OPTIONS)
    [made] = kept_engines
    target, draft = adapt(pair[0]), draft_source(pair[1])

    def work():
        made.eager.use(target, draft, StageClock(enabled=False))
        engines.return_engine(made)
        engines.release_engines()

    def check():
        assert not engines._lock._is_owned()

    assert interrupt_everywhere(work, check, [engines, guard], "opcode") > 50


def test_engines_keep_neither_model_alive_and_go_with_their_target(pair, kept_engines):
    target, draft = map(copy.deepcopy, pair)
    generate(target, draft, prompt(9), **OPTIONS)
    models, engine = [weakref.ref(target), weakref.ref(draft)], weakref.ref(kept_engines.pop())
    gc.collect()
    assert engine() is not None
    del target, draft
    gc.collect()
    assert [model() for model in models] == [None, None]
    assert engine() is None


def test_a_failed_call_leaves_no_engine_behind(pair, kept_engines, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no more"):
        patch.setattr(DecodingStep, "verify_tokens", lambda *args: (_ for _ in ()).throw(RuntimeError("no more")))
        generate(*pair, prompt(9), **OPTIONS)
    generate(*pair, prompt(9), **OPTIONS)
    assert len(kept_engines) == 2


@pytest.mark.parametrize("rows", [1, 512, 513, 700, 1024, 1025, 5000, 32768, 40000])
def test_buckets_are_at_most_a_quarter_larger(rows):
    bucket = cache_bucket(rows, None)
    assert bucket >= rows
    assert bucket == 512 or bucket <= 1.25 * rows
    assert cache_bucket(bucket, None) == bucket
    assert cache_bucket(rows, rows + 1) in (bucket, rows + 1)


# Compiled forwards


@pytest.fixture
def compiled_shapes(monkeypatch):
    """Let torch.compile run what it traced as it is (no C++ compiler); gives the traced row counts."""
    shapes = []

    def backend(graph, inputs):
        shapes.append(graph)
        return graph.forward

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: plain(function, backend=backend, **options))
    torch._dynamo.reset()
    yield shapes
    torch._dynamo.reset()


def test_compiled_forwards_give_the_same_tokens_and_compile_once_a_shape(pair, compiled_shapes):
    wide = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 6, 7, 8])  # draft levels of 2, 3, 3 and 2 rows
    plain = generate(*pair, prompt(9), **{**OPTIONS, "tree": wide})
    compiled = [adapt(model, compile=True) for model in pair]
    assert generate(*compiled, prompt(9), **{**OPTIONS, "tree": wide}).new_tokens == plain.new_tokens
    num_shapes = len(compiled_shapes)
    assert num_shapes <= 5  # 13 rows of the target, 1 to 3 rows of the draft
    generate(*compiled, prompt(17, 1), **{**OPTIONS, "tree": wide})  # other lengths, other rows: the same shapes
    generate(*pair, prompt(5, 2), **{**OPTIONS, "tree": wide}, compile=True)
    assert len(compiled_shapes) == num_shapes


def test_many_shapes_all_get_compiled(pair, compiled_shapes):
    target = adapt(pair[0], compile=True)
    for num_nodes in range(1, 14):  # more than torch's own limit of eight
        generate(target, pair[1], prompt(9), **{**OPTIONS, "tree": TokenTree.chain(num_nodes)})
    assert len(compiled_shapes) == 13


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "fast", 1])
def test_modes_with_graphs_of_their_own_are_refused(pair, mode):
    with pytest.raises(ValueError, match="adapt: compile must be a bool or one of default, max-autotune-no-cudagraphs"):
        generate(*pair, prompt(9), **OPTIONS, compile=mode)


def test_adapting_again_keeps_or_adds_the_mode(pair):
    plain, compiled = adapt(pair[0]), adapt(pair[0], compile=True)
    assert (plain.compile_mode, compiled.compile_mode) == (None, "default")
    assert adapt(compiled) is compiled
    assert adapt(compiled, compile=True) is compiled
    assert adapt(plain, compile="max-autotune-no-cudagraphs").compile_mode == "max-autotune-no-cudagraphs"


# Adaptive trees


@pytest.fixture(scope="module")
def adaptive():
    profile = synthetic_profile(lambda n, c: 10 + 0.1 * n, lambda n, c: 0.8 + 0.01 * n)
    return plan_adaptive([0.6, 0.15, 0.06], profile, context_len=32, patience=2, half_life=4)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_adaptive_trees_switch_and_keep_greedy_output(pair, adaptive, temperature, batch_size):
    target = pair[0]
    ids = prompt(9, batch_size=batch_size)
    options = {"max_new_tokens": 80, "temperature": temperature, "eos_token_id": (), "seed": 2}
    hopeless = noisy_copy(target, 50.0)  # accepted as good as never
    used = {}
    for name, model in (("same", target), ("hopeless", hopeless)):
        output = generate(target, model, ids, tree=adaptive, **options)
        used[name] = output.stats
        assert sum(output.stats.steps_by_tree.values()) == output.stats.num_steps
        assert output.finish_reasons == ["length"] * batch_size
        if temperature == 0:
            assert output.new_tokens == generate(target, None, ids, **options).new_tokens
    start = adaptive.trees[adaptive.start]
    assert used["hopeless"].tree.num_levels < start.num_levels < used["same"].tree.num_levels


def test_a_follower_carries_on_where_the_last_call_ended(pair, adaptive):
    follower = adaptive.follow()
    options = {"max_new_tokens": 40, "eos_token_id": ()}
    generate(pair[0], pair[0], prompt(9), tree=follower, **options)
    assert follower.num_switches > 0
    learnt = follower.tree
    stats = generate(pair[0], pair[0], prompt(9, 1), tree=follower, **options).stats
    assert next(iter(stats.steps_by_tree)) == learnt


def test_no_draft_means_no_trees_at_all(pair, adaptive):
    stats = generate(pair[0], None, prompt(9), tree=adaptive, max_new_tokens=5, eos_token_id=()).stats
    assert stats.tree == TokenTree.single()
    assert stats.num_steps == 4


def test_the_word_adaptive_plans_by_itself(pair, adaptive):
    target, draft = pair
    options = {"max_new_tokens": 40, "eos_token_id": ()}
    output = generate(target, draft, prompt(9), tree="adaptive", acceptance=[0.6, 0.2], **options)
    assert output.new_tokens == generate(target, None, prompt(9), **options).new_tokens
