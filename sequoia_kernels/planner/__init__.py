"""Planner: acceptance vectors, hardware profiles, and which tree to speculate with."""

from sequoia_kernels.fingerprints import DeviceFingerprint, ModelFingerprint
from sequoia_kernels.planner.acceptance import AcceptanceEstimate, estimate_acceptance, validate_acceptance
from sequoia_kernels.planner.adaptive import (
    AdaptivePlan,
    TreeFollower,
    plan_adaptive,
    plan_from_evidence,
    shift_acceptance,
)
from sequoia_kernels.planner.candidates import PlanCandidate
from sequoia_kernels.planner.confidence import fit_confidence, shape_tree
from sequoia_kernels.planner.cost_model import CostModel
from sequoia_kernels.planner.evidence import AcceptanceEvidence
from sequoia_kernels.planner.lookup import LookupCosts, LookupEvidence
from sequoia_kernels.planner.plan import TreePlan, plan_tree
from sequoia_kernels.planner.profile import ForwardTable, HardwareProfile, OpPoint
from sequoia_kernels.planner.search import LevelWidths, OptimalTrees, optimal_tree, optimal_values
from sequoia_kernels.planner.step_records import StepRecords
from sequoia_kernels.planner.tree_files import read_tree

__all__ = [
    "AcceptanceEstimate",
    "AcceptanceEvidence",
    "AdaptivePlan",
    "CostModel",
    "DeviceFingerprint",
    "ForwardTable",
    "HardwareProfile",
    "LevelWidths",
    "LookupCosts",
    "LookupEvidence",
    "ModelFingerprint",
    "OpPoint",
    "OptimalTrees",
    "PlanCandidate",
    "StepRecords",
    "TreeFollower",
    "TreePlan",
    "estimate_acceptance",
    "fit_confidence",
    "optimal_tree",
    "optimal_values",
    "plan_adaptive",
    "plan_from_evidence",
    "plan_tree",
    "read_tree",
    "shape_tree",
    "shift_acceptance",
    "validate_acceptance",
]
