"""What Python hands to ``sequoia_kernels._host``: element type codes and addresses.

The module takes raw addresses, so that it needs no torch to build and serves every version of it. Who passes an address
keeps the tensor alive for the call and vouches for its dtype, layout and size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BOOLEAN", "ELEMENT_TYPES", "address", "writable"]

# The codes of ElementType in csrc/host/rows.h.
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# One more code, for masks only.
BOOLEAN = 4


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def writable(buffer: Tensor | None, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor to write a result into: the caller's buffer if it will do, otherwise a new one.

    A result that was not written into the caller's buffer must be copied there.
    """
    if buffer is not None and buffer.is_contiguous():
        return buffer
    return like.new_empty(shape, dtype=dtype)
