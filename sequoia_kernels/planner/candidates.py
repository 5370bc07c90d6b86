"""What plans choose from: trees with their predicted speeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sequoia_kernels.documents import Fields
from sequoia_kernels.planner.cost_model import STAGES
from sequoia_kernels.tree import MAX_STEP_ROWS, ShapedTree, TokenTree

__all__ = ["PlanCandidate", "milestones", "size_of", "speed_of"]

MAX_RATIO = 1e12  # of speeds, in a plan that is read


@dataclass(frozen=True)
class PlanCandidate:
    """One tree with its predicted speed.

    Attributes:
        tree: the tree; a `ShapedTree` where the plan was made from recorded steps and one is worth it.
        tokens_per_step: expected accepted tokens per step and request, bonus token included.
        stages: predicted milliseconds of a step by stage.
        speedup: tokens per second over those of no speculation.
    """

    tree: TokenTree | ShapedTree
    tokens_per_step: float
    stages: dict[str, float]
    speedup: float

    @property
    def kind(self) -> str:
        """ "tree", "shaped tree", "chain" or "no speculation"."""
        if isinstance(self.tree, ShapedTree):
            return "shaped tree"
        return "no speculation" if self.tree.num_nodes == 1 else "chain" if self.tree.is_chain else "tree"

    @property
    def token_tree(self) -> TokenTree:
        """The tree, where it is the same in every step; ValueError for a shaped one."""
        if isinstance(self.tree, ShapedTree):
            raise ValueError(
                f"{type(self).__name__}: tree must be a TokenTree, got {self.tree!r}; plan with shaped=False"
            )
        return self.tree

    @property
    def step_ms(self) -> float:
        """Predicted milliseconds of a step."""
        return sum(self.stages.values())

    @property
    def ms_per_token(self) -> float:
        """Predicted milliseconds for each token of a request."""
        return self.step_ms / self.tokens_per_step

    def to_fields(self) -> dict[str, Any]:
        """Give the candidate as plain JSON values."""
        numbers = {name: getattr(self, name) for name in ("tokens_per_step", "step_ms", "ms_per_token", "speedup")}
        tree = {"parents": self.tree.parents} if isinstance(self.tree, TokenTree) else {"shaped": self.tree.to_fields()}
        return {"kind": self.kind, **tree, **numbers, "stages": dict(self.stages)}

    @classmethod
    def read(cls, fields: Fields) -> PlanCandidate:
        """Read a candidate from the fields that `to_fields` gave."""
        tree: TokenTree | ShapedTree
        if "shaped" in fields:
            tree = ShapedTree.from_fields(fields.inside("shaped"))
        else:
            tree = TokenTree.from_parents_field(fields)
        if tree.num_nodes > MAX_STEP_ROWS:
            raise fields.refuse("parents", f"be a tree of at most {MAX_STEP_ROWS} nodes", f"one of {tree.num_nodes}")
        stages = fields.inside("stages")
        if set(stages) != set(STAGES):
            actual = f"those of {', '.join(stages)[:60]}"
            raise fields.refuse("stages", f"hold the times of {', '.join(STAGES)}", actual)
        times = {name: stages.time(name) for name in STAGES}
        if not sum(times.values()) > 0:
            raise fields.refuse("stages", "add up to more than 0 milliseconds", "0")
        tokens = fields.number("tokens_per_step", lambda value: 1 <= value <= MAX_RATIO, "a number >= 1")
        speedup = fields.number("speedup", lambda value: 1 / MAX_RATIO <= value <= MAX_RATIO, "a number > 0")
        return PlanCandidate(tree, float(tokens), times, float(speedup))


def speed_of(candidate: PlanCandidate) -> float:
    """Tokens per millisecond."""
    return candidate.tokens_per_step / candidate.step_ms


def size_of(candidate: PlanCandidate) -> tuple[int, float]:
    """Order of preference among candidates of about the same speed."""
    return candidate.tree.num_nodes, -speed_of(candidate)


def milestones(max_budget: int) -> Iterable[int]:
    """Budgets that the table of candidates shows: powers of two, and the largest."""
    yield from (1 << power for power in range(1, (max_budget - 1).bit_length()))
    yield max_budget
