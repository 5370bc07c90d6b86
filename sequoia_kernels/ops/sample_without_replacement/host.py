"""Draw tokens without replacement in C++ on the CPU; see csrc/host/sample_without_replacement.cpp.

Inputs and outputs as in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sequoia_kernels import _host, checks
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, writable
from sequoia_kernels.ops.warping import compute_dtype

__all__ = ["CHECKS_VALUES", "run", "supports"]

_OP = "sample_without_replacement"
CHECKS_VALUES = True


def supports(logits: Tensor, *unused: object) -> str | None:
    """CPU tensors of every shape and dtype of the contract."""
    return None if logits.is_cpu else "takes CPU tensors"


def run(
    logits: Tensor,
    num_samples: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    tokens: Tensor | None,
    log_normaliser: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the op on the backend's inputs, into the outputs where they are given."""
    num_rows, vocab = logits.shape
    drawn = writable(tokens, logits, (num_rows, num_samples), torch.int64)
    normaliser = writable(log_normaliser, logits, (num_rows,), compute_dtype(logits.dtype))
    temperature, seeds, offsets = temperature.contiguous(), seeds.contiguous(), offsets.contiguous()

    def call(check_values: bool) -> bool:
        return _host.sample_without_replacement(
            logits.data_ptr(),
            ELEMENT_TYPES[logits.dtype],
            temperature.data_ptr(),
            seeds.data_ptr(),
            offsets.data_ptr(),
            drawn.data_ptr(),
            normaliser.data_ptr(),
            num_rows,
            vocab,
            logits.stride(0),
            num_samples,
            check_values,
        )

    if not call(check_values=True):  # something looks out of range: name it
        checks.check_temperature_values(_OP, temperature)
        checks.check_logits(_OP, "logits", logits)
        call(check_values=False)
    return (
        drawn if tokens is None or tokens is drawn else tokens.copy_(drawn),
        normaliser if log_normaliser is None or log_normaliser is normaliser else log_normaliser.copy_(normaliser),
    )
