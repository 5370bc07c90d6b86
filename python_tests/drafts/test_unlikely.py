"""A draft's unlikely tokens go behind the others where the target is cut by top-p, in C++, Triton and torch alike."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from support.chi_square import joint_probs
from support.enumeration import emitted_distribution
from support.shaped_trees import steep_confidence
from support.tiny_models import tiny_llama
from support.toy_models import chain_probs, toy_pair

from sequoia_kernels import TokenTree, VocabularyMap, adapt, generate
from sequoia_kernels.decoding import step as steps
from sequoia_kernels.drafts import ModelDraft, TokenPairing, host_growth
from sequoia_kernels.drafts.unlikely import BEHIND, set_back_unlikely
from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.ops.backends import unavailable_reason
from sequoia_kernels.tree import ShapedTree

_REASON = unavailable_reason("sample_without_replacement", "triton")
# Where the Triton kernels run.
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
needs_triton = pytest.mark.skipif(_REASON is not None, reason=f"triton: {_REASON}")
BACKENDS = ["host", "reference", pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])


def device_of(backend):
    """Where a backend takes its tensors."""
    return DEVICE if backend == "triton" else "cpu"


def set_back(rows, temperature, top_p, backend):
    """The changed rows of one request. [W, vocab]."""
    device = device_of(backend)
    settings = torch.tensor([temperature], device=device), torch.tensor([top_p], device=device)
    return set_back_unlikely(rows[None].to(device), *settings, backend)[0].cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_tail_loses_its_logits_and_nothing_else_does(temperature, dtype, backend):
    chances = torch.tensor([[0.06, 0.6, 0.02, 0.25, 0.03, 0.04, 0.0]])
    logits = (temperature * chances.log()).to(dtype)
    # Below 0.6 / 4 there is 0.15 in all, below 0.6 / 8 0.15 as well, below 0.6 / 16 0.05, and below 0.6 / 32 nothing.
    for top_p, kept in ((0.5, [1, 3]), (0.65, [1, 3]), (0.8, [0, 1, 3, 5]), (0.95, [0, 1, 2, 3, 4, 5])):
        changed = set_back(logits, temperature, top_p, backend)
        expected = logits.double() - BEHIND * temperature
        expected[:, kept] = logits.double()[:, kept]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(changed[:, kept], logits[:, kept])
        torch.testing.assert_close(changed.to(wide), expected.to(dtype).to(wide), rtol=2e-6, atol=0)
        assert changed[0, 6] == -torch.inf


def sum_of(row, dropped):
    return float(torch.softmax(row.double(), 0)[dropped].sum())


def rows_of(kind: str, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab)
    rows = torch.randn(5, vocab, generator=generator, dtype=torch.float64)
    if kind == "peaked":
        rows = 6 * rows
    elif kind == "equal":
        rows = rows * 0 + 3
    elif kind == "tied":
        rows = (2 * rows).round()
    elif kind == "masked":
        rows = (3 * rows).masked_fill(rows < 0, -torch.inf)
        rows[:, 0] = 1
    elif kind == "far apart":
        rows = 40 * rows
        rows[:, 0], rows[:, -1] = torch.finfo(dtype).min, 5
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["wide", "peaked", "equal", "tied", "masked", "far apart"])
def test_cpp_gives_the_bits_of_torch(kind, dtype):
    for vocab, temperature, top_p in itertools.product((1, 2, 17, 300, 3001), (1e-4, 0.3, 1.0, 1e4), (0.05, 0.8, 0.97)):
        rows = rows_of(kind, vocab, dtype)
        given = rows.clone()
        host, reference = (set_back(rows, temperature, top_p, backend) for backend in ("host", "reference"))
        assert torch.equal(host, reference), (vocab, temperature, top_p)
        assert torch.equal(rows, given) and host.dtype == dtype
        assert torch.equal(host.isfinite(), rows.isfinite())
        for row, changed in zip(rows, host):
            scale = float(torch.tensor(temperature))
            moved = changed != row
            assert sum_of(row.double() / scale, moved) <= (1 - top_p) / 2 + 1e-6
            order = row.double().argsort(stable=True)
            assert torch.equal(changed.double()[order], changed.double().sort().values)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["wide", "peaked", "equal", "tied", "masked", "far apart"])
def test_triton_gives_the_bits_of_torch(kind, dtype):
    """Several chunks, too; float64 goes by torch. No sum of these rows is within rounding of its limit."""
    settings = torch.tensor(list(itertools.product((1e-4, 0.0, 0.7, 1e4), (0.05, 0.8, 1.0)))).unbind(1)
    for vocab in (1, 2, 300, 2 * 2048 + 1):
        rows = rows_of(kind, vocab, dtype)[:2].expand(12, -1, -1)
        there = (rows.to(DEVICE), *(values.to(DEVICE) for values in settings))
        changed = set_back_unlikely(*there, "triton").cpu()
        assert torch.equal(changed, set_back_unlikely(rows, *settings, "reference")), vocab
        assert changed.dtype == dtype


@needs_triton
def test_triton_at_the_widest_vocabularies():
    """Two sizes of chunks; a row's bound does not depend on the other rows."""
    for vocab in (65537, 151936):
        rows = (4 * torch.randn(1, 2, vocab, generator=torch.Generator().manual_seed(vocab))).to(torch.bfloat16)
        changed, reference = (set_back(rows[0], 0.8, 0.9, backend) for backend in ("triton", "reference"))
        assert torch.equal(changed, reference) and not torch.equal(changed, rows[0])
        assert torch.equal(set_back(rows[0, 1:], 0.8, 0.9, "triton"), changed[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_without_top_p_keep_their_rows(backend):
    logits = 4 * torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0)).to(device_of(backend))
    assert set_back_unlikely(logits, torch.ones(4), None, backend) is logits
    temperature, top_p = torch.tensor([0.0, 0.7, 0.7, 1.0]), torch.tensor([0.5, 1.0, 0.5, 0.9])
    changed = set_back_unlikely(logits, temperature.to(logits.device), top_p.to(logits.device), backend)
    assert torch.equal(changed[:2], logits[:2])
    for request in (2, 3):
        alone = set_back(logits[request], float(temperature[request]), float(top_p[request]), backend)
        assert torch.equal(changed[request].cpu(), alone) and not torch.equal(alone, logits[request].cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_strides_and_rows_that_the_draw_refuses(backend):
    device = device_of(backend)
    row = 4 * torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(0)).to(device)
    settings = torch.ones(1, device=device), torch.full((1,), 0.8, device=device)
    whole = set_back_unlikely(row.expand(-1, 4, -1), *settings, backend)
    assert torch.equal(whole, set_back_unlikely(row, *settings, backend).expand(-1, 4, -1))
    wider = torch.nn.functional.pad(row, (0, 14), value=torch.nan)
    assert torch.equal(set_back_unlikely(wider[:, :, :50], *settings, backend), whole[:, :1])
    apart = row.repeat_interleave(2, 2)
    assert torch.equal(set_back_unlikely(apart[:, :, ::2], *settings, backend), whole[:, :1])
    for bad in (torch.nan, torch.inf):
        broken = row.clone()
        broken[0, 0, 3] = bad
        changed = set_back_unlikely(broken, *settings, backend)
        assert changed[0, 0, 3].isnan() if bad != bad else changed[0, 0, 3] == bad
        if backend == "triton":
            reference = set_back(broken[0].cpu(), 1.0, 0.8, "reference")
            assert torch.equal(changed[0].cpu().nan_to_num(7.0), reference.nan_to_num(7.0))
    nothing = torch.full_like(row, -torch.inf)
    assert torch.equal(set_back_unlikely(nothing, *settings, backend), nothing)


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("kind", ["unrelated", "near", "same", "target misses tokens", "disjoint", "tied"])
def test_steps_are_exact_where_the_likely_tokens_are_used_up(kind, rule):
    """Every draw and every way to accept it, summed in float64: of three tokens as many children may be drawn."""
    for parents, (temperature, top_p) in itertools.product(
        ([-1, 0, 0, 0], [-1, 0, 0, 1, 1]), ((0.3, 0.5), (0.6, 0.8), (1.0, 0.8), (1.7, 0.3))
    ):
        tree = TokenTree(parents)
        target, draft = toy_pair(kind, 3, context=2, seed=1)
        whole = draft.table
        draft.table = set_back(whole, temperature, top_p, "auto")
        assert not torch.equal(draft.table, whole)
        emitted = emitted_distribution(tree, target, draft, 1, temperature, None, top_p, rule=rule)
        expected = joint_probs(chain_probs(target, 1, tree.num_levels, temperature, None, top_p))
        assert float((emitted - expected).abs().max()) <= 1e-12, (parents, temperature, top_p)


# ---- in the loop ----


VOCAB = 24
PROMPTS = torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(2))
SETTINGS = {"temperature": [1.0, 0.0, 0.7, 1.3], "top_p": [0.8, 0.8, 1.0, 0.5], "seed": [3, 4, 5, 6]}


def pair_of(case: str):
    target = tiny_llama(3, vocab_size=VOCAB, sharpness=6.0)
    if case == "bfloat16":
        return target.to(torch.bfloat16), tiny_llama(4, vocab_size=VOCAB, sharpness=6.0).to(torch.bfloat16)
    if case == "other tokens":
        model = adapt(tiny_llama(4, vocab_size=9, num_layers=1, sharpness=6.0))
        vocabulary = VocabularyMap.of(torch.tensor([0, 3, 4, 7, 11, 20]), VOCAB)
        fed = torch.arange(VOCAB) % 9
        return target, ModelDraft(model, TokenPairing(vocabulary, torch.tensor([2, 1, 0, 8, 7, 5]), fed))
    width = VOCAB + {"narrow": -5, "wide": 3}.get(case, 0)
    return target, tiny_llama(4, vocab_size=width, num_layers=1, sharpness=6.0)


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize(
    "case", ["plain", "narrow", "wide", "bfloat16", "other tokens", "shaped", "each its tree", "alone"]
)
def test_growing_in_cpp_is_growing_in_torch(case, rule, monkeypatch):
    target, draft = pair_of(case)
    tree = {"shaped": ShapedTree((1, 2, 3, 2), steep_confidence()), "each its tree": (TREE,) * 4}.get(case, TREE)
    count = 1 if case == "alone" else 4
    options = {name: values[:count] for name, values in SETTINGS.items()} | {"tree": tree, "rule": rule}
    options |= {"max_new_tokens": 40, "eos_token_id": ()}
    grown, run = [], host_growth.HostGrowth.run
    monkeypatch.setattr(host_growth.HostGrowth, "run", lambda self, clock: grown.append(run(self, clock)) or grown[-1])
    native = generate(target, draft, PROMPTS[:count], **options)
    assert grown and all(grown)
    plain = generate(target, draft, PROMPTS[:count], **options | {"top_p": None})
    same = [mine == its for mine, its in zip(native.new_tokens, plain.new_tokens)]
    assert same == [False, True, True, False][:count]
    grown.clear()
    monkeypatch.setattr(host_growth.HostGrowth, "bind", classmethod(lambda cls, *args: None))
    torchs = generate(target, draft, PROMPTS[:count], **options)
    assert not grown and native.new_tokens == torchs.new_tokens
    assert native.stats.accepted_histogram == torchs.stats.accepted_histogram
    reference = generate(target, draft, PROMPTS[:count], **options, backend="reference")
    assert reference.new_tokens == native.new_tokens


@needs_triton
@pytest.mark.parametrize("case", ["narrow", "shaped"])
def test_triton_grows_what_torch_grows(case):
    target, draft = (model.to(DEVICE) for model in pair_of(case))
    tree = ShapedTree((1, 2, 3), steep_confidence()) if case == "shaped" else TREE
    options = SETTINGS | {"tree": tree, "max_new_tokens": 5, "eos_token_id": ()}
    triton, reference = (
        generate(target, draft, PROMPTS.to(DEVICE), **options, backend=backend) for backend in ("triton", "reference")
    )
    assert triton.new_tokens == reference.new_tokens
    assert triton.stats.accepted_histogram == reference.stats.accepted_histogram


@pytest.mark.parametrize("way", ["host", "reference", pytest.param("triton", marks=needs_triton)])
def test_the_rows_that_are_kept_are_those_that_were_drawn_from(way, monkeypatch):
    """What verification reads has the unlikely tokens behind, and the children are draws from just that."""
    target, draft = (model.to(device_of(way)) for model in pair_of("plain"))
    verify, seen = steps.DecodingStep.verify_tokens, []

    def verify_tokens(self, tree):
        layout, buffers = self.prepare(tree)
        level, state = layout.levels[0], self.state
        rows = buffers.draft_logits[:, 0]
        streams = state.temperature, state.seeds, state.offsets
        drawn = sample_without_replacement(rows, level.num_samples, *streams, backend=way)
        active = state.active.bool()  # nothing is drawn for others
        assert torch.equal(drawn.tokens[active], buffers.tokens[active, 1:4])
        spread = (rows.amax(1) - rows.amin(1)) / state.temperature.where(state.temperature > 0, 1.0)
        seen.append((spread > BEHIND) & active)
        return verify(self, tree)

    monkeypatch.setattr(steps.DecodingStep, "verify_tokens", verify_tokens)
    options = {"max_new_tokens": 20 if way != "triton" else 4, "eos_token_id": (), "cuda_graphs": False}
    backend = {"host": "auto"}.get(way, way)
    generate(target, draft, PROMPTS.to(target.device), tree=TREE, backend=backend, **options, **SETTINGS)
    assert torch.stack(seen).any(0).tolist() == [True, False, False, True]
