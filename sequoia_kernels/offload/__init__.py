"""Offloading: decoder layers on the host, streamed to the device layer by layer while the model runs.

`checkpoint` reads safetensors files (`weights` names what else they may come from), `layers` finds and lays out a
model's decoder layers, `unloaded` matches the two and adds everything up, `memory` decides which layers stay on the
device, `host_weights` keeps the others in `host_memory`, `link` copies them, `scheduler` orders the copies, `lockstep`
runs a long prompt in one pass over the weights, and `model` makes a tree model of it all. `threads` keeps Ctrl-C from
breaking what runs beside the main thread.
"""

from sequoia_kernels.offload.link import CudaLink, Link, ThreadLink
from sequoia_kernels.offload.memory import MemoryPlan, plan_memory
from sequoia_kernels.offload.model import OffloadedModel, load_offloaded, memory_plan, random_offloaded
from sequoia_kernels.offload.weights import normal_weights

__all__ = [
    "CudaLink", "Link", "MemoryPlan", "OffloadedModel", "ThreadLink", "load_offloaded", "memory_plan", "normal_weights",
    "plan_memory", "random_offloaded",
]  # fmt: skip
