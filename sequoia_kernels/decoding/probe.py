"""The tree that acceptance and the loop's overhead are measured with."""

from sequoia_kernels.tree import TokenTree

# Wide enough to see a fifth child, deep enough to be accepted often: about the optimal 24 nodes for a middling pair.
PROBE_TREE = TokenTree([-1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 6, 6, 6, 7, 10, 13, 13, 14, 18, 18, 21])
