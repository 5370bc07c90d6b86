"""Token trees: topology, packed ancestor masks, values, files and drawings."""

from sequoia_kernels.tree.acceptance_vector import check_acceptance
from sequoia_kernels.tree.token_tree import MAX_NODES, TokenTree, TreeTensors

__all__ = ["MAX_NODES", "TokenTree", "TreeTensors", "check_acceptance"]
