"""What one step needs to know of its tree: which rows each draft forward feeds, and where the drawn tokens go."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sequoia_kernels.models import TreeStep
from sequoia_kernels.tree import TokenTree


@dataclass(frozen=True)
class DraftLevel:
    """One draft forward and the draw behind it.

    Attributes:
        step: rows of the forward: the level's internal nodes.
        nodes: the same nodes as an index. [width] int64.
        num_samples: children to draw for each of them: the level's largest number of children.
        first_child: first node of the next level; its nodes are exactly the children drawn here, in order.
        num_children: how many they are.
        drawn: for each child, its place in the flattened draw [width * num_samples]. [num_children] int64.
    """

    step: TreeStep
    nodes: torch.Tensor
    num_samples: int
    first_child: int
    num_children: int
    drawn: torch.Tensor


@dataclass(frozen=True)
class TreeLayout:
    """A tree with the index tensors of its decoding step, all on one device.

    Attributes:
        tree: the tree.
        target_step: rows of the target forward: every node.
        root_step: rows of the first draft forward: the last committed token and the root. It starts one row before
            the committed length, so that a leaf accepted in the step before, which the draft never saw, is fed now;
            for any other token the same values are written again. One shape serves every request of a batch.
        root_level: the draw of the root's children, None for a tree of one node.
        levels: the forwards and draws below the root.
    """

    tree: TokenTree
    target_step: TreeStep
    root_step: TreeStep
    root_level: DraftLevel | None
    levels: tuple[DraftLevel, ...]

    @classmethod
    def build(cls, tree: TokenTree, device: torch.device | str) -> TreeLayout:
        """Build the layout of a tree on a device."""
        tensors = tree.tensors(device)
        target_step = TreeStep(
            tree_mask=tensors.ancestor_mask,
            node_ids=torch.arange(tree.num_nodes, dtype=torch.int32, device=device),
            depths=tensors.depths,
            num_tree_rows=tree.num_nodes,
            first_node=0,
        )
        chain = TokenTree.chain(2).tensors(device)
        root_step = TreeStep(
            tree_mask=chain.ancestor_mask,
            node_ids=torch.arange(2, dtype=torch.int32, device=device),
            depths=chain.depths,
            num_tree_rows=2,
            first_node=0,
        )
        levels = [
            _draft_level(tree, level, device)
            for level in range(tree.num_levels - 1)  # the deepest level has leaves only
        ]
        return cls(tree, target_step, root_step, levels[0] if levels else None, tuple(levels[1:]))


def _draft_level(tree: TokenTree, level: int, device: torch.device | str) -> DraftLevel:
    tensors = tree.tensors(device)
    internal = tree.internal_nodes(level)
    num_samples = max(tree.num_children[node] for node in internal)
    first_child = tree.first_child[internal[0]]
    drawn = [row * num_samples + rank for row, node in enumerate(internal) for rank in range(tree.num_children[node])]
    nodes = torch.tensor(internal, dtype=torch.int64, device=device)
    contiguous = internal[-1] - internal[0] + 1 == len(internal)
    step = TreeStep(
        tree_mask=tensors.ancestor_mask.index_select(0, nodes),
        node_ids=nodes.to(torch.int32),
        depths=tensors.depths.index_select(0, nodes),
        num_tree_rows=internal[-1] + 1,
        first_node=internal[0] if contiguous else None,
    )
    return DraftLevel(step, nodes, num_samples, first_child, len(drawn), torch.tensor(drawn, device=device))
