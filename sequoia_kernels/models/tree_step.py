"""What one forward feeds: which tree nodes, what each of them sees, and where their rows go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from sequoia_kernels import checks
from sequoia_kernels.tree import MAX_STEP_ROWS, TokenTree, Topology

__all__ = ["ForwardInputs", "TreeStep", "causal_step"]


class TreeStep(NamedTuple):
    """The rows of one forward: N nodes of a token tree, in the order of `input_ids`. Made by `of`.

    Device tensors, equal for every request of a batch; nothing in here depends on the tokens, so one object serves all
    steps with the same tree: make it once, before the loop.

    Attributes:
        tree_mask: bit j % 32 of word j // 32 in row i is set iff row i sees tree slot j. [N, W], or [B, N, W] where
            each request has a tree of its own, int32.
        node_ids: tree slot of each row: keys and values go to row cache_lens[b] + node_ids[i]. [N] int32.
        depths: depth of each row; its position is cache_lens[b] + depths[i]. [N] int32.
        num_tree_rows: tree slots in use: one more than the highest slot written or seen.
        first_node: node_ids[0] where node_ids is one ascending run without holes, else None.
    """

    tree_mask: torch.Tensor
    node_ids: torch.Tensor
    depths: torch.Tensor
    num_tree_rows: int
    first_node: int | None = None

    @classmethod
    def of(
        cls,
        tree: TokenTree | Topology,
        nodes: Sequence[int] | torch.Tensor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> TreeStep:
        """Return the step that feeds a tree, or some of its nodes.

        Args:
            tree: the tree, or a topology: of one tree, or of trees for each request whose levels are equally wide.
            nodes: which nodes, increasing: integers, or a tensor of them, which is read; None feeds all.
            device: where the step of a `TokenTree` is to be, "cpu" unless given. A topology's is where the topology is.

        Raises:
            TypeError: not a tree, or nodes that are no integers.
            ValueError: nodes do not increase or are not the tree's, a topology comes with a device, or (on a CPU) its
                trees have levels of other widths.

        Example:
            >>> TreeStep.of(TokenTree([-1, 0, 0, 1]), [1, 2]).depths.tolist()
            [1, 1]
        """
        if not isinstance(tree, (TokenTree, Topology)):
            raise TypeError(f"TreeStep.of: tree must be a TokenTree or a Topology, got {type(tree).__name__}")
        if isinstance(tree, TokenTree):
            topology = tree.tensors("cpu" if device is None else device)
        else:
            topology = tree
            if device is not None:
                raise ValueError(f"TreeStep.of: device must be None beside a Topology, got {device}")
        num_nodes = topology.num_nodes
        if nodes is not None:
            nodes = nodes.tolist() if isinstance(nodes, torch.Tensor) else nodes
            if not isinstance(nodes, Iterable):
                raise TypeError(f"TreeStep.of: nodes must be integers, got {nodes}")
            nodes = [checks.whole_number("TreeStep.of", "nodes", node, kind="integers") for node in nodes]
            if not nodes or any(node >= after for node, after in zip(nodes, [*nodes[1:], num_nodes])) or nodes[0] < 0:
                raise ValueError(f"TreeStep.of: nodes must increase within 0..{num_nodes - 1}, got {nodes}")
        mask, depths = topology.ancestor_mask, topology.depths
        if depths.dim() == 2:
            if depths.is_cpu and bool((depths != depths[:1]).any()):
                request, node = (depths != depths[:1]).nonzero()[0].tolist()
                actual = f"depths {int(depths[0, node])} and {int(depths[request, node])} of node {node}"
                rule = "have equally many nodes on every level of all its trees"
                checks.fail_range("TreeStep.of", "tree", rule, f"{actual} of the requests 0 and {request}")
            depths = depths[0]
        if nodes is None:
            ids = torch.arange(num_nodes, dtype=torch.int32, device=mask.device)
            return cls(mask, ids, depths, num_nodes, 0)
        ids = torch.tensor(nodes, dtype=torch.int32, device=mask.device)
        first = nodes[0] if nodes[-1] - nodes[0] + 1 == len(nodes) else None
        return cls(mask.index_select(-2, ids), ids, depths.index_select(0, ids), nodes[-1] + 1, first)


class ForwardInputs(NamedTuple):
    """What one forward is given besides its cache; see `TreeModel.forward`."""

    input_ids: torch.Tensor
    cache_lens: torch.Tensor
    step: TreeStep
    last_row: torch.Tensor | None
    hidden_states: dict[int, torch.Tensor] | None = None

    def check_for_kernels(self, num_layers: int) -> None:
        """Refuse what a forward of our own would read or write out of bounds.

        Raises:
            ValueError: the step has other nodes than are fed, or masks of another number.
            IndexError: `hidden_states` has a key that is no layer's.
        """
        batch_size, num_nodes = self.input_ids.shape
        mask, depths = self.step.tree_mask, self.step.depths
        if depths.shape != (num_nodes,) or mask.shape[:-1] not in ((num_nodes,), (batch_size, num_nodes)):
            raise ValueError(
                f"forward: step must have depths [nodes] = [{num_nodes}] and a tree_mask [nodes, words] or [batch, "
                f"nodes, words] for {batch_size} requests, got {list(depths.shape)} and {list(mask.shape)}"
            )
        if self.hidden_states and not all(0 <= number <= num_layers for number in self.hidden_states):
            raise IndexError(
                f"forward: hidden_states must have keys in 0..{num_layers}, got {list(self.hidden_states)}"
            )


@lru_cache(maxsize=64)
def causal_step(num_rows: int, device: torch.device | str = "cpu") -> TreeStep:
    """Return the step of a chain: row i sees slots 0..i, as in ordinary causal decoding.

    Args:
        num_rows: rows of the chain, 1..1024.
        device: device of the tensors.

    Returns:
        A `TreeStep`, cached by row count and device: do not write to its tensors.

    Raises:
        ValueError: `num_rows` is out of range.

    Notes:
        This is the step of prefill (a chain behind what is committed) and of decoding without speculation
        (`causal_step(1)`).

    Example:
        >>> causal_step(3).tree_mask.flatten().tolist()
        [1, 3, 7]
    """
    if not 1 <= num_rows <= MAX_STEP_ROWS:
        raise ValueError(
            f"causal_step: num_rows must be in 1..{MAX_STEP_ROWS}, got {num_rows}; feed longer chains in chunks"
        )
    with torch.inference_mode(False):  # kept for later calls, which may run outside inference mode
        return TreeStep.of(TokenTree.chain(num_rows).tensors(device))
