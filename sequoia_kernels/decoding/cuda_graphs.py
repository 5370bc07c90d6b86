"""CUDA-graph decoding: a whole step captured once a tree and replayed, so that the host only launches graphs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from sequoia_kernels.cuda_graphs import Captured, capture, on_device
from sequoia_kernels.decoding.commit import EmittedTokens
from sequoia_kernels.decoding.state import DecodingState
from sequoia_kernels.tree import TokenTree

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class GraphedSteps:
    """Captures `run_step(tree)` once for every tree and replays it; runs uncaptured trees as they are.

    The captured step reads and advances the state in place and works on buffers that live as long as the engine, so a
    replay needs no inputs. Lengths are read on the device and grids follow from shapes, so one graph serves every
    context length.

    Args:
        run_step: one uncaptured step, or a part of one that writes its results into buffers.
        state: the state that the step advances; restored after the warm-ups.
    """

    def __init__(self, run_step: Callable[[TokenTree], Any], state: DecodingState) -> None:
        self.run_step = run_step
        self.state = state
        self._captured: dict[TokenTree, Captured] = {}
        self._memory = torch.cuda.graph_pool_handle() if state.cache_lens.is_cuda else None

    def step(self, tree: TokenTree) -> Any:
        """Run one step. The returned tensors of a captured one are overwritten by the next step of the same tree."""
        captured = self._captured.get(tree)
        if captured is None:
            return self.run_step(tree)
        captured.graph.replay()
        return captured.result

    @property
    def num_captured(self) -> int:
        """Trees whose step is captured."""
        return len(self._captured)

    def capture(self, tree: TokenTree) -> None:
        """Capture a tree's step, unless that is done. The state is as before afterwards.

        Raises:
            CaptureError: the step cannot be captured.
        """
        if tree in self._captured:
            return
        advanced = self.state.advancing()
        before = [tensor.clone() for tensor in advanced]

        def restore() -> None:  # what else a step writes lies behind the committed rows
            for tensor, value in zip(advanced, before, strict=True):
                tensor.copy_(value)

        self._captured[tree] = capture(
            lambda: self.run_step(tree), self.state.cache_lens.device, memory=self._memory, undo=restore
        )


def on_target_device(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function whose first argument is the target run with the target's device as the current one."""

    @functools.wraps(function)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = getattr(args[0] if args else kwargs.get("target"), "device", None)
        with on_device(device) if isinstance(device, torch.device) else contextlib.nullcontext():
            return function(*args, **kwargs)

    return guarded


class HostCopy:
    """Copies a step's emitted tokens to the host without waiting; `read` waits for that copy, not for later work."""

    def __init__(self, emitted: EmittedTokens) -> None:
        self._event: torch.cuda.Event | None = None
        if emitted.tokens.device.type != "cuda":
            self._tensors: list[torch.Tensor] = list(emitted)
            return
        with on_device(emitted.tokens.device):  # whose stream the copies and the event go to
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
