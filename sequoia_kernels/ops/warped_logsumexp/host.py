"""warped_logsumexp in C++ on the CPU; see csrc/host/warped_logsumexp.cpp. Inputs and outputs as in op.py."""

from __future__ import annotations

from sequoia_kernels import _host
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, address, contiguous, deliver, writable

from .op import WarpedNormaliser, WarpInputs, check_values

__all__ = ["CHECKS_VALUES", "run", "supports"]

CHECKS_VALUES = True


def supports(inputs: WarpInputs) -> str | None:
    """CPU tensors of every shape and dtype of the contract."""
    return None if inputs.logits.is_cpu else "takes CPU tensors"


def run(inputs: WarpInputs, outputs: WarpedNormaliser) -> None:
    """Write the outputs."""
    logits, *options = inputs
    results = writable(outputs)
    rows = contiguous(*options)

    def call(check: bool) -> bool:
        return _host.warped_logsumexp(
            logits.data_ptr(),
            ELEMENT_TYPES[logits.dtype],
            *map(address, rows),
            *map(address, results),
            *logits.shape,
            logits.stride(0),
            check,
        )

    if not call(check=True):  # something looks out of range: name it
        check_values(inputs)
        call(check=False)
    deliver(results, outputs)
