"""Trees for tests: all small ones, and random ones from hypothesis."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st


def all_parents(num_nodes: int) -> Iterator[list[int]]:
    """Every tree of so many nodes, as breadth-first parents: non-decreasing, each before its child."""

    def extended(parents: list[int]) -> Iterator[list[int]]:
        if len(parents) == num_nodes:
            yield parents
            return
        for parent in range(max(parents[-1], 0), len(parents)):
            yield from extended([*parents, parent])

    yield from extended([-1])


@st.composite
def parents_lists(draw: st.DrawFn, max_nodes: int = 80) -> list[int]:
    """Breadth-first parents of a random tree."""
    parents = [-1]
    for _ in range(draw(st.integers(0, max_nodes - 1))):
        last = max(parents[-1], 0)
        # small steps mostly: bushy and deep trees both appear
        step = draw(st.sampled_from([0, 0, 0, 1, 1, 2, 5]))
        parents.append(min(last + step, len(parents) - 1))
    return parents
