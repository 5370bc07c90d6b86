"""Small PTX kernels written by hand, each with one block of code that matters, for the emulator's own tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from support.ptx.emulator import Emulator
from support.ptx.launch import Options

__all__ = ["Sample", "run_sample"]

_HEAD = """\
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry sample(.param .u64 source_address, .param .u64 target_address)
{{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<99>;
.reg .b64 %rd<20>;
ld.param.b64 %rd1, [source_address];
ld.param.b64 %rd2, [target_address];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
shl.b32 %r3, %r1, 2;
mov.b32 %r4, dynamic;
add.s32 %r5, %r4, %r3;
{body}
ret;
}}
"""


class Sample(NamedTuple):
    """What a sample did."""

    findings: set[str]
    target: torch.Tensor


def run_sample(
    body: str,
    *,
    num_threads: int = 64,
    num_blocks: int = 1,
    source: torch.Tensor | None = None,
    empty_source: bool = False,
    shared_bytes: int = 1024,
    options: Options | None = None,
    cooperative: bool = False,
) -> Sample:
    """Run a body in a kernel of a source and a target of 4-byte numbers.

    The body finds the addresses of both in %rd1 and %rd2, of its thread's own elements in %rd4 and %rd5, of its word in
    shared memory in %r5, which begins at %r4, the thread in %r1 and the block in %r2. Registers from %r10 are free.

    Args:
        body: PTX instructions.
        num_threads: of a block.
        num_blocks: of the grid.
        source: [num_threads] of the grid's first block's; 0, 1, 2, ... if None.
        empty_source: nobody has written the source.
        shared_bytes: of a block.
        options: how the launch runs.
        cooperative: all blocks are under way at once.
    """
    emulator = Emulator(options)
    source = torch.arange(num_threads, dtype=torch.int32) if source is None else source
    if empty_source:
        emulator.watch_empty(source)
    target = torch.zeros(num_threads, dtype=source.dtype)
    tensors = [("source", source), ("target", target)]
    addresses: list[int | float | bytes] = [source.data_ptr(), target.data_ptr()]
    shape, text = (num_threads, 1, 1), _HEAD.format(body=body)
    emulator.launch(text, (num_blocks, 1, 1), shape, shared_bytes, addresses, tensors, cooperative=cooperative)
    return Sample(emulator.report.kinds(), target)
