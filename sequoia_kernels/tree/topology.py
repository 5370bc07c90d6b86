"""The topology of trees as device tensors: what ops and decoding steps work with. `TokenTree` is the human's tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Topology"]


class Topology(NamedTuple):
    """Topology of one tree that all requests share, or of a tree for each request; N nodes each, breadth-first.

    The tensors of a `TokenTree` are shared by all users of the tree: never write to them. A topology of one's own may
    be made, and changed between two steps, on the device; ops read nothing of it on the host but the two bounds.

    Attributes:
        parents: parent of each node, -1 for the root. [N] or [B, N], int32, as all others.
        depths: edges between the root and each node.
        ranks: place of each node among its siblings, from 0; 0 for the root.
        first_child: first child of each node, -1 for leaves.
        num_children: number of children of each node.
        ancestor_mask: bit j % 32 of word j // 32 in row i is set iff node j is i or an ancestor of i.
            [N, ceil(N / 32)] or [B, N, ceil(N / 32)], int32.
        num_levels: no tree has more levels.
        max_branching: no node has more children.
    """

    parents: torch.Tensor
    depths: torch.Tensor
    ranks: torch.Tensor
    first_child: torch.Tensor
    num_children: torch.Tensor
    ancestor_mask: torch.Tensor
    num_levels: int
    max_branching: int

    @property
    def num_nodes(self) -> int:
        """Nodes of each tree."""
        return self.parents.shape[-1]

    @property
    def batch_size(self) -> int | None:
        """Number of trees; None for one that all requests share."""
        return self.parents.shape[0] if self.parents.dim() == 2 else None

    @classmethod
    def stack(cls, topologies: Sequence[Topology]) -> Topology:
        """Give one topology with a tree for each request.

        Args:
            topologies: a single tree's for each request, of equally many nodes, on one device.

        Raises:
            ValueError: there are none, one holds several trees, or they differ in their number of nodes.

        Example:
            >>> from sequoia_kernels import TokenTree
            >>> trees = [TokenTree([-1, 0, 0]), TokenTree([-1, 0, 1])]
            >>> Topology.stack([tree.tensors() for tree in trees]).parents.tolist()
            [[-1, 0, 0], [-1, 0, 1]]
        """
        shapes = sorted({tuple(topology.parents.shape) for topology in topologies})
        if len(shapes) != 1 or len(shapes[0]) != 1:
            raise ValueError(f"Topology.stack: topologies must be single trees of equally many nodes, got {shapes}")
        stacked: list[Any] = [torch.stack(parts) for parts in zip(*(topology[:-2] for topology in topologies))]
        bounds = [max(parts) for parts in zip(*(topology[-2:] for topology in topologies))]
        return cls(*stacked, *bounds)
