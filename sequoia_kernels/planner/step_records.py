"""Recorded steps: what any tree would have been worth in them, under any verification rule.

An acceptance vector says how often the child of a rank is accepted, whatever its node. That is not all there is: a node
deep in the tree lies behind tokens that were easy to guess, so that more of its children are accepted, and under the
rule "traversal" the worth of a node depends on what is below it. So a few hundred steps are decoded with a large tree,
and of each is kept what decides, at every node: the probabilities of the children's tokens, and how much of the target
exceeds so many times the draft. From this the expected number of tokens of every smaller tree is computed in every
step, without drawing coins, and averaged.

The average is over the steps that the tree itself would have made. Through easy text a recording of short steps makes
many and one of long steps few, so its steps do not count alike: a stretch of text of g tokens takes the recording its
own steps there, and the tree g / f of them, with f the tree's mean worth in the stretch. A step counts as much as the
second number over the first, in the `NEAR` steps on either side of it, without the step itself.

At a node with the target's probabilities t(x) and the draft's d(x) the rules need, outside the tokens tried,

    excess(g) = sum of max(t(x) - g d(x), 0).

Tokens of the recorded node's children are added up one by one; for all other tokens the sum and its slope are recorded
at fixed values of g, and taken from the cubic between them (which moves a step's value by half a percent at most where
single tokens make corners, and a mean not at all).
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels import checks
from sequoia_kernels.documents import Format, is_number, write_bytes
from sequoia_kernels.planner.acceptance import AcceptanceEstimate
from sequoia_kernels.planner.shaped_steps import nodes_given_out
from sequoia_kernels.tree import DEFAULT_RULE, Confidence, ShapedTree, TokenTree, rule_named

__all__ = ["EXCESS_RATIOS", "NodeRecords", "StepRecords"]

Floats = NDArray[np.float64]

# g. A first rejection brings it to 1 or more, where a good draft has most tokens; what exceeds the draft a hundred
# times is little, and mostly one token.
EXCESS_RATIOS = np.concatenate(
    ([0.0], 2.0 ** np.arange(0, 2, 1 / 8), 2.0 ** np.arange(2, 8, 0.5), 2.0 ** np.arange(8, 26, 2))
)
TAIL = 0.025  # of the draws beyond each end of an interval
NUM_DRAWS = 512
NEAR = 7  # steps before and behind one that tell how easy the text is there

FORMAT = Format("sequoia-kernels/step-records", 4, indent=None)
MOST_BYTES = 1 << 32  # of a file's arrays
FORETOLD = "foretold"  # the array that only some files have


class NodeRecords(NamedTuple):
    """What is kept of S steps with a tree of N nodes, of which I have children; all float32.

    Attributes:
        target: the target's probability of each node's token behind its parent; 0 for the root. [S, N]
        draft: the draft's; 0 for the root and for what is no draw. [S, N]
        excess: `excess` of a node with children over the tokens that are none of them. [S, I, ratios]
        slope: the draft's mass of those among them that exceed: minus the slope of `excess`; at the ratio 0 all of its
            mass outside the children. [S, I, ratios]
        likelihood: as `draft`, but at temperature 0 the draft's probability at 1, by which confidence goes. [S, N]
        peak: the draft's largest probability at a node with children, at the same temperature. [S, I]
    """

    target: NDArray[np.float32]
    draft: NDArray[np.float32]
    excess: NDArray[np.float32]
    slope: NDArray[np.float32]
    likelihood: NDArray[np.float32]
    peak: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StepRecords:
    """Steps that were decoded with a large tree, and what smaller ones would have been worth in them.

    Attributes:
        tree: the tree that was recorded; trees within it can be valued.
        nodes: of every step.
        requests: which request each step belongs to. [S] int64.
        acceptance: acceptance vector of the same steps, with its counts; its temperature, top-k and top-p are those
            that the steps were decoded with. Where steps were cut, it is of their paths before.
        given: tokens that each step gave the text; None makes all steps count alike. [S] int64.
        foretold: how likely a child is accepted at each node with children, as the draft itself foretold before it drew
            them; None of a draft that does not. [S, I] float32.
    """

    tree: TokenTree
    nodes: NodeRecords
    requests: NDArray[np.int64]
    acceptance: AcceptanceEstimate
    given: NDArray[np.int64] | None = None
    foretold: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.requests)

    def holds(self, tree: TokenTree) -> bool:
        """Tell whether a tree lies within the one that was recorded, child by child from the first."""
        return self._places(tree) is not None

    def nodes_of(self, tree: TokenTree) -> list[int]:
        """Give the recorded nodes that stand for a tree's, in its order; ValueError where one was not recorded."""
        places = self._places(tree)
        if places is None:
            raise ValueError(
                f"StepRecords: tree must lie within the recorded tree, got one of {tree.num_nodes} nodes that does not"
            )
        return places

    def sample(self, num_steps: int) -> StepRecords:
        """Give about so many of the steps, neighbours by twice `NEAR`; all of them where there are not many more.

        Raises:
            TypeError: num_steps is no integer.
            ValueError: num_steps is below 1.
        """
        num_steps = checks.whole_number("StepRecords.sample", "num_steps", num_steps, rule=checks.at_least(1))
        stride = len(self) // num_steps
        if stride < 2:
            return self
        places = np.arange(len(self))
        return self.part(places[places // (2 * NEAR) % stride == 0])

    def part(self, steps: NDArray[np.int64]) -> StepRecords:
        """Give some of the steps, by their places in ascending order, for a step is weighed by those beside it.

        Raises:
            TypeError: steps are no integers.
            ValueError: steps are no row of places, or one does not come behind the one before.
        """
        where, steps = "StepRecords.part", np.asarray(steps)
        if steps.dtype.kind not in "iu":
            raise TypeError(f"{where}: steps must be an array of integers, got {steps.dtype}")
        if steps.ndim != 1:
            checks.fail_range(where, "steps", "have shape [number of steps]", list(steps.shape))
        steps = steps.astype(np.int64)
        outside = (steps < 0) | (steps >= len(self))
        if outside.any():
            checks.fail_range(where, "steps", f"be in 0..{len(self) - 1}", int(steps[outside][0]))
        early = np.flatnonzero(np.diff(steps) <= 0)
        if len(early):
            before, behind = steps[early[0] : early[0] + 2].tolist()
            checks.fail_range(where, "steps", "be in ascending order, each once", f"{behind} behind {before}")
        given = None if self.given is None else self.given[steps]
        nodes = NodeRecords(*(part[steps] for part in self.nodes))
        foretold = None if self.foretold is None else self.foretold[steps]
        return StepRecords(self.tree, nodes, self.requests[steps], self.acceptance, given, foretold)

    def said(self, confidence: Confidence) -> NDArray[np.float32]:
        """Give what `undrawn` of a confidence goes by at each node with children. [S, I]"""
        return self.foretold if confidence.foretold and self.foretold is not None else self.nodes.peak

    def values(self, tree: TokenTree | ShapedTree, rule: str = DEFAULT_RULE) -> Floats:
        """Give the expected number of tokens, the bonus token included, of a tree in every step. [S] float64.

        Args:
            tree: a tree within the recorded one; or a shaped tree, whose nodes that were not recorded count as if they
                were never accepted.
            rule: verification rule, by its name.

        Raises:
            ValueError: the tree does not lie within the recorded one; the rule is unknown, or has no values of steps.
        """
        where = "StepRecords.values"
        taken = None
        if isinstance(tree, ShapedTree):
            taken = nodes_given_out(tree, self.tree, self.nodes.likelihood, self.said(tree.confidence))
            places = list(range(self.tree.num_nodes))
        else:
            places = self.nodes_of(tree)
        name = rule_named(where, rule).name
        if self.acceptance.temperature == 0 or name == "sequoia":  # greedily all rules are one
            if taken is not None:
                return np.asarray((self.reached * taken).sum(axis=1))
            return np.asarray(self.reached[:, places].sum(axis=1))
        if name != "traversal":
            raise ValueError(f"{where}: rule must be sequoia or traversal, got {rule!r}")
        whole = self.tree if isinstance(tree, ShapedTree) else tree
        return _Traversal(self, whole, places, taken).expected_tokens()

    def tokens_per_step(self, tree: TokenTree | ShapedTree, rule: str = DEFAULT_RULE) -> float:
        """Give a tree's mean number of tokens per step, over the steps that it would have made; see `values`."""
        return self.mean_of(self.values(tree, rule))

    def tokens_per_step_interval(self, tree: TokenTree | ShapedTree, rule: str = DEFAULT_RULE) -> tuple[float, float]:
        """Give the 95 % interval of a tree's tokens per step, by a bootstrap over requests."""
        return self.interval_of(self.values(tree, rule))

    def interval_of(self, values: Floats) -> tuple[float, float]:
        """Give that interval for a tree's values [S]."""
        lower, upper = np.quantile(self.drawn_means(values), [TAIL, 1 - TAIL])
        mean = self.mean_of(values)
        return min(float(lower), mean), max(float(upper), mean)

    def mean_of(self, values: Floats) -> float:
        """Give the mean of a tree's values [S] as `tokens_per_step` does."""
        return float(np.average(values, weights=self._weights(values)))

    def drawn_means(self, values: Floats) -> Floats:
        """Give that mean over requests drawn again, for all values the same ones. [512]"""
        sums, counts = self.by_request(values)
        drawn = np.random.Generator(np.random.PCG64(0)).integers(len(counts), size=(NUM_DRAWS, len(counts)))
        means: Floats = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        return means

    def by_request(self, values: Floats) -> tuple[Floats, Floats]:
        """Give what each request adds to that mean: tokens, and the steps that they take. [requests] each.

        The requests are in ascending order; the sum of the first over that of the second is the mean.
        """
        weights = self._weights(values)
        _, of_step = np.unique(self.requests, return_inverse=True)
        tokens, steps = (np.bincount(of_step, weights=part) for part in (values * weights, weights))
        return np.asarray(tokens, dtype=np.float64), np.asarray(steps, dtype=np.float64)

    def _weights(self, values: Floats) -> Floats:
        """How many steps of a tree with these values one step of the recording stands for. [S]"""
        if self.given is None:
            return np.ones(len(self))
        places = np.arange(len(self))
        begins = np.flatnonzero(np.diff(self.requests, prepend=self.requests[:1] - 1))
        own = np.searchsorted(begins, places, side="right") - 1
        first = np.maximum(places - NEAR, begins[own])
        last = np.minimum(places + NEAR + 1, np.append(begins[1:], len(self))[own])

        def nearby(amounts: Floats) -> Floats:
            sums = np.concatenate(([0.0], np.cumsum(amounts)))
            around: Floats = sums[last] - sums[first] - amounts
            return around

        alone = last - first == 1
        return np.where(alone, 1.0, nearby(self.given.astype(np.float64)) / np.where(alone, 1.0, nearby(values)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the records to a file, an archive of numpy arrays, which appears whole or not at all."""
        given = np.zeros(0, dtype=np.int64) if self.given is None else self.given
        fields = {"parents": self.tree.parents, "acceptance": self.acceptance.to_document()}
        header = FORMAT.dump({**fields, "excess_ratios": EXCESS_RATIOS.tolist()}).encode()
        archive = io.BytesIO()
        arrays = self.nodes._asdict()
        if self.foretold is not None:
            arrays[FORETOLD] = self.foretold
        np.savez_compressed(
            archive, header=np.frombuffer(header, dtype=np.uint8), requests=self.requests, given=given,
            **arrays,
        )  # fmt: skip
        write_bytes(path, archive.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepRecords:
        """Read records from a file that `save` wrote.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it is no such file of this version, or something in it breaks its rule; the message names both.
        """
        where = f"StepRecords.load: {os.fspath(path)}"
        data = Path(path).read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MOST_BYTES:
                    raise ValueError(f"{where}: the arrays must take at most {MOST_BYTES} bytes, got more")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                wanted = ("header", "requests", "given", *NodeRecords._fields)
                header, requests, given, *nodes = (arrays[name] for name in wanted)
                foretold = arrays.get(FORETOLD)
        except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError) as reason:
            raise ValueError(f"{where}: the file must hold recorded steps, got one that does not: {reason}") from None
        try:
            text = header.tobytes().decode()
        except UnicodeDecodeError:
            raise ValueError(f"{where}: the header must be JSON text, got bytes that are not UTF-8") from None
        fields = FORMAT.parse(text, where)
        tree = TokenTree.from_parents_field(fields)
        if not np.array_equal(fields.entries("excess_ratios", is_number, "a list of numbers"), EXCESS_RATIOS):
            raise fields.refuse("excess_ratios", "be those of this sequoia-kernels", "others; record the steps again")
        inner = fields.inside("acceptance")
        acceptance = AcceptanceEstimate.from_fields(inner)
        num_steps, num_internal = len(np.atleast_1d(requests)), sum(map(bool, tree.num_children))
        shapes = [(num_steps, tree.num_nodes)] * 2 + [(num_steps, num_internal, len(EXCESS_RATIOS))] * 2
        shapes += [(num_steps, tree.num_nodes), (num_steps, num_internal)]
        if requests.shape != (num_steps,) or requests.dtype != np.int64 or num_steps == 0:
            raise ValueError(f"{where}: requests must be [steps] int64, got {list(requests.shape)} {requests.dtype}")
        checked = list(zip(NodeRecords._fields, nodes, shapes))
        if foretold is not None:
            checked.append((FORETOLD, foretold, shapes[-1]))
        for name, array, shape in checked:
            if array.shape != shape or array.dtype != np.float32:
                got = f"{list(array.shape)} {array.dtype}"
                raise ValueError(f"{where}: {name} must be {list(shape)} float32, got {got}")
            if not bool(((array >= 0) & (array <= 1 + 1e-5)).all()):
                raise ValueError(f"{where}: {name} must hold probabilities, got entries that are none")
        if given.dtype != np.int64 or given.shape not in ((num_steps,), (0,)) or bool((given < 1).any()):
            got = f"{list(given.shape)} {given.dtype}"
            raise ValueError(f"{where}: given must be [{num_steps}] int64 or [0], at least 1 each, got {got}")
        if bool((given > tree.num_levels).any()):
            rule = f"given must be at most the tree's {tree.num_levels} levels each"
            raise ValueError(f"{where}: {rule}, got {given.max()}")
        return cls(tree, NodeRecords(*nodes), requests, acceptance, given if len(given) else None, foretold)

    @cached_property
    def node_worths(self) -> list[float]:
        """How often each recorded node is accepted by the rule "sequoia": a tree is worth the sum over its nodes."""
        worths: list[float] = self.reached.mean(axis=0).tolist()
        return worths

    @cached_property
    def _internal(self) -> dict[int, int]:
        """Place of each node with children among them."""
        nodes = [node for node, count in enumerate(self.tree.num_children) if count]
        return {node: place for place, node in enumerate(nodes)}

    @cached_property
    def reached(self) -> Floats:
        """The probability that the rule "sequoia" accepts each node, in every step. [S, N]"""
        reached = np.zeros(self.nodes.target.shape)
        reached[:, 0] = 1
        for node in self._internal:
            state = _NodeState(self, node)
            left = reached[:, node].copy()
            for child in self.tree.children(node):
                accepted = state.chance(child) if self.acceptance.temperature else self.nodes.target[:, child]
                reached[:, child] = left * accepted
                left *= 1 - accepted
                state.drop(child)
        return reached

    def _places(self, tree: TokenTree) -> list[int] | None:
        """Which recorded node stands for each node of a tree, None if one of them was not recorded."""
        places = [0]
        for node, parent in enumerate(tree.parents[1:], start=1):
            above = places[parent]
            rank = node - tree.first_child[parent]
            if rank >= self.tree.num_children[above]:
                return None
            places.append(self.tree.first_child[above] + rank)
        return places


class _NodeState:
    """A recorded node while its children are tried, in every step at once.

    With g and f of the residual max(t - g d, 0) / f, and D the draft's mass of what was not tried, a child enters with
    min(1, chance * residual(x) / (d(x) / D)); dropping it takes g to g + f / (chance D), f to the excess there, and the
    chance to Z / (Z + 1 - chance) with Z = chance f' / f.
    """

    def __init__(self, records: StepRecords, node: int, chance: Floats | float = 1.0) -> None:
        nodes = records.nodes
        self.children = records.tree.children(node)
        self.target = nodes.target[:, self.children].astype(np.float64)  # of what was not tried
        self.draft = nodes.draft[:, self.children].astype(np.float64)
        place = records._internal[node]
        self.excess, self.slope = nodes.excess[:, place], nodes.slope[:, place]
        num_steps = len(records)
        self.own_chance = np.broadcast_to(np.asarray(chance, dtype=np.float64), (num_steps,)).copy()
        self.ratio, self.mass = np.zeros(num_steps), np.ones(num_steps)
        self.outside = self.slope[:, 0].astype(np.float64)  # the draft's mass outside the recorded children

    def chance(self, child: int) -> Floats:
        """The chance that a child enters with, 0 where it is no draw."""
        place = child - self.children[0]
        target, draft = self.target[:, place], self.draft[:, place]
        left = self.outside + self.draft.sum(axis=1)
        wanted = self.own_chance * np.maximum(target - self.ratio * draft, 0) * left
        given = self.mass * draft
        return np.minimum(np.divide(wanted, given, out=np.zeros_like(wanted), where=given > 0), 1.0)

    def drop(self, child: int, taken: NDArray[np.bool_] | None = None) -> None:
        """Give a child up, in the steps that have it (all where None)."""
        place = child - self.children[0]
        drawn = self.draft[:, place] > 0
        if taken is not None:
            drawn &= taken
        left = self.outside + self.draft.sum(axis=1)
        given = self.own_chance * left
        ratio = self.ratio + np.divide(self.mass, given, out=np.full_like(given, np.inf), where=given > 0)
        self.target[drawn, place] = 0
        self.draft[drawn, place] = 0
        self.ratio = np.where(drawn, np.minimum(ratio, EXCESS_RATIOS[-1]), self.ratio)
        mass = self._excess()
        rest = np.divide(self.own_chance * mass, self.mass, out=np.zeros_like(mass), where=self.mass > 0)
        total = rest + (1 - self.own_chance)
        dropped = np.divide(rest, total, out=np.ones_like(rest), where=total > 0)
        self.own_chance = np.where(drawn, dropped, self.own_chance)
        self.mass = np.where(drawn, mass, self.mass)

    def _excess(self) -> Floats:
        """The residual's mass at the ratio."""
        steps = np.arange(len(self.ratio))
        place = np.clip(np.searchsorted(EXCESS_RATIOS, self.ratio, side="right") - 1, 0, len(EXCESS_RATIOS) - 2)
        low, high = EXCESS_RATIOS[place], EXCESS_RATIOS[place + 1]
        width = high - low
        way = (self.ratio - low) / width
        ends = [values[steps, place + side] for values in (self.excess, self.slope) for side in (0, 1)]
        low_excess, high_excess, low_slope, high_slope = (end.astype(np.float64) for end in ends)
        between = (
            low_excess * (1 + 2 * way) * (1 - way) ** 2
            + high_excess * way**2 * (3 - 2 * way)
            - low_slope * width * way * (1 - way) ** 2
            - high_slope * width * way**2 * (way - 1)
        )
        children = np.maximum(self.target - self.ratio[:, None] * self.draft, 0).sum(axis=1)
        return np.asarray(np.clip(between, high_excess, low_excess) + children)


class _Traversal:
    """The expected tokens of one tree under the rule "traversal", in every step at once.

    Where `taken` [S, N] is given, a step has only those of the tree's nodes, of each node's children its first ones.
    """

    def __init__(
        self, records: StepRecords, tree: TokenTree, places: Sequence[int], taken: NDArray[np.bool_] | None = None
    ) -> None:
        self.records, self.tree, self.places = records, tree, places
        self.taken = np.ones((len(records), tree.num_nodes), dtype=np.bool_) if taken is None else taken
        self.ever: list[bool] = np.asarray(self.taken.any(axis=0)).tolist()
        self.failed = np.ones(len(records))  # the probability that no node was accepted so far
        self.tokens = np.zeros(len(records))

    def expected_tokens(self) -> Floats:
        self._visit(0, np.ones(len(self.records)))
        return self.tokens

    def _visit(self, node: int, chance: Floats) -> None:
        """Enter a node with a chance, try what is below it, and leave it."""
        children = [child for child in self.tree.children(node) if self.ever[child]]
        if children:
            state = _NodeState(self.records, self.places[node], chance)
            for child in children:
                place, taken = self.places[child], self.taken[:, child]
                self._visit(child, np.where(taken, state.chance(place), 0))
                state.drop(place, taken)
            chance = state.own_chance
        self.tokens += self.failed * chance * (self.tree.depths[node] + 1)
        self.failed = self.failed * (1 - chance)
