"""Each kind of fault that the PTX emulator looks for, planted in a small kernel, and the same kernel without it."""

from __future__ import annotations

import pytest
import torch
from support.ptx.emulator import Emulator
from support.ptx.launch import Options
from support.ptx.memory import UNWRITTEN
from support.ptx.report import KernelStoppedError, UnsupportedError
from support.ptx.samples import run_sample

STORE = "st.global.b32 [%rd5], %r10;\n"
OTHER_WARP = "xor.b32 %r6, %r5, 128;\n"  # the word of the thread 32 further
NEIGHBOUR = "xor.b32 %r6, %r5, 4;\n"
PUT = "st.shared.b32 [%r5], %r1;\n"
GET = "ld.shared.b32 %r10, [%r6];\n"
COPY = "cp.async.ca.shared.global [%r5], [%rd4], 4;\ncp.async.commit_group;\n"
WAIT = "cp.async.wait_group 0;\n"
BARRIER = "bar.sync 0;\n"

CASES = {
    # memory
    "copy": ("ld.global.b32 %r10, [%rd4];\n" + STORE, set()),
    "behind a tensor": ("ld.global.b32 %r10, [%rd4+4];\n" + STORE, {"out of bounds"}),
    "before a tensor": ("st.global.b32 [%rd2+-4], %r1;\n", {"out of bounds"}),
    "guarded": ("setp.lt.u32 %p1, %r1, 63;\n@%p1 ld.global.b32 %r10, [%rd4+4];\n", set()),
    "misaligned vector": ("ld.global.v2.b32 {%r10, %r11}, [%rd4];\n" + STORE, {"misaligned"}),
    "unwritten shared memory": ("ld.shared.b32 %r10, [%r5];\n" + STORE, {"shared uninitialised"}),
    "behind shared memory": ("st.shared.b32 [%r5+1000], %r1;\n", {"out of bounds"}),
    "misaligned shared": ("st.shared.b64 [%r5], %rd1;\n", {"misaligned"}),
    # races in a block
    "no barrier": (PUT + OTHER_WARP + GET + STORE, {"shared race between warps (read after write)"}),
    "barrier": (PUT + BARRIER + OTHER_WARP + GET + STORE, set()),
    "no warp barrier": (PUT + NEIGHBOUR + GET + STORE, {"shared race in a warp (read after write)"}),
    "warp barrier": (PUT + "bar.warp.sync -1;\n" + NEIGHBOUR + GET + STORE, set()),
    "warp barrier between warps": (
        PUT + "bar.warp.sync -1;\n" + OTHER_WARP + GET + STORE,
        {"shared race between warps (read after write)"},
    ),
    "write after read": (
        PUT + BARRIER + OTHER_WARP + GET + "add.s32 %r11, %r1, 100;\nst.shared.b32 [%r5], %r11;\n",
        {"shared race between warps (write after read)"},
    ),
    "write of the same": (PUT + BARRIER + OTHER_WARP + GET + PUT, set()),
    "many write one place": ("st.global.b32 [%rd2], %r1;\n", {"global race in one instruction"}),
    "atomics": ("red.global.add.u32 [%rd2], 1;\natom.global.add.u32 %r10, [%rd2], 1;\n", set()),
    # copies
    "copy waited for": (COPY + WAIT + BARRIER + OTHER_WARP + GET + STORE, set()),
    "copy without barrier": (
        COPY + WAIT + OTHER_WARP + GET + STORE,
        {"shared race between warps (read after write)"},
    ),
    "copy with its barrier before its wait": (
        COPY + BARRIER + WAIT + OTHER_WARP + GET + STORE,
        {"shared race between warps (read after write)"},
    ),
    "copy without wait": (
        COPY + "ld.shared.b32 %r10, [%r5];\n" + STORE,
        {"read of an unfinished cp.async", "cp.async in flight at the end", "shared uninitialised"},
    ),
    "wait for too few": (
        COPY + "cp.async.wait_group 1;\nld.shared.b32 %r10, [%r5];\n" + WAIT,
        {"read of an unfinished cp.async", "shared uninitialised"},
    ),
    "copy overwritten": (COPY + PUT + WAIT, {"write to an unfinished cp.async"}),
    "copy onto what is read": (
        PUT + BARRIER + OTHER_WARP + GET + COPY + WAIT,
        {"shared race between warps (cp.async after read)"},
    ),
    "misaligned copy": (
        "cp.async.ca.shared.global [%r5], [%rd4], 8;\ncp.async.commit_group;\n" + WAIT,
        {"misaligned"},
    ),
    # warps and barriers
    "barrier in a branch": (
        "setp.lt.s32 %p1, %r1, 8;\n@%p1 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 0;\nB:\n",
        {"barrier by a part of a warp"},
    ),
    "barrier in a branch of warps": (
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 0;\nB:\n",
        set(),
    ),
    "barrier behind an end": (
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync 0;\n",
        {"barrier behind the end of some threads"},
    ),
    "shuffle in a branch": (
        "setp.lt.s32 %p1, %r1, 8;\n@%p1 bra A;\nshfl.sync.bfly.b32 %r10, %r1, 1, 31, -1;\nA:\n",
        {"warp instruction by a part of its warp"},
    ),
    "shuffle of those in a branch": (
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra A;\nshfl.sync.bfly.b32 %r10, %r1, 1, 31, -1;\nA:\n",
        set(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_found_where_planted_and_nowhere_else(name):
    body, expected = CASES[name]
    assert run_sample(body).findings == expected


def test_unwritten_tensor():
    body = "ld.global.b32 %r10, [%rd4];\n" + STORE
    assert run_sample(body, empty_source=True).findings == {"global uninitialised"}


def test_holes_of_strided_tensors():
    body = "ld.global.b32 %r10, [%rd4];\n" + STORE
    assert run_sample(body, source=torch.zeros(64, 2, dtype=torch.int32)[:, 0]).findings == {"out of bounds"}


def test_what_torch_writes_into_an_empty_tensor_counts():
    emulator = Emulator()
    empty = torch.zeros(8, dtype=torch.int32)
    emulator.watch_empty(empty)
    empty[:4] = 1
    allocation = emulator.allocations([("empty", empty)])[0]
    assert allocation.state.tolist() == [0] * 16 + [UNWRITTEN] * 16


# Every block stores its words; the one that arrives last at a counter reads those of the other.
LAST_BLOCK = """\
shl.b32 %r20, %r2, 8;
cvt.u64.u32 %rd6, %r20;
add.s64 %rd7, %rd4, %rd6;
st.global.b32 [%rd7], %r1;
{barrier}
setp.eq.s32 %p1, %r1, 0;
{fence}
@%p1 atom.global.gpu{semantics}.add.u32 %r21, [%rd2], 1;
{fence}
@%p1 st.shared.b32 [%r4], %r21;
bar.sync 0;
ld.shared.b32 %r22, [%r4];
setp.ne.s32 %p2, %r22, 1;
@%p2 bra DONE;
xor.b32 %r23, %r20, 256;
cvt.u64.u32 %rd8, %r23;
add.s64 %rd9, %rd4, %rd8;
ld.global.b32 %r24, [%rd9];
DONE:
"""
RACE = {"global race between blocks (read after write)"}


@pytest.mark.parametrize("interleave", [1, 2])
@pytest.mark.parametrize(
    ("barrier", "fence", "semantics", "expected"),
    [
        ("bar.sync 0;", "", ".acq_rel", set()),
        ("bar.sync 0;", "@%p1 fence.acq_rel.gpu;", ".relaxed", set()),
        ("bar.sync 0;", "", ".relaxed", RACE),
        ("bar.sync 0;", "", ".acquire", RACE),
        ("bar.sync 0;", "", ".release", RACE),
        ("", "", ".acq_rel", RACE),
    ],
)
def test_last_block(interleave, barrier, fence, semantics, expected):
    body = LAST_BLOCK.format(barrier=barrier, fence=fence, semantics=semantics)
    source = torch.zeros(128, dtype=torch.int32)
    options = Options(interleave=interleave)
    assert run_sample(body, num_blocks=2, source=source, options=options).findings == expected


@pytest.mark.parametrize("order", ["serial", "reversed", "random"])
def test_blocks_that_write_one_place(order):
    options = Options(order=order)
    different = run_sample("add.s32 %r10, %r2, 7;\n" + STORE, num_blocks=2, options=options)
    assert different.findings == {"global race between blocks (write after write)"}
    assert run_sample("mov.b32 %r10, 7;\n" + STORE, num_blocks=2, options=options).findings == set()


@pytest.mark.parametrize("warps", ["together", "first", "last", "random"])
def test_faults_show_in_every_order_of_warps(warps):
    options = Options(warps=warps)
    for name in ("no barrier", "barrier", "warp barrier between warps", "copy waited for", "copy without wait"):
        body, expected = CASES[name]
        assert run_sample(body, options=options).findings >= expected, name
    assert run_sample(CASES["barrier"][0], options=options).findings == set()


def test_device_assertion_ends_the_launch():
    body = "setp.ne.s32 %p1, %r1, 5;\n@%p1 bra A;\ncall.uni __assertfail, (a, b, c, d, e);\nA:\n"
    with pytest.raises(KernelStoppedError, match=r"assertion failed in thread 5 of block 0"):
        run_sample(body)


def test_a_kernel_without_end_is_stopped():
    with pytest.raises(KernelStoppedError, match="must end within 100 pieces"):
        run_sample("A:\nbra A;\n", options=Options(max_pieces=100))


@pytest.mark.parametrize(
    "body", ["bar.sync 1, 64;\n", "mbarrier.init.shared.b64 [%r5], 1;\n", "ld.local.b32 %r10, [%rd1];\n"]
)
def test_what_is_not_emulated_is_refused(body):
    with pytest.raises(UnsupportedError):
        run_sample(body)


# wgmma ----------------------------------------------------------------------------------------------------------------

ACCUMULATORS = "{%r40, %r41, %r42, %r43}"
# One group of 128 threads: both operands are zeros at address 0, in rows of 128 bytes; m64n8k16.
MATRICES = """\
shl.b32 %r30, %r1, 6;
add.s32 %r30, %r30, %r4;
mov.b32 %r31, 0;
st.shared.v4.b32 [%r30], {%r31, %r31, %r31, %r31};
st.shared.v4.b32 [%r30+16], {%r31, %r31, %r31, %r31};
st.shared.v4.b32 [%r30+32], {%r31, %r31, %r31, %r31};
st.shared.v4.b32 [%r30+48], {%r31, %r31, %r31, %r31};
"""
FENCED = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
PRODUCT = f"""\
mov.b64 %rd10, {(1 << 62) | (64 << 32) | (1 << 16):d};
mov.b32 %r40, 0f3F800000;
mov.b32 %r41, 0f3F800000;
mov.b32 %r42, 0f3F800000;
mov.b32 %r43, 0f3F800000;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {ACCUMULATORS}, %rd10, %rd10, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
"""
LANDED = "wgmma.wait_group.sync.aligned 0;\n"
READ = "st.global.b32 [%rd5], %r41;\n"

PRODUCTS = {
    "whole": (MATRICES + FENCED + PRODUCT + LANDED + READ, set()),
    "accumulator read before its wait": (
        MATRICES + FENCED + PRODUCT + READ + LANDED,
        {"wgmma accumulator read before its wait"},
    ),
    "accumulator written before its wait": (
        MATRICES + FENCED + PRODUCT + "mov.b32 %r42, 0;\n" + LANDED + READ,
        {"wgmma accumulator written before its wait"},
    ),
    "no fence of its registers": (
        MATRICES + FENCED + PRODUCT.replace("wgmma.fence.sync.aligned;\n", "") + LANDED + READ,
        {"no wgmma.fence before wgmma"},
    ),
    "never waited for": (MATRICES + FENCED + PRODUCT, {"wgmma in flight at the end"}),
    "operand overwritten": (
        MATRICES + FENCED + PRODUCT + "st.shared.b32 [%r30], %r1;\n" + LANDED,
        {"write to an operand of wgmma in flight", "shared race between warps (write after read)"},
    ),
    "no proxy fence": (MATRICES + BARRIER + PRODUCT + LANDED, {"no fence.proxy.async before wgmma"}),
    "no barrier": (
        MATRICES + "fence.proxy.async.shared::cta;\n" + PRODUCT + LANDED,
        {"shared race between warps (wgmma after write)"},
    ),
    "nobody wrote it": (PRODUCT + LANDED, {"shared uninitialised"}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_warp_groups(name):
    body, expected = PRODUCTS[name]
    sample = run_sample(body, num_threads=128, source=torch.zeros(128), shared_bytes=8192)
    assert sample.findings == expected
    if READ in body:
        assert torch.equal(sample.target, torch.ones(128))
