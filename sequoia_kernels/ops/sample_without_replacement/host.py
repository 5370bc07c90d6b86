"""sample_without_replacement in C++ on the CPU; see csrc/host/sample_without_replacement.cpp.

Inputs and outputs as in op.py.
"""

from __future__ import annotations

from collections.abc import Callable

import sequoia_kernels._host as _host
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, address, contiguous, deliver, writable

from .op import SampledTokens, SampleInputs, check_values

__all__ = ["CHECKS_VALUES", "bind", "run", "supports"]

CHECKS_VALUES = True


def supports(inputs: SampleInputs) -> str | None:
    """CPU tensors of every shape and dtype of the contract."""
    return None if inputs.logits.is_cpu else "takes CPU tensors"


def bind(inputs: SampleInputs, outputs: SampledTokens) -> Callable[[bool], bool]:
    """Prepare calls on what will lie in these tensors then.

    Args:
        inputs: the inputs.
        outputs: contiguous outputs.

    Returns:
        A call that takes whether to check values; False, and nothing is written, where one is out of range.
    """
    logits = inputs.logits
    rows = contiguous(inputs.temperature, inputs.seeds, inputs.offsets)
    arguments = (
        logits.data_ptr(), ELEMENT_TYPES[logits.dtype], *map(address, rows), *map(address, outputs), *logits.shape,
        logits.stride(0), inputs.num_samples,
    )  # fmt: skip

    def call(check: bool, held: object = (inputs, outputs, rows)) -> bool:
        return _host.sample_without_replacement(*arguments, check)

    return call


def run(inputs: SampleInputs, outputs: SampledTokens) -> None:
    """Write the outputs."""
    results = writable(outputs)
    call = bind(inputs, results)
    if not call(True):  # something looks out of range: name it
        check_values(inputs)
        call(False)
    deliver(results, outputs)
