"""What the emulator's instructions compute, against Python's integers, NumPy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.ptx import numerics, tensor_cores
from support.ptx.mutations import mutants
from support.ptx.parser import Address, parse
from support.ptx.samples import run_sample
from support.ptx.warp_instructions import shuffle_sources

STORE = "st.global.b32 [%rd5], %r10;\n"
THREADS = torch.arange(64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mad.lo.s32 %r10, %r1, 3, -7;\n", THREADS * 3 - 7),
        ("sub.s32 %r11, %r1, 32;\ndiv.s32 %r10, %r11, 5;\n", torch.div(THREADS - 32, 5, rounding_mode="trunc")),
        ("sub.s32 %r11, %r1, 32;\nrem.s32 %r10, %r11, 5;\n", torch.fmod(THREADS - 32, 5)),
        ("sub.s32 %r11, %r1, 32;\nmul.hi.s32 %r10, %r11, 0x40000000;\n", (THREADS - 32) >> 2),
        ("sub.s32 %r11, %r1, 32;\nshr.s32 %r10, %r11, 1;\n", (THREADS - 32) >> 1),
        ("shl.b32 %r10, 1, %r1;\n", torch.where(THREADS < 32, 1 << THREADS.clamp(max=31), 0).int()),
        ("bfe.u32 %r10, %r1, 1, 3;\n", THREADS >> 1 & 7),
        ("bfe.s32 %r10, %r1, 0, 1;\n", -(THREADS & 1)),
        ("prmt.b32 %r10, %r1, 0x01020304, 0x7604;\n", 0x01020004 + THREADS * 256),
        ("setp.gt.s32 %p1, %r1, 9;\nselp.b32 %r10, %r1, -1, %p1;\n", torch.where(THREADS > 9, THREADS, -1)),
        ("mov.b64 %rd10, {%r1, 7};\nmov.b64 {%r11, %r10}, %rd10;\nadd.s32 %r10, %r10, %r11;\n", THREADS + 7),
        ("cvt.rn.f32.s32 %r11, %r1;\nmul.f32 %r11, %r11, 0f3F000000;\ncvt.rzi.s32.f32 %r10, %r11;\n", THREADS // 2),
        ("shfl.sync.bfly.b32 %r10, %r1, 5, 31, -1;\n", THREADS ^ 5),
        ("shfl.sync.up.b32 %r10, %r1, 3, 0, -1;\n", torch.where(THREADS % 32 >= 3, THREADS - 3, THREADS)),
        ("shfl.sync.idx.b32 %r10, %r1, %r3, 31, -1;\n", THREADS // 32 * 32 + THREADS * 4 % 32),
        ("redux.sync.max.s32 %r10, %r1, -1;\n", THREADS // 32 * 32 + 31),
        ("popc.b32 %r10, %r1;\n", torch.tensor([bin(thread).count("1") for thread in range(64)])),
        ("clz.b32 %r10, %r1;\n", torch.tensor([32 - thread.bit_length() for thread in range(64)])),
        (
            "mov.b32 %r10, 0;\nmov.b32 %r11, 0;\nLOOP:\nadd.s32 %r10, %r10, %r11;\nadd.s32 %r11, %r11, 1;\n"
            "setp.le.s32 %p1, %r11, %r1;\n@%p1 bra LOOP;\n",
            THREADS * (THREADS + 1) // 2,
        ),
    ],
)
def test_integers(body, expected):
    sample = run_sample(body + STORE)
    assert sample.findings == set()
    assert torch.equal(sample.target, expected.int())


def test_atomics_of_a_block_add_up():
    sample = run_sample("atom.global.add.u32 %r10, [%rd2], 2;\n")
    assert sample.target[0] == 128


def test_fused_multiply_add_rounds_once():
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal(4000).astype(np.float32) for _ in range(2))
    addend = (-left * right * np.float32(1 + 2**-20)).astype(np.float32)
    # Midpoints of floats that a tiny product decides, which rounding twice gets wrong.
    left = np.append(left, np.float32([2.0**-80, -(2.0**-80)]))
    right = np.append(right, np.float32([1, 1]))
    addend = np.append(addend, np.float32([1 + 2**-23, 1 + 2**-23]))
    exact = np.array([np.longdouble(a) * np.longdouble(b) + np.longdouble(c) for a, b, c in zip(left, right, addend)])
    assert np.array_equal(numerics.fused(left, right, addend), exact.astype(np.float32))
    halfway = numerics.fused(np.float32([2.0**-24, 2.0**-24]), np.float32([1, 1 + 2**-23]), np.float32([1, 1]))
    assert halfway.tolist() == [1.0, 1.0 + 2**-23]


def test_half_precision_is_torchs():
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e3
    for type_, narrowed, widened in (
        (torch.bfloat16, numerics.bfloat16_from_float, numerics.float_from_bfloat16),
        (torch.float16, numerics.half_from_float, numerics.float_from_half),
    ):
        assert np.array_equal(widened(narrowed(numbers.numpy())), numbers.to(type_).float().numpy())
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(numerics.e4m3_values().astype(np.float32), codes, equal_nan=True)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_stay_in_their_warp(mode):
    sources, _ = shuffle_sources(mode, 7, 0 if mode == "up" else 31, 96)
    assert np.array_equal(sources // 32, np.arange(96) // 32)


def test_products_of_a_warp():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 16, generator=generator).bfloat16(), torch.randn(16, 8, generator=generator).bfloat16()
    lane, half = np.arange(32)[:, None], np.arange(2)[None, :]
    bits_a, bits_b = (matrix.view(torch.uint16).numpy() for matrix in (a, b))
    pairs = [bits_a[lane // 4 + 8 * (r % 2), lane % 4 * 2 + half + 8 * (r // 2)] for r in range(4)]
    fragment_a = np.stack([np.ascontiguousarray(pair).view(np.uint32)[:, 0] for pair in pairs])[None]
    pairs = [bits_b[lane % 4 * 2 + half + 8 * r, lane // 4] for r in range(2)]
    fragment_b = np.stack([np.ascontiguousarray(pair).view(np.uint32)[:, 0] for pair in pairs])[None]
    rows = tensor_cores.multiply(fragment_a, fragment_b, np.ones((1, 4, 32), np.float32), "bf16")
    product = np.empty((16, 8), np.float32)
    for register, row in enumerate(rows):
        product[tensor_cores.accumulator_row(register), tensor_cores.accumulator_column(register)] = row
    assert np.allclose(product, (a.double() @ b.double() + 1).numpy(), atol=1e-6)


def test_descriptor_of_a_swizzled_matrix():
    descriptor = tensor_cores.MatrixDescriptor.decode((1 << 62) | (64 << 32) | (1 << 16) | (0x400 >> 4))
    assert descriptor == (0x400, 16, 1024, 128)
    offsets = descriptor.offsets(16, transposed=False)
    assert np.unique(offsets).size == 16 * 16
    assert offsets[0, 0] == 0x400
    assert offsets[1, 0] == 0x400 + 128 + 16  # row 1: its groups of 16 bytes change places by twos
    assert offsets[8, 0] == 0x800
    assert tensor_cores.MatrixDescriptor.decode(0) is None


PTX = """\
.version 8.7
.target sm_90a
.file 1 "kernel.py"
.extern .shared .align 16 .b8 dynamic[];
.visible .entry one(.param .u64 .ptr .global .align 1 first, .param .align 8 .b8 second[24])
.reqntid 128
{
.reg .b32 %r<3>; /* two
lines */ .reg .pred %p<2>;
.loc 1 12 3
@!%p1 ld.global.v2.b32 {%r1, %r2}, [ %rd1 + -8 ]; // a comment; with a semicolon
{ .reg .pred inner; setp.eq.s32 inner, %r1, 0; @inner bra $L__end; }
bar.sync 0;
$L__end:
cp.async.wait_group 1;
ret;
}
"""


def test_parsing():
    module = parse(PTX)
    kernel = module.kernels["one"]
    assert (module.target, module.external_shared) == ("sm_90a", {"dynamic": 16})
    assert [tuple(parameter) for parameter in kernel.parameters] == [("first", 8, 8), ("second", 24, 8)]
    load, compare, branch, _, label, *_ = kernel.body
    assert (load.guard, load.guard_negated, load.line, load.location) == ("%p1", True, 11, "kernel.py:12")
    assert load.operands == (("%r1", "%r2"), Address("%rd1", -8))
    assert compare.operands[0] == branch.guard != "inner"
    assert kernel.registers[branch.guard] == 0
    assert label.name == branch.operands[0] == "$L__end"


@pytest.mark.parametrize("text", ["no PTX", PTX.replace("ret;\n}", "ret;")])
def test_what_is_no_ptx_is_refused(text):
    with pytest.raises(ValueError, match="must"):
        parse(text)


def test_mutants():
    found = {mutant.name: mutant for mutant in mutants(PTX)}
    assert set(found) == {"barrier 0 left out", "wait for copies 0 left out", "wait for copies 0 loosened by a group"}
    assert "bar.sync" not in found["barrier 0 left out"].ptx
    assert "wait_group 2;" in found["wait for copies 0 loosened by a group"].ptx
    assert found["barrier 0 left out"].line == 13
