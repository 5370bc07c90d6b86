"""What every op's bench script shares: the correctness gate, the measurement, the JSON, the command line.

A script is a module (`bench_<op>.py`) with the names of `OpBench` that calls `main`. For every case each provider is
first checked against `expected`; a wrong one is not timed. What is right is timed as `clocks.py` describes. A provider
that cannot run is skipped, and the reason is kept.

The document has for each case and provider its status (ok, skipped, wrong or failed, with the reason); mode ->
percentiles in ms; the headline, which is the mode that the rates and percentages are computed from, against the
ceilings measured in the same run (the floor is the larger of bytes over the copy bandwidth and operations over the
matrix rate); on a GPU, whether a CUDA graph could be captured, which no host sync survives, and what one call launches.
`ratios[ours][other]` says how many times faster ours is, in the first mode that both have.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from bench.common import report
from bench.common.clocks import (
    HEADLINE_MODES,
    MODES,
    Call,
    DeviceClock,
    count_launches,
    host_samplers,
    percentiles,
    take_samples,
)
from bench.common.machine import commit, environment, free_memory, measure_peaks
from bench.common.script import Run, Script, option, shared
from sequoia_kernels.cuda_graphs import on_device
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.ops import backends

VERSION = 1
REFERENCE = "reference"
MAX_INPUT_SETS = 8


class Unavailable(Exception):
    """A provider cannot run here, or not this case; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """One set of sizes. CUDA cases are too large for a CPU, and CPU cases tell nothing of a GPU."""

    name: str
    device: str
    sizes: Mapping[str, Any]
    quick: bool = False

    def __getitem__(self, key: str) -> Any:
        return self.sizes[key]


@dataclass(frozen=True)
class Provider:
    """Somebody who can do an op's work."""

    # takes case and inputs, does what a user would do once and returns the call to be timed, which returns the result.
    # Raises `Unavailable` if it cannot.
    prepare: Callable[[Case, Any], Call]
    ours: bool = False  # one of this package's own backends
    capturable: bool = True  # no call waits for the device; a CUDA graph of it is then tried
    # gives the result to be checked, where the timed call draws randomness of its own: the same code with the
    # reference's randomness
    gate: Callable[[Case, Any], Any] | None = None
    # in place of the script's own, for somebody who solves a slightly different problem
    mismatch: Callable[[Case, Any, Any, Any], str | None] | None = None
    note: str = ""  # what is different or left out, for the reader of the table


class OpBench(Protocol):
    """The module that a script is; `flops` may be missing, and `reset(inputs)` sets back what calls change, if any."""

    OP: str
    CASES: list[Case]  # sizes, for a CPU or for a GPU
    PROVIDERS: dict[str, Provider]  # who can do the op's work
    make_inputs: Callable[[Case, torch.device, int], Any]  # fresh ones, a NamedTuple; equal seeds give equal inputs
    expected: Callable[[Case, Any], Any]  # the right result, from the same rounded inputs in float64
    mismatch: Callable[[Case, Any, Any, Any], str | None]  # (case, inputs, expected, result): what is wrong, or None
    bytes_moved: Callable[[Case], int]  # the fewest through memory: each input read, each output written once
    flops: Callable[[Case], int]  # operations of the matrix unit


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    device: torch.device
    quick: bool = False  # quick cases only
    seconds: float | None = None  # time for all cases; those that are not begun by then are skipped
    only_case: str = ""  # run cases whose name contains this
    only_provider: str = ""  # run providers whose name contains this
    seconds_per_case: float = 1.5
    min_repeats: int = 10  # rounds that are run whatever they take


def own_providers(op: str, bind: Callable[[Case, Any, str], Call]) -> dict[str, Provider]:
    """Every backend of an op as a provider: "sequoia <backend>", and "reference".

    `bind` gives the call to be timed for (case, inputs, backend name).
    """

    def prepare(name: str) -> Callable[[Case, Any], Call]:
        def prepared(case: Case, inputs: Any) -> Call:
            reason = backends.unavailable_reason(op, name)
            if reason is None and name == "triton" and case.device == "cpu":
                reason = "interpreted kernels say nothing about speed"
            if reason is not None:
                raise Unavailable(reason)
            return bind(case, inputs, name)

        return prepared

    return {
        name if name == REFERENCE else f"sequoia {name}": Provider(prepare(name), ours=name != REFERENCE)
        for name in backends.backend_names(op)
    }


def backend_rank(provider: str, device_type: str) -> int:
    """Where `backend="auto"` would look for one of our providers: the smallest is ours."""
    order = backends.AUTO_ORDER[device_type]
    name = provider.removeprefix("sequoia ")
    return order.index(name) if name in order else len(order)


# ---- one case


def run_case(bench: OpBench, case: Case, settings: Settings, peaks: Mapping[str, Any]) -> dict[str, Any]:
    """Gate and time every provider at one case."""
    device = settings.device
    results: dict[str, dict[str, Any]] = {}
    inputs = bench.make_inputs(case, device, 0)
    num_sets = _num_input_sets(inputs, device)
    expected = bench.expected(case, inputs)
    passed: dict[str, Provider] = {}
    for name, provider in bench.PROVIDERS.items():
        if settings.only_provider not in name:
            continue
        results[name] = {"ours": provider.ours, "note": provider.note}
        results[name] |= _gate(bench, case, provider, expected, device)
        if results[name]["status"] == "ok":
            passed[name] = provider
    del expected
    gc.collect()

    input_sets = [inputs, *(bench.make_inputs(case, device, seed) for seed in range(1, num_sets))]
    reset_inputs = getattr(bench, "reset", lambda _: None)

    def reset() -> None:
        for entry in input_sets:
            reset_inputs(entry)

    clock = DeviceClock(device) if device.type == "cuda" else None
    samplers = {}
    for name, provider in passed.items():
        try:
            calls = [provider.prepare(case, entry) for entry in input_sets]
            if clock is None:
                samplers[name] = host_samplers(calls[0], reset)
            else:
                reset()
                results[name]["launches"] = count_launches(calls[0])
                reset()
                samplers[name], reason = clock.samplers(calls, reset, provider.capturable)
                results[name]["captured"] = reason is None
                if reason is not None:
                    results[name]["not_captured"] = reason
        except (RuntimeError, Unavailable) as error:  # out of memory is a RuntimeError
            results[name] |= {"status": "failed", "reason": _first_line(error)}
    try:
        taken = take_samples(samplers, seconds=settings.seconds_per_case, min_repeats=settings.min_repeats)
    except RuntimeError as error:
        taken = {}
        for name in samplers:
            results[name] |= {"status": "failed", "reason": _first_line(error)}
    num_bytes, operations = bench.bytes_moved(case), getattr(bench, "flops", lambda _: 0)(case)
    memory_ms = num_bytes / (peaks["copy_gb_per_s"] * 1e6)
    arithmetic_ms = operations / (peaks["matmul_tflop_per_s"] * 1e9)
    floor_ms = max(memory_ms, arithmetic_ms)
    for name, modes in taken.items():
        ms = {mode: percentiles(samples) for mode, samples in modes.items()}
        headline = next(mode for mode in HEADLINE_MODES if mode in ms)
        seconds = ms[headline]["p50"] / 1e3
        results[name] |= {
            "ms": ms,
            "headline": headline,
            "gb_per_s": num_bytes / seconds / 1e9,
            "percent_of_copy": 100 * memory_ms / ms[headline]["p50"],
            "tflop_per_s": operations / seconds / 1e12,
            "percent_of_matmul": 100 * arithmetic_ms / ms[headline]["p50"],
            "percent_of_floor": 100 * floor_ms / ms[headline]["p50"],
        }
    return {
        "name": case.name,
        "sizes": dict(case.sizes),
        "bytes": num_bytes,
        "flops": operations,
        "floor_ms": floor_ms,
        "bound": "memory" if memory_ms >= arithmetic_ms else "arithmetic",
        "input_sets": num_sets,
        "providers": results,
        "ratios": _ratios(results),
        "ours": _ours(results, device.type),
    }


def _gate(bench: OpBench, case: Case, provider: Provider, expected: Any, device: torch.device) -> dict[str, Any]:
    """Run a provider once on inputs of its own and compare. Nobody who is wrong is timed."""
    inputs = bench.make_inputs(case, device, 0)
    try:
        call = provider.prepare(case, inputs)
        result = provider.gate(case, inputs) if provider.gate is not None else call()
        problem = (provider.mismatch or bench.mismatch)(case, inputs, expected, result)
    except (Unavailable, BackendUnavailableError) as error:
        return {"status": "skipped", "reason": _first_line(error)}
    except torch.cuda.OutOfMemoryError:
        return {"status": "skipped", "reason": "out of device memory"}
    except Exception as error:  # a rival's changed interface must not end the run
        return {"status": "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}
    return {"status": "ok"} if problem is None else {"status": "wrong", "reason": problem}


def _ratios(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    ratios: dict[str, dict[str, float]] = {}
    for ours, entry in results.items():
        if not entry["ours"] or "ms" not in entry:
            continue
        ratios[ours] = {}
        for other, rival in results.items():
            shared = [mode for mode in HEADLINE_MODES if mode in entry["ms"] and mode in rival.get("ms", {})]
            if other != ours and shared:
                ratios[ours][other] = rival["ms"][shared[0]]["p50"] / entry["ms"][shared[0]]["p50"]
    return ratios


def _ours(results: Mapping[str, Mapping[str, Any]], device_type: str) -> str | None:
    """Our provider that `backend="auto"` would take."""
    timed = [name for name, entry in results.items() if entry["ours"] and "ms" in entry]
    return min(timed, key=lambda name: backend_rank(name, device_type), default=None)


def _num_input_sets(inputs: Any, device: torch.device) -> int:
    """How many input sets a graph runs over: as many as fit into a quarter of the free memory, eight at most."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(MAX_INPUT_SETS, max(1, free // 4 // max(tensor_bytes(inputs), 1))))


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested sequences."""
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    return sum(tensor_bytes(value) for value in values) if isinstance(values, (list, tuple)) else 0


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---- all cases


def run_bench(
    bench: OpBench,
    settings: Settings,
    command: str = "",
    progress: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Run the cases of the settings' device and return the document; `progress` sees it grow after each case."""
    began = time.perf_counter()
    device = settings.device
    peaks = measure_peaks(device, 0.1 if settings.quick else 0.5)
    document: dict[str, Any] = {
        "bench": bench.OP,
        "version": VERSION,
        "command": command,
        "commit": commit(),
        "environment": environment(device),
        "device_type": device.type,
        "quick": settings.quick,
        "modes": list(MODES[device.type]),
        "peaks": peaks,
        "cases": [],
        "skipped_cases": [],
    }
    for case in bench.CASES:
        if case.device != device.type or settings.only_case not in case.name or (settings.quick and not case.quick):
            continue
        if settings.seconds is not None and time.perf_counter() - began > settings.seconds:
            document["skipped_cases"].append({"name": case.name, "reason": f"{settings.seconds:g} s were over"})
            continue
        try:
            with on_device(device):
                document["cases"].append(run_case(bench, case, settings, peaks))
        except torch.cuda.OutOfMemoryError:
            document["skipped_cases"].append({"name": case.name, "reason": "out of device memory"})
        free_memory(device)
        progress(document)
    return document


def own_failures(document: Mapping[str, Any]) -> list[str]:
    """Providers of ours, or the reference, that were wrong or failed."""
    return [
        f"{case['name']}: {name} {entry['status']}: {entry.get('reason', '')}"
        for case in document["cases"]
        for name, entry in case["providers"].items()
        if (entry["ours"] or name == REFERENCE) and entry["status"] in ("wrong", "failed")
    ]


OPTIONS = (
    *shared(device="auto", threads=None, quick=False),
    option("--seconds", help="begin no case after this time"),
    option("--case", default="", help="only cases whose name contains this"),
    option("--provider", default="", help="only providers whose name contains this"),
)


def main(bench: OpBench, arguments: Sequence[str] | None = None) -> int:
    """The command line of an op's script. 1 if one of our own backends is wrong or fails."""

    def measure(run: Run) -> int:
        options = run.options
        settings = Settings(run.device, options.quick, options.seconds, options.case, options.provider)
        if options.quick:
            settings = replace(settings, seconds_per_case=0.25, min_repeats=3)

        def progress(document: dict[str, Any]) -> None:
            print(f"  {document['cases'][-1]['name'] if document['cases'] else ''}", file=sys.stderr, flush=True)
            run.document |= document
            run.save()  # whatever ends the run early, what was measured stays

        run.document |= run_bench(bench, settings, run.document["command"], progress)
        print(report.markdown(run.document))
        if options.json:
            reason = report.plot(run.document, options.json.with_suffix(".png"))
            if reason is not None:
                print(f"no plot: {reason}")
        failures = own_failures(run.document)
        for failure in failures:
            print(f"FAILED {failure}", file=sys.stderr)
        if not run.document["cases"]:
            print(f"{bench.OP}: no case was run", file=sys.stderr)
        return 1 if failures or not run.document["cases"] else 0

    description = f"Time {bench.OP}: our backends, the reference, what users have instead. Wrong ones are not timed."
    return Script(bench.__spec__, measure, description, OPTIONS, markdown=report.markdown).main(arguments)
