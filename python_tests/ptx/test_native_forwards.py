"""The native forward of few rows in the PTX emulator: every case of its own tests, in several orders of its blocks.

Run by `python_tests/emulate_ptx.py`, in a process whose kernels are compiled; `test_compiled_ops.py` has a small part.
"""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("triton")

import torch
from support.few_rows_forwards import CASES
from support.ptx.calls import FewRowsForward
from support.ptx.emulator import Emulator
from support.ptx.launch import Options
from support.ptx.report import Finding

from sequoia_kernels.ops import triton_device

pytestmark = [
    pytest.mark.skipif(
        triton_device.INTERPRETED, reason="python_tests/emulate_ptx.py runs it, in a process that compiles its kernels"
    ),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
]

FEW_BYTES = {64: 68 << 10, 128: 108 << 10}
"""head dim -> shared memory with room for few stages, which come round several times"""
FEW_STAGES = "blocks at random, few stages"
ORDERS = {
    "blocks at random": (Options(order="random"), {}),
    FEW_STAGES: (Options(order="random", seed=1), {}),
    "the first block far ahead": (Options(order="serial", warps="last"), {"num_blocks": 4}),
    "the last block far ahead": (Options(order="reversed", warps="first"), {"num_blocks": 2}),
    "one block": (Options(warps="random"), {"num_blocks": 1}),
}
DTYPES = (torch.bfloat16, torch.float16)


def is_read_ahead(finding: Finding) -> bool:
    """Whether it is a cache row that one block reads while another writes it.

    Blocks read the first slots of a cache before they wait for the others. Among them are rows of this very launch,
    which are left out later: in these tests they hold NaN before, so that nobody has used them where results are right.
    """
    is_cached = finding.detail.startswith(("keys of layer", "values of layer"))
    return is_cached and "race between blocks" in finding.kind and finding.location.startswith("few_rows_attention.h:")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_its_specification(case, order, capability):
    options, device = ORDERS[order]
    if order == FEW_STAGES:
        device = {"shared_bytes": FEW_BYTES[CASES[case].head_dim]}
    # Both types of numbers on both devices, in turns.
    dtype = DTYPES[(list(CASES).index(case) + list(ORDERS).index(order) + capability // 10) % 2]
    emulator = Emulator(options)
    assert FewRowsForward(CASES[case], dtype, **device).is_right(emulator, capability)
    assert len(emulator.launches) == 1
    assert [str(finding) for finding in emulator.report.findings() if not is_read_ahead(finding)] == []
