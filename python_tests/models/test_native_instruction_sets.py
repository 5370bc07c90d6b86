"""Native forwards by instruction sets of the CPU: their numbers, the same bits for any rows, pairs of bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from support.native_models import behind, case_model, decode, lens_of, path_to, score_tree, small_case, tokens_of

from sequoia_kernels import _host
from sequoia_kernels.models import adapt, causal_step
from sequoia_kernels.models.native import INSTRUCTION_SET_VARIABLE

LOW_PRECISION = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def same_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_every_instruction_set(monkeypatch, name, dtype):
    prompt, tree, nodes = small_case(40)
    scored = []
    for instruction_set in _host.forward_instruction_sets():
        monkeypatch.setenv(INSTRUCTION_SET_VARIABLE, instruction_set)
        native = adapt(case_model(name).to(dtype), forward="native")
        assert native._own.instruction_set == instruction_set
        scored.append(score_tree(native, prompt, tree, nodes))
        path = path_to(tree, tree.num_nodes - 1)
        assert torch.equal(decode(native, behind(native, prompt), prompt.shape[1], nodes[0, path]), scored[-1][path])
    if dtype == torch.float32:  # seen: 1.1e-5, 1.6e-6 and 2.8e-6, the modules' own 0.9e-5, 1.6e-6 and 3.0e-6
        exact = score_tree(adapt(case_model(name).double(), forward="modules"), prompt, tree, nodes)
        bound = {"llama": 2e-5, "gemma2": 3e-6, "gpt_neox": 5e-6}[name]
        assert all(float((logits.double() - exact).abs().max()) <= bound for logits in scored)
        return
    # Where a cache row is rounded the other way, all that follows differs by a unit in the last place or two.
    bound = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert all(float((other - scored[0]).abs().max()) <= bound for other in scored)


def pairs_of(dtype, name="llama", **overrides):
    """A forward by pairs of bfloat16 and one of floats, of the same weights; skipped where the CPU has no pairs."""
    if not _host.forward_instruction_sets(pairs=True):
        pytest.skip("this CPU multiplies no pairs of bfloat16")
    runners, model = [], case_model(name, **overrides).to(dtype)
    with pytest.MonkeyPatch.context() as patched:
        for instruction_set in (_host.forward_instruction_sets(pairs=True)[0], "avx512"):
            patched.setenv(INSTRUCTION_SET_VARIABLE, instruction_set)
            runners.append(adapt(copy.deepcopy(model), forward="native"))
            assert runners[-1]._own.instruction_set == instruction_set
    return runners


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("instruction_set", _host.forward_instruction_sets())
def test_any_number_of_rows_gives_the_same_bits(monkeypatch, instruction_set, dtype):
    """Sizes that fill no vector; five rows of the wide ones no longer lie in the first-level cache together."""
    monkeypatch.setenv(INSTRUCTION_SET_VARIABLE, instruction_set)
    native = adapt(case_model("llama", intermediate_size=3001).to(dtype), forward="native")
    prompt, tokens = tokens_of(60, 1, 20), tokens_of(61, 1, 64)
    cache, lens = behind(native, prompt), lens_of(20)
    torch.set_num_threads(2)
    together = native.forward(tokens, cache, lens, causal_step(64))[0]
    assert torch.isfinite(together).all()
    for num_rows in [*range(1, 27), 47, 63]:
        logits = native.forward(tokens[:, :num_rows], cache, lens, causal_step(num_rows))[0]
        assert torch.equal(logits, together[:num_rows]), num_rows


def test_only_products_of_bfloat16_weights_are_made_of_pairs():
    case = small_case(62)
    for dtype, name, same in (
        (torch.float32, "llama", True),
        (torch.float16, "llama", True),
        (torch.bfloat16, "llama", False),
        (torch.bfloat16, "gpt2", False),  # its head: the other weights lie transposed
    ):
        pairs, floats = (score_tree(native, *case) for native in pairs_of(dtype, name))
        assert torch.equal(pairs, floats) == same, (dtype, name)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox", "gpt_neox-sequential"])
def test_keys_take_what_rounding_takes_away_from_pairs(name):
    """In separate, fused and interleaved projections. The first layer reads the same rows in both forwards."""
    prompt, wrong = tokens_of(63, 1, 40), {}
    by_pairs, by_floats = (behind(runner, prompt).layers[0] for runner in pairs_of(torch.bfloat16, name))
    for kind in ("keys", "values"):
        rows = (getattr(layer, kind)[:, :40] for layer in (by_pairs, by_floats))
        wrong[kind] = float(torch.ne(*rows).float().mean())
    assert wrong["keys"] < 0.01 < 0.1 < wrong["values"]


def test_what_is_not_finite_stays_visible_in_pairs():
    tokens = torch.tensor([[5, 6, 7, 5]])
    for value in (float("nan"), float("inf")):
        visible = []
        for native in pairs_of(torch.bfloat16):
            with torch.no_grad():
                native.model.get_input_embeddings().weight[6, 2] = value
            logits = native.forward(tokens, native.new_cache(1, 16), lens_of(0), causal_step(4))[0]
            assert torch.isnan(logits[1]).all()
            visible.append(torch.isfinite(logits))
        assert torch.equal(*visible)


def test_the_rate_of_pairs_is_refused_where_there_are_none():
    with pytest.raises(ValueError, match="portable multiplies no pairs"):
        _host.multiply_add_rate("portable", 10, 1, pairs=True)
    for name in _host.forward_instruction_sets(pairs=True):
        assert _host.multiply_add_rate(name, 10, 1, pairs=True) > 0.0


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2"])
def test_an_instruction_set_that_the_cpu_lacks_is_refused(monkeypatch, name):
    if name in _host.forward_instruction_sets():
        pytest.skip("this CPU has it")
    monkeypatch.setenv(INSTRUCTION_SET_VARIABLE, name)
    with pytest.raises(ValueError, match=f"SEQUOIA_HOST_ISA.*{name}"):
        adapt(case_model("llama"))


def test_a_wrong_instruction_set_names_the_variable_and_the_choice(monkeypatch):
    monkeypatch.setenv(INSTRUCTION_SET_VARIABLE, "sse9")
    with pytest.raises(ValueError, match=r"SEQUOIA_HOST_ISA must be one of .*portable.*, got sse9"):
        adapt(case_model("llama"))
