"""verify_tree in C++ on the CPU; see csrc/host/verify_tree.cpp. Inputs and outputs as in op.py."""

from __future__ import annotations

from collections.abc import Callable

import sequoia_kernels._host as _host
from sequoia_kernels.ops.host_calls import (
    ELEMENT_TYPES,
    VERIFICATION_RULES,
    address,
    contiguous,
    deliver,
    writable,
)

from .op import VerifiedPath, VerifyTreeInputs, check_values, rule_reason

__all__ = ["CHECKS_VALUES", "bind", "run", "supports"]

CHECKS_VALUES = True


def supports(inputs: VerifyTreeInputs) -> str | None:
    """CPU tensors of every shape and dtype of the contract."""
    reason = rule_reason(inputs, tuple(VERIFICATION_RULES))
    if reason is not None:
        return reason
    return None if inputs.tokens.is_cpu else "takes CPU tensors"


def bind(inputs: VerifyTreeInputs, outputs: VerifiedPath) -> Callable[[bool], bool]:
    """Prepare calls on what will lie in these tensors then.

    Args:
        inputs: the inputs.
        outputs: contiguous outputs.

    Returns:
        A call that takes whether to check values; False, and nothing is written, where one is out of range.
    """
    tokens, target, draft = inputs[:3]
    batch_size, num_nodes, vocab = target.shape
    drafted = target if draft is None else draft
    topology = contiguous(inputs.first_child, inputs.num_children)
    mapped = contiguous(inputs.target_to_draft, inputs.certain)
    rows = contiguous(inputs.temperature, inputs.seeds, inputs.offsets, inputs.top_k, inputs.top_p)
    arguments = (
        tokens.data_ptr(),
        target.data_ptr(),
        ELEMENT_TYPES[target.dtype],
        address(draft),
        ELEMENT_TYPES[drafted.dtype],
        *map(address, mapped),
        *map(address, topology),
        inputs.max_branching,
        *map(address, rows),
        *map(address, outputs),
        batch_size,
        num_nodes,
        inputs.num_levels,
        vocab,
        drafted.shape[2],
        num_nodes if inputs.first_child.dim() == 2 else 0,
        num_nodes if inputs.certain is not None and inputs.certain.dim() == 2 else 0,
        tokens.stride(0),
        target.stride(0),
        target.stride(1),
        drafted.stride(0),
        drafted.stride(1),
        VERIFICATION_RULES[inputs.rule],
    )

    def call(check: bool, held: object = (inputs, outputs, topology, mapped, rows)) -> bool:
        return _host.verify_tree(*arguments, check)

    return call


def run(inputs: VerifyTreeInputs, outputs: VerifiedPath) -> None:
    """Write the outputs."""
    results = writable(outputs)
    call = bind(inputs, results)
    if not call(True):  # something looks out of range: name it
        check_values(inputs)
        call(False)
    deliver(results, outputs)
