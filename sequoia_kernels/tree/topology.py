"""The topology of trees as device tensors: what ops and decoding steps work with. `TokenTree` is the human's tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sequoia_kernels import checks

__all__ = ["Topology"]


class Topology(NamedTuple):
    """Topology of one tree that all requests share, or of a tree for each request; N nodes each, breadth-first.

    The tensors of a `TokenTree` are shared by all users of the tree: never write to them. A topology of one's own may
    be made (`from_parents`), and changed between two steps, on the device; ops read nothing of it on the host but the
    two bounds. Trees of fewer nodes than the others leave the last ones unused: nobody's children, never accepted.

    Attributes:
        parents: parent of each node, -1 for the root and for unused nodes. [N] or [B, N], int32, as all others.
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
    def from_parents(
        cls, parents: torch.Tensor, *, num_levels: int | None = None, max_branching: int | None = None
    ) -> Topology:
        """Give the topology of trees that exist as parents only, on their device.

        Args:
            parents: parent of each node: -1 for the root, which is node 0, never decreasing from then on, and less than
                the node; -1 again for unused nodes behind all others. [N] or [B, N], int32 or int64.
            num_levels: no tree has more levels; None looks, and waits for the device.
            max_branching: no node has more children; likewise.

        Raises:
            TypeError: parents is not an integer tensor, or a bound no integer.
            ValueError: a wrong shape, or a bound of no tree; on a CPU also parents of no breadth-first tree, or bounds
                that do not hold.

        Notes:
            No host sync where both bounds are given; can be captured in a CUDA graph. On devices other than the CPU
            nobody checks the parents: `check` does, and `verify_tree` under ``debug``.

        Example:
            >>> Topology.from_parents(torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, -1]])).depths.tolist()
            [[0, 1, 1, 2], [0, 1, 2, 0]]
        """
        where = "Topology.from_parents"
        _check_parents_tensor(where, "parents", parents, torch.int32, torch.int64)
        if num_levels is not None:
            num_levels = checks.whole_number(where, "num_levels", num_levels, rule=checks.at_least(1))
        if max_branching is not None:
            max_branching = checks.whole_number(where, "max_branching", max_branching, rule=checks.at_least(0))
        if parents.is_cpu:
            _check_parents(where, parents)
        num_nodes, device = parents.shape[-1], parents.device
        nodes = torch.arange(num_nodes, device=device)
        has_parent = parents >= 0
        of_parent = parents.to(torch.int64).clamp(min=0)
        num_children = torch.zeros_like(of_parent).scatter_add_(-1, of_parent, has_parent.to(torch.int64))
        first_child = torch.full_like(of_parent, num_nodes).scatter_reduce_(
            -1, of_parent, torch.where(has_parent, nodes, num_nodes), "amin"
        )
        ranks = torch.where(has_parent, nodes - first_child.gather(-1, of_parent), 0)
        first_child = torch.where(num_children > 0, first_child, -1)
        # Every node looks up as far again as the one that it has got to: all ancestors in log2(N) rounds.
        words = torch.zeros(num_nodes, (num_nodes + 31) // 32, dtype=torch.int32, device=device)
        bits = torch.bitwise_left_shift(torch.ones_like(nodes, dtype=torch.int32), (nodes % 32).to(torch.int32))
        mask = words.scatter_(1, (nodes // 32)[:, None], bits[:, None]).expand(*parents.shape, -1)
        depths, ancestor = has_parent.to(torch.int64), torch.where(has_parent, of_parent, nodes)
        for _ in range((num_nodes - 1).bit_length()):
            mask = mask | mask.gather(-2, ancestor[..., None].expand(mask.shape))
            depths = depths + depths.gather(-1, ancestor)
            ancestor = ancestor.gather(-1, ancestor)
        parts = [part.to(torch.int32, copy=True) for part in (parents, depths, ranks, first_child, num_children)]
        num_levels = _largest(depths) + 1 if num_levels is None else num_levels
        max_branching = _largest(num_children) if max_branching is None else max_branching
        parents, depths, ranks, first_child, num_children = parts
        made = cls(parents, depths, ranks, first_child, num_children, mask.contiguous(), num_levels, max_branching)
        if parents.is_cpu:
            _check_bounds(where, made)
        return made

    def check(self, where: str = "Topology.check") -> None:
        """Raise unless the tensors describe the same breadth-first trees. Reads values: waits for the device.

        Args:
            where: function named in the messages.

        Raises:
            TypeError: a tensor that is none, or not of int32, or a bound that is no integer.
            ValueError: parents of no breadth-first tree, another tensor that says something else, or a bound that does
                not hold; the message names the tensor and the request.

        Example:
            >>> from sequoia_kernels import TokenTree
            >>> TokenTree.chain(3).tensors().check()
        """
        _check_parents_tensor(where, "tree.parents", self.parents, torch.int32)
        for name, part in zip(self._fields, self[:-2]):
            checks.check_tensor(where, f"tree.{name}", part)
            checks.check_dtype(where, f"tree.{name}", part, torch.int32)
        for name, bound in zip(self._fields[-2:], self[-2:]):
            checks.whole_number(where, f"tree.{name}", bound)
        _check_parents(where, self.parents, "tree.parents")
        made = Topology.from_parents(self.parents.cpu())
        for name, part, right in zip(self._fields, self[:-2], made[:-2]):
            if part.shape != right.shape:
                rule = f"have shape {list(right.shape)}, as its parents say"
                raise ValueError(f"{where}: tree.{name} must {rule}, got {list(part.shape)}")
            wrong = (part.cpu() != right).reshape(*self.parents.shape, -1).any(dim=-1)
            if bool(wrong.any()):
                index = wrong.nonzero()[0].tolist()
                rule = f"be {right[tuple(index)].tolist()}, as its parents say, {_place(index)}"
                raise ValueError(f"{where}: tree.{name} must {rule}, got {part[tuple(index)].tolist()}")
        _check_bounds(where, self)

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


def _check_parents_tensor(where: str, name: str, parents: torch.Tensor, *dtypes: torch.dtype) -> None:
    checks.check_tensor(where, name, parents)
    checks.check_dtype(where, name, parents, *dtypes)
    if parents.dim() not in (1, 2) or parents.shape[-1] == 0:
        checks.fail_range(where, name, "have shape [nodes] or [batch, nodes]", checks.shape_text(parents.shape))


def _check_parents(where: str, parents: torch.Tensor, name: str = "parents") -> None:
    """Raise ValueError unless parents are those of breadth-first trees, with unused nodes at the end. Reads values."""
    parents = parents.cpu()
    nodes = torch.arange(parents.shape[-1])
    used = parents >= 0
    used[..., 0] = True
    before = torch.cat((parents[..., :1], parents[..., :-1]), dim=-1)
    rules = {
        "be -1 at node 0, the root": (nodes == 0) & (parents != -1),
        "be at least -1": parents < -1,
        "name an earlier node": (nodes > 0) & (parents >= nodes),
        "have unused nodes, of parent -1, behind all others": used & (nodes > 0) & (used.cumsum(dim=-1) <= nodes),
        "be breadth-first (never decrease)": used & (nodes > 0) & (parents < before),
    }
    for rule, broken in rules.items():
        if bool(broken.any()):
            index = broken.nonzero()[0].tolist()
            raise ValueError(f"{where}: {name} must {rule}, got {int(parents[tuple(index)])} {_place(index)}")


def _check_bounds(where: str, tree: Topology) -> None:
    bounds = {
        "num_levels": (tree.num_levels, _largest(tree.depths) + 1),
        "max_branching": (tree.max_branching, _largest(tree.num_children)),
    }
    for name, (bound, least) in bounds.items():
        if bound < least:
            raise ValueError(f"{where}: {name} must be at least {least}, got {bound}")


def _largest(part: torch.Tensor) -> int:
    return int(part.max()) if part.numel() else 0


def _place(index: Sequence[int]) -> str:
    *request, node = index
    return f"at node {node}" + (f" of request {request[0]}" if request else "")
