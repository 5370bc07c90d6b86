"""The modules of bench/, a package of scripts beside the installed one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

__all__ = [
    "BENCH",
    "baselines",
    "bench_script",
    "cli_page",
    "clocks",
    "gpu_check",
    "harness",
    "machine",
    "replay",
    "report",
    "run_module",
    "samplers",
    "sanitize",
    "summary",
    "synthetic_pair",
    "targets",
    "vllm_signatures",
    "workloads",
]

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not BENCH.is_dir():
    pytest.skip(f"{BENCH} is not there", allow_module_level=True)
sys.path.append(str(BENCH.parent))  # behind everything else: the package that is tested is the installed one

from bench.common import (  # noqa: E402
    baselines,
    clocks,
    harness,
    machine,
    replay,
    report,
    samplers,
    summary,
    synthetic_pair,
    targets,
    workloads,
)
from bench.tools import cli_page, gpu_check, sanitize, vllm_signatures  # noqa: E402


def bench_script(name: str) -> ModuleType:
    """The module bench_<name> in one of the rooms of bench/."""
    (path,) = BENCH.glob(f"*/bench_{name}.py")
    return importlib.import_module(f"bench.{path.parent.name}.{path.stem}")


def run_module() -> ModuleType:
    """The module bench/run.py."""
    return importlib.import_module("bench.run")
