"""What one step needs to know of its tree: which rows each draft forward feeds, and where the drawn tokens go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch

from sequoia_kernels.drafts.shaping import LevelShape, ShapedReach, shaped_topology
from sequoia_kernels.models import TreeStep
from sequoia_kernels.tree import MergedTree, ShapedTree, TokenTree, Topology
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["DraftLevel", "StepTree", "TokenBuffers", "TreeLayout", "each_tree", "of_parents"]

# One tree for all requests; one for each, all of the same widths, level by level; or one that every request shapes.
StepTree: TypeAlias = TokenTree | tuple[TokenTree, ...] | ShapedTree


def each_tree(tree: StepTree) -> tuple[TokenTree | ShapedTree, ...]:
    """Give the trees that a step decodes with: one, or one for each request."""
    return tree if isinstance(tree, tuple) else (tree,)


@dataclass(frozen=True)
class DraftLevel:
    """The nodes of a level that have children, and the draw of these. W nodes, C children.

    Attributes:
        step: rows of a forward over these nodes.
        nodes: the same nodes as an index. [W] int64.
        num_samples: children to draw for each of them: the level's largest number of children.
        first_child: first node of the next level; its nodes are exactly the children drawn here, in order.
        num_children: how many they are, C.
        drawn: for each child, its place in the flattened draw [W * num_samples]. [C] int64, or [B, C] where each
            request has its own tree.
        num_with_proposal: of a `MergedTree`, how many children the first node has, if the first of them may be proposed
            instead of drawn; else 0.
        shape: gives the children out, where the tree is shaped: then `drawn` and the topology are as it writes them.
    """

    step: TreeStep
    nodes: torch.Tensor
    num_samples: int
    first_child: int
    num_children: int
    drawn: torch.Tensor
    num_with_proposal: int = 0
    shape: LevelShape | None = None


@dataclass(frozen=True)
class TreeLayout:
    """A tree with the index tensors of its decoding step, all on one device.

    Attributes:
        tree: the tree, or the trees.
        topology: the same for the ops.
        num_nodes: nodes of each tree.
        target_step: rows of the target forward: every node.
        root_step: rows of a draft's first forward: the last committed token and the root. It starts one row before
            the committed length, so that a leaf accepted in the step before, which the draft never saw, is fed now;
            for any other token the same values are written again. One shape serves every request of a batch.
        levels: the levels whose nodes have children, the root's first; none for a tree of one node.
    """

    tree: StepTree
    topology: TokenTree | Topology
    num_nodes: int
    target_step: TreeStep
    root_step: TreeStep
    levels: tuple[DraftLevel, ...]

    @classmethod
    def build(cls, tree: StepTree, device: torch.device | str, batch_size: int = 1) -> TreeLayout:
        """Build the layout of a tree, or of a tree for each request, on a device.

        Args:
            tree: the tree or trees.
            device: where the tensors live.
            batch_size: requests; only a shaped tree's layout depends on it.
        """
        if isinstance(tree, ShapedTree):
            return cls._shaped(tree, device, batch_size)
        # fake tensors of a tracer must not stay behind
        if isinstance(tree, TokenTree) and type(tree.tensors(device).ancestor_mask) is torch.Tensor:
            return _kept_layout(tree, torch.device(device))
        return cls._made(tree, device)

    @classmethod
    def _made(cls, tree: TokenTree | tuple[TokenTree, ...], device: torch.device | str) -> TreeLayout:
        trees = (tree,) if isinstance(tree, TokenTree) else tree
        parts = [entry.tensors(device) for entry in trees]
        topology = parts[0] if isinstance(tree, TokenTree) else Topology.stack(parts)
        # the deepest level has leaves only
        levels = tuple(_draft_level(trees, topology, level, device) for level in range(trees[0].num_levels - 1))
        steps = TreeStep.of(topology), TreeStep.of(TokenTree.chain(2).tensors(device))
        return cls(tree, tree if isinstance(tree, TokenTree) else topology, topology.num_nodes, *steps, levels)

    @classmethod
    def _shaped(cls, tree: ShapedTree, device: torch.device | str, batch_size: int) -> TreeLayout:
        topology = shaped_topology(tree, batch_size, device)
        shared = ShapedReach(tree, batch_size, device)
        # Steps hold tensors of their own, which are written when the level above gives out its children.
        steps = [TreeStep.of(topology, list(tree.level_nodes(level))) for level in range(tree.num_levels - 1)]
        levels = []
        for level, step in enumerate(steps):
            nodes = torch.tensor(list(tree.level_nodes(level)), dtype=torch.int64, device=device)
            places = torch.zeros(batch_size, tree.widths[level + 1], dtype=torch.int64, device=device)
            own_mask = steps[level + 1].tree_mask if level + 1 < len(steps) else None
            shape = LevelShape(tree, level, topology, shared, places, own_mask)
            first_child = tree.level_nodes(level + 1).start
            levels.append(
                DraftLevel(step, nodes, shape.max_children, first_child, tree.widths[level + 1], places, shape=shape)
            )
        root_step = TreeStep.of(TokenTree.chain(2).tensors(device))
        return cls(tree, topology, tree.num_nodes, TreeStep.of(topology), root_step, tuple(levels))


@lru_cache(maxsize=64)
def _kept_layout(tree: TokenTree, device: torch.device) -> TreeLayout:
    with torch.inference_mode(False):  # for later calls, which may run outside inference mode
        return TreeLayout._made(tree, device)


def _draft_level(trees: Sequence[TokenTree], topology: Topology, level: int, device: torch.device | str) -> DraftLevel:
    # Nodes without children are fed only where the same node of another request has some.
    internal = sorted({node for tree in trees for node in tree.internal_nodes(level)})
    num_samples = max(tree.num_children[node] for tree in trees for node in internal)
    first_child = trees[0].level_nodes(level + 1)[0]
    drawn = [
        [row * num_samples + rank for row, node in enumerate(internal) for rank in range(tree.num_children[node])]
        for tree in trees
    ]
    nodes = torch.tensor(internal, dtype=torch.int64, device=device)
    places = torch.tensor(drawn if topology.batch_size is not None else drawn[0], device=device)
    with_proposal = 0
    if isinstance(trees[0], MergedTree) and first_child in trees[0].path:
        with_proposal = trees[0].num_children[internal[0]]
    step = TreeStep.of(topology, internal)
    return DraftLevel(step, nodes, num_samples, first_child, len(drawn[0]), places, with_proposal)


@dataclass
class TokenBuffers:
    """What the draft leaves for the target. N nodes, allocated once a tree and batch.

    Attributes:
        tokens: token of every node, -1 where none could be drawn. [B, N] int64.
        draft_logits: the draft's logits at every internal node; rows of leaves are never read. [B, N, vocab], the dtype
            of its logits: as wide as the target's, with -inf for tokens that the draft does not know, or as the draft's
            where it has a vocabulary of its own. None without a draft, or where it draws nothing.
        vocabulary: of the draft, where it is not a first part of the target's.
        certain: nodes whose tokens were proposed with certainty, not drawn. [B, N] bool. None where a source draws all.
        proposed: of a `MergedTree`, tokens for the nodes of its path; -1 where a node's own draw counts. [B, N] int64.
        foretold: how likely a child of each node with children is accepted, as a source that foretells says before they
            are drawn; NaN for other nodes. [B, N] float32. None where nobody asks.
    """

    tokens: torch.Tensor
    draft_logits: torch.Tensor | None
    vocabulary: VocabularyMap | None = None
    certain: torch.Tensor | None = None
    proposed: torch.Tensor | None = None
    foretold: torch.Tensor | None = None

    @classmethod
    def allocate(
        cls, layout: TreeLayout, batch_size: int, vocab_size: int, logits_dtype: torch.dtype, device: torch.device,
        *, vocabulary: VocabularyMap | None = None, draws: bool = True, proposes: bool = False,
        foretells: bool = False,
    ) -> TokenBuffers:  # fmt: skip
        """Allocate the buffers of a tree and batch.

        Args:
            layout: the tree.
            batch_size: requests.
            vocab_size: width of the target's logits.
            logits_dtype: of the draft's.
            device: of all buffers.
            vocabulary: of the draft, where it has its own.
            draws: whether any child may be drawn.
            proposes: whether any child may be certain.
            foretells: whether the draft is asked what it foretells.
        """
        shape = (batch_size, layout.num_nodes)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        if not layout.levels:
            return cls(tokens, None)
        certain = torch.zeros(shape, dtype=torch.bool, device=device) if proposes else None
        if not draws:
            return cls(tokens, None, None, certain)
        width = vocab_size if vocabulary is None else vocabulary.draft_vocab_size
        draft_logits = torch.full((*shape, width), -torch.inf, dtype=logits_dtype, device=device)
        draft_logits[:, :, 0] = 0.0  # also rows of a request that nothing is ever drawn for can be verified
        proposed = None
        if isinstance(layout.tree, MergedTree):
            proposed = torch.full(shape, -1, dtype=torch.int64, device=device)
        foretold = torch.full(shape, torch.nan, dtype=torch.float32, device=device) if foretells else None
        return cls(tokens, draft_logits, vocabulary, certain, proposed, foretold)


def of_parents(layout: TreeLayout, level: DraftLevel, rows: torch.Tensor) -> torch.Tensor:
    """Give the rows of the parents of a level's nodes, which a shaped tree may write in every step.

    Args:
        layout: the tree, of N nodes.
        level: one of its levels, of W nodes.
        rows: one for each node. [B, N, H].

    Returns:
        [B, W, H].
    """
    topology = layout.topology
    tensors = topology.tensors(rows.device) if isinstance(topology, TokenTree) else topology
    parents = tensors.parents.index_select(-1, level.nodes).to(torch.int64).clamp(min=0)
    if parents.dim() == 1:
        return rows.index_select(1, parents)
    return rows.take_along_dim(parents[:, :, None], 1)
