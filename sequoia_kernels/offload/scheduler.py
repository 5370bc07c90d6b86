"""The order of copies: a ring of buffers that is always filled as far ahead as there is room, pass after pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sequoia_kernels.offload.host_weights import HostLayer
from sequoia_kernels.offload.layers import DecoderLayer
from sequoia_kernels.offload.link import Link

__all__ = ["LayerStreamer"]


class LayerStreamer:
    """Streams layers through a ring of buffers and binds them while they run.

    Position p of the endless sequence of passes is layer p mod S in buffer p mod n. A position is copied as soon as its
    buffer has been released by position p - n, so the first layers of a pass travel while whatever lies between two
    passes is computed. Layers may also be asked for out of order (a pass that broke off, a caller that skips layers):
    the ring then starts again at the layer that is wanted.

    An interrupt or an error may break off a change of the ring at any step. `_changing` says so, and the next call puts
    the ring into a state that does not depend on the old one.

    Args:
        layers: the streamed layers in the order in which they run. [S]
        sources: their weights on the host. [S]
        num_buffers: n, at least 1.
        device: where the buffers are, each of the size of the largest layer.
        link: does the copies, which `num_copies` counts.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        sources: Sequence[HostLayer],
        num_buffers: int,
        device: torch.device,
        link: Link,
    ) -> None:
        self.layers, self.sources, self.link = list(layers), list(sources), link
        largest = max(layer.num_bytes for layer in layers)
        self.num_copies = 0
        # Normal tensors even inside inference mode: the views below are used inside and outside of it.
        with torch.inference_mode(False):
            self.buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(num_buffers)]
            # What each layer's tensors are in each buffer, shared by layers of one layout.
            views: dict[Any, list[tuple[torch.Tensor, ...]]] = {}
            for layer in self.layers:
                if layer.layout not in views:
                    views[layer.layout] = [
                        tuple(packed.bindable(buffer) for packed in layer.tensors) for buffer in self.buffers
                    ]
            self._views = [views[layer.layout] for layer in self.layers]
        # The buffers' memory may still be in use by what the allocator had lent it to.
        self._released: list[Any] = [link.mark()] * num_buffers
        self._transfers: list[Any] = [None] * num_buffers
        self._wanted = self._issued = 0  # positions: the next one to run, the next one to copy
        self._held: int | None = None  # the layer that is bound
        self._changing = self._closed = False

    def acquire(self, layer: int) -> None:
        """Bind a layer's weights; what is computed from now on may use them. No-op where it is bound already."""
        if self._closed:
            raise RuntimeError("OffloadedModel: the model must be open, got a closed one; load it again")
        self.link.check()
        if self._held == layer and not self._changing:
            return
        self.release()
        self._changing = True
        num_layers = len(self.layers)
        if self._wanted % num_layers != layer:  # copies under way are dropped: later ones of the link overwrite them
            self._issued += (layer - self._issued) % num_layers
            self._wanted = self._issued
        self._fill()
        buffer = self._wanted % len(self.buffers)
        self.link.wait(self._transfers[buffer])
        self.layers[layer].bind(self._views[layer][buffer])
        self._held = layer
        self._changing = False

    def release(self) -> None:
        """Unbind the bound layer, if any, and let its buffer be overwritten once it has run."""
        if self._closed:
            return
        if self._changing:
            self._reset()
        if self._held is None:
            return
        self._changing = True
        self.layers[self._held].unbind()
        self._held = None
        self._released[self._wanted % len(self.buffers)] = self.link.mark()
        self._wanted += 1
        self._fill()
        self._changing = False

    def close(self) -> None:
        """Stop the link, free the buffers and the host's memory, even where the link fails. Idempotent."""
        self._closed = True
        self._unbind_all()
        try:
            self.link.close()
        finally:
            for source in self.sources:
                source.close()
            self.sources.clear()
            self._views.clear()
            self._transfers.clear()
            self.buffers.clear()

    def _reset(self) -> None:
        """Start the ring anew. The link is in order, so copies under way are overwritten by those that follow."""
        self.link.recover()
        self._unbind_all()
        self._released = [self.link.mark()] * len(self.buffers)
        self._wanted = self._issued = 0
        self._changing = False

    def _unbind_all(self) -> None:
        for layer in self.layers:
            layer.unbind()
        self._held = None

    def _fill(self) -> None:
        while self._issued < self._wanted + len(self.buffers):
            layer, buffer = self._issued % len(self.layers), self._issued % len(self.buffers)
            self._transfers[buffer] = self.link.copy(self.sources[layer], self.buffers[buffer], self._released[buffer])
            self._issued += 1
            self.num_copies += 1
            self.sources[(layer + 1) % len(self.layers)].read_ahead()
