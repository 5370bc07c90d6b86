"""A draft's unlikely tokens go behind the others where the target is cut by top-p, in C++ and in torch alike."""

from __future__ import annotations

import itertools

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
from sequoia_kernels.tree import ShapedTree

BACKENDS = ["host", "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])


def set_back(rows, temperature, top_p, backend):
    """The changed rows of one request. [W, vocab]."""
    settings = torch.tensor([temperature]), torch.tensor([top_p])
    return set_back_unlikely(rows[None], *settings, backend)[0]


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
        host, reference = (set_back(rows, temperature, top_p, backend) for backend in BACKENDS)
        assert torch.equal(host, reference), (vocab, temperature, top_p)
        assert torch.equal(rows, given) and host.dtype == dtype
        assert torch.equal(host.isfinite(), rows.isfinite())
        for row, changed in zip(rows, host):
            scale = float(torch.tensor(temperature))
            moved = changed != row
            assert sum_of(row.double() / scale, moved) <= (1 - top_p) / 2 + 1e-6
            order = row.double().argsort(stable=True)
            assert torch.equal(changed.double()[order], changed.double().sort().values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_without_top_p_keep_their_rows(backend):
    logits = 4 * torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    assert set_back_unlikely(logits, torch.ones(4), None, backend) is logits
    temperature, top_p = torch.tensor([0.0, 0.7, 0.7, 1.0]), torch.tensor([0.5, 1.0, 0.5, 0.9])
    changed = set_back_unlikely(logits, temperature, top_p, backend)
    assert torch.equal(changed[:2], logits[:2])
    for request in (2, 3):
        alone = set_back(logits[request], float(temperature[request]), float(top_p[request]), backend)
        assert torch.equal(changed[request], alone) and not torch.equal(alone, logits[request])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_strides_and_rows_that_the_draw_refuses(backend):
    row = 4 * torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(0))
    settings = torch.ones(1), torch.full((1,), 0.8)
    whole = set_back_unlikely(row.expand(-1, 4, -1), *settings, backend)
    assert torch.equal(whole, set_back_unlikely(row, *settings, backend).expand(-1, 4, -1))
    wider = torch.nn.functional.pad(row, (0, 14), value=torch.nan)
    assert torch.equal(set_back_unlikely(wider[:, :, :50], *settings, backend), whole[:, :1])
    for bad in (torch.nan, torch.inf):
        broken = row.clone()
        broken[0, 0, 3] = bad
        changed = set_back_unlikely(broken, *settings, backend)[0, 0, 3]
        assert changed.isnan() if bad != bad else changed == bad
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


@pytest.mark.parametrize("native", [True, False])
def test_the_rows_that_are_kept_are_those_that_were_drawn_from(native, monkeypatch):
    """What verification reads has the unlikely tokens behind, and the children are draws from just that."""
    target, draft = pair_of("plain")
    if not native:
        monkeypatch.setattr(host_growth.HostGrowth, "bind", classmethod(lambda cls, *args: None))
    verify, seen = steps.DecodingStep.verify_tokens, []

    def verify_tokens(self, tree):
        layout, buffers = self.prepare(tree)
        level, state = layout.levels[0], self.state
        rows = buffers.draft_logits[:, 0]
        drawn = sample_without_replacement(rows, level.num_samples, state.temperature, state.seeds, state.offsets)
        active = state.active.bool()  # nothing is drawn for others
        assert torch.equal(drawn.tokens[active], buffers.tokens[active, 1:4])
        spread = (rows.amax(1) - rows.amin(1)) / state.temperature.where(state.temperature > 0, 1.0)
        seen.append((spread > BEHIND) & active)
        return verify(self, tree)

    monkeypatch.setattr(steps.DecodingStep, "verify_tokens", verify_tokens)
    generate(target, draft, PROMPTS, tree=TREE, max_new_tokens=20, eos_token_id=(), **SETTINGS)
    assert torch.stack(seen).any(0).tolist() == [True, False, False, True]
