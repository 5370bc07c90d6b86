"""Calls as CUDA graphs: what a captured decoding step pays for them, without launches from the host."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["captured", "new_memory"]

logger = logging.getLogger("sequoia_kernels")

_NUM_WARMUPS = 2


def captured(call: Callable[[], object], device: torch.device, memory: Any = None) -> Callable[[], object]:
    """Capture a call in a CUDA graph and return its replay; on other devices return the call itself.

    Args:
        call: what to capture. Its results are thrown away.
        device: where it works.
        memory: `new_memory` of several graphs that are replayed one after the other, so that they share their memory.

    Notes:
        Where capture fails, the reason is logged and the call is returned as it is: its time then contains launches.
    """
    if device.type != "cuda":
        return call
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                for _ in range(_NUM_WARMUPS):
                    call()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            logger.warning("a call is timed uncaptured: %s", str(error).splitlines()[0])
            return call
    return graph.replay


def new_memory(device: torch.device) -> Any:
    """Give memory for graphs to share; None on devices without graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
