"""Native forwards with learned positions, transposed weights or experts: the modules' numbers, in one order."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from support.sequential import ancestors
from support.tiny_families import tiny_model

from sequoia_kernels import _host
from sequoia_kernels.models import TreeModel, adapt, causal_step, prefill
from sequoia_kernels.models.tree_step import TreeStep
from sequoia_kernels.tree import TokenTree

# Widths of no whole tiles, nor whole vectors where the modules can take them; more than one strip of transposed ones.
GPT2 = {"n_embd": 60, "n_head": 6, "n_inner": 333}
OPT = {"hidden_size": 36, "word_embed_proj_dim": 36, "num_attention_heads": 3, "ffn_dim": 51}
MIXTRAL = {"hidden_size": 40, "intermediate_size": 56, "num_local_experts": 5}
QWEN3_MOE = {"hidden_size": 40, "moe_intermediate_size": 24, "num_experts": 9, "num_experts_per_tok": 3}
MIXED = {**QWEN3_MOE, "num_hidden_layers": 4, "mlp_only_layers": [3], "decoder_sparse_step": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2 scaled by layer": ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "opt": ("opt", OPT),
    "opt without biases": ("opt", {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral, one of one": ("mixtral", {**MIXTRAL, "num_local_experts": 1, "num_experts_per_tok": 1}),
    "qwen3_moe": ("qwen3_moe", {**QWEN3_MOE, "norm_topk_prob": False}),
    "qwen3_moe normalised": ("qwen3_moe", {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3_moe with dense layers": ("qwen3_moe", MIXED),
    "qwen3_moe, wider": ("qwen3_moe", {**QWEN3_MOE, "hidden_size": 96, "moe_intermediate_size": 88}),
}


class Score(NamedTuple):
    """What is scored: a tree behind a prompt."""

    prompt: torch.Tensor  # [1, length]
    tokens: torch.Tensor  # [1, nodes]
    parents: list[int]


def model_of(case: str, dtype: torch.dtype = torch.float32) -> Any:
    family, sizes = CASES[case]
    return tiny_model(family, seed=3, **sizes).to(dtype)


def tree_to_score(seed: int, prompt_length: int, num_nodes: int) -> Score:
    numbers, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    parents = [-1]
    for node in range(1, num_nodes):
        first = max(0, parents[-1])
        parents.append(numbers.randrange(first, min(node, first + 3)))
    tokens = torch.randint(64, (1, prompt_length + num_nodes), generator=generator)
    return Score(tokens[:, :prompt_length], tokens[:, prompt_length:], parents)


def tree_logits(model: TreeModel, score: Score) -> torch.Tensor:
    lens = torch.tensor([score.prompt.shape[1]], dtype=torch.int32)
    cache = model.new_cache(1, score.prompt.shape[1] + score.tokens.shape[1])
    prefill(model, cache, score.prompt, lens)
    return model.forward(score.tokens, cache, lens, TreeStep.of(TokenTree(score.parents).tensors()))[0]


def logits_token_by_token(model: TreeModel, score: Score, node: int) -> torch.Tensor:
    path = sorted(ancestors(score.parents, node))
    tokens = torch.cat((score.prompt, score.tokens[:, path]), 1)
    cache, lens = model.new_cache(1, tokens.shape[1]), torch.zeros(1, dtype=torch.int32)
    for index in range(tokens.shape[1]):
        logits = model.forward(tokens[:, index : index + 1], cache, lens, causal_step(1))
        lens = lens + 1
    return logits[0, 0]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_are_the_modules(case):
    model = model_of(case)
    native, modules = adapt(model, forward="native"), adapt(model, forward="modules")
    for seed, num_nodes in enumerate((1, 7, 41)):
        score = tree_to_score(seed, 9, num_nodes)
        expected = tree_logits(modules, score)
        error = float((tree_logits(native, score) - expected).abs().max())
        assert error <= 1e-4 * max(1.0, float(expected.std())), num_nodes


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), ("gpt2", torch.bfloat16), ("opt", torch.float16)],
    ids=str,
)
def test_a_node_has_the_bits_of_its_path_fed_alone(case, dtype, set_threads):
    model = adapt(model_of(case, dtype), forward="native")
    for threads, num_nodes in ((3, 60), (2, 5)):  # the first is enough to share for GPT-2 and the wider experts
        score = tree_to_score(num_nodes, 6, num_nodes)
        set_threads(threads)
        logits = tree_logits(model, score)
        set_threads(1)
        for node in {num_nodes - 1, num_nodes // 2}:
            assert torch.equal(logits[node], logits_token_by_token(model, score, node)), (threads, node)


@pytest.mark.parametrize("case", ["gpt2", "opt"])
def test_bfloat16_errs_no_more_than_the_modules(case):
    model = model_of(case, torch.bfloat16)
    native, modules = adapt(model, forward="native"), adapt(model, forward="modules")
    scores = [tree_to_score(seed, 9, 30) for seed in (11, 12, 13)]
    rounded = [torch.cat([tree_logits(runner, score).float() for score in scores]) for runner in (native, modules)]
    runner = adapt(model.float(), forward="modules")
    exact = torch.cat([tree_logits(runner, score) for score in scores])
    errors = [(logits - exact).abs() for logits in rounded]
    assert errors[0].mean() <= errors[1].mean() and errors[0].max() <= errors[1].max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_are_chosen_in_float32_only(case, dtype):
    model = adapt(model_of(case, dtype))
    assert model.runs == "modules" and model.not_native.startswith("its experts are chosen by rounded numbers")


def test_instruction_sets_agree(monkeypatch):
    for case in ("gpt2", "qwen3_moe"):
        score = tree_to_score(5, 4, 23)
        logits = []
        for name in _host.forward_instruction_sets():
            monkeypatch.setenv("SEQUOIA_HOST_ISA", name)
            logits.append(tree_logits(adapt(model_of(case), forward="native"), score))
        for other in logits[1:]:
            assert torch.allclose(logits[0], other, rtol=0.0, atol=1e-5 * max(1.0, float(logits[0].std())))


def test_all_rows_may_choose_the_same_experts():
    model = model_of("qwen3_moe")
    native, score = adapt(model, forward="native"), tree_to_score(2, 3, 33)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # all are as probable: those of the lowest numbers, other ones than torch's
    logits = tree_logits(native, score)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits[-1], logits_token_by_token(native, score, 32))


def test_what_is_not_finite_in_a_router_stays_visible():
    model = model_of("mixtral")
    native = adapt(model, forward="native")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[1] = float("nan")
    assert torch.isnan(tree_logits(native, tree_to_score(2, 3, 5))).all()


def test_changed_experts_are_seen_by_the_next_forward():
    model = model_of("mixtral")
    native, score = adapt(model, forward="native"), tree_to_score(2, 3, 5)
    tree_logits(native, score)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(-1.0)
    expected = tree_logits(adapt(model, forward="modules"), score)
    assert torch.allclose(tree_logits(native, score), expected, rtol=0.0, atol=1e-4 * max(1.0, float(expected.std())))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_table_of_positions_is_used_to_its_end(family):
    model = model_of(family)
    length = adapt(model).max_positions
    score = tree_to_score(4, length - 3, 3)
    expected = tree_logits(adapt(model, forward="modules"), score)
    logits = tree_logits(adapt(model, forward="native"), score)
    assert torch.allclose(logits, expected, rtol=0.0, atol=1e-4 * max(1.0, float(expected.std())))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"do_layer_norm_before": False}, "config.do_layer_norm_before must be True"),
        ({"word_embed_proj_dim": 20}, "model.decoder.project_in must be None"),
    ],
)
def test_forms_of_opt_without_a_description_run_by_their_modules(overrides, reason):
    model = adapt(tiny_model("opt", **{**OPT, **overrides}))
    assert model.runs == "modules"
    assert reason in model.not_native
