"""Compile every Triton kernel for every supported GPU architecture and write docs/triton_resources.{json,md}.

Needs no GPU. The cases are those of python_tests/support/triton_cases.py: each op's own launches over its dtypes,
sizes, block configurations and options. For each kernel: registers and stack of a thread (a stack of 0 bytes means that
nothing was spilled), shared memory of a program, warps and pipeline stages.

    python -m bench.tools.triton_resources                    all cases, four architectures; 10 to 20 minutes of a core
    python -m bench.tools.triton_resources --op verify_tree   compile one op again and keep the rest of the report
    python -m bench.tools.triton_resources --check 90         compile for sm_90 with another triton, add what it did

The compiler decides registers, so the report is made with the triton that constraints.txt pins and names it. What
--check finds with others goes into the report as a line: kernels compiled, failures, spills. Compiling shows that a
kernel can run well, not that it does: times are what the bench scripts of the ops measure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sequoia_kernels.documents import write_text

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "python_tests"
REPORT = ROOT / "docs" / "triton_resources.json"
DEVICES = {80: "sm_80, A100", 89: "sm_89, RTX 4090", 90: "sm_90, H100 and H200", 100: "sm_100, B200"}


COLUMNS = ("registers", "stack_bytes", "shared_bytes", "num_warps", "num_stages", "shared_bound")


def compile_kernels(capability: int, op: str | None) -> dict[str, Any]:
    """Compile for one architecture, in a process in which triton is not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(TESTS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "support.triton_compile", "--capability", str(capability)]
    if op is not None:
        command += ["--op", op]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def compact(kernels: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, list[Any]]]]]:
    """op -> kernel -> case -> capability -> values of `COLUMNS`; a case launches a kernel at most once for all."""
    tables: dict[str, Any] = {}
    for entry in kernels:
        cases = tables.setdefault(entry["op"], {}).setdefault(entry["kernel"], {})
        cases.setdefault(entry["case"], {})[str(entry["capability"])] = [entry[name] for name in COLUMNS]
    return tables


def report_text(report: dict[str, Any]) -> str:
    """The report as JSON with a case to a line."""
    header = json.dumps({key: value for key, value in report.items() if key != "kernels"}, indent=1)[:-2]
    ops = []
    for op, tables in report["kernels"].items():
        kernels = []
        for kernel, cases in tables.items():
            rows = ",\n".join(f"   {json.dumps(case)}: {json.dumps(values)}" for case, values in cases.items())
            kernels.append(f"  {json.dumps(kernel)}: {{\n{rows}\n  }}")
        ops.append(f" {json.dumps(op)}: {{\n" + ",\n".join(kernels) + "\n }")
    return f'{header},\n "kernels": {{\n' + ",\n".join(ops) + "\n }\n}\n"


def markdown(report: dict[str, Any]) -> str:
    """The report as tables: one for each op and kernel, a column for each architecture."""
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Compiled by triton {report['triton']}, on a machine without a GPU. Made by",
        f"`{report['command']}`; the same numbers for programs are in triton_resources.json. A cell reads",
        "registers of a thread / KiB of shared memory of a program / warps x pipeline stages; `spills` marks a kernel",
        "with a stack. An empty cell was not compiled: of sm_89, whose shared memory is smaller, only some cases were.",
    ]
    if report["checked"]:
        lines += [
            "",
            "The same cases compiled by other versions (`python -m bench.tools.triton_resources --check`):",
            "",
        ]
        lines += [f"- triton {version}: {finding}" for version, finding in sorted(report["checked"].items())]
    for op, tables in report["kernels"].items():
        for kernel, cases in tables.items():
            lines += ["", f"## {op}: `{kernel}`", ""]
            lines += ["| case | " + " | ".join(DEVICES.values()) + " |", "|---" * (len(DEVICES) + 1) + "|"]
            for case, values in cases.items():
                cells = (cell(values.get(str(capability))) for capability in DEVICES)
                lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(values: list[Any] | None) -> str:
    """One kernel on one architecture."""
    if values is None:
        return ""
    entry = dict(zip(COLUMNS, values))
    text = f"{entry['registers']} / {entry['shared_bytes'] / 1024:.1f} / {entry['num_warps']}x{entry['num_stages']}"
    return text + (" spills" if entry["stack_bytes"] else "")


def finding(kernels: list[dict[str, Any]], failures: list[str]) -> str:
    """What a version did with all cases, in a line."""
    spilling = [entry for entry in kernels if entry["stack_bytes"]]
    text = f"{len(kernels)} kernels, {len(failures)} failures, {len(spilling)} with spills"
    if spilling:
        most = max(entry["stack_bytes"] for entry in spilling)
        names = dict.fromkeys(f"{entry['op']} ({entry['case']}) on sm_{entry['capability']}" for entry in spilling)
        text += f" of at most {most} bytes: " + "; ".join(names)
    return text


def main() -> int:
    """Compile, write the report, and fail if a kernel spills or does not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="compile the cases of this op only")
    parser.add_argument(
        "--check",
        type=int,
        nargs="*",
        choices=sorted(DEVICES),
        metavar="CAPABILITY",
        help="add a line on this version of triton to the report; for these architectures only, if any are named",
    )
    parser.add_argument("--jobs", type=int, default=1, help="architectures to compile for at a time (default: 1)")
    options = parser.parse_args()
    if options.check is not None and options.op is not None:
        parser.error("--check compiles all ops; give no --op")
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda capability: compile_kernels(capability, options.op), options.check or DEVICES))
    kernels = [entry for result in results for entry in result["kernels"]]
    failures = [failure for result in results for failure in result["failures"]]
    version = results[0]["triton"]

    report: dict[str, Any] = {"checked": {}, "kernels": {}}
    if REPORT.exists():
        report = json.loads(REPORT.read_text())
    if options.check is not None:
        names = ", ".join(f"sm_{capability}" for capability in options.check or DEVICES)
        report["checked"][version] = f"{names}: {finding(kernels, failures)}"
    else:
        tables = {**(report["kernels"] if options.op is not None else {}), **compact(kernels)}
        report = {
            "command": "python -m bench.tools.triton_resources",
            "triton": version,
            "checked": {other: text for other, text in report["checked"].items() if other != version},
            "columns": COLUMNS,
            "kernels": dict(sorted(tables.items())),
        }
    write_text(REPORT, report_text(report))
    write_text(REPORT.with_suffix(".md"), markdown(report))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    print(f"triton {version}: {finding(kernels, failures)}")
    return 1 if failures or any(entry["stack_bytes"] for entry in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
