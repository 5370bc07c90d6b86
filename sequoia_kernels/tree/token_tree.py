"""TokenTree: the shape of one speculation step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import islice, pairwise
from typing import Any, NoReturn

import torch

from sequoia_kernels import checks
from sequoia_kernels.documents import Document, Fields, Format, is_count, write_bytes, write_text
from sequoia_kernels.errors import TreeFormatError
from sequoia_kernels.tree import drawing, growmap
from sequoia_kernels.tree.acceptance_vector import check_acceptance
from sequoia_kernels.tree.topology import Topology

__all__ = ["MAX_NODES", "MAX_STEP_ROWS", "TokenTree"]

# Rows of one step: what the ops, the models and the loop take of a tree or of a prompt's chunk.
MAX_STEP_ROWS = 1024
# Planning and drawing may look further.
MAX_NODES = 65536

FIELDS = ("format", "version", "parents")


class TokenTree(Document):
    """An immutable tree of tokens to be drafted and verified in one step.

    Node 0 is the root: the last emitted token. Nodes are numbered breadth-first: levels one after another, the
    children of a node side by side in draw order (rank 0 is drawn first). All nodes below the root are speculated.

    Args:
        parents: parent of each node. [nodes] integers, `parents[0] == -1`, non-decreasing, `parents[i] < i`; at most
            65536.

    Raises:
        TypeError: parents is not a sequence of integers.
        ValueError: parents is not a breadth-first tree, or too large; the message names the entry and the rule.

    Notes:
        Equal trees compare and hash equal. Methods that return lists return fresh ones.

    Example:
        >>> tree = TokenTree([-1, 0, 0, 1, 1, 2])
        >>> tree.num_levels, tree.widths, tree.children(1)
        (3, [1, 2, 3], [3, 4])
        >>> tree.expected_tokens([0.6, 0.2])
        2.4
    """

    _parents: tuple[int, ...]
    _depths: tuple[int, ...]
    _first_child: tuple[int, ...]
    _num_children: tuple[int, ...]
    _level_starts: tuple[int, ...]
    _hash: int
    _device_tensors: dict[torch.device, Topology]

    def __init__(self, parents: Iterable[int]) -> None:
        checked = _check_parents(parents)
        num_nodes = len(checked)
        depths = [0] * num_nodes
        first_child = [-1] * num_nodes
        num_children = [0] * num_nodes
        level_starts = [0]
        for node in range(1, num_nodes):
            parent = checked[node]
            depths[node] = depths[parent] + 1
            if depths[node] == len(level_starts):
                level_starts.append(node)
            if num_children[parent] == 0:
                first_child[parent] = node
            num_children[parent] += 1
        level_starts.append(num_nodes)
        vars(self).update(
            _parents=checked, _depths=tuple(depths), _first_child=tuple(first_child), _num_children=tuple(num_children),
            _level_starts=tuple(level_starts), _hash=hash(checked), _device_tensors={},
        )  # fmt: skip

    # ---- identity ----

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"TokenTree: {name} must not be set, trees are immutable; build another TokenTree")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"TokenTree: {name} must not be deleted, trees are immutable")

    def __eq__(self, other: object) -> bool:
        return self._parents == other._parents if isinstance(other, TokenTree) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[TokenTree], tuple[list[int]]]:
        return TokenTree, (self.parents,)

    def __copy__(self) -> TokenTree:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> TokenTree:
        return self

    def __len__(self) -> int:
        return self.num_nodes

    def __repr__(self) -> str:
        if self.num_nodes <= 16:
            return f"TokenTree({self.parents})"
        widths = ", ".join(map(str, self.widths[:12])) + (", ..." if self.num_levels > 12 else "")
        return f"<TokenTree of {self.num_nodes} nodes on {self.num_levels} levels, widths [{widths}]>"

    # ---- topology ----

    @property
    def parents(self) -> list[int]:
        """Parent of each node, -1 for the root."""
        return list(self._parents)

    @property
    def num_nodes(self) -> int:
        """Number of nodes, root included: the tree's budget."""
        return len(self._parents)

    @property
    def num_levels(self) -> int:
        """Depth of the deepest node + 1; 1 for a lone root."""
        return len(self._level_starts) - 1

    @property
    def depths(self) -> list[int]:
        """Edges between the root and each node."""
        return list(self._depths)

    @property
    def first_child(self) -> list[int]:
        """First child of each node, -1 for leaves."""
        return list(self._first_child)

    @property
    def num_children(self) -> list[int]:
        """Number of children of each node."""
        return list(self._num_children)

    @property
    def widths(self) -> list[int]:
        """Number of nodes on each level."""
        return [end - start for start, end in pairwise(self._level_starts)]

    @property
    def max_branching(self) -> int:
        """Largest number of children of any node; 0 for a lone root."""
        return max(self._num_children)

    @property
    def is_chain(self) -> bool:
        """Whether no node has more than one child; true for a lone root."""
        return self.max_branching <= 1

    def children(self, node: int) -> list[int]:
        """Return the children of a node in draw order."""
        node = self._check_index("node", node, self.num_nodes, "children")
        first = self._first_child[node]
        return list(range(first, first + self._num_children[node])) if first >= 0 else []

    def rank(self, node: int) -> int:
        """Return a node's place among its siblings, from 0 in draw order. The root has no siblings: 0."""
        node = self._check_index("node", node, self.num_nodes, "rank")
        return node - self._first_child[self._parents[node]] if node > 0 else 0

    def level_nodes(self, level: int) -> list[int]:
        """Return the nodes of a level, which are consecutive."""
        level = self._check_index("level", level, self.num_levels, "level_nodes")
        return list(range(self._level_starts[level], self._level_starts[level + 1]))

    def internal_nodes(self, level: int) -> list[int]:
        """Return the nodes of a level that have children: those that the draft model is fed."""
        level = self._check_index("level", level, self.num_levels, "internal_nodes")
        start, end = self._level_starts[level], self._level_starts[level + 1]
        return [node for node in range(start, end) if self._num_children[node] > 0]

    def ancestor_mask(self) -> torch.Tensor:
        """Return which nodes each node sees: itself and its ancestors.

        Returns:
            Bit j % 32 of word j // 32 in row i is set iff node j is i or an ancestor of i. [nodes, ceil(nodes / 32)],
            int32, CPU, fresh.

        Example:
            >>> TokenTree([-1, 0, 0, 1]).ancestor_mask().tolist()
            [[1], [3], [5], [11]]
        """
        return self.tensors().ancestor_mask.clone()

    def tensors(self, device: torch.device | str = "cpu") -> Topology:
        """Return the topology as tensors on a device.

        Args:
            device: where the tensors live.

        Returns:
            Topology, made at the first call for each device and shared by later ones; do not write to them.

        Notes:
            The first call for a CUDA device copies from the host, so make it before capturing a graph.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        cached = self._device_tensors.get(device)
        if cached is not None:
            return cached
        ranks = [self.rank(node) for node in range(self.num_nodes)]
        by_node = (self._parents, self._depths, ranks, self._first_child, self._num_children, self._packed_mask())
        # The cache outlives the caller's inference mode, in which tensors would be unusable elsewhere.
        with torch.inference_mode(False):
            parts: list[Any] = [torch.tensor(values, dtype=torch.int32).to(device) for values in by_node]
            parts += [self.num_levels, self.max_branching]
            made = Topology(*parts)
        if type(made.ancestor_mask) is torch.Tensor:  # fake tensors of a tracer must not stay behind
            self._device_tensors[device] = made
        return made

    # ---- values ----

    def node_values(self, acceptance: Sequence[float]) -> list[float]:
        """Return the probability that a step accepts each node.

        Args:
            acceptance: probability that the child of each rank is the accepted one. [max_children], each >= 0, sum <=
                1. Ranks beyond the end are never accepted.

        Returns:
            Product of acceptance[rank] along the path to each node, 1 for the root. [nodes] floats.

        Raises:
            TypeError, ValueError: acceptance is not such a vector.

        Source:
            Sequoia (arXiv 2402.12374), section 3.1.
        """
        return self._values(acceptance, "node_values")

    def expected_tokens(self, acceptance: Sequence[float]) -> float:
        """Return the mean number of tokens that a step emits, the bonus token included: the sum of all node values.

        Args:
            acceptance: as in `node_values`.

        Raises:
            TypeError, ValueError: acceptance is not such a vector.

        Example:
            >>> TokenTree.chain(3).expected_tokens([0.5])
            1.75
        """
        return math.fsum(self._values(acceptance, "expected_tokens"))

    # ---- other trees ----

    @classmethod
    def single(cls) -> TokenTree:
        """Return the lone root: decoding without speculation."""
        return cls([-1])

    @classmethod
    def chain(cls, num_nodes: int) -> TokenTree:
        """Return a chain of `num_nodes` nodes, root included: classical speculation of `num_nodes - 1` tokens."""
        num_nodes = _check_count(num_nodes, "chain", "num_nodes")
        return cls(range(-1, num_nodes - 1))

    @classmethod
    def kary(cls, branching: int, num_levels: int) -> TokenTree:
        """Return the full tree in which every node above the last level has `branching` children."""
        branching = _check_count(branching, "kary", "branching")
        num_levels = _check_count(num_levels, "kary", "num_levels")
        num_internal, width = 0, 1
        for _ in range(num_levels - 1):
            num_internal += width
            width *= branching
            _check_size(num_internal + width, "TokenTree.kary")
        return cls([-1] + [parent for parent in range(num_internal) for _ in range(branching)])

    @classmethod
    def k_chains(cls, num_chains: int, length: int) -> TokenTree:
        """Return `num_chains` chains of `length` nodes below a root: the shape of SpecInfer's k x length trees."""
        num_chains = _check_count(num_chains, "k_chains", "num_chains")
        length = _check_count(length, "k_chains", "length")
        _check_size(1 + num_chains * length, "TokenTree.k_chains")
        return cls([-1] + [0] * num_chains + list(range(1, 1 + num_chains * (length - 1))))

    @classmethod
    def from_growmap(cls, growmap_fields: Mapping[str, Any]) -> TokenTree:
        """Import a grow map of the official Sequoia repository.

        Args:
            growmap_fields: the dictionary of a grow-map file. "Successors" (children of each node in draw order, node
                0 the root) is needed; "mask" [nodes, nodes] (nonzero: row sees column), "depth" [nodes], "size",
                "roots" and "branches" are checked against it where present. Values may be lists, NumPy arrays or
                tensors.

        Returns:
            The tree, renumbered breadth-first where it was not.

        Raises:
            TypeError: growmap_fields is not a dictionary.
            TreeFormatError: a field is malformed or contradicts the others.

        Notes:
            The files are pickles, which this package never opens. Load one without running its code, then save it as
            JSON::

                fields = torch.load("L40-CNN-68m-7b-greedy.pt", weights_only=True, map_location="cpu")
                TokenTree.from_growmap(fields).save("tree.json")

        Source:
            The fields as written by tree_search.py of github.com/Infini-AI-Lab/Sequoia.

        Example:
            >>> TokenTree.from_growmap({"Successors": [[1, 2], [3], [], []]})
            TokenTree([-1, 0, 0, 1])
        """
        return cls(growmap.parents_from_growmap(growmap_fields))

    # ---- files: {"format": "sequoia-kernels/tree", "version": 1, "parents": [...]}; TreeFormatError for others ----

    FORMAT = Format(
        "sequoia-kernels/tree", 1, TreeFormatError, indent=None,
        hint="; TokenTree.from_growmap tells how to import a .pt grow map",
    )  # fmt: skip

    def to_fields(self) -> dict[str, Any]:
        """Give the fields of the tree's document."""
        return {"parents": self._parents}

    @classmethod
    def from_fields(cls, fields: Fields) -> TokenTree:
        """Read a tree from the fields of its document; TreeFormatError names what is wrong with it."""
        for name in fields:
            if name not in FIELDS:
                raise fields.refuse(name, f"not be there beside {', '.join(FIELDS)}", "an unknown field")
        return cls.from_parents_field(fields)

    @classmethod
    def from_parents_field(cls, fields: Fields) -> TokenTree:
        """Read a tree from the field "parents" of any document."""
        parents = fields.entries("parents", lambda value: is_count(value, -1), "a list of node numbers")
        try:
            return cls(parents)
        except ValueError as reason:
            raise fields.refuse("parents", "be a tree", f"a list that is none: {reason}") from None

    # ---- drawings ----

    def draw(self, acceptance: Sequence[float] | None = None) -> str:
        """Return the tree as text, one node a line: id, rank among its siblings and, with an acceptance vector, value.

        Example:
            >>> print(TokenTree([-1, 0, 0, 1]).draw([0.6, 0.2]))
            0  value 1.000
            ├─ 1  rank 0  value 0.600
            │  └─ 3  rank 0  value 0.360
            └─ 2  rank 1  value 0.200
        """
        values = None if acceptance is None else self._values(acceptance, "draw")
        return drawing.draw_text(self, values)

    def to_svg(self, acceptance: Sequence[float] | None = None) -> str:
        """Return the tree as an SVG picture.

        Args:
            acceptance: as in `node_values`. With it a node's area and colour show its value, and each level its sum:
                the probability that a step gets that far.

        Returns:
            A standalone SVG document; pointing at a node shows its id, rank and value.
        """
        values = None if acceptance is None else self._values(acceptance, "to_svg")
        return drawing.render_svg(drawing.make_picture(self, values))

    def save_svg(self, path: str | os.PathLike[str], acceptance: Sequence[float] | None = None) -> None:
        """Write `to_svg(acceptance)` to a file, whole or not at all."""
        write_text(path, self.to_svg(acceptance))

    def save_png(
        self, path: str | os.PathLike[str], acceptance: Sequence[float] | None = None, *, scale: float = 2.0
    ) -> None:
        """Write the picture of `to_svg` as a PNG file, whole or not at all.

        Args:
            path: file to write.
            acceptance: as in `to_svg`.
            scale: pixels per SVG pixel, in (0, 16].

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: scale is out of range.
        """
        values = None if acceptance is None else self._values(acceptance, "save_png")
        if not 0.0 < scale <= 16.0:
            raise ValueError(f"TokenTree.save_png: scale must be in (0, 16], got {scale}")
        write_bytes(path, drawing.render_png(drawing.make_picture(self, values), scale))

    # ---- inside ----

    def _values(self, acceptance: Sequence[float], method: str) -> list[float]:
        rates = check_acceptance(acceptance, f"TokenTree.{method}").tolist()
        values = [1.0] * self.num_nodes
        for node in range(1, self.num_nodes):
            parent = self._parents[node]
            rank = node - self._first_child[parent]
            values[node] = values[parent] * rates[rank] if rank < len(rates) else 0.0
        return values

    def _packed_mask(self) -> list[list[int]]:
        """Rows of the ancestor mask, in signed words of 32 bits; plain numbers, which torch.compile follows."""
        rows = [1]
        for node in range(1, self.num_nodes):
            rows.append(rows[self._parents[node]] | 1 << node)
        shifts = range(0, self.num_nodes, 32)
        return [[((row >> shift & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 for shift in shifts] for row in rows]

    def _check_index(self, name: str, index: int, length: int, method: str) -> int:
        rule = checks.within(0, length - 1)
        return checks.whole_number(f"TokenTree.{method}", name, index, rule=rule, show_value=True)


def _check_parents(parents: Iterable[int]) -> tuple[int, ...]:
    """Return breadth-first parents as a tuple of Python ints, or name the first entry that breaks a rule."""
    as_list = getattr(parents, "tolist", None)  # arrays and tensors
    source = as_list() if callable(as_list) else parents
    if isinstance(source, (str, bytes, Mapping, set, frozenset)) or not isinstance(source, Iterable):
        raise TypeError(f"TokenTree: parents must be a list of integers, got {type(parents).__name__}")
    entries = list(islice(source, MAX_NODES + 1))
    if len(entries) > MAX_NODES:
        _check_size(len(source) if isinstance(source, Sized) else len(entries), "TokenTree")
    checked = tuple(
        entry if type(entry) is int else checks.whole_number("TokenTree", f"parents[{node}]", entry, show_value=True)
        for node, entry in enumerate(entries)
    )
    if not checked:
        raise ValueError("TokenTree: parents must have at least the root's entry -1, got none")
    if checked[0] != -1:
        raise ValueError(f"TokenTree: parents must begin with -1 for the root, got parents[0] = {checked[0]}")
    previous = 0
    with_children: set[int] = set()
    for node in range(1, len(checked)):
        parent = checked[node]
        if parent < 0:
            raise ValueError(f"TokenTree: parents must have -1 at the root only, got parents[{node}] = {parent}")
        if parent >= node:
            raise ValueError(
                f"TokenTree: parents must name an earlier node (parents[i] < i), got parents[{node}] = {parent}"
            )
        if parent < previous:
            rule = "keep siblings side by side" if parent in with_children else "be breadth-first (never decrease)"
            raise ValueError(
                f"TokenTree: parents must {rule}, got parents[{node}] = {parent} after parents[{node - 1}] = {previous}"
            )
        with_children.add(parent)
        previous = parent
    return checked


def _check_size(num_nodes: int, caller: str) -> None:
    if num_nodes > MAX_NODES:
        raise ValueError(f"{caller}: a tree must have at most {MAX_NODES} nodes, got {num_nodes}")


def _check_count(value: int, method: str, name: str) -> int:
    count = checks.whole_number(f"TokenTree.{method}", name, value, rule=checks.at_least(1), show_value=True)
    _check_size(count, f"TokenTree.{method}")
    return count
