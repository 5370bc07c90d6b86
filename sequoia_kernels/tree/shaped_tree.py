"""Trees that take their shape while they grow: fixed widths, children given to the nodes that are likeliest accepted.

A token tree is the same in every step. But drafts are sure of themselves at some places and not at others, and a child
behind an unlikely token is worth little. So only the number of nodes of each level is fixed here; which of them get how
many children is decided in every step, before these are drawn, from what is known then: the tokens above with their
probabilities, and how sure the draft is of what comes next, or what it foretells of that itself. Never from the
children's own tokens: a node that is kept or dropped for the token it has drawn changes the distribution of what is
emitted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import Any, ClassVar

from sequoia_kernels.documents import Document, Fields, Format, is_integer, is_number
from sequoia_kernels.tree.token_tree import MAX_STEP_ROWS, TokenTree

__all__ = ["PROBABILITY_EDGES", "Confidence", "ShapedTree"]

# Between these probabilities of the draft confidence is constant: bin i holds those from edge i - 1 to below edge i.
PROBABILITY_EDGES = (
    2.0**-10, 2.0**-8, 2.0**-6, 2.0**-5, 2.0**-4, 0.125,
    0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999,
)  # fmt: skip
NUM_BINS = len(PROBABILITY_EDGES) + 1
MAX_RANKS = 64

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Confidence:
    """How often a child is accepted once its parent is, by what the draft says; see `planner.fit_confidence`.

    The draft's probabilities are those at the request's temperature, at temperature 0 those at 1. Ranks behind the last
    one of a table count as that one.

    Attributes:
        drawn: by the child's rank and its own probability, once it is drawn. [ranks][bins], in (0, 1].
        undrawn: by the child's rank and the probability of its parent's likeliest next token, which is known before the
            child is. [ranks][bins], in (0, 1], falling with the rank: it has as many ranks as a node gets children.
        foretold: `undrawn` goes by what the draft itself foretells at the parent, where it does (a confidence head), in
            place of that probability.

    Raises:
        TypeError: the tables do not hold numbers, or foretold is no boolean.
        ValueError: a table has no ranks or another number of bins than `PROBABILITY_EDGES` makes, or an entry is out of
            range.
    """

    drawn: Table
    undrawn: Table
    foretold: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.foretold, bool):
            raise TypeError(f"Confidence: foretold must be a boolean, got {type(self.foretold).__name__}")
        for name in ("drawn", "undrawn"):
            table = tuple(map(tuple, getattr(self, name)))
            where = f"Confidence: {name} must"
            if not 1 <= len(table) <= MAX_RANKS or any(len(row) != NUM_BINS for row in table):
                sizes = sorted({len(row) for row in table})
                raise ValueError(f"{where} be 1 to {MAX_RANKS} rows of {NUM_BINS}, got {len(table)} of {sizes}")
            for row in table:
                for entry in row:
                    if not isinstance(entry, Real) or isinstance(entry, bool):
                        raise TypeError(f"{where} hold numbers, got {type(entry).__name__}")
                    if not 0 < float(entry) <= 1:
                        raise ValueError(f"{where} have entries in (0, 1], got {entry}")
            object.__setattr__(self, name, tuple(tuple(map(float, row)) for row in table))
        for better, worse in zip(self.undrawn, self.undrawn[1:]):
            if not all(high > low for high, low in zip(better, worse)):
                raise ValueError("Confidence: undrawn must fall from rank to rank, got one that does not")

    @property
    def max_children(self) -> int:
        """Children that a node gets at most."""
        return len(self.undrawn)

    @staticmethod
    def bin_of(probability: float) -> int:
        """Give the column of the tables for a probability of the draft.

        Example:
            >>> Confidence.bin_of(0.0), Confidence.bin_of(0.5), Confidence.bin_of(1.0)
            (0, 10, 18)
        """
        return bisect_right(PROBABILITY_EDGES, probability)


@dataclass(frozen=True)
class ShapedTree(Document):
    """A tree of fixed widths whose nodes get their children while it grows: `generate` takes it as its tree.

    Attributes:
        widths: nodes of each level, 1 for the root; at most `confidence.max_children` times those of the level above.
        confidence: by which children are given out.

    Raises:
        TypeError: widths are no integers, or confidence is none.
        ValueError: widths do not begin with 1, a level is empty or wider than it can be, or there are more than 1024
            nodes.

    Example:
        >>> confidence = Confidence([[0.5] * 19], [[0.5] * 19, [0.1] * 19])
        >>> ShapedTree([1, 2, 3], confidence).num_nodes
        6
    """

    FORMAT: ClassVar[Format] = Format("sequoia-kernels/shaped-tree", 1, indent=None)

    widths: tuple[int, ...]
    confidence: Confidence

    def __post_init__(self) -> None:
        where = "ShapedTree: widths must"
        if not isinstance(self.confidence, Confidence):
            raise TypeError(f"ShapedTree: confidence must be a Confidence, got {type(self.confidence).__name__}")
        if (
            not isinstance(self.widths, Sequence)
            or isinstance(self.widths, str)
            or not all(map(is_integer, self.widths))
        ):
            raise TypeError(f"{where} be a sequence of integers, got {self.widths!r}")
        object.__setattr__(self, "widths", tuple(map(int, self.widths)))
        if self.widths[:1] != (1,):
            raise ValueError(f"{where} begin with 1, for the root, got {list(self.widths)}")
        for above, width in zip(self.widths, self.widths[1:]):
            if not 1 <= width <= above * self.confidence.max_children:
                most = f"1 to {self.confidence.max_children} times the level above"
                raise ValueError(f"{where} be {most}, got {width} below {above}")
        if self.num_nodes > MAX_STEP_ROWS:
            raise ValueError(f"{where} add up to at most {MAX_STEP_ROWS} nodes, got {self.num_nodes}")

    def __repr__(self) -> str:
        return f"ShapedTree(widths={list(self.widths)})"

    @property
    def num_nodes(self) -> int:
        """Nodes of the tree, the root included."""
        return sum(self.widths)

    @property
    def num_levels(self) -> int:
        """Levels of the tree, the root's included."""
        return len(self.widths)

    @property
    def max_branching(self) -> int:
        """Children that a node may get; 0 for a lone root."""
        return min(self.confidence.max_children, max(self.widths[1:], default=0))

    def level_nodes(self, level: int) -> range:
        """Give the nodes of a level."""
        first = sum(self.widths[:level])
        return range(first, first + self.widths[level])

    def even(self) -> TokenTree:
        """Give a token tree of the same widths whose levels' children are spread evenly: one of many shapes."""
        parents = [-1]
        for first, width, below in zip(accumulate(self.widths, initial=0), self.widths, self.widths[1:]):
            parents += sorted(first + child % width for child in range(below))
        return TokenTree(parents)

    def to_fields(self) -> dict[str, Any]:
        """Give the tree as plain JSON values."""
        tables = {name: [list(row) for row in getattr(self.confidence, name)] for name in ("drawn", "undrawn")}
        said = {"foretold": True} if self.confidence.foretold else {}
        return {"widths": list(self.widths), "edges": list(PROBABILITY_EDGES), **tables, **said}

    @classmethod
    def from_fields(cls, fields: Fields) -> ShapedTree:
        """Read a tree from the fields that `to_fields` gave."""
        widths = fields.entries("widths", is_integer, "a list of integers")
        if tuple(fields.entries("edges", is_number, "a list of numbers")) != PROBABILITY_EDGES:
            raise fields.refuse("edges", "be those of this sequoia-kernels", "others; make the tree again")
        drawn, undrawn = (fields.entries(name, _is_row, "rows of numbers") for name in ("drawn", "undrawn"))
        foretold = fields.get("foretold", lambda value: isinstance(value, bool), "a boolean", optional=True)
        try:
            return cls(tuple(widths), Confidence(drawn, undrawn, bool(foretold)))
        except (TypeError, ValueError) as reason:
            raise fields.refuse(
                "widths", "be those of a shaped tree with its confidence", f"others: {reason}"
            ) from None


def _is_row(value: object) -> bool:
    return isinstance(value, list) and all(map(is_number, value))
