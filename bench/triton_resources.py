"""Compile every Triton kernel for every supported GPU architecture and write docs/triton_resources.{json,md}.

Needs no GPU. The cases are those of python_tests/support/triton_cases.py: each op's own launches over its dtypes,
sizes, block configurations and options. For each kernel: registers and stack of a thread (a stack of 0 bytes means that
nothing was spilled), shared memory of a program, warps and pipeline stages.

    python bench/triton_resources.py                       all cases, four architectures; about 20 minutes of one core
    python bench/triton_resources.py --op verify_tree      compile one op again and keep the rest of the report

The compiler decides registers, so the report names its version. Compiling shows that a kernel can run well, not that it
does: times are what the bench scripts of the ops measure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "python_tests"
REPORT = ROOT / "docs" / "triton_resources.json"
DEVICES = {80: "sm_80, A100", 89: "sm_89, RTX 4090", 90: "sm_90, H100 and H200", 100: "sm_100, B200"}


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


def markdown(report: dict[str, Any]) -> str:
    """The report as tables: one for each op and kernel, a column for each architecture."""
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Compiled by triton {report['triton']}, on a machine without a GPU; none of this was run on one. Made by",
        "`python bench/triton_resources.py`; the same numbers for programs are in triton_resources.json. A cell reads",
        "registers of a thread / KiB of shared memory of a program / warps x pipeline stages; `spills` marks a kernel",
        "with a stack.",
    ]
    kernels = report["kernels"]
    for op, kernel in dict.fromkeys((entry["op"], entry["kernel"]) for entry in kernels):
        entries = [entry for entry in kernels if (entry["op"], entry["kernel"]) == (op, kernel)]
        lines += ["", f"## {op}: `{kernel}`", ""]
        lines += ["| case | " + " | ".join(DEVICES.values()) + " |", "|---" * (len(DEVICES) + 1) + "|"]
        for case in dict.fromkeys(entry["case"] for entry in entries):
            cells = (
                cell(entry for entry in entries if (entry["case"], entry["capability"]) == (case, capability))
                for capability in DEVICES
            )
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(entries: Iterable[dict[str, Any]]) -> str:
    """One kernel on one architecture; more than one launch of it in a case are separated by a semicolon."""
    return "; ".join(
        f"{entry['registers']} / {entry['shared_bytes'] / 1024:.1f} / {entry['num_warps']}x{entry['num_stages']}"
        + (" spills" if entry["stack_bytes"] else "")
        for entry in entries
    )


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def kept_kernels(op: str | None) -> Iterator[dict[str, Any]]:
    """What the report has of the other ops."""
    if op is not None and REPORT.exists():
        yield from (entry for entry in json.loads(REPORT.read_text())["kernels"] if entry["op"] != op)


def main() -> int:
    """Compile, write the report, and fail if a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="compile the cases of this op only")
    parser.add_argument("--jobs", type=int, default=1, help="architectures to compile for at a time (default: 1)")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda capability: compile_kernels(capability, options.op), DEVICES))
    kernels = [*kept_kernels(options.op), *(entry for result in results for entry in result["kernels"])]
    kernels.sort(key=lambda entry: entry["op"])  # stable: cases stay in the order of the table
    report = {"command": "python bench/triton_resources.py", "triton": results[0]["triton"], "kernels": kernels}
    rows = ",\n".join(json.dumps(entry) for entry in kernels)
    header = json.dumps({key: value for key, value in report.items() if key != "kernels"})[:-1]
    write(REPORT, f'{header}, "kernels": [\n{rows}\n]}}\n')
    write(REPORT.with_suffix(".md"), markdown(report))
    spilling = [entry for entry in kernels if entry["stack_bytes"]]
    for entry in spilling:
        print(f"spills: {entry}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(spilling)} with spills: {REPORT.relative_to(ROOT)}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
