"""Run the benchmarks: one command for all of them, or for one suite.

    python bench/run.py --suite all --out results            this machine's GPU where there is one, else its CPU
    python bench/run.py --suite ops --out results --quick    about a minute, to see that everything works

Every script runs in a process of its own, so that one that crashes does not end the run. What cannot run on the device
is skipped, and the summary says why. Written are OUT/<device>/<bench>.json, tables and plots beside them, and
OUT/<device>/summary.md and .json. Exit status 1 if a script failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # `python bench/run.py` finds what `python -m bench.run` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.common import summary, targets
from bench.common.machine import ROOT, command_line, commit, device_folder, environment, pick_device
from bench.common.report import table
from bench.common.script import write_json


class Script(NamedTuple):
    """One benchmark."""

    name: str  # the result is <name>.json; the file is bench_<name>.py in a room of bench/
    suite: str  # ops, decode or planner
    # device types it can run on, to be told by --device where `takes_device`
    devices: tuple[str, ...] = ("cpu", "cuda")
    why_not: str = ""  # the reason that is given on other devices
    takes_device: bool = True  # has a --device option
    takes_seconds: bool = False  # has a --seconds option, and ends by itself when they are over
    weight: float = 1.0  # its share of a limited time, relative to the others


def op_script(op: str, weight: float) -> Script:
    """A script that is built on the harness."""
    return Script(op, "ops", takes_seconds=True, weight=weight)


# New benchmarks plug in here.
SCRIPTS = (
    op_script("tree_attention", weight=4.0),
    op_script("sample_without_replacement", weight=2.0),
    op_script("warped_logsumexp", weight=1.0),
    op_script("verify_tree", weight=2.0),
    op_script("compact_kv_cache_", weight=1.0),
    Script("captured_loop", "decode", ("cuda",), "needs a CUDA device: on a CPU no graph is captured"),
    Script("demo_pair", "decode", weight=3.0),
    Script("paper_systems", "decode", takes_seconds=True, weight=6.0),
    Script("tree_forward_cpu", "decode", ("cpu",), "times forwards on the CPU", takes_device=False),
    Script("forward_floors", "decode", ("cpu",), "times forwards on the CPU", takes_device=False, weight=2.0),
    Script("offload", "decode", takes_seconds=True, weight=4.0),
    Script("adaptive", "planner"),
    Script("lookup", "decode", weight=2.0),
    Script("auto", "planner", weight=2.0),
    Script("robustness", "decode", weight=6.0),
    Script("plan", "planner", takes_device=False),
    Script("cost_model", "planner", weight=3.0),
    Script("planner", "planner", weight=3.0),
    Script("planner_pick", "planner", weight=3.0),
    Script("rules", "planner", weight=3.0),
)
SUITES = ("ops", "decode", "planner")


def selected(suite: str) -> list[Script]:
    """The scripts of a suite."""
    return [script for script in SCRIPTS if suite in ("all", script.suite)]


def run_script(script: Script, folder: Path, device_type: str, quick: bool, timeout: float | None) -> dict[str, Any]:
    """Run one script and tell how it went."""
    outcome: dict[str, Any] = {"name": script.name, "suite": script.suite, "status": "skipped", "seconds": 0.0}
    if device_type not in script.devices:
        return outcome | {"reason": script.why_not}
    if timeout is not None and timeout <= 0:
        return outcome | {"reason": "the time was over"}
    (path,) = ROOT.glob(f"bench/*/bench_{script.name}.py")
    command = [sys.executable, "-m", ".".join(path.relative_to(ROOT).with_suffix("").parts)]
    command += ["--quick"] if quick else []
    command += ["--device", device_type] if script.takes_device else []
    if script.takes_seconds and timeout is not None:
        # What it began it may end, so it stops beginning well before it would be killed.
        command += ["--seconds", f"{0.7 * timeout:.0f}"]
    command += ["--json", str(folder / f"{script.name}.json")]
    # A script is found in the folder that it is started in, which this variable would hide.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    if quick and device_type == "cpu":
        variables.setdefault("OMP_NUM_THREADS", "1")  # others run beside it
    log = folder / f"{script.name}.log"
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        try:
            result = subprocess.run(
                command, cwd=ROOT, env=variables, stdout=stream, stderr=subprocess.STDOUT, timeout=timeout, check=False
            )
            failure = f"exit status {result.returncode}, see {log.name}" if result.returncode else None
        except subprocess.TimeoutExpired:
            failure = f"took longer than {timeout:.0f} s, see {log.name}"
    outcome["seconds"] = time.perf_counter() - started
    return outcome | ({"status": "ok"} if failure is None else {"status": "failed", "reason": failure})


def run_suite(options: argparse.Namespace, folder: Path, device_type: str) -> list[dict[str, Any]]:
    """Run a suite's scripts and tell what became of each."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = None if options.minutes is None else time.perf_counter() + 60 * options.minutes
    scripts = selected(options.suite)

    def run(index: int) -> dict[str, Any]:
        script, share = scripts[index], None
        if deadline is not None:
            waiting = [other.weight for other in scripts[index:] if device_type in other.devices]
            share = (deadline - time.perf_counter()) * script.weight / max(sum(waiting), script.weight)
        outcome = run_script(script, folder, device_type, options.quick, share)
        line = f"{script.name}: {outcome['status']} ({outcome['seconds']:.1f} s) {outcome.get('reason', '')}"
        print(line.rstrip(), flush=True)
        return outcome

    # A quick run asks whether everything works, not how fast it is: on a CPU each core takes a script.
    at_once = (os.cpu_count() or 1) if options.quick and device_type == "cpu" else 1
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(run, range(len(scripts))))


def write_summary(folder: Path, device_type: str, outcomes: Sequence[dict[str, Any]], command: str, short: str) -> None:
    """Write summary.md and summary.json: what ran, what it showed in short, the targets, and all tables."""
    facts = environment(device_type)
    rows = [
        [entry["name"], entry["suite"], entry["status"], f"{entry['seconds']:.1f} s", entry.get("reason", "")]
        for entry in outcomes
    ]
    parts = [
        f"# Benchmarks on {facts['device']['name']}",
        f"{facts['date']} UTC, commit {commit() or 'unknown'}, torch {facts['torch']}.\n`{command}`",
        table(["bench", "suite", "status", "time", "why"], rows, left=5),
        short,
    ]
    for entry in outcomes:
        tables, log = (folder / f"{entry['name']}.{suffix}" for suffix in ("md", "log"))
        if entry["status"] == "ok" and tables.exists():
            parts.append(tables.read_text(encoding="utf-8").strip())
        elif entry["status"] == "ok" and log.exists():
            parts.append(f"## {entry['name']}\n\n```\n{_without_progress(log.read_text(encoding='utf-8'))}\n```")
    (folder / "summary.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    found = [finding._asdict() for finding in targets.evaluate(targets.load_documents(folder))]
    facts = {"command": command, "commit": commit(), "environment": facts}
    write_json(folder / "summary.json", {**facts, "scripts": list(outcomes), "targets": found})


def _without_progress(text: str) -> str:
    """A log's lines without what scripts tell of their progress, and progress bars and warnings of libraries."""
    lines = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
    others = [line for line in lines if line and not line.startswith(("Loading weights", "[transformers]"))]
    return "\n".join(line for line in others if not re.match(r"  +\d+\.\d s  ", line))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="few small cases, about a minute on two cores")
    parser.add_argument("--minutes", type=float, help="share this time among the scripts")
    parser.add_argument("--targets", action="store_true", help="show a GPU's targets on a CPU, too")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    folder = options.out.resolve() / device_folder(device)
    outcomes = run_suite(options, folder, device.type)
    documents = targets.load_documents(folder)
    short = f"# Ours beside the best other\n\n{summary.markdown(documents)}"
    if options.targets or device.type == "cuda":
        short += f"\n\n# Targets, of an H200\n\n{targets.markdown(targets.evaluate(documents))}"
    write_summary(folder, device.type, outcomes, command_line("bench.run", arguments), short)
    pictures = sorted(path.name for suffix in ("png", "svg") for path in folder.glob(f"*.{suffix}"))
    print(f"\n{short}\n\ntables: {folder / 'summary.md'}\ndocuments: {folder}/*.json")
    print(f"pictures: {', '.join(pictures) or 'none'}")
    return 1 if any(outcome["status"] == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
