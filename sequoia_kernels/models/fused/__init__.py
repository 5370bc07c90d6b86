"""Forwards of few kernels on a GPU: matrix products by torch, everything between two of them fused.

forward.py          a described model, its weights packed so that products read them together, and the forward itself
packing.py          weights that are read together, laid one behind the other without a second copy
steps.py            the three steps between products: contract and launch
triton_kernels.py   their kernels
reference.py        the same in plain torch: the specification
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from sequoia_kernels.models.attention_probe import LayerCall
from sequoia_kernels.models.quantised import NotNativeError

if TYPE_CHECKING:
    from sequoia_kernels.models.fused.forward import FusedForward

__all__ = ["fused_forward"]


def fused_forward(
    model: PreTrainedModel, calls: Sequence[LayerCall], logits_dtype: torch.dtype, device: torch.device
) -> FusedForward:
    """Make a model's fused forward; the kernels' compiler is imported here, since not everybody has it.

    Raises:
        NotNativeError: there can be none; the message says why.
    """
    try:
        from sequoia_kernels.models.fused.forward import FusedForward
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise NotNativeError("triton is not installed") from None
    return FusedForward(model, calls, logits_dtype, device)
