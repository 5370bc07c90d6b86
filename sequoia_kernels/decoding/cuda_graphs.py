"""CUDA-graph decoding: a whole step captured once a tree and replayed, so that the host only launches graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from sequoia_kernels.decoding.commit import EmittedTokens
from sequoia_kernels.decoding.state import DecodingState
from sequoia_kernels.tree import TokenTree

logger = logging.getLogger("sequoia_kernels")

_NUM_WARMUPS = 2


class GraphedSteps:
    """Captures `run_step(tree)` once for every tree and replays it.

    The captured step reads and advances the state in place and works on buffers that live as long as the engine, so a
    replay needs no inputs. Lengths are read on the device and grids follow from shapes, so one graph serves every
    context length. Where capture fails, the reason is logged once and steps run uncaptured from then on.

    Args:
        run_step: one uncaptured step, or a part of one that writes its results into buffers.
        state: the state that the step advances; restored after the warm-ups.
    """

    def __init__(self, run_step: Callable[[TokenTree], Any], state: DecodingState) -> None:
        self.run_step = run_step
        self.state = state
        self.reason_off: str | None = None
        self._captured: dict[TokenTree, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None

    def step(self, tree: TokenTree) -> Any:
        """Run one step. The returned tensors are overwritten by the next step of the same tree."""
        self.capture(tree)
        if self.reason_off is not None:
            return self.run_step(tree)
        graph, emitted = self._captured[tree]
        graph.replay()
        return emitted

    @property
    def num_captured(self) -> int:
        """Trees whose step is captured."""
        return len(self._captured)

    def capture(self, tree: TokenTree) -> None:
        """Capture a tree's step, unless that is done or off. The state is as before afterwards."""
        if self.reason_off is not None or tree in self._captured:
            return
        advanced = (
            self.state.cache_lens,
            self.state.root_tokens,
            self.state.last_tokens,
            self.state.offsets,
        )
        before = [tensor.clone() for tensor in advanced]

        def restore() -> None:
            for tensor, value in zip(advanced, before, strict=True):
                tensor.copy_(value)

        # Warm-ups compile kernels and fill the allocator. They write behind the committed rows only, so restoring the
        # state undoes them.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(_NUM_WARMUPS):
                    self.run_step(tree)
                    restore()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            # Other threads may go on using the device meanwhile, such as one that reads layers for an offloaded target.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                emitted = self.run_step(tree)
        except RuntimeError as error:
            torch.cuda.synchronize()
            restore()
            self.reason_off = str(error).splitlines()[0]
            logger.warning(
                "CUDA-graph capture is off for this call, steps are launched one by one: %s", self.reason_off
            )
            return
        self._captured[tree] = graph, emitted


class HostCopy:
    """Copies a step's emitted tokens to the host without waiting; `read` waits for that copy, not for later work."""

    def __init__(self, emitted: EmittedTokens) -> None:
        self._event: torch.cuda.Event | None = None
        if emitted.tokens.device.type != "cuda":
            self._tensors: list[torch.Tensor] = list(emitted)
            return
        self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in emitted]
        for host, device in zip(self._tensors, emitted, strict=True):
            host.copy_(device, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Return (tokens [B][levels], nodes [B][levels], num_tokens [B])."""
        if self._event is not None:
            self._event.synchronize()
        tokens, nodes, num_tokens = (tensor.tolist() for tensor in self._tensors)
        return tokens, nodes, num_tokens
