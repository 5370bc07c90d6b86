"""Timing: rounds, order, percentiles, progress. Nothing here depends on how long anything takes."""

from __future__ import annotations

import pytest
import torch

from sequoia_kernels.measure import time_calls
from sequoia_kernels.measure import timing as timing_module
from sequoia_kernels.measure.timing import Turn


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the calls themselves advance."""

    class Clock:
        now = 0.0

        def advance(self, milliseconds: float) -> None:
            self.now += milliseconds / 1e3

    clock = Clock()
    monkeypatch.setattr(timing_module.time, "perf_counter", lambda: clock.now)
    return clock


def test_every_call_runs_once_a_round_behind_the_warm_up(clock):
    order: list[str] = []
    calls = {name: lambda name=name: (order.append(name), clock.advance(1)) for name in "abcd"}
    times = time_calls(calls, "cpu", min_repeats=6, max_repeats=6, seconds=0, warmup=2)
    rounds = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert len(rounds) == 8
    assert all(sorted(entries) == list("abcd") for entries in rounds)
    assert len({tuple(entries) for entries in rounds}) > 1  # shuffled anew
    assert list(times) == list("abcd")
    assert all(time.repeats == 6 for time in times.values())


def test_a_turn_settles_first_and_has_something_before_each_of_its_calls(clock):
    order: list[str] = []
    durations = iter([9.0, 8.0, 3.0, 2.0] * 3)
    calls = {
        "one": lambda: (order.append("one"), clock.advance(1)),
        "more": lambda: (order.append("more"), clock.advance(next(durations))),
    }
    turn = Turn(before=lambda: (order.append("level"), clock.advance(100)), settling=2, timed=2)
    times = time_calls(calls, "cpu", min_repeats=2, max_repeats=2, seconds=0, warmup=1, turns={"more": turn})
    whole = " ".join(order)
    assert whole.replace("one", "").split() == ["level", "more"] * 4 * 3
    assert whole.count(" ".join(["level more"] * 4)) == 3  # a turn is not interrupted by other calls
    assert times["one"] == pytest.approx((1, 1, 1, 1, 2))
    assert times["more"] == pytest.approx((2, 2.5, 3, 2.5, 4))


def test_the_order_follows_from_the_seed(clock):
    def run(seed: int) -> list[str]:
        order: list[str] = []
        time_calls({name: lambda name=name: order.append(name) for name in "abcdef"}, "cpu", seconds=0, seed=seed)
        return order

    assert run(1) == run(1) != run(2)


def test_percentiles_are_of_the_counted_rounds(clock):
    durations = iter([1000.0, 10.0, 20.0, 30.0, 40.0, 50.0])  # the first is the warm-up
    times = time_calls(
        {"call": lambda: clock.advance(next(durations))}, "cpu", min_repeats=5, max_repeats=5, seconds=0, warmup=1
    )
    assert times["call"] == pytest.approx((18.0, 30.0, 42.0, 30.0, 5))


def test_the_mean_counts_interruptions_but_not_endless_ones(clock):
    durations = {"short": [1.0] * 7 + [21.0], "long": [10.0] * 8, "hit": [1.0] * 7 + [1e6]}
    waiting = {name: iter(times) for name, times in durations.items()}
    calls = {name: lambda name=name: clock.advance(next(waiting[name])) for name in durations}
    times = time_calls(calls, "cpu", min_repeats=8, max_repeats=8, seconds=0, warmup=0)
    assert [times[name].p50_ms for name in durations] == pytest.approx([1, 10, 1])
    # the slowest call's 80th percentile is 10: what is beyond 40 more than a call's median is cut
    assert [times[name].mean_ms for name in durations] == pytest.approx([(7 + 21) / 8, 10, (7 + 41) / 8])


@pytest.mark.parametrize(
    ("seconds", "min_repeats", "max_repeats", "expected"),
    [(0.0, 3, 50, 3), (0.0105, 3, 50, 10), (1.0, 3, 7, 7), (0.0, 5, 2, 5)],
)
def test_repeats_stay_between_the_limits_and_use_the_time(clock, seconds, min_repeats, max_repeats, expected):
    times = time_calls(
        {"call": lambda: clock.advance(1)},
        "cpu",
        min_repeats=min_repeats,
        max_repeats=max_repeats,
        seconds=seconds,
        warmup=1,
    )
    assert times["call"].repeats == expected


@pytest.mark.parametrize("seconds", [0.0, 0.02, 10.0])
def test_progress_rises_to_one(clock, seconds):
    seen: list[float] = []
    calls = {name: lambda: clock.advance(1) for name in "abc"}
    time_calls(calls, "cpu", min_repeats=4, max_repeats=8, seconds=seconds, progress=seen.append)
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_repeats": 0},
        {"max_repeats": 0},
        {"min_repeats": 1.5},
        {"seconds": -1},
        {"seconds": float("nan")},
        {"warmup": -1},
    ],
)
def test_bad_arguments_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"time_calls: {name} must be"):
        time_calls({"call": lambda: None}, "cpu", **arguments)


def test_a_device_is_busy_while_a_call_is_launched(fake_cuda):
    """Events around a call on an idle device would also time how long the first launch takes to get there."""
    device = torch.device("cuda", 1)
    times = time_calls({"call": lambda: fake_cuda.log.append("call")}, device, min_repeats=1, seconds=0, warmup=0)
    assert times["call"].p50_ms == 4.0
    recorded = "record on default of cuda:1"
    assert fake_cuda.log == ["synchronize cuda:1", "busy", recorded, "call", recorded, "wait for default of cuda:1"]
    fake_cuda.assert_untouched()
