"""`doctor`: say what is installed, which backends work here, and why others do not."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping
from typing import Any

from sequoia_kernels.cli.arguments import add_command
from sequoia_kernels.cli.terminal import Terminal
from sequoia_kernels.version import __version__


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        run,
        "Say what is installed, which backends work here, and why others do not.",
        "sequoia-kernels doctor path/of/model",
    )
    parser.add_argument(
        "models", nargs="*",
        help="folders or hub ids: say what runs these models' forwards, too, or which draft one holds",
    )  # fmt: skip


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    import torch

    from sequoia_kernels.ops.backends import backend_report
    from sequoia_kernels.vllm import installed_vllm

    packages = {name: _version_of(name) for name in ("torch", "triton", "transformers", "numpy", "safetensors")}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    modules: dict[str, str | None] = {}
    for module in ("_host", "_cuda"):
        try:
            __import__(f"sequoia_kernels.{module}")
            modules[module] = None
        except ImportError as error:
            modules[module] = str(error)
    report = backend_report()
    forwards = [] if modules["_host"] is not None else _native_forwards()
    models = {name: _held(name) for name in args.models}
    vllm = installed_vllm()
    healthy = modules["_host"] is None and all(None in reasons.values() for reasons in report.values())
    document = {
        "version": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "cuda_devices": devices,
        "modules": _verdicts(modules),
        "backends": {op: _verdicts(reasons) for op, reasons in report.items()},
        "native_forwards": forwards,
        "models": models,
        "vllm": {"version": vllm.version, "supported": vllm.reason is None, "reason": vllm.reason},
        "healthy": healthy,
    }

    def show() -> None:
        terminal.out.print(f"sequoia-kernels {__version__}, Python {platform.python_version()}, {platform.machine()}")
        terminal.out.print(", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items()))
        terminal.out.print("CUDA devices: " + (", ".join(devices) if devices else "none"))
        for module, reason in modules.items():
            terminal.out.print(f"sequoia_kernels.{module}: " + ("built" if reason is None else f"missing ({reason})"))
        columns = ("op", "backend", "works here")
        rows = [
            (op, name, "yes" if reason is None else f"no: {reason}")
            for op, reasons in report.items()
            for name, reason in reasons.items()
        ]
        terminal.table(columns, rows, "backends", left=columns)
        if forwards:
            terminal.out.print(f"native forwards on this CPU: {forwards[0]} (of {', '.join(forwards)})")
        terminal.out.print(
            "trees in vLLM: " + (f"yes, {vllm.version}" if vllm.reason is None else f"no, {vllm.reason}")
        )
        for name, found in models.items():
            terminal.out.print(f"{name}: {found['holds']}")
        if modules["_host"] is not None:
            terminal.out.print("Build the host module with `pip install .` from a checkout; it needs a C++17 compiler.")
        if modules["_cuda"] is not None:
            terminal.out.print("For the native CUDA kernels, install from source where nvcc is on the PATH.")

    terminal.result(document, show)
    return 0 if healthy else 1


def _verdicts(reasons: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
    return {name: {"works": reason is None, "reason": reason} for name, reason in reasons.items()}


def _native_forwards() -> list[str]:
    """Instruction sets that native forwards can use here, the one that they do use first."""
    from sequoia_kernels import _host
    from sequoia_kernels.models.native import INSTRUCTION_SET_VARIABLE

    chosen = _host.forward_instruction_set(os.environ.get(INSTRUCTION_SET_VARIABLE, ""))
    return [chosen, *(name for name in _host.forward_instruction_sets() if name != chosen)]


def _held(name: str) -> dict[str, Any]:
    """What a folder holds: a published draft, or a model, with what runs its forwards on a CPU."""
    from sequoia_kernels.drafts import DraftFolder, format_of
    from sequoia_kernels.models import adapt, load_model

    published = format_of(name)
    if published is not None:
        folder = DraftFolder.open(name)
        size = sum(folder.need(key).numel() for key in folder.keys)
        config = folder.config
        inner = config.get("text_config")
        known = config.get("draft_vocab_size") or config.get("vocab_size")
        if known is None and isinstance(inner, dict):
            known = inner.get("vocab_size")
        holds = f"a draft of the format {published.name}, {size:,} parameters in {len(folder.keys)} weights"
        return {
            "draft_format": published.name, "parameters": size, "draft_vocab_size": known,
            "holds": holds + (f", {known:,} tokens" if isinstance(known, int) else ""),
        }  # fmt: skip
    model = adapt(load_model(name))
    because = f", since {model.not_native}" if model.not_native else ""
    holds = f"a {model.family} model, {model.runs} forwards{because}"
    return {"family": model.family, "forwards": model.runs, "not_native": model.not_native, "holds": holds}


def _version_of(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
