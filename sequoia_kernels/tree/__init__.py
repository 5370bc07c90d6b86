"""Token trees: topology, packed ancestor masks, values, files and drawings; verification rules by name."""

from sequoia_kernels.tree.acceptance_vector import TYPICAL_ACCEPTANCE, check_acceptance, vector_of_chances
from sequoia_kernels.tree.lookup_tree import LONGEST_PATH, LookupTree, MergedTree
from sequoia_kernels.tree.rules import (
    DEFAULT_RULE,
    VerificationRule,
    register_rule,
    rule_named,
    rule_names,
    usual_rule,
)
from sequoia_kernels.tree.shaped_tree import PROBABILITY_EDGES, Confidence, ShapedTree
from sequoia_kernels.tree.token_tree import MAX_NODES, MAX_STEP_ROWS, TokenTree
from sequoia_kernels.tree.topology import Topology

__all__ = [
    "DEFAULT_RULE",
    "LONGEST_PATH",
    "MAX_NODES",
    "MAX_STEP_ROWS",
    "PROBABILITY_EDGES",
    "TYPICAL_ACCEPTANCE",
    "Confidence",
    "LookupTree",
    "MergedTree",
    "ShapedTree",
    "TokenTree",
    "Topology",
    "VerificationRule",
    "check_acceptance",
    "register_rule",
    "rule_named",
    "rule_names",
    "usual_rule",
    "vector_of_chances",
]
