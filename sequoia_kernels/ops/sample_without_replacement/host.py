"""sample_without_replacement in C++ on the CPU; see csrc/host/sample_without_replacement.cpp.

Inputs and outputs as in op.py.
"""

from __future__ import annotations

from sequoia_kernels import _host
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, address, contiguous, deliver, writable

from .op import SampledTokens, SampleInputs, check_values

__all__ = ["CHECKS_VALUES", "run", "supports"]

CHECKS_VALUES = True


def supports(inputs: SampleInputs) -> str | None:
    """CPU tensors of every shape and dtype of the contract."""
    return None if inputs.logits.is_cpu else "takes CPU tensors"


def run(inputs: SampleInputs, outputs: SampledTokens) -> None:
    """Write the outputs."""
    logits = inputs.logits
    results = writable(outputs)
    rows = contiguous(inputs.temperature, inputs.seeds, inputs.offsets)

    def call(check: bool) -> bool:
        return _host.sample_without_replacement(
            logits.data_ptr(),
            ELEMENT_TYPES[logits.dtype],
            *map(address, rows),
            *map(address, results),
            *logits.shape,
            logits.stride(0),
            inputs.num_samples,
            check,
        )

    if not call(check=True):  # something looks out of range: name it
        check_values(inputs)
        call(check=False)
    deliver(results, outputs)
