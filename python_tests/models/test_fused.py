"""The fused forward: its steps against their specification, its logits against the modules', weights that stay theirs.

On a CPU Triton's interpreter runs the kernels, where it is asked for; on a GPU `adapt` takes the forward by itself.
"""

from __future__ import annotations

import copy
import gc
import pickle
import random
import sys
import threading
import weakref
from itertools import product

import pytest
import torch
from support.adapters import add_adapters
from support.native_models import CASES, case_model, lens_of, path_to, random_tree, score_tree, tokens_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from sequoia_kernels import generate
from sequoia_kernels.cuda_graphs import capture
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import adapt, adapter, causal_step, prefill
from sequoia_kernels.models.adapter import TreeModel
from sequoia_kernels.models.cache import TreeCache
from sequoia_kernels.models.quantised import NotNativeError
from sequoia_kernels.models.tree_step import ForwardInputs

pytest.importorskip("triton", reason="triton is not installed")

from sequoia_kernels.models.fused import fused_forward, reference, steps
from sequoia_kernels.models.fused.packing import movable, packed_rows
from sequoia_kernels.ops import triton_device

DEVICE = torch.device("cpu" if triton_device.INTERPRETED else "cuda:0")
_REASON = triton_device.unavailable_reason()
needs_kernels = pytest.mark.skipif(_REASON is not None, reason=f"the kernels cannot run: {_REASON}")
# Rows of a prompt and nodes of a tree: an interpreted kernel takes a millisecond for every few heads of a row.
PROMPT, NODES = (5, 6) if triton_device.INTERPRETED else (21, 12)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# One case for each thing that a layer may do; on a GPU all of them run.
FEW = (
    "llama", "llama-biases", "qwen3", "gemma2", "olmo2", "phi", "phi3", "gpt_neox", "gpt2", "granite",
)  # fmt: skip
FUSED_CASES = [
    name for name, (family, _) in CASES.items()
    if family not in ("mixtral", "qwen3_moe") and (DEVICE.type == "cuda" or name in FEW)
]  # fmt: skip


def fused_pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[TreeModel, TreeModel]:
    """A model of its own with fused forwards, and a copy of it with the modules'."""
    model = copy.deepcopy(case_model(name)).to(DEVICE, dtype)
    return with_fused_forward(model), adapt(copy.deepcopy(model), forward="modules")


def with_fused_forward(model) -> TreeModel:
    """What `adapt` does on a GPU, on any device that the kernels run on."""
    plan = adapt(model, forward="modules")._plan
    own = fused_forward(model, plan.calls, plan.logits_dtype, DEVICE)
    return TreeModel(model, plan._replace(own=own))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm_of(kind: int, width: int, dtype: torch.dtype, *, bias: bool = False, offset: float = 0.0, seed: int = 9):
    weight = 1 + 0.3 * normal(width, dtype=dtype, seed=seed)
    return steps.Norm(kind, weight, normal(width, dtype=dtype, seed=seed + 1) if bias else None, 1e-5, offset)


def assert_near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Up to a unit in the last place, of numbers up to 4 that may cancel, of which float32 has some more."""
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[wanted.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=4 * tolerance)


# ---- the steps

UPDATES = ("none", "plain", "scaled", "normed")
NORMS = ("rms", "offset", "layer", "layer without bias", "none")


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 96, 1000])
@pytest.mark.parametrize(("update", "kind"), [case for case in product(UPDATES, NORMS) if case != ("none", "none")])
def test_residual_norms(dtype, width, update, kind):
    norm = {
        "rms": norm_of(1, width, dtype),
        "offset": norm_of(1, width, dtype, offset=1.0),
        "layer": norm_of(2, width, dtype, bias=True),
        "layer without bias": norm_of(2, width, dtype),
        "none": None,
    }[kind]
    settings = {"scaled": {"update_scale": 0.22}, "normed": {"update_norm": norm or norm_of(1, width, dtype)}}
    streams = [normal(5, width, dtype=dtype) for _ in range(2)]
    branch = None if update == "none" else normal(5, width + 3, dtype=dtype, seed=1)[:, :width]
    outputs = [
        room.residual_norm_(stream, branch, norm, **settings.get(update, {}))
        for room, stream in zip((steps, reference), streams)
    ]
    assert_near(*streams)
    assert_near(*outputs)


HEADS = {
    "all dims": steps.Heads(4, 2, 16, 0, 64, 96, 16, 16),
    "some dims": steps.Heads(3, 3, 20, 0, 60, 120, 20, 8),
    "none": steps.Heads(5, 1, 24, 0, 120, 144, 24, 0),
    "interleaved": steps.Heads(4, 4, 8, 0, 8, 16, 24, 8),
    "several at once": steps.Heads(12, 4, 8, 0, 96, 128, 8, 8),
}


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", ["none", "rms", "offset", "layer"])
@pytest.mark.parametrize("layout", HEADS)
def test_rotation_and_cache_rows(layout, norms, dtype, monkeypatch):
    """Also of rows that have no room: nothing is written for them, and nothing beside the rows that have."""
    heads = HEADS[layout]
    if layout == "several at once":  # as where there are many rows
        monkeypatch.setattr(steps, "_heads_at_once", lambda rows, num_heads, traits: 8)
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    places = steps.RowPlaces(
        torch.tensor([3, 0, 17], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 1, 1, 2], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 1, 2, 5], dtype=torch.int32, device=DEVICE),
        16,
    )
    table = normal(18, heads.rotated_dims, seed=3) if heads.rotated_dims else None
    settings = {}
    if norms != "none":
        kinds = {"rms": (1, False, 0.0), "offset": (1, False, 1.0), "layer": (2, True, 0.0)}
        kind, bias, offset = kinds[norms]
        settings = {
            name: norm_of(kind, heads.head_dim, dtype, bias=bias, offset=offset, seed=seed)
            for name, seed in (("query_norm", 20), ("key_norm", 30))
        }
    results = []
    for room in (steps, reference):
        projected = normal(12, width + 8, dtype=dtype, seed=4)[:, :width]
        caches = [torch.full((3, 20, heads.num_kv_heads, heads.head_dim), 7.0, dtype=dtype, device=DEVICE)] * 1
        keys, values = caches[0], caches[0].clone()
        queries = room.rotate_and_store_(projected, keys, values, places, heads, table, **settings)
        assert queries.shape == (3, 4, heads.num_heads, heads.head_dim)
        assert queries.untyped_storage().data_ptr() == projected.untyped_storage().data_ptr()
        results.append((queries, keys, values))
    for got, wanted in zip(*results):
        assert_near(got, wanted)
    assert (results[0][1][2, :17] == 7.0).all() and (results[0][1][0, 6:8] == 7.0).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", range(5))
def test_activations(activation, gated, dtype):
    projected = 2 * normal(3, 2 * 300, dtype=dtype)
    got = steps.gated_activation(projected, gated, activation)
    assert_near(got, reference.gated_activation(projected, gated, activation))


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_a_row_is_the_same_bits_among_any_others(rows):
    """Sums follow from the width alone, so a tree's rows are those of plain decoding, as far as products allow."""
    stream, update = normal(40, 96, dtype=torch.bfloat16), normal(40, 96, dtype=torch.bfloat16, seed=1)
    norm = norm_of(1, 96, torch.bfloat16)
    whole = steps.residual_norm_(stream.clone(), update, norm)
    assert torch.equal(steps.residual_norm_(stream[:rows].clone(), update[:rows], norm), whole[:rows])


# ---- the forward


@needs_kernels
@pytest.mark.parametrize("name", FUSED_CASES)
def test_logits_are_the_modules_in_float32(name):
    fused, modules = fused_pair(name)
    assert (fused.runs, fused.not_native, modules.runs) == ("fused", "", "modules")
    drawn = random.Random(3)
    prompt, tree = tokens_of(3, 1, PROMPT).to(DEVICE), random_tree(drawn, NODES)
    nodes = tokens_of(5, 1, tree.num_nodes).to(DEVICE)
    expected = score_tree(modules, prompt, tree, nodes)
    error = (score_tree(fused, prompt, tree, nodes) - expected).abs().max() / max(1.0, float(expected.std()))
    assert 0.1 < float(expected.std()) < 10.0 and float(error) <= 1e-4


@needs_kernels
@pytest.mark.parametrize("name", [name for name in FUSED_CASES if name in ("llama", "gemma2", "phi")])
def test_low_precision_errs_no_more_than_the_modules(name):
    """Beside float32, in the mean, with a tenth and a little to spare for other orders of summation."""
    fused, modules = fused_pair(name, torch.bfloat16)
    exact = adapt(copy.deepcopy(modules.model).float(), forward="modules")
    drawn = random.Random(3)
    prompt, tree = tokens_of(3, 1, PROMPT).to(DEVICE), random_tree(drawn, NODES)
    nodes = tokens_of(5, 1, tree.num_nodes).to(DEVICE)
    wanted = score_tree(exact, prompt, tree, nodes)
    errors = [
        float((score_tree(model, prompt, tree, nodes).float() - wanted).abs().mean()) for model in (fused, modules)
    ]
    assert errors[0] <= 1.1 * errors[1] + 1e-3


@needs_kernels
def test_batches_rows_and_hidden_states_are_the_modules():
    fused, modules = fused_pair("qwen3")
    tokens = tokens_of(1, 2, 5).to(DEVICE)
    lens = lens_of(0, 0).to(DEVICE)
    found = []
    for model in (fused, modules):
        cache = model.new_cache(2, 32)
        hidden = {0: torch.empty(0), 1: torch.empty(0), model.num_layers: torch.empty(0)}
        rows = torch.tensor([4, 2], device=DEVICE)
        logits = model.forward(tokens, cache, lens, causal_step(5, DEVICE), last_row=rows, hidden_states=hidden)
        short = model.forward(tokens, model.new_cache(2, 32), lens, causal_step(5, DEVICE), last_row=rows)
        assert logits.shape == (2, 1, model.vocab_size)
        torch.testing.assert_close(short, logits, rtol=1e-5, atol=1e-5)
        found.append([logits, *hidden.values(), *cache.tensors()])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(IndexError, match=r"hidden_states must have keys in 0\.\."):
        hidden = {99: torch.empty(0)}
        fused.forward(tokens, fused.new_cache(2, 32), lens, causal_step(5, DEVICE), hidden_states=hidden)


@needs_kernels
def test_inputs_of_other_dtypes_and_strides_count_as_their_numbers():
    """Before any row is written; and what has other shapes is refused before that."""
    fused, _ = fused_pair("llama")
    tokens, lens, step = tokens_of(1, 2, 3).to(DEVICE), lens_of(2, 4).to(DEVICE), causal_step(3, DEVICE)
    spread = [tensor.repeat_interleave(2, 0)[::2] for tensor in (step.node_ids, step.depths.long(), lens.long())]
    assert not any(tensor.is_contiguous() for tensor in spread)
    same = step._replace(tree_mask=step.tree_mask.repeat_interleave(2, 1)[:, ::2], node_ids=spread[0], depths=spread[1])
    caches = [fused.new_cache(2, 8) for _ in range(2)]
    expected = fused.forward(tokens, caches[0], lens, step)
    assert torch.equal(fused.forward(tokens, caches[1], spread[2], same), expected)
    assert all(map(torch.equal, *(cache.tensors() for cache in caches)))
    cache = fused.new_cache(2, 8)
    for changes in ({"depths": step.depths[:2]}, {"tree_mask": step.tree_mask[:2]}):
        with pytest.raises(ValueError, match=r"forward: step must have depths \[nodes\] = \[3\] and a tree_mask"):
            fused.forward(tokens, cache, lens, step._replace(**changes))
    assert not any(tensor.any() for tensor in cache.tensors())


@needs_kernels
def test_what_a_forward_gives_may_be_changed_and_learned_from():
    fused, modules = fused_pair("llama")
    tokens, lens, step = tokens_of(1, 1, 3).to(DEVICE), lens_of(0).to(DEVICE), causal_step(3, DEVICE)
    for model in (fused, modules):
        hidden = {1: torch.empty(0), model.num_layers: torch.empty(0)}
        logits = model.forward(tokens, model.new_cache(1, 8), lens, step, hidden_states=hidden)
        for tensor in (logits, *hidden.values()):
            assert not tensor.is_inference() and not tensor.requires_grad
            tensor[..., 0] = 0.0
            nn.Linear(tensor.shape[-1], 1).to(DEVICE)(tensor).sum().backward()


@needs_kernels
def test_a_tree_scores_what_its_paths_score():
    fused, _ = fused_pair("llama")
    prompt, tree = tokens_of(3, 1, 9).to(DEVICE), random_tree(random.Random(1), 8)
    nodes = tokens_of(5, 1, tree.num_nodes).to(DEVICE)
    scored = score_tree(fused, prompt, tree, nodes)
    for node in (0, tree.num_nodes - 1):
        path = path_to(tree, node)
        cache = fused.new_cache(1, 32)
        text = torch.cat((prompt, nodes[:, path]), 1)
        alone = fused.forward(text, cache, lens_of(0).to(DEVICE), causal_step(text.shape[1], DEVICE))[0, -1]
        torch.testing.assert_close(scored[node], alone, rtol=1e-4, atol=1e-4)


def shortened(layers: int) -> TreeModel:
    """A model of so many equal layers, with fused forwards; of heads that the attention's kernels take."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = case_model("llama", hidden_size=64, intermediate_size=96, **heads).to(DEVICE, torch.bfloat16)
    model.model.layers = nn.ModuleList([copy.deepcopy(model.model.layers[0]) for _ in range(layers)])
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = layers
    return with_fused_forward(model)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += str(function).removeprefix("aten.").startswith(("mm", "addmm", "linear", "matmul"))
        return function(*args, **(kwargs or {}))


@needs_kernels
def test_a_layer_takes_four_products_and_four_steps(monkeypatch):
    """By the difference of two depths; beside them there is the attention only."""
    calls = []

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            calls.append(grid)
            return self.kernel[grid]

    for name in ("residual_norm_kernel", "rotate_and_store_kernel", "gated_activation_kernel"):
        monkeypatch.setattr(steps, name, Counting(getattr(steps, name)))
    counts = []
    for layers in (1, 3):
        fused = shortened(layers)
        cache, lens = fused.new_cache(1, 16), lens_of(0).to(DEVICE)
        calls.clear()
        with torch.inference_mode(), Products() as products:
            fused._own(ForwardInputs(tokens_of(1, 1, 4).to(DEVICE), lens, causal_step(4, DEVICE), None), cache, None)
        counts.append((products.count, len(calls)))
    assert [after - before for before, after in zip(*counts)] == [8, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 12])
def test_a_captured_layer_is_at_most_eleven_launches(rows):
    """Four products, of which some are split and added up, four steps, and the attention with its merge; no masks."""
    counts = []
    for layers in (1, 3):
        fused = shortened(layers)
        cache, lens = fused.new_cache(1, 512), lens_of(300).to(DEVICE)
        tokens, step = tokens_of(1, 1, rows).to(DEVICE), causal_step(rows, DEVICE)
        graph, _ = capture(lambda: fused.forward(tokens, cache, lens, step), DEVICE)  # noqa: B023
        graph.replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graph.replay()
            torch.cuda.synchronize()
        counts.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()))
    assert 18 <= counts[1] - counts[0] <= 22, counts


# ---- the weights


@needs_kernels
def test_parameters_stay_and_are_read_where_they_lie():
    model = copy.deepcopy(case_model("llama")).to(DEVICE)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    fused = with_fused_forward(model)
    layer = model.model.layers[0]
    memory = {part.weight.untyped_storage().data_ptr() for part in (layer.self_attn.q_proj, layer.self_attn.v_proj)}
    assert len(memory) == 1
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.is_contiguous()
    tokens, lens = tokens_of(1, 1, 4).to(DEVICE), lens_of(0).to(DEVICE)

    def scored():
        return fused.forward(tokens, fused.new_cache(1, 8), lens, causal_step(4, DEVICE)).clone()

    def by_modules():
        modules = adapt(copy.deepcopy(model), forward="modules")
        return modules.forward(tokens, modules.new_cache(1, 8), lens, causal_step(4, DEVICE))

    first = scored()
    with torch.no_grad():
        layer.self_attn.k_proj.weight.mul_(1.5)  # in place
    second = scored()
    layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach() * 2)  # another one
    third = scored()
    assert not torch.allclose(first, second) and not torch.allclose(second, third)
    torch.testing.assert_close(third, by_modules(), rtol=1e-4, atol=1e-4)
    assert (
        layer.mlp.up_proj.weight.untyped_storage().data_ptr() == layer.mlp.gate_proj.weight.untyped_storage().data_ptr()
    )
    layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach()[:, :-1].contiguous())
    with pytest.raises(ValueError, match="forward: weight must keep its shape, dtype, layout, device and memory"):
        fused._own(ForwardInputs(tokens, lens, causal_step(4, DEVICE), None), None, None)


@needs_kernels
def test_a_model_whose_weights_lie_together_is_saved_generates_copies_and_pickles(tmp_path):
    model = copy.deepcopy(case_model("llama")).to(DEVICE)
    tokens = tokens_of(1, 1, 6).to(DEVICE)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(tokens, **options)
    with_fused_forward(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    for other in (model, loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(tokens, **options), expected)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@needs_kernels
def test_between_calls_nothing_but_the_parameters_holds_weights():
    """Else a model that is moved or cast would be there twice."""
    fused, _ = fused_pair("llama")
    tokens = tokens_of(1, 1, 4).to(DEVICE)
    output = generate(fused, None, tokens, max_new_tokens=3, temperature=0.0, eos_token_id=())
    assert fused.runs == "fused" and fused._own._weights is None
    again = generate(fused, None, tokens, max_new_tokens=3, temperature=0.0, eos_token_id=())
    assert again.new_tokens == output.new_tokens
    with pytest.raises(RuntimeError, match="enough"):
        generate(fused, None, tokens, max_new_tokens=3, temperature=0.0, eos_token_id=(), logits_hook=give_up)
    assert fused._own._weights is None


def give_up(*arguments: object) -> None:
    raise RuntimeError("enough")


@needs_kernels
def test_a_model_that_is_again_what_it_was_before_holds_its_weights_once():
    model = copy.deepcopy(case_model("llama")).to(DEVICE)
    forwards = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        fused = adapt(model.to(dtype), forward="modules")
        plan = fused._plan
        if plan.own is None:  # as `adapt` does on a GPU
            own = fused_forward(model, plan.calls, plan.logits_dtype, DEVICE)
            adapter._plans[model][plan.fingerprint] = plan._replace(own=own)
            forwards.append(own)
    assert adapter._plans[model][plan.fingerprint].own is forwards[0]
    assert len(forwards) == 2 and forwards[1]._weights is None


@needs_kernels
def test_weights_that_were_exchanged_are_settled_before_somebody_notes_where_they_lie():
    fused, _ = fused_pair("llama")
    layer = fused.model.model.layers[0]
    layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach().clone())
    fused.settle()
    noted = [weight.data_ptr() for weight in fused.weights()]
    tokens, lens = tokens_of(1, 1, 4).to(DEVICE), lens_of(0).to(DEVICE)
    fused.forward(tokens, fused.new_cache(1, 8), lens, causal_step(4, DEVICE))
    assert [weight.data_ptr() for weight in fused.weights()] == noted
    before = fused.forward_state()
    fused.model.model.rotary_emb.inv_freq.mul_(0.5)  # of which captured forwards read a table
    assert fused.forward_state() != before
    logits_are_the_modules(fused, fused.model)


@needs_kernels
def test_threads_that_meet_a_changed_weight_lay_it_once():
    fused, modules = fused_pair("llama")
    tokens, lens = tokens_of(1, 1, 4).to(DEVICE), lens_of(0).to(DEVICE)
    step = causal_step(4, DEVICE)
    wanted = modules.forward(tokens, modules.new_cache(1, 8), lens, step)
    for layer in fused.model.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach().clone())
    found = []
    threads = [threading.Thread(target=lambda: found.append(fused._own._look_up().addresses)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and found[0] == found[1] == found[2]
    got = fused.forward(tokens, fused.new_cache(1, 8), lens, step)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_it_holds_parameters_and_not_the_model():
    """Plans are kept by the model: one that held it would keep both for good."""
    model = copy.deepcopy(case_model("llama")).to(DEVICE)
    plan = adapt(model, forward="modules")._plan
    own, gone = fused_forward(model, plan.calls, plan.logits_dtype, DEVICE), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and own.name == "fused"


def test_weights_are_laid_together_once_and_views_of_others_memory_are_not():
    one, two = (nn.Parameter(torch.randn(rows, 3)) for rows in (2, 5))
    wanted = torch.cat([one.detach(), two.detach()])
    assert packed_rows([one, two], False) is None and movable([[one, two]]) == [True]
    packed = packed_rows([one, two])
    assert torch.equal(packed, wanted)
    again = packed_rows([one, two], False)
    assert again.data_ptr() == packed.data_ptr() == one.data_ptr()
    view, other = nn.Parameter(torch.zeros(12)[:6].view(2, 3)), nn.Parameter(torch.zeros(2, 3))
    alias = nn.Parameter(other.detach())
    with torch.inference_mode():
        held = nn.Parameter(torch.zeros(2, 3))
    groups = [[one, view], [two, other], [alias], [held], [two, two]]
    assert movable(groups) == [False] * 5 and movable([[one, nn.Parameter(torch.zeros(2, 3))]]) == [True]


WAYS_TO_LIE_APART = {
    "one weight in two places of a group": lambda first, second: setattr(
        first.self_attn.k_proj, "weight", first.self_attn.v_proj.weight
    ),
    "one weight in two groups": lambda first, second: setattr(second.mlp.up_proj, "weight", first.mlp.gate_proj.weight),
    "a view": lambda first, second: setattr(
        first.mlp.up_proj, "weight", nn.Parameter(torch.stack([first.mlp.up_proj.weight.detach()] * 2)[0])
    ),
    "weights of one memory": lambda first, second: setattr(
        second.self_attn.k_proj, "weight", nn.Parameter(first.self_attn.k_proj.weight.detach())
    ),
}


@needs_kernels
@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize("way", WAYS_TO_LIE_APART)
def test_weights_that_cannot_lie_together_are_read_where_they_are(way, is_adapted):
    """Each of them followed when it is changed in place, before the forward is made and behind it."""
    model = copy.deepcopy(case_model("llama", num_hidden_layers=2)).to(DEVICE)
    first, second = model.model.layers
    if is_adapted:
        fused = with_fused_forward(model)
        WAYS_TO_LIE_APART[way](first, second)
    else:
        WAYS_TO_LIE_APART[way](first, second)
        fused = with_fused_forward(model)
    addresses = {}
    for _ in range(2):
        logits_are_the_modules(fused, model)
        addresses.setdefault("once", [weight.data_ptr() for weight in model.parameters()])
        with torch.no_grad():
            for layer in (first, second):
                for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight.mul_(1.3)
        logits_are_the_modules(fused, model)
        fused.let_go()
    logits_are_the_modules(fused, model)
    assert addresses["once"] == [weight.data_ptr() for weight in model.parameters()]


def logits_are_the_modules(fused: TreeModel, model) -> None:
    tokens, lens, step = tokens_of(1, 1, 4).to(DEVICE), lens_of(0).to(DEVICE), causal_step(4, DEVICE)
    modules = adapt(copy.deepcopy(model), forward="modules")
    wanted = modules.forward(tokens, modules.new_cache(1, 8), lens, step)
    got = fused.forward(tokens, TreeCache(fused._plan.specs, 1, 8), lens, step)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_merged_adapters_are_read_in_the_weights_they_are_merged_into():
    model = copy.deepcopy(case_model("llama"))
    adapters = add_adapters(model)
    model.to(DEVICE).eval()
    with pytest.raises(NotNativeError, match=r"support\.adapters\.AdaptedLinear, not torch's Linear"):
        with_fused_forward(model)
    for layer in adapters:
        layer.merge()
    fused = with_fused_forward(model)
    logits_are_the_modules(fused, model)
    for layer in adapters:  # another one is merged into them, in place
        layer.merged, layer.active = [], ["b"]
        layer.merge()
    logits_are_the_modules(fused, model)


def test_an_interrupt_between_two_weights_of_a_product_leaves_them_right():
    class Stopping(nn.Parameter):
        @property
        def data(self):
            return self.detach()

        @data.setter
        def data(self, rows):
            raise KeyboardInterrupt

    one, two = (nn.Parameter(torch.randn(rows, 3)) for rows in (2, 5))
    wanted = torch.cat([one.detach(), two.detach()])
    two.__class__ = Stopping
    with pytest.raises(KeyboardInterrupt):
        packed_rows([one, two])
    two.__class__ = nn.Parameter
    assert torch.equal(torch.cat([one.detach(), two.detach()]), wanted) and packed_rows([one, two], False) is None
    assert movable([[one, two]]) == [True] and torch.equal(packed_rows([one, two]), wanted)


@needs_kernels
def test_where_there_is_no_memory_to_lay_weights_together_they_are_read_apart(monkeypatch):
    model = copy.deepcopy(case_model("llama")).to(DEVICE)
    plan = adapt(model, forward="modules")._plan
    concatenate, calls = torch.cat, []

    def stopping(*arguments, **settings):
        calls.append(sys._getframe(1).f_code.co_name)
        if calls.count("packed_rows") == 2 and calls[-1] == "packed_rows":
            raise torch.OutOfMemoryError
        return concatenate(*arguments, **settings)

    monkeypatch.setattr(torch, "cat", stopping)
    fused = TreeModel(model, plan._replace(own=fused_forward(model, plan.calls, plan.logits_dtype, DEVICE)))
    monkeypatch.undo()
    logits_are_the_modules(fused, model)
    gate, up = (
        part.weight.untyped_storage()
        for part in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj)
    )
    assert calls.count("packed_rows") == 4 and gate.data_ptr() != up.data_ptr()
    fused.let_go()
    logits_are_the_modules(fused, model)  # there is memory now
    gate, up = (
        part.weight.untyped_storage()
        for part in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj)
    )
    assert gate.data_ptr() == up.data_ptr()


@needs_kernels
def test_models_that_are_stored_as_they_lie_and_exchanged_as_a_whole(tmp_path):
    """State dicts whose weights lie together, weights taken from them, and conversions that swap tensors."""
    model = copy.deepcopy(case_model("llama")).to(DEVICE)
    with_fused_forward(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = copy.deepcopy(case_model("llama")).to(DEVICE)
    fused = with_fused_forward(other)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"), assign=True)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    up = other.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach() * 2)  # the memory that its neighbour still lies in is not our own
    logits_are_the_modules(fused, other)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    logits_are_the_modules(with_fused_forward(model), model)


# ---- who gets one


def test_a_cpu_model_refuses_the_fused_forward_by_name():
    model = copy.deepcopy(case_model("llama"))
    with pytest.raises(UnsupportedModelError, match="got 'fused': on this device they are native"):
        adapt(model, forward="fused")
    assert adapt(model).runs == "native"


@needs_kernels
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.lm_head.float(), "its weights are of several types"),
        (
            lambda model: model.model.layers[0].register_forward_hook(lambda *args: None),
            "a forward hook of a LlamaDecoderLayer is not",
        ),
        (lambda model: setattr(model.config, "model_type", "bloom"), "has no description"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(change, reason):
    model = copy.deepcopy(case_model("llama")).to(DEVICE, torch.bfloat16)
    plan = adapt(model, forward="modules")._plan
    change(model)
    with pytest.raises(NotNativeError, match=reason):
        fused_forward(model, plan.calls, plan.logits_dtype, DEVICE)


@needs_kernels
def test_experts_and_weights_of_few_bits_are_left_to_the_modules():
    model = copy.deepcopy(case_model("mixtral")).to(DEVICE)
    plan = adapt(model, forward="modules")._plan
    with pytest.raises(NotNativeError, match="experts"):
        fused_forward(model, plan.calls, plan.logits_dtype, DEVICE)


def test_kernels_that_do_not_compile_leave_a_model_to_its_modules(monkeypatch):
    model = copy.deepcopy(case_model("llama"))
    plan = adapt(model, forward="modules")._plan

    def fails(*arguments):
        raise RuntimeError("PassManager::run failed\nand a page of code")

    monkeypatch.setattr(adapter, "_input_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(adapter, "fused_forward", fails)
    made = adapter._with_own_forward(model, plan)
    assert (made.own, made.not_own) == (None, "its kernels do not run here: RuntimeError: PassManager::run failed")
    monkeypatch.setattr(adapter, "_input_device", lambda model: torch.device("cpu"))
    monkeypatch.setattr(adapter, "NativeForward", fails)
    with pytest.raises(RuntimeError, match="PassManager"):
        adapter._with_own_forward(model, plan)


@needs_kernels
def test_caches_in_pages_are_left_to_the_modules(caplog):
    model, modules = fused_pair("llama")
    lens, table = lens_of(5).to(DEVICE), torch.tensor([[2, 0, 3]], dtype=torch.int32, device=DEVICE)
    nodes, step = tokens_of(1, 1, NODES).to(DEVICE), causal_step(NODES, DEVICE)
    scored = []
    for own in (model, modules):
        cache = own.new_paged_cache(4, 4).of(table)
        prefill(own, cache, tokens_of(0, 1, 5).to(DEVICE), lens)
        with caplog.at_level("INFO", logger="sequoia_kernels"):
            scored.append(own.forward(nodes, cache, lens, step))
    assert torch.equal(*scored)
    plan = model._plan
    caplog.clear()
    again = TreeModel(model.model, plan)
    with caplog.at_level("INFO", logger="sequoia_kernels"):
        for _ in range(2):
            again.forward(nodes, cache, lens, step)
    assert caplog.messages == ["llama: forwards on paged caches by its modules, fused ones know no pages"]
    asked_for = TreeModel(model.model, plan, forward_mode="fused")
    with pytest.raises(UnsupportedModelError, match="cache must not be paged for fused forwards, which were asked for"):
        asked_for.forward(nodes, cache, lens, step)


@pytest.mark.gpu
def test_adapt_takes_it_on_a_gpu_and_leaves_it_where_it_is_told_to():
    model = copy.deepcopy(case_model("llama")).cuda()
    assert adapt(model).runs == adapt(model, forward="fused").runs == "fused"
    assert adapt(model, forward="modules").runs == adapt(model, compile=True).runs == "modules"
    assert adapt(adapt(model, forward="modules"), forward="auto").runs == "fused"
    with pytest.raises(UnsupportedModelError, match="got 'native': on this device they are fused"):
        adapt(model, forward="native")
