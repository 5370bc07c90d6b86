"""What Python hands to ``sequoia_kernels._host``: element type codes and addresses.

The module takes raw addresses, so that it needs no torch to build and serves every version of it. Who passes an address
keeps the tensor alive for the call and vouches for its dtype, layout and size.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["BOOLEAN", "ELEMENT_TYPES", "VERIFICATION_RULES", "address", "contiguous", "deliver", "writable"]

Outputs = TypeVar("Outputs", bound=tuple[Any, ...])

# The codes of ElementType in csrc/host/rows.h.
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# One more code, for masks only.
BOOLEAN = 4
# The codes of VerificationRule in csrc/host/ops.h.
VERIFICATION_RULES = {"sequoia": 0, "traversal": 1}


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous copies of what is strided, and the others as they are."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def writable(outputs: Outputs) -> Outputs:
    """The outputs, with a contiguous buffer in place of each that is strided; `deliver` copies from there."""
    for output in outputs:
        if output is not None and not output.is_contiguous():
            return type(outputs)(*contiguous(*outputs))  # type: ignore[arg-type]
    return outputs


def deliver(results: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
    """Copy what `writable` had put in the place of an output."""
    if results is not outputs:
        for result, output in zip(results, outputs):
            if output is not None and result is not None and result is not output:
                output.copy_(result)
