"""Timing of many calls side by side.

Machines drift: clocks change, caches warm up, other programs come and go. Calls timed one after another would carry
that drift as if it were theirs. So every round runs each call once, in an order that is shuffled anew, and medians over
the rounds are compared.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from sequoia_kernels.cuda_graphs import on_device
from sequoia_kernels.documents import is_count

__all__ = [
    "Progress", "Timing", "Turn", "device_ms", "event_ms", "host_ms", "keep_busy", "pooled_slowdown", "quantile",
    "report_percent", "time_calls",
]  # fmt: skip

Key = TypeVar("Key", bound=Hashable)
Progress = Callable[[int, int, str], None]  # done, total, what is being done


class Timing(NamedTuple):
    """Percentiles of one call's times, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    mean_ms: float  # interruptions longer than four times the slowest call are cut to that
    repeats: int  # calls timed

    @classmethod
    def of(cls, samples: Sequence[float], longest_interruption: float = math.inf) -> Timing:
        """Summarise the times of one call, in milliseconds; see `mean_ms` for what is cut."""
        ordered = sorted(samples)
        p20, p50, p80 = (quantile(ordered, fraction) for fraction in (0.2, 0.5, 0.8))
        mean = sum(min(sample, p50 + longest_interruption) for sample in ordered) / len(ordered)
        return cls(p20, p50, p80, mean, len(ordered))


class Turn(NamedTuple):
    """What a call's turn in a round is, where that is more than one call."""

    before: Callable[[], object] | None = None  # done before each of the calls, untimed
    settling: int = 0  # calls at the beginning that are not timed: till caches hold what they hold in decoding
    timed: int = 1  # calls behind those


def time_calls(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device | str,
    *,
    min_repeats: int = 5,
    max_repeats: int = 100,
    seconds: float = 1.0,
    warmup: int = 2,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    turns: Mapping[Key, Turn] | None = None,
) -> dict[Key, Timing]:
    """Time calls in interleaved rounds.

    Args:
        calls: what to time, by name. Every call must do the same work each time.
        device: where the calls work. On CUDA they are timed by events around them, launched while the device is still
            busy, else by the clock.
        min_repeats: rounds that are run whatever they take.
        max_repeats: rounds after which no more are run.
        seconds: further rounds are begun while this much time has not passed, warm-up included.
        warmup: rounds at the beginning that are not counted.
        seed: of the order within the rounds.
        progress: called with the fraction done, after every call.
        turns: what the turn of some of the calls is; one timed call where nothing is said.

    Returns:
        Percentiles by name, in the order of `calls`.

    Notes:
        On CUDA it waits for the device after every call.

    Example:
        >>> times = time_calls({"sum": lambda: sum(range(100))}, "cpu", seconds=0.01)
        >>> times["sum"].p20_ms <= times["sum"].p50_ms
        True
    """
    for name, value in (("min_repeats", min_repeats), ("max_repeats", max_repeats)):
        if not is_count(value, 1):
            raise ValueError(f"time_calls: {name} must be a positive integer, got {value!r}")
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"time_calls: seconds must be a finite time >= 0, got {seconds}")
    if not is_count(warmup):
        raise ValueError(f"time_calls: warmup must be an integer >= 0, got {warmup!r}")
    device = torch.device(device)
    order = list(calls)
    shuffle = random.Random(seed).shuffle
    samples: dict[Key, list[float]] = {key: [] for key in order}
    clock = device_ms if device.type == "cuda" else host_ms
    whole, once = turns or {}, Turn()
    begin = time.perf_counter()
    num_rounds = -warmup
    while num_rounds < min_repeats or (num_rounds < max_repeats and time.perf_counter() - begin < seconds):
        shuffle(order)
        for index, key in enumerate(order, start=1):
            turn = whole.get(key, once)
            for place in range(turn.settling + turn.timed):
                if turn.before is not None:
                    turn.before()
                milliseconds = clock(calls[key], device)
                if num_rounds >= 0 and place >= turn.settling:
                    samples[key].append(milliseconds)
            if progress is not None:
                rounds = warmup + num_rounds + index / len(order)
                spent = (time.perf_counter() - begin) / seconds if seconds > 0 else 1.0
                # done when the least rounds are over, and either the time or the most rounds are used up
                most = rounds / (warmup + max(max_repeats, min_repeats))
                progress(min(1.0, rounds / (warmup + min_repeats), max(spent, most)))
        num_rounds += 1
    longest = 4 * max((quantile(sorted(times), 0.8) for times in samples.values()), default=0.0)
    return {key: Timing.of(samples[key], longest) for key in calls}


def pooled_slowdown(times: Collection[Timing]) -> float:
    """Mean over median of many calls: what interruptions add is in proportion to the time that a call takes."""
    return sum(time.mean_ms for time in times) / sum(time.p50_ms for time in times)


def report_percent(progress: Progress | None, describe: Callable[[], str]) -> Callable[[float], None]:
    """Return what reports a fraction done to `progress`, as percent, and only where that has grown.

    Drawing a bar takes longer than many a call that is timed.
    """
    shown = -1

    def report(fraction: float) -> None:
        nonlocal shown
        done = int(100 * fraction)
        if progress is not None and done > shown:
            shown = done
            progress(done, 100, describe())

    return report


def host_ms(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Milliseconds of one call by the host's clock; `device` is there for the sake of `device_ms`."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def device_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call on a CUDA device that does nothing else."""
    with on_device(device):
        torch.cuda.synchronize()
        keep_busy()
        return event_ms(call)


def keep_busy() -> None:
    """Occupy the current CUDA device for some 50 microseconds without touching memory.

    What is launched meanwhile waits in the stream, as in a loop that launches ahead: the way of its first launch to the
    device, 5 to 8 microseconds, is then no part of its time.
    """
    torch.cuda._sleep(100_000)


def event_ms(call: Callable[[], object]) -> float:
    """Milliseconds on the current CUDA device from the end of what was launched before to the end of the call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Read a quantile off sorted numbers, linear between neighbours, as in NumPy."""
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
