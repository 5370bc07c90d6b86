"""Hugging Face models as tree models: adapting, caches, prefill, loading."""

from sequoia_kernels.models.adapter import TreeModel, adapt, agree_on_changes
from sequoia_kernels.models.attention import TreeAttention
from sequoia_kernels.models.cache import LayerSpec, PagedTreeCache, StepContext, TreeCache, TreeCacheLayer
from sequoia_kernels.models.few_rows_linear import FewRowsLinear, bind_linear
from sequoia_kernels.models.forward_state import described_once, foreign_code_ran
from sequoia_kernels.models.loading import check_pair, check_sizes, load_model
from sequoia_kernels.models.native import BoundForward
from sequoia_kernels.models.packing import pack_linear_layers, unpack_linear_layers
from sequoia_kernels.models.prefill import prefill
from sequoia_kernels.models.tree_step import TreeStep, causal_step

__all__ = [
    "BoundForward", "FewRowsLinear", "LayerSpec", "PagedTreeCache", "StepContext", "TreeAttention", "TreeCache",
    "TreeCacheLayer", "TreeModel", "TreeStep", "adapt", "agree_on_changes", "bind_linear", "causal_step", "check_pair",
    "check_sizes",
    "described_once", "foreign_code_ran", "load_model", "pack_linear_layers", "prefill", "unpack_linear_layers",
]  # fmt: skip
