"""Steps on memory that is known beforehand, in C++, do what the same steps do op by op; and notice what changes."""

from __future__ import annotations

import random

import pytest
import torch
from support.native_models import random_tree
from support.tiny_models import noisy_copy, tiny_llama

import sequoia_kernels
from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.decoding import step as steps
from sequoia_kernels.decoding.step import DecodingStep
from sequoia_kernels.drafts import DecodingState, Drafting, DraftSource, draft_source, host_growth
from sequoia_kernels.models import TreeModel
from sequoia_kernels.ops import CacheTable, backends, verify_tree
from sequoia_kernels.ops.compact_kv_cache_ import host as host_moves
from sequoia_kernels.ops.compact_kv_cache_.op import CompactInputs

TREES = [
    TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 5]),
    TokenTree([-1, 0, 0, 0, 2, 2, 2, 4, 4]),
    TokenTree([-1, 0, 0, 0, 1, 2, 3, 6, 6]),
]
VOCAB = 24
TARGET = tiny_llama(3, vocab_size=VOCAB, sharpness=6.0)
DRAFT = noisy_copy(TARGET, 0.4)


def prompts(batch_size: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch_size, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def runs(monkeypatch):
    """How often each part of a step ran in place."""
    counts = {"grown": 0, "scored": 0, "committed": 0}

    def counting(owner, method, name):
        plain = getattr(owner, method)

        def counted(*arguments):
            result = plain(*arguments)
            counts[name] += result is not None and result is not False
            return result

        monkeypatch.setattr(owner, method, counted)

    counting(host_growth.HostGrowth, "run", "grown")
    counting(DecodingStep, "_score_in_place", "scored")
    counting(steps.HostStep, "commit", "committed")
    return counts


@pytest.fixture
def op_by_op(monkeypatch):
    """Switches steps in place off: a replaced forward is called, and a replaced backend too."""

    def switch_off():
        plain = TreeModel.forward
        monkeypatch.setattr(TreeModel, "forward", lambda *args, **kwargs: plain(*args, **kwargs))
        monkeypatch.setattr(steps.HostStep, "serves", staticmethod(lambda *args: False))

    return switch_off


def lanes(batch_size: int, mixed: bool) -> dict:
    """Sampling settings, of all requests or of each."""
    if not mixed:
        return {"temperature": 0.8}
    some = {"temperature": [0.0, 0.7, 1.3], "top_k": [0, 5, 0], "top_p": [1.0, 1.0, 0.8]}
    return {name: values[:batch_size] for name, values in some.items()}


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("case", ["one", "three", "trees", "narrow draft", "wide draft", "bfloat16", "plain", "greedy"])
def test_steps_in_place_decode_what_steps_op_by_op_do(case, mixed, rule, runs, op_by_op):
    target, draft, tree, batch_size = TARGET, DRAFT, TREES[0], 1
    if case in ("three", "trees", "narrow draft", "wide draft"):
        batch_size = 3
    if case == "trees":
        tree = TREES
    if case in ("narrow draft", "wide draft"):
        draft = tiny_llama(3, vocab_size=VOCAB + (-5 if "narrow" in case else 3), num_layers=1, sharpness=6.0)
    if case == "bfloat16":
        target, draft = (tiny_llama(3, vocab_size=VOCAB, sharpness=6.0).to(torch.bfloat16) for _ in range(2))
    options = lanes(batch_size, mixed) if case != "greedy" else {"temperature": 0.0}
    options |= {
        "max_new_tokens": 60,
        "rule": rule,
        "seed": list(range(7, 7 + batch_size)),
        "eos_token_id": (3,) if batch_size == 3 else (),
    }
    if case == "plain":
        draft, options = None, options
    else:
        options["tree"] = tree
    in_place = generate(target, draft, prompts(batch_size), **options)
    assert runs["scored"] == runs["committed"] == in_place.stats.num_steps > 2
    assert runs["grown"] == (0 if case == "plain" else in_place.stats.num_steps)
    before = dict(runs)
    op_by_op()
    expected = generate(target, draft, prompts(batch_size), **options)
    assert runs["grown"] == before["grown"] and runs["committed"] == before["committed"]
    assert in_place.new_tokens == expected.new_tokens
    for name in ("request_steps", "visited_by_rank", "accepted_by_rank", "steps_by_tree", "num_steps"):
        assert getattr(in_place.stats, name) == getattr(expected.stats, name), name
    assert set(in_place.stats.stage_seconds) == set(expected.stats.stage_seconds)


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("ended", [0, 1, 2])
def test_a_request_that_has_ended_takes_no_work(ended, rule):
    """Its rows are neither fed, drawn nor verified, and the others' are what they are beside an active one."""
    tree, first = TREES[0], [9, 6, 8]

    def steps_of(ends):
        state = DecodingState.create(
            3, torch.device("cpu"), seeds=[5, 6, 7], temperature=[0.9, 0.0, 1.2], top_k=None, top_p=[1.0, 1.0, 0.8]
        )
        step = DecodingStep(adapt(TARGET), draft_source(DRAFT), state, 40 + 3 * tree.num_nodes, rule=rule)
        with torch.inference_mode():
            step.prefill(prompts(3), torch.tensor(first, dtype=torch.int32))
            step.run(tree)
            if ends:
                step.end_request(ended)
            buffers, lane = step.prepare(tree)[1], state.cache_lens[ended].item()
            logits = step._scored.view(3, tree.num_nodes, VOCAB)
            behind = [tensor[ended, lane:] for tensor in (*step.target_cache.tensors(), *step.drafting.cache_tensors())]
            kept = [buffers.tokens[ended, 1:], buffers.draft_logits[ended], logits[ended], *behind]
            before = [tensor.clone() for tensor in kept]
            emitted = [[part.clone() for part in step.run(tree)[:3]] for _ in range(3)]
        return emitted, [torch.equal(*pair) for pair in zip(kept, before, strict=True)]

    expected, changed = steps_of(False)
    found, unchanged = steps_of(True)
    assert not any(changed) and all(unchanged)
    for (tokens, nodes, counts), (its_tokens, its_nodes, its_counts) in zip(found, expected, strict=True):
        assert counts[ended] == 0 and bool((tokens[ended] == -1).all())
        for lane in {0, 1, 2} - {ended}:
            assert torch.equal(tokens[lane], its_tokens[lane])
            assert torch.equal(nodes[lane], its_nodes[lane]) and counts[lane] == its_counts[lane] > 0


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_ops_take_requests_that_nothing_was_ever_drawn_for(temperature, rule):
    """One that ended with the prompts, or before a tree was first met: the op verifies it all the same."""
    options = {"tree": TREES[0], "seed": [5, 6, 7], "temperature": temperature, "rule": rule, "max_new_tokens": 12}
    ended = generate(TARGET, DRAFT, prompts(3), **options).new_tokens[1][0]
    expected = generate(TARGET, DRAFT, prompts(3), eos_token_id=ended, **options)
    assert expected.new_tokens[1] == [ended] and expected.stats.num_steps > 0
    hooked = generate(
        TARGET, DRAFT, prompts(3), eos_token_id=ended, logits_hook=lambda paths, logits: logits, **options
    )
    assert hooked.new_tokens == expected.new_tokens


def stepped(tree, seed, rule, op_by_op=None):
    """The state and the caches behind a prompt and three steps."""
    if op_by_op is not None:
        op_by_op()
    state = DecodingState.create(
        2, torch.device("cpu"), seeds=[seed, seed + 1], temperature=[0.9, 0.0], top_k=None, top_p=None
    )
    step = DecodingStep(adapt(TARGET), draft_source(DRAFT), state, 40 + 3 * tree.num_nodes, rule=rule)
    with torch.inference_mode():
        step.prefill(prompts(2), torch.tensor([9, 6], dtype=torch.int32))
        emitted = [[part.tolist() for part in step.run(tree)[:3]] for _ in range(3)]
    rows = [
        tensor[b, : int(length)] for tensor in step.target_cache.tensors() for b, length in enumerate(state.cache_lens)
    ]
    rows += [
        tensor[b, : int(length)]
        for tensor in step.drafting.cache_tensors()
        for b, length in enumerate(state.cache_lens)
    ]
    buffers = step.prepare(tree)[1]
    return (
        emitted,
        [value.tolist() for value in vars(state).values() if isinstance(value, torch.Tensor)],
        rows,
        buffers,
    )


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("seed", range(6))
def test_trees_of_all_shapes_leave_the_same_state_caches_and_buffers(seed, rule, op_by_op):
    tree = random_tree(random.Random(seed), 2 + 5 * seed)
    emitted, state, rows, buffers = stepped(tree, seed, rule)
    expected_emitted, expected_state, expected_rows, expected_buffers = stepped(tree, seed, rule, op_by_op)
    assert emitted == expected_emitted and state == expected_state
    assert all(torch.equal(row, expected) for row, expected in zip(rows, expected_rows, strict=True))
    assert torch.equal(buffers.tokens, expected_buffers.tokens)
    assert torch.equal(buffers.draft_logits, expected_buffers.draft_logits)


def test_a_draft_with_few_positions_is_grown_in_place(runs, op_by_op):
    draft = tiny_llama(3, vocab_size=VOCAB, sharpness=6.0, max_positions=32)
    options = {"tree": TREES[0], "max_new_tokens": 80, "temperature": 0.7, "seed": 3}
    found = generate(TARGET, draft, prompts(2), **options)
    assert runs["grown"] == found.stats.num_steps and found.stats.draft_restarts > 0
    op_by_op()
    assert found.new_tokens == generate(TARGET, draft, prompts(2), **options).new_tokens


@pytest.mark.parametrize("whose", ["target", "draft"])
def test_bad_logits_are_refused_as_the_op_refuses_them_and_nothing_advances(whose):
    target, draft = (tiny_llama(3, vocab_size=VOCAB, sharpness=6.0) for _ in range(2))
    state = DecodingState.create(1, torch.device("cpu"), seeds=[0], temperature=[1.0], top_k=None, top_p=None)
    step = DecodingStep(adapt(target), draft_source(draft), state, 64)
    with torch.inference_mode():
        step.prefill(prompts(1), torch.tensor([9], dtype=torch.int32))
        step.run(TREES[0])
        before = [tensor.clone() for tensor in state.advancing()]
        with torch.inference_mode(False), torch.no_grad():
            {"target": target, "draft": draft}[whose].lm_head.weight[3].fill_(torch.nan)
        with pytest.raises(ValueError, match=r"logits must .*NaN|logits must .*nan"):
            step.run(TREES[0])
    assert all(torch.equal(tensor, old) for tensor, old in zip(state.advancing(), before, strict=True))


def test_logits_of_another_layout_go_to_the_op():
    state = DecodingState.create(1, torch.device("cpu"), seeds=[0], temperature=[0.0], top_k=None, top_p=None)
    step = DecodingStep(adapt(TARGET), draft_source(DRAFT), state, 64)
    tree = TokenTree.chain(3)
    with torch.inference_mode():
        step.prefill(prompts(1), torch.tensor([9], dtype=torch.int32))
        step.draft_tokens(tree)
        host = step._host_step(tree)
        logits = torch.randn(1, 3, VOCAB, generator=torch.Generator().manual_seed(0))
        assert host.verify(logits) is host.path and host.verify(logits.double()) is host.path
        for other in (logits[:, :, :-1], logits[:, :2], logits.mT.contiguous().mT, logits.to(torch.int64)):
            assert host.verify(other) is None


def test_a_cache_that_is_full_is_refused_and_nothing_advances():
    state = DecodingState.create(1, torch.device("cpu"), seeds=[0], temperature=[0.0], top_k=None, top_p=None)
    step = DecodingStep(adapt(TARGET), draft_source(DRAFT), state, 9 + TREES[0].num_nodes)
    with torch.inference_mode():
        step.prefill(prompts(1), torch.tensor([9], dtype=torch.int32))
        step.run(TREES[0])
        before = [tensor.clone() for tensor in state.advancing()]
        with pytest.raises(ValueError, match="cache_lens must leave room for"):
            step.run(TREES[0])
    assert all(torch.equal(tensor, old) for tensor, old in zip(state.advancing(), before, strict=True))


class Changing:
    """A streamer that does something to the models when it has got some tokens."""

    def __init__(self, change, after):
        self.change, self.left = change, after

    def put(self, value):
        self.left -= 1
        if self.left == 0:
            self.change()

    def end(self):
        pass


@pytest.mark.parametrize("way", ["in place", "data", "parameter"])
@pytest.mark.parametrize("whose", ["target", "draft"])
def test_weights_that_are_exchanged_in_the_middle_of_decoding_are_used_next(way, whose, op_by_op):
    def decoded():
        target, draft = (tiny_llama(3, vocab_size=VOCAB, sharpness=6.0) for _ in range(2))
        head = {"target": target, "draft": draft}[whose].lm_head
        other = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))

        def change():
            with torch.inference_mode(False), torch.no_grad():
                if way == "in place":
                    head.weight.copy_(other)
                elif way == "data":
                    head.weight.data = other
                else:
                    head.weight = torch.nn.Parameter(other, requires_grad=False)

        result = generate(
            target, draft, prompts(1), tree=TREES[0], max_new_tokens=40, temperature=0.0, streamer=Changing(change, 12)
        )
        return result.new_tokens, result.stats.accepted_by_rank

    found = decoded()
    op_by_op()
    assert found == decoded()


def test_training_mode_in_the_middle_of_decoding_is_refused():
    target, draft = (tiny_llama(3, vocab_size=VOCAB, sharpness=6.0) for _ in range(2))
    for model in (target, draft):
        with pytest.raises(ValueError, match="must be in evaluation mode"):
            generate(target, draft, prompts(1), tree=TREES[0], max_new_tokens=40, streamer=Changing(model.train, 12))
        model.eval()


class MeddlingDrafting(Drafting):
    """Draws nothing, and gives the target another head in the middle of a step."""

    def grow(self, layout, buffers):
        buffers.tokens[:, 1:] = -1
        buffers.draft_logits.zero_()
        self.source.num_steps += 1
        if self.source.num_steps == 4:
            self.source.head.weight.data = self.source.other


class MeddlingDraft(DraftSource):
    def __init__(self, head, other):
        self.head, self.other, self.num_steps = head, other, 0
        self.device, self.vocab_size, self.logits_dtype = torch.device("cpu"), VOCAB, torch.float32
        self.positions = None

    def check_target(self, target):
        pass

    def start(self, target, state, max_cache_len, *, backend, clock):
        return MeddlingDrafting(self, state, backend, clock)


def test_what_a_draft_of_ones_own_does_to_the_target_is_seen(op_by_op):
    def decoded():
        target = tiny_llama(3, vocab_size=VOCAB, sharpness=6.0)
        other = torch.randn(target.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        source = MeddlingDraft(target.lm_head, other)
        return generate(target, source, prompts(1), tree=TREES[0], max_new_tokens=20, temperature=0.0).new_tokens

    found = decoded()
    op_by_op()
    assert found == decoded()


@pytest.mark.parametrize("advance", [True, False])
def test_bound_moves_can_be_repeated(advance):
    cache = torch.arange(16.0).view(1, 16, 1, 1)
    table = CacheTable([cache])
    lens = torch.tensor([4], dtype=torch.int32)
    move = host_moves.bind(
        CompactInputs(
            [cache], torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32), lens, None,
            table.entries, table.max_row_bytes, table.num_slots, advance,
        )
    )  # fmt: skip
    for count in (1, 2):
        move()
        assert lens.tolist() == [4 + 2 * count * advance]
    assert cache.flatten().tolist() == [*range(5), 6, 6, *((8,) if advance else (7,)), *range(8, 16)]


def test_the_weights_of_a_call_are_held_whoever_drops_them():
    target = adapt(tiny_llama(3, vocab_size=VOCAB, sharpness=6.0))
    cache, lens = target.new_cache(1, 16), torch.zeros(1, dtype=torch.int32)
    tokens = torch.tensor([[1, 2, 3]])
    step = sequoia_kernels.models.causal_step(3)
    bound = target.bind(tokens, cache, lens, step)
    logits = torch.empty(bound.shape)
    assert bound.run(logits)
    expected = logits.clone()
    weight = target.model.lm_head.weight
    old = weight.data_ptr()
    weight.data = torch.zeros_like(weight)
    torch.randn(weight.shape)  # would take the place of what is freed
    assert bound.run(logits) and torch.equal(logits, expected)
    assert weight.data_ptr() != old
    assert torch.equal(target.forward(tokens, cache, lens, step), torch.zeros_like(logits))
    sequoia_kernels.models.foreign_code_ran()
    assert bound.run(logits) and not logits.any()


def test_forwards_that_are_not_native_or_not_ours_are_not_bound(monkeypatch):
    model = tiny_llama(3, vocab_size=VOCAB)
    arguments = lambda tree_model: (  # noqa: E731
        torch.zeros(1, 1, dtype=torch.int64), tree_model.new_cache(1, 4), torch.zeros(1, dtype=torch.int32),
        sequoia_kernels.models.causal_step(1),
    )  # fmt: skip
    native, modules = adapt(model), adapt(model, forward="modules")
    assert modules.bind(*arguments(modules)) is None
    assert native.bind(*arguments(native)) is not None
    with pytest.raises(ValueError, match="bind: input_ids must be contiguous"):
        native.bind(
            torch.zeros(2, 2, dtype=torch.int64).t(), native.new_cache(2, 4), torch.zeros(2, dtype=torch.int32),
            sequoia_kernels.models.causal_step(2),
        )  # fmt: skip
    monkeypatch.setattr(TreeModel, "forward", lambda *args, **kwargs: None)
    assert native.bind(*arguments(native)) is None


def test_a_backend_that_somebody_registered_is_called(monkeypatch):
    op = verify_tree.__name__
    assert backends.runs_own(op, "auto", "cpu", "host") and backends.runs_own(op, "host", "cpu", "host")
    assert not backends.runs_own(op, "reference", "cpu", "host") and not backends.runs_own(op, "auto", "cuda", "host")
    assert not backends.runs_own(op, "nobody", "cpu", "host")
    for table in (backends._modules, backends._loaded, backends._reasons):
        monkeypatch.setitem(table, op, dict(table[op]))
    backends._forget_choices(op)
    own = backends.choose(op, "host", "cpu", _inputs())
    calls = []
    backends.register_backend(op, "host", lambda inputs: None, lambda *args: (calls.append(1), own.run(*args)))
    try:
        assert not backends.runs_own(op, "auto", "cpu", "host")
        generate(TARGET, DRAFT, prompts(1), tree=TREES[0], max_new_tokens=12)
        assert len(calls) > 2
    finally:
        backends._forget_choices(op)


def _inputs():
    class Inputs:
        rule = sequoia_kernels.tree.DEFAULT_RULE
        tokens = torch.zeros(1, 1)

    return Inputs()
