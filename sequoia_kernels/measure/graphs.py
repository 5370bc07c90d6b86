"""Calls as CUDA graphs: what a captured decoding step pays for them, without launches from the host."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

__all__ = ["captured"]

logger = logging.getLogger("sequoia_kernels")

_NUM_WARMUPS = 2


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture a call in a CUDA graph and return its replay; on other devices return the call itself.

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
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            logger.warning("a call is timed uncaptured: %s", str(error).splitlines()[0])
            return call
    return graph.replay
