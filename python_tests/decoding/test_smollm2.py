"""A real model of 135M parameters, where its wheel is installed: greedy text is plain decoding's, both rules sample."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import support.bench_scripts  # noqa: F401  (bench/ is found)
import torch

from bench.common import smollm2
from bench.common.smollm2_prompts import CALIBRATION, HELD_OUT
from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.drafts import draft_source

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(smollm2.why_missing() is not None, reason=str(smollm2.why_missing())),
]

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 7, 10])


@pytest.fixture(scope="module")
def pair():
    """The target, its first two layers under its own head, and prompts."""
    target, tokenizer = smollm2.load_target(torch.float32)
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = 2
    draft = type(target)(config).eval()
    wanted = draft.state_dict()
    draft.load_state_dict({name: tensor for name, tensor in target.state_dict().items() if name in wanted})
    prompts = [torch.tensor([ids]) for ids in smollm2.chat(tokenizer, CALIBRATION[:4])]
    return target, draft, tokenizer, prompts


def test_its_text_is_english(pair):
    target, _, tokenizer, _ = pair
    (ids,) = smollm2.chat(tokenizer, ["What is the capital of France?"])
    prompt = torch.tensor([ids])
    output = generate(target, None, prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12)
    text = tokenizer.decode(output.new_tokens[0])
    assert text.startswith("The capital of France is Paris")


def test_greedy_text_is_plain_decodings(pair):
    target, draft, _, prompts = pair
    accepted = []
    for ids in prompts:
        plain = target.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48, pad_token_id=0
        )
        output = generate(target, draft, ids, attention_mask=torch.ones_like(ids), tree=TREE, max_new_tokens=48)
        assert torch.equal(output.sequences, plain)
        accepted.append(output.stats.tokens_per_step)
    assert max(accepted) > 1  # drafted tokens were among them


@pytest.fixture(scope="module")
def texts(pair):
    """Twenty requests, and what plain decoding says to each."""
    target, _, tokenizer, _ = pair
    prompts = smollm2.chat(tokenizer, HELD_OUT[:20])
    common = {"max_new_tokens": 32, "eos_token_id": ()}
    outputs = [
        generate(target, None, ids, attention_mask=torch.ones_like(ids), **common)
        for ids in (torch.tensor([prompt]) for prompt in prompts)
    ]
    return prompts, [output.new_tokens[0] for output in outputs]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("kind", ["first layers", "layers:8", "smollm2", "smollm2-eagle3", "smollm2-dspark"])
def test_greedy_text_with_every_draft(pair, texts, kind, lookup, batch_size):
    target, draft, *_ = pair
    prompts, wanted = texts
    if kind.startswith("smollm2"):
        draft = smollm2.DRAFT.with_name(kind)
        if not (draft / "config.json").is_file():
            pytest.skip(f"bench/systems/train_draft.py has not written {draft.name}")
    elif kind == "layers:8":
        draft = kind
    draft = draft_source(str(draft) if isinstance(draft, Path) else draft, adapt(target))
    accepted = []
    for first in range(0, len(prompts), batch_size):
        rows = prompts[first : first + batch_size]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        tree = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 7])
        output = generate(
            target, draft, ids, attention_mask=mask, tree=tree, lookup=lookup, max_new_tokens=32, eos_token_id=()
        )
        assert output.new_tokens == wanted[first : first + batch_size]
        accepted.append(output.stats.tokens_per_step)
    assert max(accepted) > 1


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_both_rules_sample(pair, rule):
    target, draft, _, prompts = pair
    for seed, ids in enumerate(prompts[:2]):
        options = {"tree": TREE, "max_new_tokens": 32, "temperature": 1.0, "seed": seed, "eos_token_id": ()}
        options["attention_mask"] = torch.ones_like(ids)  # what ends a turn is also what pads
        output = generate(target, draft, ids, rule=rule, **options)
        assert len(output.new_tokens[0]) == 32
        assert 1 <= output.stats.tokens_per_step <= TREE.num_levels
        assert output.new_tokens == generate(target, draft, ids, rule=rule, **options).new_tokens
