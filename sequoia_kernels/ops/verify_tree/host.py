"""Decide the accepted paths in C++ on the CPU; see csrc/host/verify_tree.cpp. Inputs and outputs as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sequoia_kernels import _host
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, address, writable

from .op import _check_values

__all__ = ["CHECKS_VALUES", "run", "supports"]

CHECKS_VALUES = True


def supports(tokens: Tensor, *unused: object) -> str | None:
    """CPU tensors of every shape and dtype of the contract."""
    return None if tokens.is_cpu else "takes CPU tensors"


def run(
    tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    first_child: Tensor,
    num_children: Tensor,
    num_levels: int,
    max_branching: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    nodes: Tensor | None,
    num_accepted: Tensor | None,
    next_token: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op on the backend's inputs, into the outputs where they are given."""
    batch_size, num_nodes, vocab = target_logits.shape
    path = writable(nodes, tokens, (batch_size, num_levels), torch.int32)
    count = writable(num_accepted, tokens, (batch_size,), torch.int32)
    following = writable(next_token, tokens, (batch_size,), torch.int64)
    temperature, seeds, offsets = temperature.contiguous(), seeds.contiguous(), offsets.contiguous()
    first_child, num_children = first_child.contiguous(), num_children.contiguous()
    top_k = None if top_k is None else top_k.contiguous()
    top_p = None if top_p is None else top_p.contiguous()
    draft = target_logits if draft_logits is None else draft_logits

    def call(check: bool) -> bool:
        return _host.verify_tree(
            tokens.data_ptr(),
            target_logits.data_ptr(),
            ELEMENT_TYPES[target_logits.dtype],
            address(draft_logits),
            ELEMENT_TYPES[draft.dtype],
            first_child.data_ptr(),
            num_children.data_ptr(),
            temperature.data_ptr(),
            seeds.data_ptr(),
            offsets.data_ptr(),
            address(top_k),
            address(top_p),
            path.data_ptr(),
            count.data_ptr(),
            following.data_ptr(),
            batch_size,
            num_nodes,
            num_levels,
            vocab,
            tokens.stride(0),
            target_logits.stride(0),
            target_logits.stride(1),
            draft.stride(0),
            draft.stride(1),
            check,
        )

    if not call(check=True):  # something looks out of range: name it
        _check_values(tokens, target_logits, draft_logits, num_children, temperature, top_p)
        call(check=False)
    return (
        path if nodes is None or nodes is path else nodes.copy_(path),
        count if num_accepted is None or num_accepted is count else num_accepted.copy_(count),
        following if next_token is None or next_token is following else next_token.copy_(following),
    )
