"""Verification rules by name: how a drafted tree is decided, and what a tree is worth under that decision.

A rule has two halves that never meet in code: `verify_tree` decides with it (each backend says in `supports` which
rules it knows), the planner values trees with it. What joins them is the name, which `verify_tree`, `plan_tree` and
`generate` take as `rule`. A new rule is one `register_rule` here and a backend that knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sequoia_kernels.tree.token_tree import TokenTree

__all__ = ["DEFAULT_RULE", "VerificationRule", "register_rule", "rule_named", "rule_names", "usual_rule"]

DEFAULT_RULE = "sequoia"


class VerificationRule(NamedTuple):
    """A verification rule as the planner sees it.

    A rule must keep the target's distribution. It may rely on this of a tree: a node is included only by what was
    known before its own token was drawn, and a node's children are drawn without replacement, in the order of ranks.

    Attributes:
        name: what `verify_tree`, `plan_tree` and `generate` are given as `rule`.
        expected_tokens: mean number of tokens that a step emits with a tree, the bonus token included, from the tree
            and an acceptance vector: [max_children], the probability that the child of each rank is the accepted one.
        adds_up: whether that is the sum over the tree's nodes of the products along their paths, as `TokenTree` adds
            it up: then trees are planned with the tables of optimal ones.
    """

    name: str
    expected_tokens: Callable[[TokenTree, Sequence[float]], float]
    adds_up: bool = False


_rules: dict[str, VerificationRule] = {}


def register_rule(rule: VerificationRule) -> None:
    """Make a rule known by its name. It replaces one of the same name.

    Args:
        rule: the rule.

    Raises:
        TypeError: not a `VerificationRule` with a name and a function.
    """
    if not isinstance(rule, VerificationRule) or not isinstance(rule.name, str) or not callable(rule.expected_tokens):
        raise TypeError(f"register_rule: rule must be a VerificationRule with a name and a function, got {rule!r}")
    _rules[rule.name] = rule


def rule_names() -> tuple[str, ...]:
    """Give the names of the rules, in the order in which they became known."""
    return tuple(_rules)


def rule_named(where: str, name: Any) -> VerificationRule:
    """Find a rule by its name.

    Args:
        where: function named in the messages.
        name: the name.

    Raises:
        TypeError: the name is no string.
        ValueError: there is no such rule.

    Example:
        >>> from sequoia_kernels import TokenTree
        >>> rule_named("plan_tree", "sequoia").expected_tokens(TokenTree.chain(3), [0.5])
        1.75
    """
    if not isinstance(name, str):
        raise TypeError(f"{where}: rule must be a string, got {type(name).__name__}")
    if name not in _rules:
        raise ValueError(f"{where}: rule must be one of {', '.join(_rules)}, got {name!r}")
    return _rules[name]


def usual_rule(device_type: str, sampled: bool) -> str:
    """Give the rule that is taken where none is asked for: the faster one, where both were measured.

    On a CPU that is "traversal" above temperature 0 (`bench.planner.bench_rules`); greedily all rules are one. On other
    devices the rule "traversal" has not been timed yet.

    Args:
        device_type: of the target, such as "cpu".
        sampled: whether anything is decoded above temperature 0.

    Example:
        >>> usual_rule("cpu", True), usual_rule("cpu", False)
        ('traversal', 'sequoia')
    """
    return "traversal" if device_type == "cpu" and sampled else DEFAULT_RULE


# From the root: each node's children are tried in turn, and a rejected node takes its subtree with it.
register_rule(VerificationRule(DEFAULT_RULE, lambda tree, acceptance: tree.expected_tokens(acceptance), adds_up=True))

# From the leaves: the deepest node is tested first, with the probability that the path to it deserves as a whole. What
# a node is worth depends on what is below it, so a vector only sums up what such runs have accepted in trees like
# theirs; recorded steps (`planner.StepRecords`) tell more.
register_rule(VerificationRule("traversal", lambda tree, acceptance: tree.expected_tokens(acceptance), adds_up=True))
