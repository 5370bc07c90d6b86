"""The native forward on a CPU: the modules' logits, the same bits however a node is fed, the model's own weights."""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
import threading

import pytest
import torch
from support.native_models import (
    CASES,
    LOW_PRECISION_CASES,
    MAX_CACHE_LEN,
    VOCAB,
    WIDE,
    behind,
    case_model,
    case_pair,
    decode,
    lens_of,
    path_to,
    random_tree,
    score_tree,
    small_case,
    tokens_of,
)
from support.processes import python_environment, run_process
from support.tiny_families import tiny_model
from support.tiny_models import tiny_llama
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sequoia_kernels import _host
from sequoia_kernels.demo import load_demo_pair
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import adapt, causal_step, pack_linear_layers, packing, prefill
from sequoia_kernels.models.attention import attend_along_tree
from sequoia_kernels.models.description import NATIVE_FAMILIES
from sequoia_kernels.models.tree_step import TreeStep
from sequoia_kernels.tree import TokenTree, Topology

LOW_PRECISION = (torch.bfloat16, torch.float16)
SANITIZED = "sanitized" in _host.__file__
SQUARE = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 12}


@pytest.fixture(autouse=True)
def same_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- the modules' logits ----


def test_every_family_has_a_case():
    assert {family for family, _ in CASES.values()} == NATIVE_FAMILIES.keys()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_modules_in_float32(name):
    native, modules = case_pair(name)
    assert (native.runs, native.not_native, modules.runs) == ("native", "", "modules")
    for seed in range(3):
        prompt, tree, nodes = small_case(seed)
        expected = score_tree(modules, prompt, tree, nodes)
        assert 0.1 < float(expected.std()) < 10.0
        error = (score_tree(native, prompt, tree, nodes) - expected).abs().max() / max(1.0, float(expected.std()))
        assert float(error) <= 1e-4


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", LOW_PRECISION_CASES)
def test_low_precision_errs_no_more_than_the_modules(name, dtype):
    """Against float32 on the same rounded weights. Sums of many errors: single ones are compared by their maximum."""
    model = case_model(name).to(dtype)
    exact = adapt(copy.deepcopy(model).float(), forward="modules")
    native, modules = adapt(model, forward="native"), adapt(model, forward="modules")
    errors = {"native": [], "modules": []}
    for seed in range(2):
        case = small_case(seed)
        expected = score_tree(exact, *case)
        for kind, own in (("native", native), ("modules", modules)):
            scored = score_tree(own, *case)
            assert scored.dtype == dtype
            errors[kind].append((scored.float() - expected).abs().flatten())
    native_errors, modules_errors = (torch.cat(errors[kind]) for kind in ("native", "modules"))
    assert native_errors.mean() <= modules_errors.mean()
    assert native_errors.max() <= modules_errors.max()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_hidden_states_are_numbered_as_the_modules_are(name):
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        native, modules = case_pair(name, dtype)
        prompt, tree, nodes = small_case(5)
        kept = []
        for model in (native, modules):
            hidden = dict.fromkeys(range(model.num_layers + 1))
            lens = lens_of(prompt.shape[1])
            model.forward(nodes, behind(model, prompt), lens, TreeStep.of(tree.tensors()), hidden_states=hidden)
            kept.append(hidden)
        for number, expected in kept[1].items():
            actual = kept[0][number]
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
            scale = max(1.0, float(expected.float().abs().max()))
            assert float((actual.float() - expected.float()).abs().max()) <= bound * scale


def test_models_that_were_asked_for_hidden_states_stay_native():
    """transformers leaves the hooks in the model that took them down."""
    model = case_model("llama")
    native = adapt(model, forward="native")
    with torch.no_grad():
        model(tokens_of(0, 1, 4), output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    native.new_cache(1, 8)
    assert native.runs == adapt(model).runs == "native"


def test_hidden_states_of_no_layer_are_an_index_error():
    native = case_pair("llama").native
    for number in (-1, native.num_layers + 1):
        with pytest.raises(IndexError, match=r"hidden_states must have keys in 0\.\.2"):
            native.forward(
                tokens_of(0, 1, 2), native.new_cache(1, 8), lens_of(0), causal_step(2), hidden_states={number: None}
            )


@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.float32), ("gemma3_text", torch.bfloat16)], ids=str)
def test_long_contexts(name, dtype):
    """Behind thousands of rows: within the modules' error, which in low precision grows with the context."""
    model = case_model(name, num_hidden_layers=1, layer_types=["full_attention"], max_position_embeddings=4096).to(
        dtype
    )
    prompt, (_, tree, nodes) = tokens_of(3, 1, 2500), small_case(3)
    exact = adapt(copy.deepcopy(model).float(), forward="modules")
    scored = []
    for own in (adapt(model, forward="native"), adapt(model, forward="modules"), exact):
        cache = behind(own, prompt, 2600)
        scored.append(own.forward(nodes, cache, lens_of(2500), TreeStep.of(tree.tensors()))[0].float())
    native, modules, expected = scored
    if dtype == torch.float32:
        assert float((native - expected).abs().max()) <= 1e-4
    else:
        assert (native - expected).abs().mean() <= (modules - expected).abs().mean()


def test_nodes_beyond_the_last_position_are_fed_at_it():
    limited = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    model = case_model("llama", max_position_embeddings=20, **limited)
    native, modules = adapt(model, forward="native"), adapt(model, forward="modules")
    assert native.max_positions == 20
    prompt, tree, nodes = tokens_of(1, 1, 18), TokenTree.chain(6), tokens_of(2, 1, 6)
    scored = []
    for own in (native, modules):
        cache = own.new_cache(1, 24, beyond_positions=True)
        prefill(own, cache, prompt, lens_of(18))
        scored.append(own.forward(nodes, cache, lens_of(18), TreeStep.of(tree.tensors())))
    assert float((scored[0] - scored[1]).abs().max()) <= 1e-4


# ---- the same bits ----


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), *((name, torch.bfloat16) for name in LOW_PRECISION_CASES)],
    ids=str,
)
def test_trees_are_the_bits_of_their_paths(name, dtype):
    native = case_pair(name, dtype).native
    for seed in range(2):
        prompt, tree, nodes = small_case(seed + 10)
        torch.set_num_threads(1 + seed)
        scored = score_tree(native, prompt, tree, nodes)
        cache = behind(native, prompt)
        for node in {tree.num_nodes - 1, tree.num_nodes // 2}:
            path = path_to(tree, node)
            assert torch.equal(decode(native, cache, prompt.shape[1], nodes[0, path]), scored[path])


@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "olmo2", "phi"])
def test_threads_change_no_bit(name):
    native = case_pair(name, torch.bfloat16, wide=True).native
    prompt, tree, nodes = small_case(21)
    scored = []
    for num_threads in (1, 2, 3, 1, 5, 2):
        torch.set_num_threads(num_threads)
        scored.append(score_tree(native, prompt, tree, nodes))
    assert all(torch.equal(scored[0], other) for other in scored)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("own_trees", [False, True])
def test_requests_of_a_batch_are_the_bits_of_single_ones(name, own_trees):
    native = case_pair(name, wide=True).native
    lens, num_nodes = lens_of(7, 1, 64, 33), 27
    prompts = tokens_of(4, 4, 64)
    if own_trees:  # whose levels are equally wide
        trees = [TokenTree([-1, *(0,) * 13, *(1 + (i * step) // 13 for i in range(13))]) for step in (0, 5, 9, 13)]
        trees = [TokenTree([-1, *(0,) * 13, *sorted(tree.parents[14:])]) for tree in trees]
        step = TreeStep.of(Topology.stack([tree.tensors() for tree in trees]))
        assert step.tree_mask.dim() == 3
    else:
        trees = [random_tree(random.Random(3), num_nodes)] * 4
        step = TreeStep.of(trees[0].tensors())
    nodes = tokens_of(5, 4, num_nodes)
    torch.set_num_threads(2)
    cache = native.new_cache(4, MAX_CACHE_LEN)
    last = prefill(native, cache, prompts, lens)
    together = native.forward(nodes, cache, lens, step)  # 108 rows
    wanted = torch.tensor([0, 26, 13, 25])
    one_row = native.forward(nodes, cache, lens, step, last_row=wanted)
    assert torch.equal(one_row, together.take_along_dim(wanted[:, None, None], 1))
    for request, tree in enumerate(trees):
        prompt = prompts[request : request + 1, : int(lens[request])]
        alone = native.new_cache(1, MAX_CACHE_LEN)
        assert torch.equal(prefill(native, alone, prompt, lens[request : request + 1])[0], last[request])
        scored = native.forward(
            nodes[request : request + 1], alone, lens[request : request + 1], TreeStep.of(tree.tensors())
        )
        assert torch.equal(scored[0], together[request])
        for row, single in zip(cache.tensors(), alone.tensors()):
            filled = int(lens[request]) + num_nodes
            assert torch.equal(row[request, :filled], single[0, :filled])


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "stablelm-parallel"])
def test_prompts_leave_the_same_rows_in_any_chunks(name):
    native = case_pair(name, torch.bfloat16, wide=True).native
    prompt, whole = tokens_of(6, 1, 150), native.new_cache(1, 150)
    torch.set_num_threads(3)
    native.forward(prompt, whole, lens_of(0), causal_step(150))
    for sizes in ([*(1,) * 40, 110], [64, 1, 65, *(1,) * 20], [7, 63, 80]):
        cache, start = native.new_cache(1, 150), 0
        for size in sizes:
            native.forward(prompt[:, start : start + size], cache, lens_of(start), causal_step(size))
            start += size
        assert all(map(torch.equal, cache.tensors(), whole.tensors()))


def test_levels_of_a_tree_fed_one_after_the_other():
    native = case_pair("mistral").native
    prompt, tree, nodes = small_case(33, nodes=60)
    scored = score_tree(native, prompt, tree, nodes)
    cache, topology = behind(native, prompt), tree.tensors()
    for depth in range(tree.num_levels):
        level = [node for node in range(tree.num_nodes) if int(topology.depths[node]) == depth]
        logits = native.forward(nodes[:, level], cache, lens_of(prompt.shape[1]), TreeStep.of(topology, level))
        assert torch.equal(logits[0], scored[level])


def test_rows_nothing_was_written_to_are_not_read():
    native = case_pair("gemma2").native
    prompt, tree, nodes = small_case(8)
    scored = score_tree(native, prompt, tree, nodes)
    cache = behind(native, prompt)
    for tensor in cache.tensors():
        tensor[:, prompt.shape[1] :] = float("nan")
    again = native.forward(nodes, cache, lens_of(prompt.shape[1]), TreeStep.of(tree.tensors()))[0]
    assert torch.equal(again, scored)
    assert all(bool(tensor[:, prompt.shape[1] + tree.num_nodes :].isnan().all()) for tensor in cache.tensors())


# ---- instruction sets ----


# ---- the model's own weights ----


def both(model):
    return adapt(model, forward="native"), adapt(model, forward="modules")


def assert_follows(native, modules, before=None):
    case = small_case(50)
    scored, expected = score_tree(native, *case), score_tree(modules, *case)
    assert float((scored - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.std()))
    assert before is None or float((scored - before).abs().max()) > 1e-2
    return scored


def test_changed_weights_are_seen_by_the_next_forward():
    model = case_model("llama")
    native, modules = both(model)
    scored = assert_follows(native, modules)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.q_proj.weight.mul_(-1.5)
        scored = assert_follows(native, modules, scored)
        layer.mlp.up_proj.weight.data = torch.randn_like(layer.mlp.up_proj.weight)
        scored = assert_follows(native, modules, scored)
        model.model.norm.weight = nn.Parameter(torch.rand(39) + 0.5)
        scored = assert_follows(native, modules, scored)
        model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})
        assert_follows(native, modules, scored)


def test_changed_rotary_frequencies_are_seen_by_the_next_forward():
    model = case_model("llama")
    native, modules = both(model)
    scored = assert_follows(native, modules)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    assert_follows(native, modules, scored)


def test_tied_embeddings_are_one_weight():
    model = case_model("llama-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    native, modules = both(model)
    scored = assert_follows(native, modules)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5).add_(0.1)
    scored = assert_follows(native, modules, scored)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * -1.5)  # not tied any more
    scored = assert_follows(native, modules, scored)
    model.model.embed_tokens.weight = model.lm_head.weight
    assert_follows(native, modules, scored)


def test_a_new_cache_notices_exchanged_modules():
    model = case_model("llama")
    native, modules = both(model)
    scored = assert_follows(native, modules)
    own = nn.Linear(39, 18, bias=False)
    model.model.layers[0].self_attn.q_proj = own
    assert_follows(native, modules, scored)
    model.model.layers[0].mlp.up_proj = copy.deepcopy(model.model.layers[0].mlp.up_proj)  # in nothing another one
    scored = assert_follows(native, modules)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1.5)
    scored = assert_follows(native, modules, scored)
    first, second = model.model.layers
    first.self_attn.layer_idx, second.self_attn.layer_idx = 1, 0
    model.model.layers = nn.ModuleList([second, first])
    assert_follows(native, modules, scored)


def transposed(weight):
    weight.data = weight.data.t()


def freed(weight):
    weight.untyped_storage().resize_(0)


def halved(weight):
    weight.data = weight.data.to(torch.bfloat16)


def test_a_new_cache_notices_weights_of_another_layout():
    """Also where they begin at the same address."""
    model = case_model("llama", **SQUARE)
    native, modules = both(model)
    scored = assert_follows(native, modules)
    with torch.no_grad():
        transposed(model.model.layers[1].self_attn.q_proj.weight)
    native = adapt(model)
    assert native.runs == "modules" and native.not_native == "a weight is not laid out row by row"
    assert_follows(native, modules, scored)


@pytest.mark.parametrize("change", [freed, halved])
def test_weights_of_another_form_are_refused_between_forwards(change):
    model = case_model("llama", **SQUARE)
    native = adapt(model, forward="native")
    prompt, tree, nodes = small_case(2)
    cache = behind(native, prompt)
    before = [tensor.clone() for tensor in cache.tensors()]
    with torch.no_grad():
        change(model.model.layers[1].self_attn.q_proj.weight)
    with pytest.raises(ValueError, match=r"forward: weight must keep its shape, dtype, layout.*make a new cache"):
        native.forward(nodes, cache, lens_of(prompt.shape[1]), TreeStep.of(tree.tensors()))
    assert all(map(torch.equal, cache.tensors(), before))


@pytest.mark.parametrize("replacement", [nn.Parameter(torch.zeros(3, 36)), None])
def test_parameters_of_another_form_are_refused_between_forwards(replacement):
    model = case_model("llama", **SQUARE)
    native = adapt(model, forward="native")
    cache = native.new_cache(1, 8)
    model.model.layers[0].self_attn.k_proj.weight = replacement
    with pytest.raises(ValueError, match="forward: weight must keep its shape"):
        native.forward(tokens_of(0, 1, 2), cache, lens_of(0), causal_step(2))


# ---- refusals ----


class OwnLinear(nn.Linear):
    pass


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    return "hook"


def patched(model):
    norm = model.model.norm
    norm.forward = lambda states, forward=norm.forward: forward(states)
    return "forward of a LlamaRMSNorm"


def registered(model):
    def own_attention(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("own_attention", own_attention)
    model.config._attn_implementation = "own_attention"
    return "attention function 'own_attention'"


def subclassed(model):
    model.lm_head.__class__ = OwnLinear
    return "OwnLinear"


def extended(model):
    model.model.layers[1].register_parameter("extra", nn.Parameter(torch.zeros(3)))
    return "1 of its parameters"


def doubled(model):
    model.double()
    return "float64"


def strided(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    return "row by row"


@pytest.mark.parametrize("change", [hooked, patched, registered, subclassed, extended, doubled, strided])
def test_models_with_other_code_or_weights_are_left_to_their_modules(change):
    model = case_model("llama")
    fragment = change(model)
    tree_model = adapt(model)
    assert tree_model.runs == "modules" and fragment in tree_model.not_native
    with pytest.raises(UnsupportedModelError, match=r"'auto' or 'modules' for this llama model") as refusal:
        adapt(model, forward="native")
    assert tree_model.not_native in str(refusal.value)
    prompt, tree, nodes = small_case(1)
    assert score_tree(tree_model, prompt, tree, nodes).shape == (tree.num_nodes, VOCAB)


def test_a_family_without_a_description_is_left_to_its_modules():
    model = tiny_model("cohere2")
    assert adapt(model).not_native == "family cohere2 has no description"
    with pytest.raises(UnsupportedModelError, match="family cohere2 has no description"):
        adapt(model, forward="native")


def own_attention_of_the_tree(*args, **kwargs):
    return attend_along_tree(*args, **kwargs)


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        pytest.param({"compile": True}, "compiled", marks=pytest.mark.slow),
        ({"attention": own_attention_of_the_tree}, "attention of its own"),
    ],
)
def test_settings_that_are_the_modules(settings, fragment):
    model = case_model("llama")
    tree_model = adapt(model, **settings)
    assert tree_model.runs == "modules" and fragment in tree_model.not_native
    with pytest.raises(UnsupportedModelError, match=fragment):
        adapt(model, forward="native", **settings)


def test_autocast_is_left_to_the_modules():
    model = case_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tree_model = adapt(model)
        assert tree_model.runs == "modules" and "autocast" in tree_model.not_native
    assert adapt(tree_model).runs == "native"


def test_packed_layers_are_left_to_the_modules(monkeypatch):
    class StandIn:  # oneDNN's operators on a CPU that lacks them
        _is_mkldnn_bf16_supported = staticmethod(lambda: True)
        _reorder_linear_weight = staticmethod(lambda weight, batch_size: weight.clone())
        _linear_pointwise = staticmethod(
            lambda input, packed, bias, *_: torch.nn.functional.linear(input, packed, bias)
        )

    monkeypatch.setattr(packing, "_operators", StandIn)
    model = case_model("llama").to(torch.bfloat16)
    pack_linear_layers(model)
    assert adapt(model).runs == "modules"
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        adapt(model, forward="native")


def test_the_mode_is_kept_and_switched():
    model = case_model("llama")
    native = adapt(model, forward="native")
    modules = adapt(native, forward="modules")
    assert (modules.runs, modules.not_native) == ("modules", "the modules were asked for")
    assert adapt(modules) is modules and adapt(modules, forward="auto").runs == "native"
    for tree_model in (native, modules):
        for again in (copy.copy(tree_model), copy.deepcopy(tree_model), pickle.loads(pickle.dumps(tree_model))):
            assert (again.forward_mode, again.runs) == (tree_model.forward_mode, tree_model.runs)
    with pytest.raises(ValueError, match="forward must be one of auto, native, fused, modules, got 'fast'"):
        adapt(model, forward="fast")


# ---- inputs ----


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (IndexError, {"input_ids": torch.tensor([[1, VOCAB, 2]])}),
        (IndexError, {"input_ids": torch.tensor([[1, 2, -1]])}),
        (ValueError, {"cache_lens": lens_of(-1)}),
        (ValueError, {"cache_lens": lens_of(6)}),
        (ValueError, {"cache_lens": lens_of(2**31 - 1)}),
        (ValueError, {"last_row": torch.tensor([0, 1])}),
        (IndexError, {"last_row": torch.tensor([3])}),
        (IndexError, {"last_row": torch.tensor([-1])}),
        (IndexError, {"step": causal_step(3)._replace(node_ids=torch.tensor([0, 1, 5], dtype=torch.int32))}),
        (IndexError, {"step": causal_step(3)._replace(tree_mask=torch.full((3, 1), -1, dtype=torch.int32))}),
        (IndexError, {"step": causal_step(3)._replace(depths=torch.tensor([0, 1, 10**6], dtype=torch.int32))}),
        (IndexError, {"step": causal_step(3)._replace(depths=torch.tensor([-9, 1, 2], dtype=torch.int32))}),
        (ValueError, {"step": causal_step(3)._replace(depths=torch.zeros(2, dtype=torch.int32))}),
        (ValueError, {"step": causal_step(3)._replace(tree_mask=torch.ones(2, 1, dtype=torch.int32))}),
        (ValueError, {"step": causal_step(3)._replace(tree_mask=torch.ones(2, 3, 1, dtype=torch.int32))}),
    ],
)
def test_refused_calls_write_nothing(error, changes):
    native = case_pair("llama").native
    cache = native.new_cache(1, 8)
    for tensor in cache.tensors():
        tensor.fill_(7.0)
    arguments = {"input_ids": tokens_of(0, 1, 3), "cache_lens": lens_of(4), "step": causal_step(3), **changes}
    with pytest.raises(error, match="forward: "):
        native.forward(cache=cache, **arguments)
    assert all(bool((tensor == 7.0).all()) for tensor in cache.tensors())


def test_inputs_of_other_dtypes_and_strides_count_as_their_numbers():
    native = case_pair("llama").native
    prompt, tree, nodes = small_case(14)
    scored, step = score_tree(native, prompt, tree, nodes), TreeStep.of(tree.tensors())
    wide = torch.stack((nodes[0], nodes[0] * 0)).t()[:, 0][None]
    spread = TreeStep(
        step.tree_mask.repeat_interleave(2, 1)[:, ::2], step.node_ids.long(), step.depths.repeat_interleave(2)[::2],
        step.num_tree_rows, step.first_node,
    )  # fmt: skip
    last = torch.tensor([tree.num_nodes - 1], dtype=torch.int32)
    for tokens in (nodes.int(), wide):
        cache = behind(native, prompt)
        lens = torch.tensor([prompt.shape[1]])
        assert torch.equal(native.forward(tokens, cache, lens, spread)[0], scored)
        assert torch.equal(native.forward(tokens, cache, lens, spread, last_row=last)[0, 0], scored[-1])


def test_defaults_of_torch_change_nothing():
    """Buffers are of float32, whatever new tensors are elsewhere."""
    native = case_pair("llama").native
    tokens, hidden = tokens_of(0, 1, 40), [{1: None}, {1: None}]
    expected = native.forward(tokens, native.new_cache(1, 40), lens_of(0), causal_step(40), hidden_states=hidden[0])
    cache, fresh = native.new_cache(1, 40), case_model("llama")
    before, step, lens = torch.get_default_dtype(), causal_step(40), lens_of(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            scored = native.forward(tokens, cache, lens, step, hidden_states=hidden[1])
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(scored, expected) and torch.equal(hidden[0][1], hidden[1][1])
    assert adapt(fresh).runs == "native"


# ---- threads and processes ----


def in_threads(*work):
    failures = []

    def guarded(task):
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures


def test_python_threads_run_models_side_by_side():
    """Two models, and one model twice with caches of other sizes, with teams that grow and shrink, while they end."""
    torch.set_num_threads(2)
    models = [adapt(case_model(name, **WIDE), forward="native") for name in ("llama", "gemma2", "llama")]
    models[2] = models[0]
    cases = [small_case(seed) for seed in (60, 61, 62)]
    expected = [score_tree(model, *case) for model, case in zip(models, cases)]
    ended = threading.Event()

    def work(number):
        for turn in range(12):
            torch.set_num_threads(1 + (turn + number) % 4)
            prompt, tree, nodes = cases[number]
            cache = behind(models[number], prompt, MAX_CACHE_LEN + 100 * turn + number)
            lens = lens_of(prompt.shape[1])
            scored = models[number].forward(nodes, cache, lens, TreeStep.of(tree.tensors()))[0]
            assert torch.equal(scored, expected[number])

    def end_teams():
        while not ended.wait(0.002):
            _host.stop_forward_threads()

    ending = threading.Thread(target=end_teams)
    ending.start()
    try:
        in_threads(*(lambda number=number: work(number) for number in range(3)))
    finally:
        ended.set()
        ending.join(600)


def test_as_many_threads_share_a_pass_as_its_products_outweigh_barriers_of():
    pair = load_demo_pair(torch.float32)
    target, draft, tiny = (adapt(model)._own._forward for model in (pair.target, pair.draft, tiny_llama(0)))
    for forward in (target, draft):
        assert [forward.threads_for(1, most) for most in (1, 2, 3)] == [1, 2, 3]
    taken = [target.threads_for(rows, 64) for rows in (1, 2, 4, 8, 64)]
    assert taken == sorted(taken) and 3 <= taken[0] < taken[-1] <= 64
    assert target.threads_for(64, 64) == target.threads_for(1000, 64)  # a pass is 64 rows
    assert [tiny.threads_for(rows, 8) for rows in (0, 1, 2)] == [1, 1, 1]


def test_teams_that_grow_and_shrink():
    """Members that a job leaves out may come late out of the job before."""
    native = case_pair("llama", wide=True).native
    cache, step, tokens = native.new_cache(1, 64), causal_step(64), tokens_of(0, 1, 64)
    expected = native.forward(tokens, cache, lens_of(0), step)
    drawn = random.Random(0)
    for _ in range(50 if SANITIZED else 200):
        torch.set_num_threads(drawn.choice((1, 2, 3, 4)))
        assert torch.equal(native.forward(tokens, cache, lens_of(0), step), expected)


def test_threads_start_again_behind_an_end():
    native = case_pair("llama", wide=True).native
    torch.set_num_threads(3)
    case = small_case(2)
    expected = score_tree(native, *case)
    for _ in range(3):
        _host.stop_forward_threads()
        assert torch.equal(score_tree(native, *case), expected)
    _host.stop_forward_threads()
    _host.stop_forward_threads()


_FORKS = """
import os, random, threading
import torch
from support.native_models import case_pair, random_tree, score_tree, tokens_of

tree = random_tree(random.Random(1), 30)
arguments = case_pair("llama", wide=True).native, tokens_of(1, 1, 40), tree, tokens_of(2, 1, 30)
torch.set_num_threads(4)
expected = score_tree(*arguments)
ending = threading.Event()


def run_on():
    while not ending.is_set():
        score_tree(*arguments)


other = threading.Thread(target=run_on)  # is inside a forward, mostly
other.start()
child = os.fork()
if child:
    ending.set()
    other.join()
    status = os.waitpid(child, 0)[1]
    assert status == 0, status
else:
    torch.set_num_threads(2)
assert torch.equal(score_tree(*arguments), expected)
print("agreed", flush=True)
"""  # and ends as any program does, while the members of its team spin or sleep


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.skipif(SANITIZED, reason="other interpreters are none of the sanitizers' business")
def test_children_of_a_fork_begin_anew_and_all_end():
    result = run_process([sys.executable, "-c", _FORKS], env=python_environment())
    assert result.stdout.split() == ["agreed"] * 2


_INTERRUPTED = """
import os, signal, threading
import torch
from support.native_models import case_model, lens_of, tokens_of
from sequoia_kernels.models import adapt, causal_step, prefill

signal.signal(signal.SIGINT, signal.default_int_handler)
LENGTH = 40_000  # minutes of work, in chunks
native = adapt(case_model("llama", num_hidden_layers=8, hidden_size=249), forward="native")
torch.set_num_threads(2)
tokens, cache = tokens_of(0, 1, LENGTH), native.new_cache(1, LENGTH)
native.forward(tokens[:, :64], cache, lens_of(0), causal_step(64))  # the team is there
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    prefill(native, cache, tokens, lens_of(LENGTH))
except KeyboardInterrupt:
    written = int((cache.tensors()[0][0, :, 0, 0] != 0).sum())
    print("interrupted", "early" if written < LENGTH // 2 else "late", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="other interpreters are none of the sanitizers' business")
def test_an_interrupt_ends_a_long_prompt():
    result = run_process([sys.executable, "-c", _INTERRUPTED], env=python_environment())
    assert result.stdout.split() == ["interrupted", "early"]


def test_bound_forwards_leave_the_wanted_rows_and_hidden_states():
    model = adapt(tiny_llama(3, num_layers=2), forward="native")
    step, cache = causal_step(5), model.new_cache(2, 16)
    tokens, lens = torch.randint(32, (2, 5)), torch.tensor([0, 3], dtype=torch.int32)
    expected = {number: torch.empty(0) for number in (0, 2)}
    logits = model.forward(tokens, cache, lens, step, hidden_states=expected)
    wanted = torch.tensor([[1, 3], [4, 0]])
    bound = model.bind(tokens, cache, lens, step, wanted_rows=wanted)
    found, hidden = torch.empty(bound.shape), {number: torch.empty(2, 5, bound.width) for number in (0, 2)}
    assert bound.run(found, hidden)
    assert torch.equal(found, logits.gather(1, wanted[:, :, None].expand(-1, -1, logits.shape[2])))
    for number, states in expected.items():
        assert torch.equal(hidden[number], states)
    with pytest.raises(
        ValueError, match=r"bind: wanted_rows must have shape \[batch, rows\] with batch 2, got \[1, 2\]"
    ):
        model.bind(tokens, cache, lens, step, wanted_rows=wanted[:1])
    with pytest.raises(ValueError, match=r"bind: wanted_rows must be contiguous int64, got torch\.int32"):
        model.bind(tokens, cache, lens, step, wanted_rows=wanted.int())


@pytest.mark.parametrize("num_nodes", [3, 27])
def test_bound_forwards_leave_requests_out_that_are_not_active(num_nodes):
    """Those between and behind others, in passes of 64 rows; a length that leaves no room is then nobody's."""
    model, step = adapt(tiny_llama(3, num_layers=2), forward="native"), causal_step(num_nodes)
    tokens, lens = torch.randint(32, (4, num_nodes)), lens_of(0, 3, 7, 5)
    every = model.new_cache(4, 48)
    expected = model.forward(tokens, every, lens, step)
    active, cache = lens_of(1, 0, 1, 0), model.new_cache(4, 48)
    bound = model.bind(tokens, cache, lens, step, active=active)
    found = torch.full(bound.shape, 77.0)
    tokens[1], lens[1] = 10**9, 100
    assert bound.run(found)
    for request, is_active in enumerate(active.tolist()):
        logits = expected[request] if is_active else torch.full_like(expected[request], 77.0)
        assert torch.equal(found[request], logits)
        for rows, others in zip(cache.tensors(), every.tensors(), strict=True):
            assert torch.equal(rows[request], others[request] if is_active else torch.zeros_like(rows[request]))
    active.zero_()
    assert bound.run(found.fill_(5.0)) and bool((found == 5.0).all())
    active[1] = 1
    assert not bound.run(found)
    lens[1] = 3
    with pytest.raises(ValueError, match=r"bind: active must have shape \[4\], got \[3\]"):
        model.bind(tokens, cache, lens, step, active=active[:3])
    with pytest.raises(ValueError, match=r"bind: active must be contiguous int32 on the CPU, got torch\.bool on cpu"):
        model.bind(tokens, cache, lens, step, active=active.bool())
