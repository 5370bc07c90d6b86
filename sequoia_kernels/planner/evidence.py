"""What a pair's calls have shown of its acceptance, shrunk towards a prior for as long as that is little.

Every call counts, by rank, how many nodes tried a child and how many accepted it. Two things keep a first call from
deciding too much:

- A prior of a few pseudo-visits a rank. A child that was accepted every time is not taken to be accepted always, so no
  plan grows deeper than the evidence bears.
- Requests differ more than their counts tell: one text repeats itself, the next one does not. The visits of a request
  go together with a correlation rho, and n of them are worth n / (1 + (n - 1) * rho) (Kish's design effect), at most
  1 / rho however long the request was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels.documents import MAX_COUNT, Format, is_number
from sequoia_kernels.tree import TokenTree, vector_of_chances

__all__ = ["REQUEST_SPREAD", "AcceptanceEvidence", "visits_by_rank"]

FORMAT = Format("sequoia-kernels/acceptance-evidence", version=1)

# Chance of a child once those before it were rejected, by rank, of a middling draft; and how many visits that is worth.
# An optimist's: it costs a bad draft a few steps once, but too small a tree is not found out by what it shows.
PRIOR_HAZARDS = (0.65, 0.3, 0.2, 0.13, 0.1, 0.08, 0.06, 0.05)
PRIOR_VISITS = 10.0
# Over 16 texts of the demo pair the first child has a chance of .7, with a standard deviation of .12 between them.
REQUEST_CORRELATION = 0.08
REQUEST_SPREAD = 0.6  # the same in logits
MOST_VISITS = 1000.0  # beyond it what was seen first fades, so that the estimate follows the use that is made of it


@dataclass(frozen=True)
class AcceptanceEvidence:
    """Counts by rank of a pair at one sampling setting, discounted for the requests that they come from.

    Attributes:
        visited: discounted nodes that tried their child of each rank. [ranks] float.
        accepted: discounted nodes that accepted it. [ranks] float.
        num_visits: visits of the first rank, not discounted.

    Example:
        >>> nothing = AcceptanceEvidence()
        >>> lucky = nothing.with_run([60], [60])
        >>> bool(nothing.vector[0] < lucky.vector[0] < 0.9)
        True
    """

    visited: tuple[float, ...] = ()
    accepted: tuple[float, ...] = ()
    num_visits: int = 0

    def with_run(self, visited: Sequence[int], accepted: Sequence[int], num_requests: int = 1) -> AcceptanceEvidence:
        """Give the evidence with a run's counts added.

        Args:
            visited: `visited_by_rank` of its statistics. [ranks]
            accepted: `accepted_by_rank` of them. [ranks]
            num_requests: requests that the run decoded.

        Raises:
            ValueError: they are no such counts.
        """
        where = "AcceptanceEvidence.with_run"
        if len(visited) != len(accepted) or not all(
            0 <= taken <= tried < math.inf for tried, taken in zip(visited, accepted)
        ):
            raise ValueError(f"{where}: accepted must count at most what visited counts, got {accepted} of {visited}")
        if num_requests < 1:
            raise ValueError(f"{where}: num_requests must be at least 1, got {num_requests}")
        if not len(visited) or not visited[0]:
            return self
        weight = 1 / (1 + max(visited[0] / num_requests - 1, 0) * REQUEST_CORRELATION)
        kept = min(1.0, MOST_VISITS / (sum(self.visited[:1]) + weight * visited[0]))
        sides = []
        for old, new in ((self.visited, visited), (self.accepted, accepted)):
            total = np.zeros(max(len(old), len(new)))
            total[: len(old)] += old
            total[: len(new)] += weight * np.asarray(new)
            sides.append(tuple((kept * total).tolist()))
        return AcceptanceEvidence(sides[0], sides[1], self.num_visits + int(visited[0]))

    @property
    def hazards(self) -> NDArray[np.float64]:
        """Chance of each rank's child once those before it were rejected, shrunk to the prior. [ranks] float64."""
        ranks = max(len(self.visited), len(PRIOR_HAZARDS))
        prior = np.full(ranks, PRIOR_HAZARDS[-1])
        prior[: len(PRIOR_HAZARDS)] = PRIOR_HAZARDS
        visited, accepted = np.full(ranks, PRIOR_VISITS), PRIOR_VISITS * prior
        visited[: len(self.visited)] += self.visited
        accepted[: len(self.accepted)] += self.accepted
        return np.asarray(accepted / visited)

    @property
    def vector(self) -> NDArray[np.float64]:
        """The acceptance vector of these chances. [ranks] float64."""
        return vector_of_chances(self.hazards)

    @property
    def spread(self) -> float:
        """Standard deviation of a shift, in logits, of all chances together (see `shift_acceptance`)."""
        hazards = self.hazards
        visited = np.zeros(len(hazards))
        visited[: len(self.visited)] = self.visited
        visited[0] += PRIOR_VISITS
        return 1 / math.sqrt(float((visited * hazards * (1 - hazards)).sum()))

    def to_json(self, key: dict[str, Any]) -> str:
        """Give the evidence as a JSON document that names what it belongs to."""
        return FORMAT.dump(
            {"key": key, "visited": self.visited, "accepted": self.accepted, "num_visits": self.num_visits}
        )

    @classmethod
    def from_json(cls, text: str, where: str = "AcceptanceEvidence.from_json") -> tuple[AcceptanceEvidence, Any]:
        """Parse `to_json`'s document, and give what it belongs to as well.

        Raises:
            ValueError: the text is not such a document.
        """
        fields = FORMAT.parse(text, where)

        def counts(name: str) -> tuple[float, ...]:
            found = fields.entries(name, lambda count: is_number(count) and 0 <= count <= MAX_COUNT, "a list of counts")
            return tuple(map(float, found))

        visited, accepted = counts("visited"), counts("accepted")
        if len(visited) != len(accepted) or any(taken > tried for tried, taken in zip(visited, accepted)):
            raise fields.refuse("accepted", 'hold at most what "visited" holds')
        return cls(visited, accepted, fields.count("num_visits", least=0)), fields.inside("key").value


def visits_by_rank(tree: TokenTree, nodes: Sequence[int], num_accepted: int) -> tuple[list[int], list[int]]:
    """Count what one accepted path tells of acceptance.

    Args:
        tree: the tree.
        nodes: the path, from the root on; what lies behind the accepted nodes is not read.
        num_accepted: accepted nodes, the root included.

    Returns:
        How many nodes tried their child of each rank: those that had one and rejected all children before it; and how
        many of them accepted it. No longer than the highest rank that was tried.

    Example:
        >>> visits_by_rank(TokenTree([-1, 0, 0, 1]), [0, 2], 2)
        ([1, 1], [0, 1])
    """
    visited = [0] * tree.max_branching
    accepted = [0] * tree.max_branching
    num_children, first_child = tree.num_children, tree.first_child
    for level in range(num_accepted):
        node = nodes[level]
        accepted_rank = None
        if level + 1 < num_accepted:
            accepted_rank = nodes[level + 1] - first_child[node]
        for rank in range(num_children[node] if accepted_rank is None else accepted_rank + 1):
            visited[rank] += 1
        if accepted_rank is not None:
            accepted[accepted_rank] += 1
    while visited and not visited[-1]:  # ranks that no node of this path came to
        visited.pop()
        accepted.pop()
    return visited, accepted
