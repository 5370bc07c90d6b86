"""Shaped trees on toy models: every tree and every draw, with its exact probability in float64."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import NamedTuple

import torch
from support.enumeration import emitted_by_outcomes, ordered_draws
from support.toy_models import TableModel

from sequoia_kernels import TokenTree
from sequoia_kernels.drafts.shaping import LevelShape, ShapedReach, shaped_topology
from sequoia_kernels.tree import PROBABILITY_EDGES, Confidence, ShapedTree, Topology

__all__ = ["shaped_emitted_distribution", "steep_confidence", "toy_head"]

NUM_BINS = len(PROBABILITY_EDGES) + 1


def steep_confidence(max_children: int = 3, *, foretold: bool = False) -> Confidence:
    """A confidence by which shapes vary as much as they can."""
    rising = [0.02 + 0.97 * place / (NUM_BINS - 1) for place in range(NUM_BINS)]
    drawn = [rising, [entry / 2 for entry in rising]]
    undrawn = [[(0.9 - 0.6 * place / NUM_BINS) ** (rank * (1 + place)) * 0.9 ** (rank + 1) for place in range(NUM_BINS)]
               for rank in range(max_children)]  # fmt: skip
    return Confidence(drawn, undrawn, foretold)


def toy_head(path: list[int]) -> float:
    """What a confidence head says of a node, by the tokens down to its own: anything between 0 and 1."""
    return (0.37 + sum(0.61 * (place + 1) * (token + 1) ** 2 for place, token in enumerate(path))) % 1.0


class _Partial(NamedTuple):
    """A tree grown down to some level."""

    topology: Topology
    shared: ShapedReach
    tokens: torch.Tensor  # [1, N]
    draft_logits: torch.Tensor  # [1, N, vocab]
    probability: float


def _copy(partial: _Partial) -> _Partial:
    topology = Topology(*(part.clone() for part in partial.topology[:-2]), *partial.topology[-2:])
    shared = object.__new__(ShapedReach)
    shared.__dict__ = {name: value.clone() for name, value in vars(partial.shared).items()}
    return _Partial(topology, shared, partial.tokens.clone(), partial.draft_logits.clone(), partial.probability)


def _path(partial: _Partial, node: int) -> list[int]:
    path = [node]
    while path[0]:
        path.insert(0, int(partial.topology.parents[0, path[0]]))
    return partial.tokens[0, path].clamp(min=0).tolist()


def _draws(logits: torch.Tensor, count: int, temperature: float) -> list[tuple[tuple[int, ...], float]]:
    if count == 0:
        return [((), 1.0)]
    if temperature == 0:
        allowed = [token for token in range(len(logits)) if logits[token] > -torch.inf]
        order = sorted(allowed, key=lambda token: (-float(logits[token]), token))[:count]
        return [(tuple(order) + (-1,) * (count - len(order)), 1.0)]
    temperature = float(torch.tensor(temperature, dtype=torch.float32))
    return ordered_draws(((logits - logits.max()) / temperature).tolist(), count)


def _grown(
    tree: ShapedTree, level: int, partial: _Partial, draft: TableModel, temperature: float, rerank: bool, backend: str
) -> list[_Partial]:
    """All ways to grow the next level. Reranking, which is wrong, chooses the children when all are drawn."""
    nodes = tree.level_nodes(level)
    temperatures = torch.tensor([temperature])
    logits = torch.cat([draft.logits(torch.tensor([_path(partial, node)])) for node in nodes])  # [W, vocab]
    places = torch.zeros(1, tree.widths[level + 1], dtype=torch.int64)
    partial.draft_logits[0, list(nodes)] = logits
    foretold = torch.full((1, tree.num_nodes), torch.nan)
    foretold[0, list(nodes)] = torch.tensor([toy_head(_path(partial, node)) for node in nodes])
    shape = LevelShape(tree, level, partial.topology, partial.shared, places, None)
    shape.give_out(logits[None], temperatures, backend, foretold=foretold)
    counts = partial.topology.num_children[0, list(nodes)].tolist()
    if rerank:
        counts = [shape.max_children] * len(nodes)
    grown = []
    each = [_draws(row, count, temperature) for row, count in zip(logits, counts)]
    for draws in itertools.product(*each):
        after = _copy(partial)
        probability = partial.probability
        for _, chance in draws:
            probability *= chance
        drawn = torch.full((1, len(nodes), shape.max_children), -1)
        for row, (tokens, _) in enumerate(draws):
            drawn[0, row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        own = LevelShape(tree, level, after.topology, after.shared, places.clone(), None)
        if rerank:  # by the drawn tokens' own probability: the likelier a token, the larger its "peak"
            chances = logits.softmax(dim=1).gather(1, drawn[0].clamp(min=0)) * (drawn[0] >= 0)
            worth = chances * torch.linspace(1, 0.999, shape.max_children)
            reached = after.shared.reach[0, list(nodes), None] * worth
            # first ranks first, so that what is kept of a node are its first children
            reached = reached.cummin(dim=1).values * torch.linspace(1, 0.999, shape.max_children)
            _place(own, reached.flatten().sort(descending=True, stable=True).indices[: places.shape[1]].sort().values)
        else:
            own.give_out(logits[None], temperatures, backend, foretold=foretold)
        own.log_normaliser = shape.log_normaliser
        children = range(own.first_child, own.first_child + own.num_children)
        after.tokens[0, list(children)] = drawn.flatten()[own.places[0]]
        own.note_draws(logits[None], temperatures, after.tokens, backend)
        grown.append(after._replace(probability=probability))
    return grown


def _place(shape: LevelShape, chosen: torch.Tensor) -> None:
    """Write a choice into the topology, as `give_out` does its own."""
    topology, parents = shape.topology, chosen // shape.max_children + shape.first
    shape.places[0] = chosen
    for node in range(shape.first, shape.first + shape.width):
        own = (parents == node).nonzero()[:, 0]
        topology.num_children[0, node] = len(own)
        topology.first_child[0, node] = int(own[0]) + shape.first_child if len(own) else -1
    topology.parents[0, shape.first_child : shape.first_child + shape.num_children] = parents


def shaped_emitted_distribution(
    tree: ShapedTree,
    target: TableModel,
    draft: TableModel,
    root: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    rule: str = "sequoia",
    rerank: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, int]:
    """The exact distribution as of `emitted_distribution`, and how many different trees there are."""
    tokens = torch.full((1, tree.num_nodes), -1)
    tokens[0, 0] = root
    draft_logits = torch.full((1, tree.num_nodes, draft.vocab), torch.nan, dtype=torch.float64)
    partials = [_Partial(shaped_topology(tree, 1, "cpu"), ShapedReach(tree, 1, "cpu"), tokens, draft_logits, 1.0)]
    for level in range(tree.num_levels - 1):
        partials = [
            after for partial in partials for after in _grown(tree, level, partial, draft, temperature, rerank, backend)
        ]
    by_tree = defaultdict(list)
    for partial in partials:
        by_tree[tuple(partial.topology.parents[0].tolist())].append(partial)
    emitted = []
    for parents, members in by_tree.items():
        outcomes = (
            torch.cat([member.tokens for member in members]),
            torch.cat([member.draft_logits for member in members]),
            torch.tensor([member.probability for member in members], dtype=torch.float64),
        )
        own = TokenTree(list(parents))
        emitted.append(emitted_by_outcomes(own, target, outcomes, temperature, top_k, top_p, rule=rule))
    return torch.stack(emitted).sum(dim=0), len(by_tree)
