"""warped_logsumexp in C++ on the CPU; see csrc/host/warped_logsumexp.cpp. Inputs and outputs as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sequoia_kernels import _host, checks
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, address, writable

OP = "warped_logsumexp"
CHECKS_VALUES = True


def supports(logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> str | None:
    return None if logits.is_cpu else "takes CPU tensors"


def run(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    log_normaliser: Tensor | None,
    cut: Tensor | None,
) -> tuple[Tensor, Tensor]:
    num_rows, vocab = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    results = tuple(writable(buffer, logits, (num_rows,), dtype) for buffer in (log_normaliser, cut))
    temperature = temperature.contiguous()
    top_k = None if top_k is None else top_k.contiguous()
    top_p = None if top_p is None else top_p.contiguous()

    def call(check_values: bool) -> bool:
        return _host.warped_logsumexp(
            logits.data_ptr(),
            ELEMENT_TYPES[logits.dtype],
            temperature.data_ptr(),
            address(top_k),
            address(top_p),
            results[0].data_ptr(),
            results[1].data_ptr(),
            num_rows,
            vocab,
            logits.stride(0),
            check_values,
        )

    if not call(check_values=True):  # something looks out of range: name it
        checks.check_temperature_values(OP, temperature)
        if top_p is not None:
            checks.check_top_p_values(OP, top_p)
        checks.check_logits(OP, "logits", logits)
        call(check_values=False)
    for buffer, result in zip((log_normaliser, cut), results):
        if buffer is not None and buffer is not result:
            buffer.copy_(result)
    return (
        results[0] if log_normaliser is None else log_normaliser,
        results[1] if cut is None else cut,
    )
