"""What a tree engine is told beside vLLM's own arguments, as it travels in `additional_config["sequoia"]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sequoia_kernels import checks
from sequoia_kernels.planner.adaptive import shift_acceptance
from sequoia_kernels.planner.evidence import AcceptanceEvidence
from sequoia_kernels.planner.plan import TreePlan
from sequoia_kernels.planner.search import optimal_tree
from sequoia_kernels.planner.tree_files import read_tree
from sequoia_kernels.tree import DEFAULT_RULE, TokenTree, rule_named

__all__ = ["CONFIG_KEY", "LOGGER", "TreeSettings", "trees_from"]

CONFIG_KEY = "sequoia"
LOGGER = "vllm.sequoia_kernels"  # below vLLM's own: its handlers and levels
WHERE = "vllm.engine_args"

# The trees to choose from are optimal for drafts between poor and excellent: the usual acceptance, shifted by so much.
SHIFT_LADDER = (-1.0, 0.0, 1.0, 2.0)
TREE_SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
MAX_TREE_NODES = 256
SEEDED_NODES = 6


@dataclass(frozen=True)
class TreeSettings:
    """Settings of the tree engine; plain values, so that they travel to every process of vLLM.

    Attributes:
        draft: folder or hub id of the draft model.
        trees: parents of the trees to choose from, -1 for the root; of requests with seeds the first one.
        by_load: whether the tree is chosen anew for every step, no tree among the choices; else it is the first.
        rule: verification rule.
        draft_dtype: dtype to load the draft in, such as "bfloat16"; the target's if None.
        draft_cache_tokens: tokens that the draft's pages hold, all requests together; as many as vLLM's own cache if
            None.
        profile_seconds: how long steps are timed at start, at most.
        check_ranks: compare what ranks decide in every step, and what they would have drafted.
    """

    draft: str
    trees: tuple[tuple[int, ...], ...]
    by_load: bool = True
    rule: str = DEFAULT_RULE
    draft_dtype: str | None = None
    draft_cache_tokens: int | None = None
    profile_seconds: float = 3.0
    check_ranks: bool = False

    @property
    def max_nodes(self) -> int:
        """Nodes of the largest tree."""
        return max(map(len, self.trees))

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values, without those that are the default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        values["trees"] = [list(parents) for parents in self.trees]
        return {name: value for name, value in values.items() if name == "trees" or value != defaults[name]}

    @classmethod
    def from_dict(cls, document: Any, where: str = f"additional_config[{CONFIG_KEY!r}]") -> TreeSettings:
        """Read what `to_dict` gives.

        Raises:
            TypeError, ValueError: a value is missing, unknown or out of range; the message names it.
        """
        if not isinstance(document, Mapping):
            raise TypeError(
                f"{where} must be the mapping that vllm.engine_args gives, got {type(document).__name__}; keys of your "
                "own go beside it, into one additional_config"
            )
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(document) - known)
        if unknown:
            raise ValueError(f"{where}: keys must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
        missing = [name for name in ("draft", "trees") if name not in document]
        if missing:
            raise ValueError(f"{where}: {missing[0]} must be given")
        trees = document["trees"]
        if not isinstance(trees, Sequence) or not all(isinstance(parents, Sequence) for parents in trees):
            raise TypeError(f"{where}: trees must be lists of parents, got {trees!r}")
        settings = cls(**{**document, "trees": tuple(tuple(parents) for parents in trees)})
        settings.check(where)
        return settings

    def check(self, where: str = WHERE) -> None:
        """Raise TypeError or ValueError where a value is out of range."""
        for name in ("draft", "rule"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise TypeError(f"{where}: {name} must be a string, got {getattr(self, name)!r}")
        for name in ("by_load", "check_ranks"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{where}: {name} must be a bool, got {getattr(self, name)!r}")
        if self.draft_dtype is not None and self.draft_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{where}: draft_dtype must be float32, bfloat16 or float16, got {self.draft_dtype!r}")
        if self.draft_cache_tokens is not None:
            checks.whole_number(where, "draft_cache_tokens", self.draft_cache_tokens, rule=checks.at_least(1))
        checks.real_number(where, "profile_seconds", self.profile_seconds, checks.NOT_NEGATIVE)
        rule_named(where, self.rule)
        if not self.trees:
            raise ValueError(f"{where}: trees must hold at least one tree, got none")
        for parents in self.trees:
            tree = TokenTree(parents)
            if not 2 <= tree.num_nodes <= MAX_TREE_NODES:
                raise ValueError(f"{where}: trees must have 2 to {MAX_TREE_NODES} nodes each, got {tree.num_nodes}")


def trees_from(tree: Any, max_nodes: int) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """Read the argument `tree` of `engine_args`.

    Args:
        tree: "auto"; one tree: a `TokenTree`, its parents, or the path of a file of one; or several trees.
        max_nodes: nodes of the largest tree of "auto".

    Returns:
        The trees' parents, and whether one of them is chosen by load.
    """
    limit = checks.whole_number(WHERE, "max_nodes", max_nodes, rule=checks.within(2, MAX_TREE_NODES))
    if isinstance(tree, str) and tree == "auto":
        return _ladder(limit), True
    if isinstance(tree, TokenTree):
        return (tuple(tree.parents),), False
    if isinstance(tree, (str, Path)):
        try:
            held = read_tree(tree)
        except (FileNotFoundError, IsADirectoryError) as error:
            message = f"{WHERE}: tree must be 'auto' or the path of a tree file, got {str(tree)!r}: no such file"
            raise FileNotFoundError(message) from error
        held = held.tree if isinstance(held, TreePlan) else held
        if not isinstance(held, TokenTree):
            raise TypeError(
                f"{WHERE}: tree must be a file of a TokenTree or a plan of one, got a {type(held).__name__}"
            )
        return (tuple(held.parents),), False
    if isinstance(tree, Sequence) and len(tree) and all(isinstance(parent, int) for parent in tree):
        return (tuple(TokenTree(tree).parents),), False
    if isinstance(tree, Sequence) and len(tree):
        trees = [entry for item in tree for entry in trees_from(item, max_nodes)[0]]
        return tuple(dict.fromkeys(trees)), True
    raise TypeError(
        f"{WHERE}: tree must be 'auto', a TokenTree, its parents, the path of a tree file, or several of these, "
        f"got {tree!r}"
    )


def _ladder(max_nodes: int) -> tuple[tuple[int, ...], ...]:
    """The trees of "auto": the same ones in every process. First the one for requests with seeds."""
    sizes = [size for size in TREE_SIZES if size < max_nodes] + [max_nodes]
    vectors = [shift_acceptance(AcceptanceEvidence().vector, shift).tolist() for shift in SHIFT_LADDER]
    trees = dict.fromkeys(tuple(optimal_tree(vector, size).parents) for vector in vectors for size in sizes)
    first = tuple(optimal_tree(vectors[1], min(SEEDED_NODES, max_nodes)).parents)
    return (first, *(parents for parents in trees if parents != first))
