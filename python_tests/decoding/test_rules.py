"""A verification rule by name, through the loop: a toy that accepts nothing, and so decodes one token a step."""

from __future__ import annotations

import pytest
import torch
from support.synthetic_profile import synthetic_profile
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, adapt, generate, plan_tree
from sequoia_kernels.decoding import step as step_module
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.ops import backends
from sequoia_kernels.planner import ModelFingerprint
from sequoia_kernels.tree import VerificationRule, register_rule, rules

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
PROMPT = torch.tensor([[1, 2, 3, 4]])


def decide(inputs, outputs):
    """Accept the root alone; the token behind it is the target's own choice."""
    nodes, num_accepted, next_token = outputs or (
        inputs.tokens.new_empty((len(inputs.tokens), inputs.num_levels), dtype=torch.int32),
        inputs.tokens.new_empty(len(inputs.tokens), dtype=torch.int32),
        inputs.tokens.new_empty(len(inputs.tokens)),
    )
    nodes.fill_(-1)[:, 0] = 0
    num_accepted.fill_(1)
    next_token.copy_(inputs.target_logits[:, 0].argmax(-1))
    return nodes, num_accepted, next_token


@pytest.fixture
def root_rule(monkeypatch):
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
    for name in ("_modules", "_loaded", "_reasons"):
        monkeypatch.setattr(backends, name, {op: dict(found) for op, found in getattr(backends, name).items()})
    monkeypatch.setattr(backends, "_auto", {})
    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", (*backends.AUTO_ORDER["cpu"], "toy"))
    register_rule(VerificationRule("root", lambda tree, acceptance: 1.0))
    backends.register_backend(
        "verify_tree", "toy", lambda inputs: None if inputs.rule == "root" else "knows the rule root", decide
    )


def test_a_rule_decides_by_the_backend_that_knows_it(root_rule):
    target = tiny_llama(3, vocab_size=24, sharpness=6.0)
    draft = noisy_copy(target, 0.2)
    plain = generate(target, None, PROMPT, max_new_tokens=30)
    usual = generate(target, draft, PROMPT, tree=TREE, max_new_tokens=30)
    by_rule = generate(target, draft, PROMPT, tree=TREE, max_new_tokens=30, rule="root")
    assert plain.new_tokens == usual.new_tokens == by_rule.new_tokens
    assert usual.stats.tokens_per_step > 1.5 and by_rule.stats.tokens_per_step == 1
    with pytest.raises(
        BackendUnavailableError, match=r"verify_tree: backend 'reference' cannot run this call: knows the"
    ):
        generate(target, draft, PROMPT, tree=TREE, max_new_tokens=30, rule="root", backend="reference")


def test_the_usual_rule_is_the_faster_one_that_was_measured(monkeypatch):
    """On a CPU: traversal where something is sampled. A plan says its own, and the caller has the last word."""
    target = tiny_llama(3, vocab_size=24, sharpness=6.0)
    draft = noisy_copy(target, 0.2)
    seen = []
    own = step_module.DecodingStep.__init__

    def init(self, *args, rule, **kwargs):
        seen.append(rule)
        own(self, *args, rule=rule, **kwargs)

    monkeypatch.setattr(step_module.DecodingStep, "__init__", init)
    profile = synthetic_profile(target=ModelFingerprint.of(adapt(target)), draft=ModelFingerprint.of(adapt(draft)))
    planned = {rule: plan_tree([0.6, 0.2], profile, rule=rule) for rule in (None, "traversal")}
    for options, expected in (
        ({"temperature": 0.7}, "traversal"),
        ({"temperature": 0.0}, "sequoia"),
        ({"temperature": 0.7, "rule": "sequoia"}, "sequoia"),
        ({"temperature": 0.7, "tree": planned[None]}, "sequoia"),
        ({"temperature": 0.7, "tree": planned["traversal"]}, "traversal"),
        ({"temperature": 0.0, "rule": "traversal"}, "traversal"),
    ):
        generate(target, draft, PROMPT, **{"tree": TREE, "max_new_tokens": 4} | options)
        assert seen.pop() == expected, options
    outputs = [
        generate(target, draft, PROMPT, tree=TREE, max_new_tokens=30, temperature=0.7, rule=rule).new_tokens
        for rule in (None, "traversal")
    ]
    assert outputs[0] == outputs[1]


def test_an_unknown_rule_is_refused_before_anything_runs():
    target = tiny_llama(3)
    with pytest.raises(ValueError, match="generate: rule must be one of sequoia, traversal, got 'root'"):
        generate(target, None, PROMPT, rule="root")
    with pytest.raises(TypeError, match="generate: rule must be a string, got int"):
        generate(target, None, PROMPT, rule=3)
