"""Where numbers come from: the checkout, the machine, and the two ceilings that times are compared with."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sequoia_kernels.measure import time_calls
from sequoia_kernels.planner import DeviceFingerprint

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str | None:
    """Return the checkout's commit, marked when the tree differs from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """The command that repeats a run, from the top of the repository."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything that a time depends on and that can be asked for."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "device": asdict(DeviceFingerprint.of(device)),
        "processor": DeviceFingerprint.of("cpu").name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }
    for package in ("torch", "triton", "transformers", "numpy"):
        facts[package] = _version(package)
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _driver_version()
        facts["l2_bytes"] = torch.cuda.get_device_properties(device).L2_cache_size
    return facts


def device_folder(device: torch.device | str) -> str:
    """Name of the folder of a device's results: "cpu", or the GPU's own name, e.g. "nvidia-h200"."""
    device = torch.device(device)
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def pick_device(wanted: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device, or exit with the reason."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device cuda: torch sees no CUDA device on this machine")
    return torch.device(wanted)


def wait_for(device: torch.device) -> None:
    """Wait for everything on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_peaks(device: torch.device, seconds: float = 0.5) -> dict[str, Any]:
    """Measure the ceilings of a device: a large copy (bytes read plus bytes written) and a large matrix product.

    Both on random data; the product in bfloat16 on a GPU, in float32 on a CPU.
    """
    on_cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_cuda else (768, torch.float32)
    return {
        "copy_gb_per_s": _copy_rate(device, 1 << 30 if on_cuda else 64 << 20, seconds) / 1e9,
        "matmul_tflop_per_s": _matmul_rate(device, size, dtype, seconds) / 1e12,
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def _copy_rate(device: torch.device, num_bytes: int, seconds: float) -> float:
    """Bytes read plus bytes written a second, of a block far beyond any cache."""
    source = torch.randint(1 << 30, (num_bytes // 4,), dtype=torch.int32, device=device)
    copy = torch.empty_like(source)
    return 2 * num_bytes / (1e-3 * median_ms(lambda: copy.copy_(source), device, seconds))


def _matmul_rate(device: torch.device, size: int, dtype: torch.dtype, seconds: float) -> float:
    """Operations a second."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty(size, size, dtype=dtype, device=device)
    return 2 * size**3 / (1e-3 * median_ms(lambda: torch.mm(left, right, out=product), device, seconds))


def median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of one long call by itself, of 5 to 100 of them."""
    return time_calls({"": call}, device, seconds=seconds, warmup=1)[""].p50_ms


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None
