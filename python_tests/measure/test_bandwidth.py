"""measure_bandwidth: what it reports, and what it refuses."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch

from sequoia_kernels.measure import measure_bandwidth

bandwidth = sys.modules["sequoia_kernels.measure.bandwidth"]
LINK = ["host_to_device", "host_to_device_two_streams", "device_to_host"]


def test_a_cpu_has_the_bandwidth_of_its_memory():
    found = measure_bandwidth("cpu", num_bytes=1 << 16, seconds=0.005)
    assert list(found) == ["memory_copy"]
    assert 0 < found["memory_copy"] < 1e6


@pytest.mark.parametrize("num_bytes", [0, -1, 1.5, True])
def test_bad_sizes_are_refused(num_bytes):
    with pytest.raises(ValueError, match="num_bytes must be a positive integer"):
        measure_bandwidth("cpu", num_bytes=num_bytes)


@pytest.mark.parametrize("num_bytes", [8, 7, 1])
def test_parts_travel_side_by_side_and_the_caller_waits_for_all(monkeypatch, num_bytes):
    """The order of waits and copies, with stand-ins for streams; without a device nothing overlaps."""
    log = []

    def stream(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: log.append(f"{name} waits for {other.name}"))

    @contextlib.contextmanager
    def use(stream):
        log.append(f"copy on {stream.name}")
        yield

    current = stream("current")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", use)
    source, destination = torch.arange(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    bandwidth._copy_in_parts(source, destination, [stream("a"), stream("b")])
    assert torch.equal(source, destination)
    assert log == [
        *("a waits for current", "copy on a", "b waits for current", "copy on b"),
        *("current waits for a", "current waits for b"),
    ]


def test_copies_are_made_and_timed_on_their_own_device(fake_cuda, monkeypatch):
    """Pinned memory and streams belong to the device that is current when they are made."""
    seen = []
    monkeypatch.setattr(bandwidth, "_copies", lambda *args: (seen.append(fake_cuda.current_device()), ({}, {}))[1])
    assert measure_bandwidth("cuda:1", num_bytes=8) == {}
    assert seen == [1]
    fake_cuda.assert_untouched()


@pytest.mark.gpu
def test_a_cuda_device_has_a_link_to_the_host():
    found = measure_bandwidth("cuda", num_bytes=1 << 26, seconds=0.05)
    assert list(found) == ["memory_copy", *LINK]
    assert all(0 < found[name] < found["memory_copy"] for name in LINK)
