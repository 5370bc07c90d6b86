"""Calls as CUDA graphs: what a captured decoding step pays for them, without launches from the host."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from sequoia_kernels.cuda_graphs import CaptureError, capture, refuse, refused

__all__ = ["captured", "new_memory"]

logger = logging.getLogger("sequoia_kernels")


def captured(
    call: Callable[[], object], device: torch.device, memory: Any = None, model: Any | None = None
) -> Callable[[], object]:
    """Capture a call in a CUDA graph and return its replay; on other devices return the call itself.

    Args:
        call: what to capture. Its results are thrown away.
        device: where it works.
        memory: `new_memory` of several graphs that are replayed one after the other, so that they share their memory.
        model: the `TreeModel` whose forward the call is, None where it is none. One that cannot be captured is tried
            once.

    Notes:
        Where capture fails, the reason is logged and the call is returned as it is: its time then contains launches.
    """
    if device.type != "cuda" or (model is not None and refused(model)):
        return call
    try:
        return capture(call, device, memory=memory).graph.replay
    except CaptureError as error:
        if model is not None and error.lasting:
            refuse(model, error)
        else:
            logger.warning("a call is timed uncaptured: %s", error)
        return call


def new_memory(device: torch.device) -> Any:
    """Give memory for graphs to share; None on devices without graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
