"""How a call is timed: by the host's clock on a CPU; by events, uncaptured and as graph replays, on a GPU.

What the modes mean, and why, is in docs/benchmarks.md. Calls take turns: every round runs each provider once in each
mode, in an order that is shuffled anew, so that drift of the machine hits all alike. A slow provider leaves after its
share of the time and goes on in fewer rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sequoia_kernels.cuda_graphs import CaptureError, capture, on_device
from sequoia_kernels.measure.timing import Timing, event_ms, host_ms, keep_busy

Call = Callable[[], Any]
Sample = Callable[[], float]  # runs once and returns milliseconds

MODES = {"cpu": ("warm",), "cuda": ("graph_cold", "graph_warm", "eager_cold", "eager_warm")}
HEADLINE_MODES = ("graph_cold", "eager_cold", "warm")  # of what a provider has, the first is its time
LONG_MS = 5.0  # a call that takes this long is not captured: launches are nothing beside it


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, linear between neighbours, and the number of samples."""
    timing = Timing.of(samples)
    return {"p20": timing.p20_ms, "p50": timing.p50_ms, "p80": timing.p80_ms, "repeats": timing.repeats}


def host_percentiles(call: Call, repeats: int) -> dict[str, float]:
    """Time a call by itself on the host, behind a first one that does not count."""
    call()
    return percentiles([host_ms(call) for _ in range(repeats)])


def take_samples(
    samplers: Mapping[str, Mapping[str, Sample]],  # provider -> mode -> one timed run
    *,
    seconds: float,  # for everything; each provider may use its equal share, and always gets `min_repeats`
    min_repeats: int,  # rounds that every provider takes part in
    max_repeats: int = 200,  # rounds after which nobody goes on
    seed: int = 0,  # of the order within rounds
) -> dict[str, dict[str, list[float]]]:
    """Run interleaved rounds. Gives provider -> mode -> milliseconds."""
    shuffle = random.Random(seed).shuffle
    share = seconds / max(len(samplers), 1)
    used = dict.fromkeys(samplers, 0.0)
    taken: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in samplers[name]} for name in samplers}
    for modes in samplers.values():  # not counted: the first run after preparation pays for what others do not
        for sample in modes.values():
            sample()
    for turn in range(max_repeats):
        names = [name for name in samplers if turn < min_repeats or used[name] < share]
        if not names:
            break
        shuffle(names)
        for name in names:
            started = time.perf_counter()
            for mode, sample in samplers[name].items():
                taken[name][mode].append(sample())
            used[name] += time.perf_counter() - started
    return taken


def host_samplers(call: Call, reset: Call) -> dict[str, Sample]:
    """Samplers of a call on a CPU; `reset` runs before each sample, untimed."""

    def sample() -> float:
        reset()
        return host_ms(call)

    return {"warm": sample}


class DeviceClock:
    """Samplers of calls on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # Read, not written: dirty lines would have to be written back during the call that is timed.
        self._filler = torch.randint(1 << 30, (l2_bytes,), dtype=torch.int32, device=device)  # four times L2
        self._sink = torch.empty((), dtype=torch.int64, device=device)

    def replace_l2(self) -> None:
        """Read so much that nothing of a call's inputs is left in L2."""
        torch.sum(self._filler, dim=0, out=self._sink)

    def samplers(
        self, calls: Sequence[Call], reset: Call, capturable: bool = True
    ) -> tuple[dict[str, Sample], str | None]:
        """The samplers of a provider, by mode, and the reason why there is no graph, or None.

        The calls are the same one on several input sets of the same shapes. `reset` undoes what they changed; it runs
        before each sample, untimed. Only a `capturable` call is tried in a graph.
        """
        samplers: dict[str, Sample] = {}
        reason: str | None = None if capturable else "works on the host between launches"
        if reason is None and self._timed(calls[0], reset, cold=False) > LONG_MS:
            reason = f"takes more than {LONG_MS:g} ms, beside which launches are nothing"
        if reason is None:
            try:
                samplers["graph_cold"] = self._replays(calls, reset, cold=True)
                samplers["graph_warm"] = self._replays([calls[0]] * len(calls), reset, cold=False)
            except CaptureError as error:
                samplers, reason = {}, f"cannot be captured: {error}"
        samplers["eager_cold"] = lambda: self._timed(calls[0], reset, cold=True)
        samplers["eager_warm"] = lambda: self._timed(calls[0], reset, cold=False)
        return samplers, reason

    def _replays(self, calls: Sequence[Call], reset: Call, cold: bool) -> Sample:
        def run() -> None:
            for call in calls:
                call()

        reset()
        graph = capture(run, self.device, undo=reset).graph
        return lambda: self._timed(graph.replay, reset, cold) / len(calls)

    def _timed(self, run: Call, reset: Call, cold: bool) -> float:
        with on_device(self.device):
            reset()
            # Either way the device is busy while the host records the event and launches: the first launch's way to the
            # device is not part of the time, as it is not in a loop that launches ahead.
            self.replace_l2() if cold else keep_busy()
            return event_ms(run)


def count_launches(call: Call) -> int | None:
    """Kernels, copies and fills that one call puts on the device; None where the profiler cannot tell."""
    return sum(kernel["launches"] for kernel in launched_kernels(call)) or None


def launched_kernels(call: Call) -> list[dict[str, Any]]:
    """What one call puts on the device: kernels, copies and fills by name, with their number and time in all.

    Returns:
        {"name", "launches", "us"} each, those that take most time first; nothing where the profiler cannot tell.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    except RuntimeError:
        return []
    found: dict[str, dict[str, Any]] = {}
    for event in on_device:
        kernel = found.setdefault(event.name, {"name": event.name, "launches": 0, "us": 0.0})
        kernel["launches"] += 1
        kernel["us"] += event.device_time_total
    return sorted(found.values(), key=lambda kernel: -kernel["us"])
