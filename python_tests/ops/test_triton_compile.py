"""The Triton kernels compile for GPUs that are not here: nothing spills, and shared memory fits the device.

The full table of cases is compiled by bench/tools/triton_resources.py, whose report is committed; here a few of each.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import textwrap
from pathlib import Path

import pytest
from support.processes import run_process

pytest.importorskip("triton", reason="triton is not installed")

from support.triton_cases import CASES, DRAFTING, FUSED
from support.triton_compile import DEVICES, misread_reductions

from sequoia_kernels.ops import backends

TESTS = Path(__file__).resolve().parents[1]
REPORT = TESTS.parent / "docs" / "triton_resources.json"


def run_compiler(*arguments):
    """Run Python with the compiler at hand: in this process triton may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(TESTS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return run_process([sys.executable, *arguments], env=environment).stdout


def defects(kernels):
    """What is wrong with compiled kernels, in words."""
    for entry in kernels:
        name = f"sm_{entry['capability']} {entry['op']} ({entry['case']}) {entry['kernel']}"
        limit = DEVICES[entry["capability"]].shared_bytes
        if entry["stack_bytes"]:
            yield f"{name} spills: {entry['stack_bytes']} bytes of stack"
        if entry["shared_bytes"] > limit:
            yield f"{name} takes {entry['shared_bytes']} bytes of shared memory, the device has {limit}"
        if entry["shared_bound"] is not None and entry["shared_bytes"] > entry["shared_bound"]:
            yield f"{name} takes {entry['shared_bytes']} bytes, its launch expects at most {entry['shared_bound']}"
        if entry["registers"] * 32 * entry["num_warps"] > 65536:
            yield f"{name} takes {entry['registers']} registers in {entry['num_warps']} warps"


def read_report():
    """The committed report, and its kernels one by one."""
    report = json.loads(REPORT.read_text())
    return report, [
        {"op": op, "kernel": kernel, "case": case, "capability": int(capability)} | dict(zip(report["columns"], values))
        for op, tables in report["kernels"].items()
        for kernel, cases in tables.items()
        for case, devices in cases.items()
        for capability, values in devices.items()
    ]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills(capability):
    result = json.loads(run_compiler("-m", "support.triton_compile", "--capability", str(capability), "--quick"))
    assert result["failures"] == []
    kernels = result["kernels"]
    expected = {(case.op, case.name) for case in CASES if capability in case.quick}
    assert {(entry["op"], entry["case"]) for entry in kernels} == expected
    assert list(defects(kernels)) == []


LAYOUT = "#linear7 = #ttg.linear<{register = [[4, 0]], lane = [%s], warp = [[0, 0], [8, 0]], block = []}>\n"
REDUCTION = """\
%%best = "tt.reduce"(%%left) <{axis = %d : i32}> ({
^bb0(%%first: i32 loc(#loc4), %%second: i32 loc(#loc4)):
  %%best_3 = arith.maxsi %%first, %%second : i32 loc(#loc5)
  tt.reduce.return %%best_3 : i32 loc(#loc5)
}) : (tensor<%s>) -> i32 loc(#loc5)
"""
SLICE = "16xi32, #ttg.slice<{dim = %d, parent = #linear7}>"


@pytest.mark.parametrize(
    ("lanes", "axis", "tensor", "bits"),
    [
        ("[1, 0], [2, 0], [0, 0], [4, 0]", 0, "16x1xi32, #linear7", "xx-x"),
        ("[1, 0], [2, 0], [4, 0], [0, 0]", 0, "16x1xi32, #linear7", ""),
        ("[0, 0], [2, 0], [4, 0], [0, 0]", 0, "16x1xi32, #linear7", ""),
        ("[1, 0], [0, 1], [2, 0], [0, 0]", 0, "16x2xi32, #linear7", "x-x-"),
        ("[1, 0], [0, 1], [2, 0], [0, 0]", 1, "16x2xi32, #linear7", ""),
        ("[1, 0], [0, 1], [2, 0], [0, 0]", 0, SLICE % 1, "x-x-"),
        ("[1, 0], [0, 1], [2, 0], [0, 0]", 0, SLICE % 0, ""),
        ("[1, 0], [0, 1], [2, 0], [0, 0]", 0, "16x1xi32, #blocked", ""),
    ],
)
def test_reductions_over_lanes_that_lie_apart_are_told(lanes, axis, tensor, bits):
    expected = [f"axis {axis} of tensor<{tensor}>, bits of lanes {bits}"] if bits else []
    assert misread_reductions(LAYOUT % lanes + REDUCTION % (axis, tensor)) == expected


def test_every_op_and_architecture_is_compiled_here():
    assert {case.op for case in CASES if case.quick} == {*backends.backend_report(), DRAFTING, FUSED}
    assert {capability for case in CASES for capability in case.quick} == {80, 90, 100}


def test_the_committed_report_is_complete_and_clean():
    """Also with a later kernel: a new case, a case that is gone or another launch asks for the report's command."""
    report, kernels = read_report()
    reported = {(entry["op"], entry["case"], entry["capability"]) for entry in kernels}
    assert reported == {(case.op, case.name, capability) for case in CASES for capability in case.devices}, (
        "docs/triton_resources.json is out of date: run python -m bench.tools.triton_resources"
    )
    assert list(defects(kernels)) == []
    constraints = (TESTS.parent / "constraints.txt").read_text()
    assert f"triton=={report['triton']}\n" in constraints, "made by another triton than the pinned one"


def test_the_report_has_every_dtype_head_dim_and_table():
    _, kernels = read_report()
    pattern = re.compile(r"(\w+), head dim (\d+), \d+ nodes(, fp8 cache)?(, pages of 16, window, sinks, lse)?")
    found = set()
    for entry in kernels:
        if match := pattern.fullmatch(entry["case"]):
            dtype, head_dim, is_float8, is_paged = match.groups()
            found.add((dtype + (is_float8 or ""), int(head_dim), is_paged is not None, entry["capability"]))
    dtypes = ("bf16", "fp16", "fp32", "bf16, fp8 cache")
    assert found >= set(itertools.product(dtypes, (32, 64, 128, 256), (False, True), (80, 90, 100)))


def test_sizes_that_change_from_step_to_step_do_not_compile_anew():
    """A tree of other size, or a longer cache, must meet the kernel that is there: compiling takes seconds."""
    script = """
        import torch
        from sequoia_kernels.ops.tree_attention import triton_kernels
        from support.triton_cases import attention_case
        from support.triton_compile import compile_case

        for num_nodes, num_slots in ((17, 8192), (24, 8200), (31, 9001), (32, 8197)):
            compile_case(attention_case(torch.bfloat16, 64, num_nodes, num_slots=num_slots), 80)
        for kernel in (triton_kernels.tree_attention_kernel, triton_kernels.merge_splits_kernel):
            assert len(kernel.device_caches[80][0]) == 1, kernel.__name__
    """
    run_compiler("-c", textwrap.dedent(script))
