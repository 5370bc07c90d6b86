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
MOST = 10_000
"""pieces of code that a sample may run"""
WARPS = ("together", "first", "last", "random")

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


def test_a_kernel_without_end_tells_what_was_found():
    """Lanes that a condition parts, in a loop: those that stay shuffle with others that have left."""
    body = "A:\nshfl.sync.bfly.b32 %r10, %r1, 1, 31, -1;\nsetp.lt.s32 %p1, %r1, 8;\n@%p1 bra A;\n"
    with pytest.raises(KernelStoppedError, match=r"until then:\nwarp instruction by a part of its warp: .*shfl\.sync"):
        run_sample(body, options=Options(max_pieces=100))


@pytest.mark.parametrize(
    "body",
    [
        "bar.sync %r1, 64;\n",
        "mbarrier.arrive_drop.shared.b64 %rd10, [%r5];\n",
        "cp.async.bulk.global.shared::cta.bulk_group [%rd5], [%r5], 64;\n",
        "ld.local.b32 %r10, [%rd1];\n",
    ],
)
def test_what_is_not_emulated_is_refused(body):
    with pytest.raises(UnsupportedError):
        run_sample(body)


def in_orders(cases: dict[str, tuple[str, set[str]]]) -> list[tuple[str, str]]:
    """What is right is so in every order of warps; which fault shows first may hang on it."""
    return [(name, warps) for name, (_, faults) in cases.items() for warps in (WARPS[:1] if faults else WARPS)]


# parts of a block -----------------------------------------------------------------------------------------------------

FIRST_64 = "setp.ge.u32 %p1, %r1, 64;\n@%p1 bra END;\n"
# The last warp reads what the first one has stored, behind a barrier that the others do not wait at.
HANDED_ON = """\
setp.ge.u32 %p1, %r1, 64;
@%p1 bra LAST;
{before}
bar.arrive 2, 96;
{after}
bra END;
LAST:
bar.sync 2, 96;
sub.s32 %r6, %r5, 256;
ld.shared.b32 %r10, [%r6];
END:
"""

MORE = {"barrier with more threads than it waits for"}
IMPOSSIBLE = {"barrier for an impossible number of threads", *MORE}

PARTS = {
    "barrier of a part": (FIRST_64 + PUT + "bar.sync 1, 64;\n" + OTHER_WARP + GET + STORE + "END:\n", set()),
    "no barrier of a part": (
        FIRST_64 + PUT + OTHER_WARP + GET + STORE + "END:\n",
        {"shared race between warps (read after write)"},
    ),
    "barrier of a part, threads one after the other": (
        # The first thread of each warp comes later than the others, since it is further down in the text.
        FIRST_64 + PUT + "and.b32 %r20, %r1, 31;\nsetp.eq.s32 %p2, %r20, 0;\n@%p2 bra LATER;\nMEET:\n"
        "bar.sync 1, 64;\n"
        + OTHER_WARP
        + GET
        + "END:\nret;\nLATER:\nld.acquire.gpu.global.u32 %r20, [%rd2];\nbra MEET;\n",
        set(),
    ),
    "stored in front of an arrival": (HANDED_ON.format(before=PUT, after=""), set()),
    "stored behind an arrival": (
        HANDED_ON.format(before=PUT, after="add.s32 %r11, %r1, 7;\nst.shared.b32 [%r5], %r11;\n"),
        {"shared race between warps (read after write)"},
    ),
    "more threads than a barrier waits for": ("bar.sync 1, 64;\n", MORE),
    "different numbers": (
        FIRST_64 + "bar.sync 1, 96;\nbra LAST;\nEND:\nbar.sync 1, 64;\nLAST:\n",
        {"barrier with different numbers of threads"},
    ),
    "no whole warps": ("bar.sync 1, 40;\n", IMPOSSIBLE),
}


@pytest.mark.parametrize(("name", "warps"), in_orders(PARTS))
def test_barriers_of_a_part_of_a_block(name, warps):
    body, expected = PARTS[name]
    options = Options(warps=warps, max_pieces=MOST)
    assert run_sample(body, num_threads=96, source=torch.zeros(96), options=options).findings == expected


def test_a_barrier_that_nobody_else_comes_to():
    with pytest.raises(KernelStoppedError, match="wait at barriers that nobody else comes to"):
        run_sample("bar.sync 1, 96;\n")


# Every block stores its words and counts itself in; when all have, each reads those of the other.
GRID_BARRIER = """\
shl.b32 %r20, %r2, 8;
cvt.u64.u32 %rd6, %r20;
add.s64 %rd7, %rd4, %rd6;
st.global.b32 [%rd7], %r1;
bar.sync 0;
setp.ne.s32 %p1, %r1, 0;
@%p1 bra MEET;
red.{release}gpu.global.add.u32 [%rd2], 1;
WAIT:
ld.{acquire}gpu.global.u32 %r21, [%rd2];
setp.lt.u32 %p2, %r21, 2;
@%p2 bra WAIT;
MEET:
bar.sync 0;
xor.b32 %r23, %r20, 256;
cvt.u64.u32 %rd8, %r23;
add.s64 %rd9, %rd4, %rd8;
ld.global.b32 %r24, [%rd9];
"""


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize(
    ("release", "acquire", "expected"),
    [("release.", "acquire.", set()), ("relaxed.", "acquire.", RACE), ("release.", "relaxed.", RACE)],
)
def test_blocks_that_wait_for_each_other(release, acquire, expected, warps, in_parts):
    body = GRID_BARRIER.format(release=release, acquire=acquire)
    if in_parts:
        body = body.replace("bar.sync 0;", "bar.sync 1, 64;")
    options = Options(warps=warps, max_pieces=1000)
    found = run_sample(body, num_blocks=2, source=torch.zeros(128), options=options, cooperative=True).findings
    assert {finding.replace("write after read", "read after write") for finding in found} == expected
    with pytest.raises(KernelStoppedError, match="must end within 1000 pieces"):  # one after the other
        run_sample(body, num_blocks=2, source=torch.zeros(128), options=options)


# mbarriers ------------------------------------------------------------------------------------------------------------


def set_up(count: int) -> str:
    """An mbarrier behind the words of the threads."""
    return (
        "add.s32 %r30, %r4, 512;\nsetp.eq.s32 %p3, %r1, 0;\n"
        f"@%p3 mbarrier.init.shared::cta.b64 [%r30], {count};\nfence.proxy.async.shared::cta;\n"
    )


ARRIVE = "mbarrier.arrive.release.cta.shared::cta.b64 %rd10, [%r30];\n"
AWAIT = "AWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r30], 0;\n@!%p2 bra AWAIT;\n"


def handed_on(count: int, arrival: str = ARRIVE, wait: str = AWAIT, put: str = PUT) -> str:
    """The second warp reads what the first one has stored."""
    return (
        set_up(count) + BARRIER + "setp.ge.u32 %p1, %r1, 32;\n@%p1 bra SECOND;\n" + put + arrival
        + "bra END;\nSECOND:\n" + wait + OTHER_WARP + GET + STORE + "END:\n"
    )  # fmt: skip


ONE_ARRIVES = "setp.eq.s32 %p4, %r1, 0;\n@%p4 " + ARRIVE
RACES = {"shared race between warps (read after write)"}
NO_GATE = {"no mbarrier there"}
GATES = {
    "all of a warp arrive": (handed_on(32), set()),
    "test_wait": (handed_on(32, wait=AWAIT.replace("try_wait", "test_wait")), set()),
    "by what an arrival gave": (
        set_up(64) + BARRIER + PUT + ARRIVE
        + "AWAIT:\nmbarrier.test_wait.shared.b64 %p2, [%r30], %rd10;\n@!%p2 bra AWAIT;\n" + OTHER_WARP + GET + STORE,
        set(),
    ),
    "arrivals that count several": (
        handed_on(64, arrival=ARRIVE.replace("[%r30]", "[%r30], 2").replace(".release.cta", "")), set(),
    ),
    "one arrives for its warp": (handed_on(1, arrival="bar.warp.sync -1;\n" + ONE_ARRIVES), set()),
    "one arrives for others it has not met": (handed_on(1, arrival=ONE_ARRIVES), RACES),
    "nobody waits": (handed_on(32, wait=""), RACES),
    "stored behind the arrival": (handed_on(32, arrival=ARRIVE + PUT.replace("%r1;", "%r2;"), put=""), RACES),
    "more arrivals than it waits for": (
        set_up(32) + BARRIER + "@%p3 " + ARRIVE.replace("[%r30]", "[%r30], 33").replace(".release.cta", ""),
        {"more arrivals than an mbarrier waits for"},
    ),
    "never set up": (handed_on(32).replace("@%p3 mbarrier.init.shared::cta.b64 [%r30], 32;\n", ""), NO_GATE | RACES),
    "no barrier behind its setting up": (
        handed_on(32).replace(BARRIER, ""), {"shared race between warps (mbarrier used before it is set up)"},
    ),
    "set up twice": (set_up(1) + set_up(1), {"mbarrier set up twice"}),
    "for no arrivals": (set_up(0), {"mbarrier for an impossible number of arrivals"}),
    "loaded": (set_up(1) + BARRIER + "ld.shared.b32 %r10, [%r30+4];\n", {"mbarrier used as memory"}),
    "stored": (set_up(1) + BARRIER + "@%p3 st.shared.b32 [%r30], %r2;\n", {"mbarrier used as memory"}),
    "memory again": (
        set_up(1) + "@%p3 mbarrier.inval.shared.b64 [%r30];\n@%p3 st.shared.b32 [%r30], %r2;\n", set(),
    ),
    "taken down and used": (
        set_up(1) + "@%p3 mbarrier.inval.shared.b64 [%r30];\n" + BARRIER + "@%p3 " + ARRIVE, NO_GATE,
    ),
    "misaligned": ("add.s32 %r30, %r4, 516;\nmbarrier.init.shared.b64 [%r30], 1;\n", {"misaligned"}),
    "outside": ("add.s32 %r30, %r4, 1024;\nmbarrier.init.shared.b64 [%r30], 1;\n", {"out of bounds"}),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_mbarriers(name):
    body, expected = GATES[name]
    sample = run_sample(body, options=Options(max_pieces=MOST))
    findings = {finding.replace("write after read", "read after write") for finding in sample.findings}
    assert findings - {"shared uninitialised"} == expected
    if not expected and STORE in body:
        assert sample.target[32:].tolist() == list(range(32))


@pytest.mark.parametrize("warps", WARPS)
def test_mbarriers_in_every_order_of_warps(warps):
    options = Options(warps=warps, max_pieces=MOST)
    for name in ("all of a warp arrive", "one arrives for its warp", "by what an arrival gave"):
        assert run_sample(GATES[name][0], options=options).findings == set(), name
    assert run_sample(GATES["one arrives for others it has not met"][0], options=options).findings == RACES


def test_a_new_mbarrier_counts_as_having_been_open():
    body = handed_on(32, wait=AWAIT.replace("[%r30], 0", "[%r30], 1"))
    findings = run_sample(body, options=Options(warps="last", max_pieces=MOST)).findings
    assert findings == {"shared uninitialised", "shared race between warps (write after read)"}


@pytest.mark.parametrize("count", [31, 33])
def test_an_mbarrier_that_does_not_open(count):
    """Of too few arrivals the rest go on to the next phase, which does not end either."""
    with pytest.raises(KernelStoppedError):
        run_sample(handed_on(count).replace("[%r30], 0", f"[%r30], {int(count < 32)}"), options=Options(max_pieces=999))


# copies that tell an mbarrier -----------------------------------------------------------------------------------------

EXPECT = "@%p3 mbarrier.arrive.expect_tx.shared::cta.b64 %rd10, [%r30], 256;\n"
BULK = "@%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd1], 256, [%r30];\n"
OWN = "ld.shared.b32 %r10, [%r5];\n"
ONE_COPIES = set_up(1) + BARRIER + EXPECT + BULK
NO_FENCE = {"no fence.proxy.async before cp.async.bulk"}
UNFINISHED = {"read of an unfinished cp.async", "shared uninitialised"}
FLYING = {"cp.async in flight at the end"}
ANNOUNCE = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r30];\n"
ALL_COPY = set_up(64) + BARRIER + "cp.async.ca.shared.global [%r5], [%rd4], 4;\n"
ANNOUNCED = {
    "in bulk": (ONE_COPIES + AWAIT + OWN + STORE, set()),
    "in bulk, nobody waits": (ONE_COPIES + OWN + STORE, UNFINISHED | FLYING),
    "in bulk, one waits": (
        ONE_COPIES + "@!%p3 bra READ;\n" + AWAIT + "READ:\n" + OWN + STORE,
        {"shared race with a copy (read after write)"},
    ),
    "in bulk, one waits and all meet": (
        ONE_COPIES + "@!%p3 bra READ;\n" + AWAIT + "READ:\nbar.sync 0;\n" + OWN + STORE, set(),
    ),
    "in bulk, mbarrier not fenced": (
        ONE_COPIES.replace("fence.proxy.async.shared::cta;\n", "") + AWAIT + OWN + STORE, NO_FENCE,
    ),
    "in bulk, onto what was stored": (PUT + ONE_COPIES + AWAIT + OWN + STORE, set()),
    "in bulk, onto what was stored behind the fence": (
        set_up(1) + PUT + BARRIER + EXPECT + BULK + AWAIT + OWN + STORE, NO_FENCE,
    ),
    "in bulk, onto what others store": (
        set_up(1) + BARRIER + PUT + "fence.proxy.async.shared::cta;\n" + EXPECT + BULK + AWAIT,
        {"shared race between warps (cp.async.bulk after write)", "shared race in a warp (cp.async.bulk after write)"},
    ),
    "in bulk, written over": (ONE_COPIES + "@%p3 " + PUT + AWAIT, {"write to an unfinished cp.async"}),
    "in bulk, no piece": (ONE_COPIES.replace("256, [%r30]", "248, [%r30]"), {"misaligned"}),
    "in bulk, behind the tensor": (
        set_up(1) + BARRIER + EXPECT + BULK.replace("[%rd1]", "[%rd1+16]") + AWAIT, {"out of bounds"},
    ),
    "in bulk, no mbarrier": (
        ONE_COPIES.replace("256, [%r30]", "256, [%r4]"), NO_GATE,
    ),
    "announced": (ALL_COPY + ANNOUNCE + AWAIT + OTHER_WARP + GET, set()),
    "announced, group committed": (
        ALL_COPY + "cp.async.commit_group;\n" + ANNOUNCE + AWAIT + OTHER_WARP + GET, set(),
    ),
    "announced, counted in": (
        ALL_COPY + ANNOUNCE.replace(".noinc", "") + "mbarrier.arrive.shared.b64 %rd10, [%r30];\n" + AWAIT + OTHER_WARP
        + GET,
        set(),
    ),
    "announced, nobody waits": (ALL_COPY + ANNOUNCE + OTHER_WARP + GET, UNFINISHED | FLYING),
    "arrived for by hand": (ALL_COPY + "mbarrier.arrive.shared.b64 %rd10, [%r30];\n" + AWAIT + OTHER_WARP + GET,
        UNFINISHED | FLYING,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "warps"), in_orders(ANNOUNCED))
def test_copies_that_tell_an_mbarrier(name, warps):
    body, expected = ANNOUNCED[name]
    sample = run_sample(body, options=Options(warps=warps, max_pieces=MOST))
    assert sample.findings == expected
    if not expected and STORE in body:
        assert sample.target.tolist() == list(range(64))


@pytest.mark.parametrize("num_bytes", [128, 512])
def test_bytes_that_were_not_expected(num_bytes):
    body = ONE_COPIES.replace("[%r30], 256", f"[%r30], {num_bytes}") + AWAIT
    with pytest.raises(KernelStoppedError):
        run_sample(body, options=Options(max_pieces=999))


# addresses ------------------------------------------------------------------------------------------------------------

GENERIC = "cvt.u64.u32 %rd10, %r6;\ncvta.shared.u64 %rd11, %rd10;\n"
ADDRESSES = {
    "generic, of shared memory": (PUT + BARRIER + OTHER_WARP + GENERIC + "ld.u32 %r10, [%rd11];\n" + STORE, set()),
    "generic, of both": (
        PUT + BARRIER + OTHER_WARP + GENERIC + "setp.lt.u32 %p1, %r1, 9;\nselp.b64 %rd12, %rd11, %rd4, %p1;\n"
        "ld.u32 %r10, [%rd12];\n" + STORE,
        set(),
    ),
    "generic, no barrier": (
        PUT + OTHER_WARP + GENERIC + "ld.u32 %r10, [%rd11];\n" + STORE,
        {"shared race between warps (read after write)"},
    ),
    "generic, behind shared memory": (OTHER_WARP + GENERIC + "st.u32 [%rd11+1024], %r1;\n", {"out of bounds"}),
    "generic and back": (
        OTHER_WARP + GENERIC + "cvta.to.shared.u64 %rd12, %rd11;\ncvt.u32.u64 %r20, %rd12;\n"
        "st.shared.u32 [%r20], %r1;\n",
        set(),
    ),
    "parameters": (
        "mov.b64 %rd10, source_address;\nld.param.b64 %rd11, [%rd10+8];\nst.global.b32 [%rd11], 1;\n",
        set(),
    ),
    "behind the parameters": (
        "mov.b64 %rd10, source_address;\nld.param.b64 %rd11, [%rd10+16];\n",
        {"out of bounds"},
    ),
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_computed_addresses(name):
    body, expected = ADDRESSES[name]
    assert run_sample(body).findings == expected


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
