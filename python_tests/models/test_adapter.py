"""Tree forwards of adapted models, by their modules, against plain sequential decoding of the same models."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from support.interrupts import interrupt_everywhere
from support.sequential import depths, packed_mask, tree_logits
from support.tiny_families import FAMILIES, VOCAB, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import sequoia_kernels.models as models
import sequoia_kernels.models.adapter as adapter
import sequoia_kernels.models.attention as attention
import sequoia_kernels.models.cache as cache_module
import sequoia_kernels.models.switch as switch
from sequoia_kernels import guard
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import TreeCache, TreeModel, TreeStep, causal_step, prefill
from sequoia_kernels.models.families import PROVEN_FAMILIES, cache_argument

# Branches at every level but the last, single children, and a path longer than the families' window of 4.
PARENTS = [-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 9]
SMALL_PARENTS = [-1, 0, 0, 1, 3]
# Two float32 computations of logits of order 1, which differ in the order of their sums only.
TOLERANCE = 3e-5


def adapt(model: Any, **settings: Any) -> TreeModel:
    """Adapt a model whose own modules run, as they do where no native forward can."""
    return models.adapt(model, **{"forward": "modules"} | settings)


def tree_step(parents: list[int], nodes: list[int] | None = None) -> TreeStep:
    """Return the step that feeds some nodes of a tree, all by default."""
    rows = list(range(len(parents))) if nodes is None else nodes
    return TreeStep(
        tree_mask=packed_mask(parents)[rows].contiguous(),
        node_ids=torch.tensor(rows, dtype=torch.int32),
        depths=torch.tensor(depths(parents), dtype=torch.int32)[rows],
        num_tree_rows=max(rows) + 1,
        first_node=rows[0] if rows == list(range(rows[0], rows[0] + len(rows))) else None,
    )


def random_tokens(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=generator)


def committed(model: TreeModel, prompts: list[list[int]], max_cache_len: int) -> tuple[TreeCache, torch.Tensor]:
    """Return a cache that holds the prompts, and their lengths. [B] int32."""
    lens = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    cache = model.new_cache(len(prompts), max_cache_len)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    prefill(model, cache, padded, lens)
    return cache, lens


def move_rows(cache: TreeCache, lens: torch.Tensor, accepted: list[list[int]]) -> torch.Tensor:
    """Commit each request's accepted nodes, row by row. Returns the new lengths."""
    for tensor in cache.tensors():
        for request, nodes in enumerate(accepted):
            start = int(lens[request])
            tensor[request, start : start + len(nodes)] = tensor[request, [start + node for node in nodes]]
    return lens + torch.tensor([len(nodes) for nodes in accepted], dtype=torch.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_logits_equal_sequential_decoding(family: str) -> None:
    """Requests of different lengths, a tree step, a commit of paths of different lengths, and another tree step."""
    plain = tiny_model(family)
    model = adapt(plain)
    assert [spec.window for spec in model._plan.specs] == FAMILIES[family][2]
    assert model.family == family
    assert model.vocab_size == VOCAB
    generator = torch.Generator().manual_seed(7)
    prompts = [random_tokens(generator, length).tolist() for length in (9, 1, 6)]
    cache, lens = committed(model, prompts, max_cache_len=31)

    tokens = random_tokens(generator, 3, len(PARENTS))
    scored = model.forward(tokens, cache, lens, tree_step(PARENTS))
    for request, prompt in enumerate(prompts):
        expected = tree_logits(plain, prompt, tokens[request].tolist(), PARENTS)
        assert expected.std() > 0.5
        torch.testing.assert_close(scored[request], expected, rtol=0, atol=TOLERANCE)

    accepted = [[0, 1, 4, 7, 9, 10], [0], [0, 2, 6]]
    lens = move_rows(cache, lens, accepted)
    prompts = [
        prompt + tokens[request, nodes].tolist()
        for request, (prompt, nodes) in enumerate(zip(prompts, accepted, strict=True))
    ]
    tokens = random_tokens(generator, 3, len(SMALL_PARENTS))
    scored = model.forward(tokens, cache, lens, tree_step(SMALL_PARENTS))
    for request, prompt in enumerate(prompts):
        expected = tree_logits(plain, prompt, tokens[request].tolist(), SMALL_PARENTS)
        torch.testing.assert_close(scored[request], expected, rtol=0, atol=TOLERANCE)


def test_every_proven_family_is_tested() -> None:
    assert set(FAMILIES) >= PROVEN_FAMILIES


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_level_by_level_equals_the_whole_tree(family: str) -> None:
    """A draft feeds the internal nodes of one level at a time, which need not be neighbours."""
    model = adapt(tiny_model(family))
    generator = torch.Generator().manual_seed(3)
    cache, lens = committed(model, [random_tokens(generator, length).tolist() for length in (5, 8)], 24)
    tokens = random_tokens(generator, 2, len(PARENTS))
    whole = model.forward(tokens, cache, lens, tree_step(PARENTS))
    for tensor in cache.tensors():
        for request in range(2):
            tensor[request, int(lens[request]) :] = 0
    for nodes in ([0], [1, 2], [4], [7], [9]):
        level = model.forward(tokens[:, nodes], cache, lens, tree_step(PARENTS, nodes))
        torch.testing.assert_close(level, whole[:, nodes], rtol=0, atol=TOLERANCE)
    skipping = model.forward(tokens[:, [4, 7, 8]], cache, lens, tree_step(PARENTS, [4, 7, 8]))
    torch.testing.assert_close(skipping, whole[:, [4, 7, 8]], rtol=0, atol=TOLERANCE)


def test_an_empty_cache_is_a_legal_prefix() -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    tokens = random_tokens(torch.Generator().manual_seed(0), 1, len(PARENTS))
    scored = model.forward(tokens, model.new_cache(1, 16), torch.zeros(1, dtype=torch.int32), tree_step(PARENTS))
    expected = tree_logits(plain, [], tokens[0].tolist(), PARENTS)
    torch.testing.assert_close(scored[0], expected, rtol=0, atol=TOLERANCE)


def test_only_the_trees_rows_are_written() -> None:
    model = adapt(tiny_model("llama"))
    cache = model.new_cache(2, 20)
    for tensor in cache.tensors():
        tensor.fill_(0.125)
    lens = torch.tensor([3, 7], dtype=torch.int32)
    nodes = [0, 2, 5]
    model.forward(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache, lens, tree_step(PARENTS, nodes))
    for tensor in cache.tensors():
        touched = (tensor != 0.125).flatten(2).any(-1)
        for request in range(2):
            assert touched[request].nonzero().flatten().tolist() == [int(lens[request]) + node for node in nodes]


def test_a_tree_of_more_than_32_nodes_uses_all_mask_words() -> None:
    plain = tiny_model("mistral")
    model = adapt(plain)
    parents = [-1] + [max(0, (node - 1) // 2) for node in range(1, 70)]
    generator = torch.Generator().manual_seed(5)
    prompt = random_tokens(generator, 6).tolist()
    cache, lens = committed(model, [prompt], 80)
    tokens = random_tokens(generator, 1, 70)
    scored = model.forward(tokens, cache, lens, tree_step(parents))
    expected = tree_logits(plain, prompt, tokens[0].tolist(), parents)
    torch.testing.assert_close(scored[0], expected, rtol=0, atol=TOLERANCE)


def test_bfloat16_stays_close() -> None:
    plain = tiny_model("gemma2").to(torch.bfloat16)
    model = adapt(plain)
    generator = torch.Generator().manual_seed(2)
    prompt = random_tokens(generator, 9).tolist()
    cache, lens = committed(model, [prompt], 24)
    assert {tensor.dtype for tensor in cache.tensors()} == {torch.bfloat16}
    tokens = random_tokens(generator, 1, len(PARENTS))
    scored = model.forward(tokens, cache, lens, tree_step(PARENTS))[0].float()
    expected = tree_logits(plain, prompt, tokens[0].tolist(), PARENTS).float()
    assert (scored - expected).abs().mean() < 0.03 * expected.std()


def settings(model: Any) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    plain = tiny_model(family)
    prompt = torch.tensor([[5, 9, 11, 3]])

    def generated() -> torch.Tensor:
        return plain.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)

    before = generated(), settings(plain), plain.config.to_dict(), plain.forward
    weights = {name: (id(tensor), tensor.clone()) for name, tensor in plain.state_dict(keep_vars=True).items()}
    model = adapt(plain)
    cache, lens = committed(model, [[5, 9, 11, 3]], 20)
    model.forward(torch.tensor([[1, 2, 3, 4, 5]]), cache, lens, tree_step(SMALL_PARENTS))
    assert model.model is plain
    assert torch.equal(generated(), before[0])
    assert (settings(plain), plain.config.to_dict(), plain.forward) == before[1:]
    for name, tensor in plain.state_dict(keep_vars=True).items():
        assert id(tensor) == weights[name][0]
        assert torch.equal(tensor, weights[name][1])


def test_the_attention_function_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    before = settings(plain)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken on purpose")

    cache, lens = model.new_cache(1, 8), torch.zeros(1, dtype=torch.int32)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "tree_attention", broken)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            model.forward(torch.tensor([[1]]), cache, lens, causal_step(1))
    assert settings(plain) == before
    model.forward(torch.tensor([[1]]), cache, lens, causal_step(1))


def test_two_threads_take_turns_on_one_model() -> None:
    plain = tiny_model("llama")
    models = [adapt(plain), adapt(plain)]
    tokens = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])]
    lens = torch.zeros(1, dtype=torch.int32)

    def scored(index: int) -> torch.Tensor:
        return models[index].forward(tokens[index], models[index].new_cache(1, 8), lens, causal_step(3))

    expected = [scored(0), scored(1)]
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(25) if not torch.equal(scored(index), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert "sequoia_tree" not in settings(plain)


@pytest.mark.parametrize("event", ["line", "opcode"])
def test_an_interrupt_anywhere_leaves_neither_attention_nor_lock_behind(event: str) -> None:
    plain = tiny_model("llama")
    before = settings(plain)
    own = switch.AttentionSwitch(plain, attention.ATTENTION_NAME)

    def check() -> None:
        assert settings(plain) == before
        assert not any(lock._is_owned() for lock in own._locks)
        assert torch.is_grad_enabled()

    def work() -> None:
        own.run(lambda: settings(plain))
        own.at_rest(lambda: settings(plain))

    assert interrupt_everywhere(work, check, [switch, guard], event) > 30


def test_an_interrupt_in_a_forward_leaves_nothing_behind() -> None:
    plain = tiny_model("llama")
    model, before = adapt(plain), settings(plain)
    cache, lens = model.new_cache(1, 8), torch.zeros(1, dtype=torch.int32)

    def check() -> None:
        assert settings(plain) == before
        assert not any(lock._is_owned() for lock in model._switch._locks)
        assert torch.is_grad_enabled()
        with pytest.raises(UnsupportedModelError, match=r"must be used through TreeModel\.forward"):
            cache.update(torch.zeros(1), torch.zeros(1), 0)

    step = causal_step(1)
    work = partial(model.forward, torch.tensor([[1]]), cache, lens, step)
    assert interrupt_everywhere(work, check, [adapter, cache_module, guard, switch, attention]) > 50
    work()


def test_an_error_inside_of_two_calls_leaves_the_outer_ones_locks() -> None:
    plain = tiny_model("llama")
    switch, rest = adapt(plain)._switch, plain.config._attn_implementation

    def fail() -> None:
        raise KeyError("inside")

    def call() -> None:
        with pytest.raises(KeyError, match="inside"):
            switch.at_rest(fail)
        assert all(lock._is_owned() for lock in switch._locks)

    for outer in (switch.run, switch.at_rest):
        outer(call)
        assert plain.config._attn_implementation == rest
        assert not any(lock._is_owned() for lock in switch._locks)


def test_a_forward_inside_a_forward_is_an_error_and_not_a_deadlock() -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    cache, lens = model.new_cache(1, 8), torch.zeros(1, dtype=torch.int32)

    def forward(*_: Any) -> None:
        model.forward(torch.tensor([[1]]), cache, lens, causal_step(1))

    handle = plain.lm_head.register_forward_pre_hook(forward)
    with pytest.raises(RuntimeError, match="forward: the model must not be run from within a forward of its own"):
        forward()
    handle.remove()
    forward()


def test_a_model_is_compared_with_its_own_forward_while_no_other_thread_decodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread's forward would leave its attention in the configurations, which the own forward reads."""
    plain = tiny_model("llama")
    own = switch.AttentionSwitch(plain, attention.ATTENTION_NAME)
    held: list[bool] = []

    def note(*_: Any) -> None:
        held.append(all(lock._is_owned() for lock in own._locks))

    plain.register_forward_pre_hook(note)
    monkeypatch.setattr(adapter, "PROVEN_FAMILIES", frozenset())
    adapt(plain)
    assert len(held) >= 4  # the probe, the own forward, and the tree's two
    assert all(held)


def test_models_that_share_layers_take_turns() -> None:
    """A draft made of the target's first layer has its own configuration, but the layer reads the target's."""
    target = tiny_model("llama")
    draft = tiny_model("llama", num_hidden_layers=1)
    draft.model.layers = target.model.layers[:1]
    before = settings(target)
    models = [adapt(target), adapt(draft)]
    inside, leave = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def forward(model: TreeModel) -> None:
        try:
            model.forward(torch.tensor([[1]]), model.new_cache(1, 4), torch.zeros(1, dtype=torch.int32), causal_step(1))
        except BaseException as error:
            errors.append(error)

    def wait(*_: Any) -> None:
        inside.set()
        assert leave.wait(60)

    for first, second in (models, models[::-1]):
        inside.clear()
        leave.clear()
        handle = first.model.lm_head.register_forward_pre_hook(wait)
        threads = [threading.Thread(target=forward, args=(model,), daemon=True) for model in (first, second)]
        threads[0].start()
        assert inside.wait(60)
        threads[1].start()
        threads[1].join(0.2)
        assert threads[1].is_alive()  # it waits for its turn
        leave.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        handle.remove()
        assert errors == []
        assert settings(target) == before
    assert target.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_no_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the op itself, a forward makes nothing of the size of the cache."""
    plain = tiny_model("gemma2")
    model = adapt(plain)
    rows = 100_000
    cache = model.new_cache(1, rows)
    lens = torch.tensor([rows - 10], dtype=torch.int32)
    real = attention.tree_attention

    def unwatched(*args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return real(*args, **kwargs)

    monkeypatch.setattr(attention, "tree_attention", unwatched)
    # the rows themselves are written in place, by an operator that returns the whole cache
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda self, *args: self)
    with _LargestTensor() as largest:
        model.forward(torch.tensor([[1, 2]]), cache, lens, causal_step(2))
    assert 0 < largest.num_elements < 10_000


def test_a_layer_that_is_skipped_is_noticed() -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    cache = model.new_cache(1, 4)
    layer = plain.model.layers[1]
    layer.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(UnsupportedModelError, match=r"once in each of 2 layers, got 1 calls.*make a new cache"):
        model.forward(torch.tensor([[1]]), cache, torch.zeros(1, dtype=torch.int32), causal_step(1))


def test_a_call_without_context_is_an_error_and_not_wrong_output() -> None:
    plain = tiny_model("llama")
    adapt(plain)
    plain.set_attn_implementation(attention.ATTENTION_NAME)
    with pytest.raises(UnsupportedModelError, match="must receive the step's context"):
        plain(input_ids=torch.tensor([[1, 2]]))


def test_the_models_own_generate_refuses_a_tree_cache() -> None:
    plain = tiny_model("llama")
    cache = adapt(plain).new_cache(1, 16)
    with pytest.raises(UnsupportedModelError, match=r"must be used through TreeModel\.forward"):
        plain.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False, **{cache_argument(plain): cache})


def test_a_mask_that_reaches_the_attention_is_an_error() -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    context = cache_module.StepContext.create(
        model.new_cache(1, 4), causal_step(1), torch.zeros(1, dtype=torch.int32), attention.attend_along_tree
    )
    rows = torch.zeros(1, 4, 1, 8)
    with pytest.raises(UnsupportedModelError, match="must be called without a mask"):
        attention.tree_attention_forward(
            model.model.model.layers[0].self_attn, rows, rows, rows, torch.zeros(1, 1, 1, 1), sequoia_context=context
        )


def test_unknown_family_is_compared_with_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    real = adapter._check_against_plain_forward
    monkeypatch.setattr(
        adapter,
        "_check_against_plain_forward",
        lambda model, foreign: (checked.append(model.family), real(model, foreign)),
    )
    adapt(tiny_model("olmo3"))
    adapt(tiny_model("llama"))
    assert checked == ["olmo3"]


def test_family_whose_tree_logits_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "PROVEN_FAMILIES", frozenset())
    plain = tiny_model("llama")
    rotary = plain.model.rotary_emb.forward
    plain.model.rotary_emb.forward = lambda hidden, position_ids: rotary(hidden, position_ids - position_ids[:, :1])
    with pytest.raises(UnsupportedModelError, match="family llama cannot decode trees: its logits along a small tree"):
        adapt(plain)


def test_adapt_probes_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    assert adapt(model) is model
    monkeypatch.setattr(adapter, "_make_plan", lambda *_: pytest.fail("probed again"))
    assert adapt(plain).vocab_size == model.vocab_size


def test_a_cast_after_adapting_is_noticed() -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    assert model.new_cache(1, 4).tensors()[0].dtype == torch.float32
    plain.to(torch.bfloat16)
    cache = model.new_cache(1, 4)
    assert cache.tensors()[0].dtype == model.dtype == torch.bfloat16
    model.forward(torch.tensor([[1]]), cache, torch.zeros(1, dtype=torch.int32), causal_step(1))


def test_properties() -> None:
    plain = tiny_model("gpt2", eos_token_id=[3, 5])
    model = adapt(plain)
    assert model.num_parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert (model.num_layers, model.max_positions, model.eos_token_ids) == (2, 128, (3, 5))
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert adapt(tiny_model("llama")).eos_token_ids == ()
    assert "gpt2" in repr(model)


def test_not_a_transformers_model() -> None:
    with pytest.raises(TypeError, match="adapt: model must be a transformers PreTrainedModel, got Linear"):
        adapt(torch.nn.Linear(2, 2))


def test_training_mode_is_refused() -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    plain.train()
    with pytest.raises(ValueError, match=r"must be in evaluation mode, got training mode; call model\.eval\(\)"):
        adapt(plain)
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        model.forward(torch.tensor([[1]]), model.new_cache(1, 4), torch.zeros(1, dtype=torch.int32), causal_step(1))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tokens", "lens", "step_rows", "last_row", "message"),
    [
        (
            torch.tensor([[1, 2]]),
            int32(0),
            3,
            None,
            r"input_ids must have shape \[batch, nodes\] with the step's 3 nodes",
        ),
        (torch.tensor([1, 2, 3]), int32(0), 3, None, r"input_ids must have shape \[batch, nodes\]"),
        (torch.ones(2, 1, dtype=torch.int64), int32(0, 0), 1, None, "cache must be this model's cache for 2 requests"),
        (torch.tensor([[1]]), int32(0, 0), 1, None, r"cache_lens must have shape \[batch\] = \[1\], got \[2\]"),
        (torch.tensor([[1]]), int32(0), 1, torch.zeros(2), r"last_row must have shape \[batch\] = \[1\], got \[2\]"),
        (
            torch.tensor([[1, 2]]),
            int32(7),
            2,
            None,
            "cache_lens must leave room for 2 tree rows in a cache of 8, got 7",
        ),
        (torch.tensor([[1]]), int32(-1), 1, None, "cache_lens must leave room for 1 tree rows in a cache of 8, got -1"),
    ],
)
def test_bad_forward_arguments(
    tokens: torch.Tensor, lens: torch.Tensor, step_rows: int, last_row: torch.Tensor | None, message: str
) -> None:
    model = adapt(tiny_model("llama"))
    cache = model.new_cache(1, 8)
    with pytest.raises(ValueError, match=f"forward: {message}"):
        model.forward(tokens, cache, lens, causal_step(step_rows), last_row=last_row)
    assert all(not tensor.any() for tensor in cache.tensors())


def test_a_cache_of_another_model_is_refused() -> None:
    model, other = adapt(tiny_model("llama")), adapt(tiny_model("llama", num_hidden_layers=1))
    with pytest.raises(ValueError, match="cache must be this model's cache"):
        model.forward(torch.tensor([[1]]), other.new_cache(1, 4), int32(0), causal_step(1))


@pytest.mark.parametrize("forward", ["native", "modules"])
def test_a_cache_of_a_model_with_other_heads_is_refused(forward: str) -> None:
    """A forward in C++ or on a GPU would write where its own rows were: elsewhere, or behind the cache's end."""
    narrow, wide = (adapt(tiny_model("llama", head_dim=width), forward=forward) for width in (8, 64))
    cache = narrow.new_cache(1, 4)
    with pytest.raises(ValueError, match=r"cache must be this model's cache as .* key_dim=64, .* got .* key_dim=8, "):
        wide.forward(torch.tensor([[1, 2]]), cache, int32(0), causal_step(2))
    assert all(not tensor.any() for tensor in cache.tensors())


@pytest.mark.parametrize(("batch_size", "max_cache_len"), [(0, 4), (1, 0), (-1, 4)])
def test_bad_cache_sizes(batch_size: int, max_cache_len: int) -> None:
    with pytest.raises(ValueError, match="new_cache: batch_size and max_cache_len must be at least 1"):
        adapt(tiny_model("llama")).new_cache(batch_size, max_cache_len)


LONGROPE = {
    "rope_parameters": {
        "rope_theta": 10000.0,
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
}
LIMITED = [("opt", 128, {}), ("gpt2", 128, {}), ("llama4_text", 39, {}), ("phi3", 32, LONGROPE)]


@pytest.mark.parametrize(("family", "limit", "overrides"), LIMITED)
def test_no_token_is_committed_beyond_the_models_positions(family: str, limit: int, overrides: dict[str, Any]) -> None:
    model = adapt(tiny_model(family, **overrides))
    assert (model.max_positions, model.trained_positions) == (limit, limit)
    assert model.new_cache(1, limit).max_cache_len == limit
    with pytest.raises(
        ValueError, match=f"max_cache_len must be at most {limit}, the positions that this {family} model"
    ):
        model.new_cache(1, limit + 1)
    cache = model.new_cache(1, limit + 8, beyond_positions=True)
    with pytest.raises(ValueError, match=f"prefill: input_ids must fit the model's {limit} positions, got {limit + 1}"):
        prefill(model, cache, torch.ones(1, limit + 1, dtype=torch.int64), torch.tensor([limit + 1]))


@pytest.mark.parametrize(("family", "limit", "overrides"), LIMITED)
def test_nodes_beyond_the_models_positions_do_not_disturb_those_before(
    family: str, limit: int, overrides: dict[str, Any]
) -> None:
    model = adapt(tiny_model(family, **overrides))
    cache = model.new_cache(1, limit + 8, beyond_positions=True)
    prompt = torch.arange(limit - 2)[None] % 7
    prefill(model, cache, prompt, torch.tensor([limit - 2]))
    within = model.forward(torch.tensor([[3, 5]]), cache, int32(limit - 2), causal_step(2))
    beyond = model.forward(torch.tensor([[3, 5, 2, 6, 4]]), cache, int32(limit - 2), causal_step(5))
    torch.testing.assert_close(beyond[:, :2], within)
    assert bool(torch.isfinite(beyond).all())
    expected = model.model(input_ids=torch.cat((prompt, torch.tensor([[3, 5]])), dim=1)).logits[:, -2:]
    torch.testing.assert_close(within, expected, rtol=1e-4, atol=1e-4)


def test_what_a_model_can_be_fed_and_predicts_is_known() -> None:
    plain = tiny_model("llama")
    model = adapt(plain)
    assert (model.num_embeddings, model.vocab_size, model.logits_dtype) == (64, 64, torch.float32)
    hidden_size = plain.config.hidden_size
    plain.set_input_embeddings(torch.nn.Embedding(48, hidden_size))
    plain.set_output_embeddings(torch.nn.Linear(hidden_size, 80, bias=False, dtype=torch.float64))
    plain.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    model = adapt(plain.eval())
    assert (model.num_embeddings, model.vocab_size, model.logits_dtype) == (48, 80, torch.float64)
