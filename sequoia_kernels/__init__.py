"""Lossless tree speculative decoding: kernels, a decoding loop and a hardware-aware tree planner.

The public names live here; everything behind them is imported on first use, so `import sequoia_kernels` costs nothing
and a program that only plans trees never loads a model library.

Trees and planning:
    TokenTree, Topology, optimal_tree, optimal_values, estimate_acceptance, AcceptanceEstimate, HardwareProfile,
    measure_profile, plan_tree, TreePlan, ShapedTree, shape_tree
Generation with Hugging Face models:
    generate, GenerateOutput, GenerateStats, GrammarHook, adapt, load_offloaded (sequoia_kernels.hf: trees for
    model.generate)
The four ops of a decoding step, and one for own verifiers and samplers (docs/own_loop.md):
    tree_attention, sample_without_replacement, verify_tree, compact_kv_cache_, CacheTable; warped_logsumexp;
    VocabularyMap
Own loops with Hugging Face models, besides adapt; servers' conventions are in sequoia_kernels.interop:
    TreeStep, prefill
Errors:
    BackendUnavailableError, UnsupportedModelError, ProfileError, TreeFormatError, RankError
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sequoia_kernels.version import __version__

if TYPE_CHECKING:
    from sequoia_kernels.decoding import GenerateOutput, GenerateStats, GrammarHook, generate, release_engines
    from sequoia_kernels.errors import (
        BackendUnavailableError,
        ProfileError,
        RankError,
        TreeFormatError,
        UnsupportedModelError,
    )
    from sequoia_kernels.measure import measure_profile
    from sequoia_kernels.models import TreeStep, adapt
    from sequoia_kernels.models.prefill import prefill
    from sequoia_kernels.offload import load_offloaded
    from sequoia_kernels.ops.compact_kv_cache_ import CacheTable, compact_kv_cache_
    from sequoia_kernels.ops.sample_without_replacement import sample_without_replacement
    from sequoia_kernels.ops.tree_attention import tree_attention
    from sequoia_kernels.ops.verify_tree import verify_tree
    from sequoia_kernels.ops.warped_logsumexp import warped_logsumexp
    from sequoia_kernels.planner import (
        AcceptanceEstimate,
        AdaptivePlan,
        HardwareProfile,
        TreePlan,
        estimate_acceptance,
        optimal_tree,
        optimal_values,
        plan_adaptive,
        plan_tree,
        shape_tree,
    )
    from sequoia_kernels.tree import ShapedTree, TokenTree, Topology
    from sequoia_kernels.vocabularies import VocabularyMap

__all__ = [
    "AcceptanceEstimate",
    "AdaptivePlan",
    "BackendUnavailableError",
    "CacheTable",
    "GenerateOutput",
    "GenerateStats",
    "GrammarHook",
    "HardwareProfile",
    "ProfileError",
    "RankError",
    "ShapedTree",
    "TokenTree",
    "Topology",
    "TreeFormatError",
    "TreePlan",
    "TreeStep",
    "UnsupportedModelError",
    "VocabularyMap",
    "__version__",
    "adapt",
    "compact_kv_cache_",
    "estimate_acceptance",
    "generate",
    "load_offloaded",
    "measure_profile",
    "optimal_tree",
    "optimal_values",
    "plan_adaptive",
    "plan_tree",
    "prefill",
    "release_engines",
    "sample_without_replacement",
    "shape_tree",
    "tree_attention",
    "verify_tree",
    "warped_logsumexp",
]

# Where each public name lives. The imports above say the same to type checkers; a test compares the two.
_ROOMS = {
    "decoding": ["GenerateOutput", "GenerateStats", "GrammarHook", "generate", "release_engines"],
    "errors": ["BackendUnavailableError", "ProfileError", "RankError", "TreeFormatError", "UnsupportedModelError"],
    "measure": ["measure_profile"],
    "models": ["TreeStep", "adapt", "prefill"],
    "offload": ["load_offloaded"],
    "ops": [
        "CacheTable",
        "compact_kv_cache_",
        "sample_without_replacement",
        "tree_attention",
        "verify_tree",
        "warped_logsumexp",
    ],
    "planner": [
        "AcceptanceEstimate",
        "AdaptivePlan",
        "HardwareProfile",
        "TreePlan",
        "estimate_acceptance",
        "optimal_tree",
        "optimal_values",
        "plan_adaptive",
        "plan_tree",
        "shape_tree",
    ],
    "tree": ["ShapedTree", "TokenTree", "Topology"],
    "vocabularies": ["VocabularyMap"],
}
_MODULES = ("hf", "interop")  # public by their own names
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
