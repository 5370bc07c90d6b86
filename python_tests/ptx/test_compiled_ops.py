"""Every op's compiled kernels, in the PTX emulator: results as the reference's, and nothing found.

Run by `python_tests/emulate_ptx.py`, in a process whose kernels are compiled: skipped where Triton interprets them.
"""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from support.few_rows_forwards import CASES
from support.ptx.calls import CALLS, FewRowsForward, collecting_call, compaction_call
from support.ptx.emulator import Emulator
from support.ptx.launch import Options
from support.ptx.triton_launches import emulated

from sequoia_kernels.ops import triton_device
from sequoia_kernels.ops.sample_without_replacement.triton_selection import largest, largest_entries

pytestmark = pytest.mark.skipif(
    triton_device.INTERPRETED, reason="python_tests/emulate_ptx.py runs it, in a process that compiles its kernels"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

# Each device has its own order, and a fault that shows in one shows in a test of the other as a rule.
DEVICES = {
    80: Options(order="random", interleave=3),
    90: Options(order="reversed"),
}


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("name", CALLS)
def test_compiled_kernels(name, capability):
    emulator = Emulator(DEVICES[capability])
    assert CALLS[name]().is_right(emulator, capability)
    assert emulator.launches
    assert [str(finding) for finding in emulator.report.findings()] == []


def test_what_programs_collect_gives_the_same_bits_in_any_order():
    results = []
    for options in (Options(order="serial"), Options(order="reversed"), Options(order="random", interleave=4)):
        with emulated(Emulator(options), 90):
            results.append(collecting_call(0, 0.9).make("triton"))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@triton.jit
def selection_kernel(
    entries_ptr, taken_ptr, left_ptr, largest_ptr, SIZE: tl.constexpr, COUNT: tl.constexpr, WARPS: tl.constexpr
):
    places = tl.arange(0, SIZE)
    taken, left = largest_entries(tl.load(entries_ptr + places), COUNT, WARPS)
    tl.store(taken_ptr + tl.arange(0, COUNT), taken)
    tl.store(left_ptr + places, left)
    # Each thread stores its own: lanes that take another one for the largest store different numbers.
    tl.store(largest_ptr + places, tl.full([SIZE], 0, tl.int32) + largest(taken))


# Sizes of a draw of 1, 5, 8, 16, 64 and 128 tokens, of groups and of their tokens, and one that is taken as a whole.
@pytest.mark.parametrize(
    ("size", "count", "num_warps"),
    [
        (16, 16, 4), (64, 8, 4), (512, 8, 4), (1024, 8, 4), (2048, 8, 4), (1024, 16, 4), (2048, 16, 4), (2048, 32, 4),
        (2048, 128, 8), (8192, 128, 8), (8192, 256, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("capability", DEVICES)
def test_networks_part_entries_and_all_lanes_know_the_largest(capability, size, count, num_warps):
    generator = torch.Generator().manual_seed(0)
    entries = (torch.randperm(4 * size, generator=generator)[:size] - 2 * size).int()
    taken, left, top = torch.zeros(count).int(), torch.zeros(size).int(), torch.zeros(size).int()
    emulator = Emulator(DEVICES[capability])
    with emulated(emulator, capability):
        selection_kernel[(1,)](entries, taken, left, top, size, count, num_warps, num_warps=num_warps)
    assert [str(finding) for finding in emulator.report.findings()] == []
    is_left = left != -(2**31)
    assert torch.equal(left[is_left], entries[is_left])
    assert torch.equal(taken.sort().values, entries[~is_left].sort().values)
    assert torch.equal(top, entries.max().expand(size))


@needs_nvcc
@pytest.mark.parametrize("capability", DEVICES)
def test_native_compaction(capability):
    from support.ptx.cuda_launches import native_kernels

    emulator = Emulator(DEVICES[capability])
    call = compaction_call()
    with native_kernels(emulator, capability):
        assert call.agrees(call.make("cuda"))
    assert emulator.launches
    assert [str(finding) for finding in emulator.report.findings()] == []


# Few stages of weights, which come round; more blocks than units of the attention, and fewer.
FORWARDS = {
    80: FewRowsForward(CASES["two requests, a head of keys each"], torch.float16, num_blocks=4, shared_bytes=68 << 10),
    90: FewRowsForward(CASES["a group"], torch.bfloat16, num_blocks=2),
}


@needs_nvcc
@pytest.mark.parametrize("capability", DEVICES)
def test_native_forward_of_few_rows(capability):
    emulator = Emulator(DEVICES[capability])
    assert FORWARDS[capability].is_right(emulator, capability)
    assert [launch.num_blocks for launch in emulator.launches] == [FORWARDS[capability].num_blocks]
    assert [str(finding) for finding in emulator.report.findings()] == []
