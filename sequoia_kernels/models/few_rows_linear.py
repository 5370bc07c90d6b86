"""A linear layer for a handful of rows: on a CPU one C++ call, as the native forwards multiply, elsewhere torch's."""

from __future__ import annotations

from os import environ
from typing import Any

import torch
import torch.nn.functional as F

from sequoia_kernels.host_module import host as _host
from sequoia_kernels.models.native import INSTRUCTION_SET_VARIABLE
from sequoia_kernels.models.quantised import ELEMENT_TYPES

__all__ = ["FewRowsLinear", "bind_linear"]

# Beyond these torch's own product is faster, and below them a small weight takes less than the call. One thread of a
# Zen CPU with AVX-512, November 2026:
# python -m bench.systems.bench_dflash --threads 1 --rows 1 2 4 8 16 32 --dtype float32 (or bfloat16)
MOST_NATIVE_ROWS = {4: 32, 2: 8}  # by bytes of a number
LEAST_NATIVE_NUMBERS = 1 << 16


class FewRowsLinear:
    """rows @ weight.T + bias, for weights that are read more often than they are multiplied.

    To C++ it is a model without layers: the rows are its embeddings, the weight its head.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        most_rows: rows that are multiplied in C++ at most; None takes what was measured.

    Attributes:
        is_native: whether few rows are multiplied in C++.

    Example:
        >>> linear = FewRowsLinear(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        >>> linear(torch.tensor([[1.0, 1.0]])).tolist()
        [[3.0, 3.0]]
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, most_rows: int | None = None) -> None:
        self.weight, self.bias = weight, bias
        tensors = [weight] if bias is None else [weight, bias]
        self.is_native = weight.dim() == 2 and all(
            tensor.is_cpu and tensor.is_contiguous() and tensor.dtype == weight.dtype for tensor in tensors
        ) and weight.dtype in ELEMENT_TYPES and weight.numel() >= LEAST_NATIVE_NUMBERS  # fmt: skip
        self._most_rows = MOST_NATIVE_ROWS.get(weight.element_size(), 0) if most_rows is None else most_rows
        self._bound: dict[int, Any] = {}  # by number of rows

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What it reads."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows. [..., inputs] -> [..., outputs], in the weight's dtype."""
        width, count = rows.shape[-1], rows.numel() // max(rows.shape[-1], 1)
        if not self.is_native or not 0 < count <= self._most_rows or rows.dtype != self.weight.dtype:
            return F.linear(rows, self.weight, self.bias)
        if width != self.weight.shape[1]:
            raise ValueError(f"FewRowsLinear: rows must have {self.weight.shape[1]} inputs, got {width}")
        bound = self._bound.get(count)
        if bound is None:
            tokens = torch.arange(count, dtype=torch.int64)
            bound = bind_linear(self.weight, tokens, count, has_bias=self.bias is not None)
            self._bound[count] = bound
        given = rows.contiguous()
        out = torch.empty(*rows.shape[:-1], self.weight.shape[0], dtype=self.weight.dtype)
        addresses = [given.data_ptr(), *(tensor.data_ptr() for tensor in self.tensors)]
        table = torch.tensor(addresses, dtype=torch.int64)
        bound[0].run(table.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out


def bind_linear(
    weight: torch.Tensor, tokens: torch.Tensor, num_embeddings: int, *, has_bias: bool,
    rows_dtype: torch.dtype | None = None, out_dtype: torch.dtype | None = None,
) -> tuple[Any, tuple[torch.Tensor, ...]]:  # fmt: skip
    """Describe the product of some rows of a table with a weight, to be run on tables of three or two addresses.

    Args:
        weight: [outputs, inputs], row by row.
        tokens: which rows, read at every run; those out of range are taken as the nearest. [rows] int64, contiguous.
        num_embeddings: rows of the table, which has the weight's inputs.
        has_bias: whether a bias is added, of the weight's dtype.
        rows_dtype: dtype of the table; None is the weight's.
        out_dtype: likewise of the products.

    Returns:
        A `_host.BoundForward`, which takes the addresses of table, weight and bias; and what must live as long.
    """
    outputs, inputs = weight.shape
    code, count = ELEMENT_TYPES[weight.dtype], tokens.shape[0]
    bias = (2, 0, 1, outputs, code, False) if has_bias else None
    description = {
        "width": inputs,
        "embedding": (0, 0, num_embeddings, inputs, ELEMENT_TYPES[rows_dtype or weight.dtype], False),
        "positions": None,
        "position_offset": 0,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "final_norm": None,
        "head": ((1, 0, outputs, inputs, code, False), bias),
        "logit_scale": 1.0,
        "logit_softcap": 0.0,
        "rotation_dims": [],
        "layers": [],
    }
    zeros = torch.zeros(count, dtype=torch.int32)
    call = {
        "tokens": tokens.data_ptr(),
        "depths": zeros.data_ptr(),
        "node_ids": zeros.data_ptr(),
        "tree_mask": zeros.data_ptr(),
        "cache_lens": zeros.data_ptr(),
        "num_requests": 1,
        "num_nodes": count,
        "num_words": 1,
        "mask_per_request": False,
        "max_position": 0,
        "caches": 0,
        "cache_rows": 1,
        "rotations": 0,
        "wanted_nodes": 0,
        "logits_type": ELEMENT_TYPES[out_dtype or weight.dtype],
    }
    forward = _host.Forward(description, environ.get(INSTRUCTION_SET_VARIABLE, ""))
    return _host.BoundForward(forward, call), (tokens, zeros)
