"""A real model of 135M parameters, where its wheel is installed: greedy text is plain decoding's, both rules sample."""

from __future__ import annotations

import copy

import pytest
import support.bench_scripts  # noqa: F401  (bench/ is found)
import torch

from bench.common import smollm2
from bench.common.smollm2_prompts import CALIBRATION
from sequoia_kernels import TokenTree, generate

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
