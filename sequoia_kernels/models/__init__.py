"""Hugging Face models as tree models: adapting, caches, prefill, loading."""

from sequoia_kernels.models.adapter import TreeModel, adapt
from sequoia_kernels.models.cache import TreeCache, TreeCacheLayer
from sequoia_kernels.models.loading import check_pair, load_model
from sequoia_kernels.models.offload import OffloadedModel, load_offloaded, memory_plan, random_offloaded
from sequoia_kernels.models.packing import pack_linear_layers, unpack_linear_layers
from sequoia_kernels.models.prefill import prefill
from sequoia_kernels.models.step import TreeStep, causal_step

__all__ = [
    "OffloadedModel",
    "TreeCache",
    "TreeCacheLayer",
    "TreeModel",
    "TreeStep",
    "adapt",
    "causal_step",
    "check_pair",
    "load_model",
    "load_offloaded",
    "memory_plan",
    "pack_linear_layers",
    "prefill",
    "random_offloaded",
    "unpack_linear_layers",
]
