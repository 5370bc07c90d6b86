"""Verification rules by name."""

from __future__ import annotations

import pytest

from sequoia_kernels import TokenTree
from sequoia_kernels.tree import DEFAULT_RULE, VerificationRule, register_rule, rule_named, rule_names, rules


def test_the_default_rule_values_a_tree_as_the_tree_does() -> None:
    tree, acceptance = TokenTree([-1, 0, 0, 1, 1, 3]), [0.6, 0.2]
    assert rule_named("here", DEFAULT_RULE).expected_tokens(tree, acceptance) == tree.expected_tokens(acceptance)


def test_a_rule_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
    toy = VerificationRule("first_child", lambda tree, acceptance: 1.0 + (tree.num_nodes > 1) * acceptance[0])
    register_rule(toy)
    assert rule_names() == (DEFAULT_RULE, "traversal", "first_child")
    assert rule_named("here", "first_child").expected_tokens(TokenTree.chain(4), [0.5]) == 1.5


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="generate: rule must be one of sequoia, traversal, got 'nope'"):
        rule_named("generate", "nope")
    with pytest.raises(TypeError, match="plan_tree: rule must be a string, got int"):
        rule_named("plan_tree", 3)
    with pytest.raises(TypeError, match="register_rule: rule must be a VerificationRule"):
        register_rule("sequoia")  # type: ignore[arg-type]
