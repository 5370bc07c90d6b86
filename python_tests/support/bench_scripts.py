"""The modules of bench/, which is a folder of scripts and no package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

__all__ = [
    "BENCH",
    "baselines",
    "bench_script",
    "clocks",
    "gpu_check",
    "harness",
    "machine",
    "report",
    "run_module",
    "sanitize",
    "synthetic_pair",
    "targets",
    "workloads",
]

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not BENCH.is_dir():
    pytest.skip(f"{BENCH} is not there", allow_module_level=True)
sys.path.append(str(BENCH))  # the scripts find one another through their own folder

baselines = importlib.import_module("baselines")
clocks = importlib.import_module("clocks")
gpu_check = importlib.import_module("gpu_check")
harness = importlib.import_module("harness")
machine = importlib.import_module("machine")
report = importlib.import_module("report")
sanitize = importlib.import_module("sanitize")
synthetic_pair = importlib.import_module("synthetic_pair")
targets = importlib.import_module("targets")
workloads = importlib.import_module("workloads")


def bench_script(name: str) -> ModuleType:
    """The module bench/bench_<name>.py."""
    return importlib.import_module(f"bench_{name}")


def run_module() -> ModuleType:
    """A fresh copy of bench/run.py, under a name that cannot be mistaken for python_tests/run.py."""
    specification = importlib.util.spec_from_file_location("bench_run", BENCH / "run.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
