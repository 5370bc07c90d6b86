"""generate() samples the target's own joint distribution, end to end with real models and caches."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from support.shaped_trees import steep_confidence
from support.tiny_models import noisy_copy, sequence_probabilities, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from sequoia_kernels import TokenTree, VocabularyMap, adapt, generate
from sequoia_kernels.decoding import loop
from sequoia_kernels.drafts import LookupDraft, ModelDraft, TokenPairing, host_growth, source
from sequoia_kernels.drafts.unlikely import set_back_unlikely
from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.tree import LookupTree, MergedTree, ShapedTree

VOCAB, LENGTH, NUM_REQUESTS = 5, 4, 6000
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])


def warp(temperature: float, top_k: int | None = None, top_p: float | None = None):
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        logits = logits / temperature
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        if top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True)
            dropped = ordered.cumsum(-1) - ordered >= top_p
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)
        return logits.softmax(-1)

    return probabilities


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 0.7, "top_k": 3}],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("kind", ["close draft", "unrelated draft", "draft = target", "no draft"])
def test_joint_distribution(settings, kind, rule):
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    draft = {
        "close draft": noisy_copy(target, 0.4),
        "unrelated draft": tiny_llama(8, vocab_size=VOCAB, sharpness=8.0),
        "draft = target": target,
        "no draft": None,
    }[kind]
    assert p_value(target, draft, settings, rule=rule) > 1e-4


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_joint_distribution_of_shaped_trees(settings, rule):
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    tree = ShapedTree((1, 2, 3, 2), steep_confidence())
    assert p_value(target, tiny_llama(8, vocab_size=VOCAB, sharpness=8.0), settings, rule=rule, tree=tree) > 1e-4


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_joint_distribution_of_a_draft_with_other_tokens(settings, rule):
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    model = adapt(tiny_llama(8, vocab_size=4, num_layers=1, sharpness=8.0))
    common, own_ids = torch.tensor([0, 3, 4]), torch.tensor([2, 1, 0])  # two of the target's are not known
    pairing = TokenPairing(VocabularyMap.of(common, VOCAB), own_ids, torch.tensor([2, 3, 3, 1, 0]))
    assert p_value(target, ModelDraft(model, pairing), settings, rule=rule) > 1e-4


REPEATING = [2, 0, 4, 2, 0, 4, 2, 0]  # so that something is found


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("kind", ["alone", "close draft", "unrelated draft", "draft of other tokens"])
def test_joint_distribution_with_lookup(settings, kind, rule, monkeypatch):
    chosen = []
    monkeypatch.setattr(loop.LookupSteps, "tree", _lookup_as_often_as_not(chosen, loop.LookupSteps.tree))
    siblings = property(lambda self: (0,) if self.base is None else (0, 1))  # as where steps are captured
    monkeypatch.setattr(LookupDraft, "siblings", siblings)
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    draft = {
        "alone": "lookup",
        "close draft": noisy_copy(target, 0.4),
        "unrelated draft": tiny_llama(8, vocab_size=VOCAB, sharpness=8.0),
        "draft of other tokens": tiny_llama(8, vocab_size=3, num_layers=1, sharpness=8.0),
    }[kind]
    assert p_value(target, draft, settings, rule=rule, prompt=REPEATING, lookup=True) > 1e-4
    assert any(isinstance(tree, LookupTree) for tree in chosen)
    assert kind == "alone" or any(isinstance(tree, LookupTree) and tree.siblings for tree in chosen)
    assert kind == "alone" or any(isinstance(tree, MergedTree) for tree in chosen)


def _lookup_as_often_as_not(chosen, choose):
    """Steps with proposals where they would be taken, and in two of three steps where there is any proposal.

    The first of these two is a lookup tree, whatever would be taken.
    """

    def tree(self, base, requests):
        picked = choose(self, base, requests)
        usual = LookupTree if len(chosen) % 3 == 1 else (LookupTree, MergedTree)
        if not isinstance(picked, usual) and len(chosen) % 3:
            picked = self.costs.trees[len(chosen) % len(self.costs.trees)]
            if len(chosen) % 3 == 2 and base.num_nodes > 1:
                picked = MergedTree(base)
            self._propose(picked, [path[: len(picked.path)] for _, path in self.choice.found()])
        chosen.append(picked)
        return picked

    return tree


# ---- top-p, where the draft's unlikely tokens are moved behind the others ----


@pytest.fixture(params=["in C++", "in torch", "by the reference"])
def growth(request, monkeypatch):
    """How trees are grown; gives the options that this takes."""
    if request.param == "in torch":
        monkeypatch.setattr(host_growth.HostGrowth, "bind", classmethod(lambda cls, *args: None))
    return {"backend": "reference"} if request.param == "by the reference" else {}


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("kind", ["close draft", "unrelated draft", "bfloat16"])
def test_joint_distribution_with_top_p(kind, rule, growth):
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    draft = noisy_copy(target, 0.4) if kind == "close draft" else tiny_llama(8, vocab_size=VOCAB, sharpness=8.0)
    if kind == "bfloat16":
        draft = draft.bfloat16()
    assert p_value(target, draft, {"temperature": 1.0, "top_p": 0.8}, rule=rule, **growth) > 1e-4


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_joint_distribution_of_a_batch_of_several_settings(rule, growth):
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    prompt, seeds = torch.tensor([2, 0, 4]), range(1000, 1000 + NUM_REQUESTS)
    mixed = [(1.0, 0.8), (0.0, 0.8), (0.6, 0.8), (1.0, 1.0)]
    temperature, top_p = ([mixed[index % 4][place] for index in range(NUM_REQUESTS)] for place in (0, 1))
    output = generate(
        target, tiny_llama(8, vocab_size=VOCAB, sharpness=8.0), prompt.repeat(NUM_REQUESTS, 1), seed=seeds, rule=rule,
        tree=TREE, max_new_tokens=LENGTH, temperature=temperature, top_p=top_p, **growth,
    )  # fmt: skip
    plain = generate(target, None, prompt[None], max_new_tokens=LENGTH).new_tokens[0]
    for place, (temperature, top_p) in enumerate(mixed):
        found = output.new_tokens[place::4]
        if temperature == 0:
            assert all(tokens == plain for tokens in found)
        else:
            settings = {"temperature": temperature, "top_p": top_p}
            assert p_value_of(found, target, prompt, settings) > 1e-4, settings


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_rows_that_are_changed_for_the_draws_alone_are_noticed(rule, monkeypatch):
    """Children drawn with the unlikely tokens behind, and verified as if they came from the draft's own rows."""
    settings = {"temperature": 1.0, "top_p": 0.8}

    def draw(logits, num_samples, temperature, *arguments, **options):
        changed = set_back_unlikely(logits[:, None], temperature, torch.full_like(temperature, 0.8))[:, 0]
        return sample_without_replacement(changed, num_samples, temperature, *arguments, **options)

    monkeypatch.setattr(host_growth.HostGrowth, "bind", classmethod(lambda cls, *args: None))
    monkeypatch.setattr(source, "set_back_unlikely", lambda logits, *arguments: logits)
    monkeypatch.setattr(source, "sample_without_replacement", draw)
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    assert p_value(target, tiny_llama(8, vocab_size=VOCAB, sharpness=8.0), settings, rule=rule) < 1e-9


def p_value(target, draft, settings, seed: int = 1000, prompt=(2, 0, 4), **options) -> float:
    """Chi-square test of the first tokens behind a prompt, against the product of the target's own probabilities."""
    prompt = torch.tensor(prompt)
    output = generate(
        target, draft, prompt.repeat(NUM_REQUESTS, 1), seed=range(seed, seed + NUM_REQUESTS),
        **{"tree": TREE, "max_new_tokens": LENGTH, **settings, **options},
    )  # fmt: skip
    return p_value_of(output.new_tokens, target, prompt, settings)


def p_value_of(new_tokens, target, prompt, settings) -> float:
    """The test of tokens that are there."""
    assert {len(tokens) for tokens in new_tokens} == {LENGTH}
    codes = torch.tensor(new_tokens) @ torch.tensor([VOCAB**power for power in reversed(range(LENGTH))])
    counts = torch.bincount(codes, minlength=VOCAB**LENGTH).double()
    expected = sequence_probabilities(target, prompt, LENGTH, warp(**settings)) * len(new_tokens)
    assert counts[expected == 0].sum() == 0  # nothing that the target would never say
    common = expected >= 5
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    kept = wanted > 0
    return stats.chisquare(observed[kept].numpy(), wanted[kept].numpy()).pvalue


class Float32Head(torch.nn.Module):
    """A head that computes and returns float32 logits, far enough from 0 that bfloat16 would round them away."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.float() @ self.weight.float().t() - 100.0


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_a_draft_whose_logits_are_wider_than_its_weights(temperature):
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    draft = tiny_llama(8, vocab_size=VOCAB, sharpness=8.0).bfloat16()
    draft.lm_head = Float32Head(draft.lm_head.weight).eval()
    assert draft.dtype == torch.bfloat16
    assert p_value(target, draft, {"temperature": temperature}) > 1e-4


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("limited_by", ["max_cache_len", "target's positions", "draft's positions", "both tables"])
def test_joint_distribution_up_to_a_limit(limited_by, lag, monkeypatch):
    """The limit falls inside of the tree, so that some of its nodes are scored at positions that mean nothing."""
    monkeypatch.setattr(loop, "steps_ahead", lambda target: lag)
    table, draft_table = (position_table(num_positions, seed) for num_positions, seed in ((6, 3), (5, 4)))
    llama = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    target, draft, options = {
        "max_cache_len": (llama, noisy_copy(llama, 0.4), {"max_cache_len": 6, "max_new_tokens": 50}),
        "target's positions": (table, noisy_copy(table, 0.4), {"max_new_tokens": 50}),
        "draft's positions": (llama, draft_table, {}),
        "both tables": (table, draft_table, {"max_new_tokens": 50}),
    }[limited_by]
    assert p_value(target, draft, {"temperature": 1.0}, **options) > 1e-4


def position_table(num_positions: int, seed: int) -> GPT2LMHeadModel:
    """A model whose table of positions ends."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=num_positions, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("sizes", [(5, 3), (5, 8), (3, 5)], ids=lambda sizes: f"{sizes[0]} fed, {sizes[1]} predicted")
def test_drafts_of_other_vocabularies(sizes):
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0, num_layers=3)
    draft = tiny_llama(8, vocab_size=sizes[0], num_layers=1)
    draft.lm_head = torch.nn.Linear(draft.config.hidden_size, sizes[1], bias=False).requires_grad_(False)
    draft.lm_head.weight.mul_(5.0)
    assert p_value(target, draft.eval(), {"temperature": 1.0}) > 1e-4
