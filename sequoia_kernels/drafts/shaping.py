"""Shaped trees: the children of a level are given out in every step, before they are drawn; the specification in torch.

Computes, for a level of W nodes whose C children come next, with reach(v) the estimated chance that node v is accepted:
    peak(v)     = the draft's largest probability behind v; or what the draft foretells there, if the tables go by that
    worth(v, k) = reach(v) * undrawn[k][bin(peak(v))]        of a child of rank k, for every v and every k below K, the
                  children that a node gets at most, and no more than C
    the C largest of the W K worths become the children, ties to the lower node and rank
and, once they are drawn with probabilities d:
    reach(x)    = reach(v) * drawn[rank(x)][bin(d(x))]
Plan: `undrawn` falls with the rank, so that what is chosen of a node are its first ranks. All is written in place into
    the trees' topology, whose shapes never change: nothing waits for the device, and a step can be captured.
Backends: where the draws run in Triton, as by default on a CUDA device, so does this, by three launches a level
    (`triton_shaping.py`). With a native draft on a CPU it is part of the call that grows the tree
    (`csrc/host/level_shape.cpp`).
Exactness: what is chosen depends on tokens above the children and on distributions behind them, never on the children.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.ops.backends import runs_own
from sequoia_kernels.tree import PROBABILITY_EDGES, ShapedTree, Topology

__all__ = ["LEAST_REACH", "LevelShape", "ShapedReach", "shaped_topology"]

LEAST_REACH = 1e-20  # a product of many levels stays a normal float32 number


def shaped_topology(tree: ShapedTree, batch_size: int, device: torch.device | str) -> Topology:
    """Give a topology of a tree's widths for each request, to be written in place; at first all are even ones."""
    even = tree.even().tensors(device)
    parts: list[Any] = [part.expand(batch_size, *part.shape).clone() for part in even[:-2]]
    parts += [tree.num_levels, tree.max_branching]
    return Topology(*parts)


class ShapedReach:
    """How likely nodes are to be accepted, as far as a step has come, and the tables by which that is estimated.

    Args:
        tree: the tree.
        batch_size: requests.
        device: where the tensors live.

    Attributes:
        reach: of every node. [B, N] float32.
        drawn: as in `Confidence`. [ranks, bins] float32.
        undrawn: likewise. [max_children, bins] float32.
        edges: between bins. [bins - 1] float32.
    """

    def __init__(self, tree: ShapedTree, batch_size: int, device: torch.device | str) -> None:
        self.reach = torch.ones(batch_size, tree.num_nodes, dtype=torch.float32, device=device)
        self.drawn = torch.tensor(tree.confidence.drawn, dtype=torch.float32, device=device)
        self.undrawn = torch.tensor(tree.confidence.undrawn, dtype=torch.float32, device=device)
        self.edges = torch.tensor(PROBABILITY_EDGES, dtype=torch.float32, device=device)


class LevelShape:
    """Gives out the children of one level. W nodes, C children.

    Args:
        tree: the tree.
        level: which level.
        topology: of every request; written in place.
        shared: what all levels of the tree share.
        places: where `DraftLevel.drawn` of this level lies. [B, C] int64; written in place.
        own_mask: rows of the children in the draft's next forward, None where there is none. [B, C, words] int32.

    Attributes:
        log_normaliser: of each row that `give_out` was given. [B, W] float32.
    """

    log_normaliser: torch.Tensor

    def __init__(
        self, tree: ShapedTree, level: int, topology: Topology, shared: ShapedReach, places: torch.Tensor,
        own_mask: torch.Tensor | None,
    ) -> None:  # fmt: skip
        device = places.device
        self.topology, self.shared, self.places, self.own_mask = topology, shared, places, own_mask
        self.first, self.width = tree.level_nodes(level).start, tree.widths[level]
        self.first_child, self.num_children = self.first + self.width, tree.widths[level + 1]
        self.max_children = min(tree.confidence.max_children, self.num_children)
        self.goes_by_foretold = tree.confidence.foretold
        children = torch.arange(self.first_child, self.first_child + self.num_children, device=device)
        words = torch.zeros(self.num_children, topology.ancestor_mask.shape[-1], dtype=torch.int32, device=device)
        bits = torch.bitwise_left_shift(torch.ones_like(children, dtype=torch.int32), (children % 32).to(torch.int32))
        self.own_bits = words.scatter_(1, (children // 32)[:, None], bits[:, None])  # [C, words]

    def give_out(
        self, logits: torch.Tensor, temperature: torch.Tensor, backend: str = "auto", *,
        foretold: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Decide which nodes get how many children, and write it into the topology.

        Args:
            logits: the draft's at the level's nodes. [B, W, vocab].
            temperature: [B] float32.
            backend: backend of the ops: where the draw runs in Triton, this does.
            foretold: as in `TokenBuffers`. [B, N] float32.
        """
        if (kernels := self._kernels(backend)) is not None:
            self.log_normaliser = kernels.give_out(self._level(kernels), logits, temperature)
            return
        scaled = self._scaled(logits, temperature)
        self.log_normaliser = scaled.logsumexp(dim=2)
        if foretold is not None and self.goes_by_foretold:
            peak = self._of_level(foretold).contiguous()  # or bucketize warns
        else:
            peak = (scaled.amax(dim=2) - self.log_normaliser).exp()
        undrawn = self.shared.undrawn[: self.max_children].t()[
            torch.bucketize(peak, self.shared.edges, right=True)
        ]  # [B, W, K]
        worth = self._of_level(self.shared.reach)[:, :, None] * undrawn
        order = worth.flatten(1).sort(dim=1, descending=True, stable=True).indices
        chosen = order[:, : self.num_children].sort(dim=1).values
        self.places.copy_(chosen)

        topology, width, children = self.topology, self.width, self._children
        parents = chosen // self.max_children
        children(topology.parents).copy_(parents + self.first)
        children(topology.ranks).copy_(chosen % self.max_children)
        counts = torch.zeros(len(chosen), width, dtype=torch.int64, device=chosen.device)
        counts.scatter_add_(1, parents, torch.ones_like(parents))
        self._of_level(topology.num_children).copy_(counts)
        starts = counts.cumsum(dim=1) - counts + self.first_child
        self._of_level(topology.first_child).copy_(torch.where(counts > 0, starts, -1))
        above = self._of_level(topology.ancestor_mask)
        rows = above.gather(1, parents[:, :, None].expand(-1, -1, above.shape[2])) | self.own_bits
        children(topology.ancestor_mask).copy_(rows)
        if self.own_mask is not None:
            self.own_mask.copy_(rows)

    def note_draws(
        self, logits: torch.Tensor, temperature: torch.Tensor, tokens: torch.Tensor, backend: str = "auto"
    ) -> None:
        """Estimate the chances of the children, now that they are drawn.

        Args:
            logits: as given to `give_out`.
            temperature: likewise.
            tokens: of all nodes, -1 where none could be drawn. [B, N] int64.
            backend: likewise.
        """
        if (kernels := self._kernels(backend)) is not None:
            level = self._level(kernels)
            kernels.note_draws(level, logits, temperature, tokens, self.log_normaliser, LEAST_REACH)
            return
        shared, parents = self.shared, self.places // self.max_children
        own = self._children(tokens)
        logit = logits.flatten(1).gather(1, parents * logits.shape[2] + own.clamp(min=0))
        chance = (self._scaled(logit, temperature) - self.log_normaliser.gather(1, parents)).exp()
        chance = torch.where(own >= 0, chance, 0)
        ranks = (self.places % self.max_children).clamp(max=shared.drawn.shape[0] - 1)
        drawn = shared.drawn[ranks, torch.bucketize(chance, shared.edges, right=True)]
        reach = self._of_level(shared.reach).gather(1, parents) * drawn
        self._children(shared.reach).copy_(reach.clamp(min=LEAST_REACH))

    def _kernels(self, backend: str) -> ModuleType | None:
        """Where the Triton kernels are, if they run this level; others, and those by what is foretold, are torch's."""
        if self.goes_by_foretold or not runs_own(
            sample_without_replacement.__name__, backend, self.places.device.type, "triton"
        ):
            return None
        from sequoia_kernels.drafts import triton_shaping

        return triton_shaping if triton_shaping.supports(self._level(triton_shaping)) is None else None

    def _level(self, kernels: ModuleType) -> Any:
        shared = self.shared
        return kernels.Level(
            self.topology, shared.reach, shared.drawn, shared.undrawn, shared.edges, self.places, self.own_mask,
            self.first, self.width, self.max_children,
        )  # fmt: skip

    def _of_level(self, values: torch.Tensor) -> torch.Tensor:
        return values.narrow(1, self.first, self.width)

    def _children(self, values: torch.Tensor) -> torch.Tensor:
        return values.narrow(1, self.first_child, self.num_children)

    @staticmethod
    def _scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """Logits over the temperature, over 1 where that is 0; float32."""
        divisor = torch.where(temperature == 0, 1.0, temperature)
        return logits.float() / divisor.view(-1, *[1] * (logits.dim() - 1))
