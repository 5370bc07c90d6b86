"""A stand-in for torch.cuda: devices, streams, events and graphs that keep their state as torch's do, on no device.

Work is done by `launch` and `wait`, which a test's calls use in place of kernels and of `.item()`. A failed capture
leaves behind what torch 2.11 leaves behind: the allocator and the random generators of the device stay in the capture.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings

import torch

from sequoia_kernels import cuda_graphs

NONE, ACTIVE, INVALIDATED = 0, 1, 2


class Stream:
    """A stream; `capture` is the capture that it is in, with its status."""

    def __init__(self, fake, device, name):
        self.fake, self.device, self.name = fake, device, name
        self.cuda_stream = id(self)
        self.status, self.nodes = NONE, []

    def __repr__(self):
        return f"{self.name} of {self.device}"

    def wait_stream(self, other):
        if self.status != NONE or other.status != NONE:
            raise RuntimeError("a stream that is being captured cannot be waited for")
        self.fake.log.append(f"{self} waits for {other}")


class FakeCuda:
    """State of a process with two devices. Installed by the fixture `fake_cuda` of conftest.py."""

    def __init__(self):
        self.log = []
        self.local = threading.local()
        self.default = {index: Stream(self, torch.device("cuda", index), "default") for index in range(2)}
        self.pools = set()  # memory that an allocator is allocating graphs from
        self.generators_capturing = set()  # devices
        self.sync_mode = 0
        self.streams = {}

    # devices and streams, of each thread

    def current_device(self):
        return getattr(self.local, "device", 0)

    def index(self, device):
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        return self.current_device() if index is None else index

    def current_stream(self, device=None):
        index = self.index(device)
        return getattr(self.local, "streams", {}).get(index, self.default[index])

    @contextlib.contextmanager
    def device(self, device):
        before, self.local.device = self.current_device(), self.index(device)
        try:
            yield
        finally:
            self.local.device = before

    @contextlib.contextmanager
    def stream(self, stream):
        with self.device(stream.device):
            before = self.current_stream(stream.device)
            self.local.streams = {**getattr(self.local, "streams", {}), stream.device.index: stream}
            try:
                yield
            finally:
                self.local.streams = {**self.local.streams, stream.device.index: before}

    def set_device(self, device):
        self.local.device = self.index(device)

    def set_stream(self, stream):
        """Make a stream, and its device, the current one."""
        self.local.device = stream.device.index
        self.local.streams = {**getattr(self.local, "streams", {}), stream.device.index: stream}

    def new_stream(self, device=None):
        stream = Stream(self, torch.device("cuda", self.index(device)), "side stream")
        self.streams[stream.cuda_stream] = stream
        return stream

    def is_current_stream_capturing(self):
        return self.current_stream().status != NONE

    # work

    def launch(self, device, work):
        """Do some work on a device's current stream, or capture it."""
        stream = self.current_stream(device)
        if stream.status == NONE:
            work()
        else:
            stream.nodes.append(work)

    def wait(self, device=None):
        """Wait for a device, as `.item()` does."""
        stream = self.current_stream(device)
        if stream.status != NONE:
            stream.status = INVALIDATED
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        if self.sync_mode == 1:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=2)
        elif self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    def synchronize(self, device=None):
        stream = self.current_stream(device)
        assert stream.status == NONE, "synchronize within a capture"
        self.log.append(f"synchronize {stream.device}")

    def set_sync_debug_mode(self, mode):
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        self.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

    def assert_untouched(self):
        """Nothing is left of a capture: the thread's device and stream, allocators, generators, the debug mode."""
        assert (self.current_device(), self.sync_mode) == (0, 0)
        assert [self.current_stream(index) for index in range(2)] == list(self.default.values())
        assert all(stream.status == NONE for stream in self.streams.values())
        assert not self.pools and not self.generators_capturing
        assert not cuda_graphs._lock._is_owned()


class Graph:
    """As `torch.cuda.CUDAGraph(keep_graph=True)`."""

    fake: FakeCuda

    def __init__(self, keep_graph=False):
        assert keep_graph  # else its nodes cannot be counted
        self.stream, self.nodes, self.instantiated = None, None, False

    def capture_begin(self, pool=None, capture_error_mode="global"):
        stream = self.stream = self.fake.current_stream()
        assert stream is not self.fake.default[stream.device.index]
        self.pool, self.device = (pool, stream.device.index), stream.device.index
        if self.pool in self.fake.pools:
            raise RuntimeError("already recording to this memory")
        self.fake.pools.add(self.pool)
        self.fake.generators_capturing.add(self.device)
        if stream.status != NONE:
            raise RuntimeError("capture_begin: the stream is being captured")
        stream.status, stream.nodes = ACTIVE, []
        self.fake.log.append(f"capture {stream}, {capture_error_mode}")

    def capture_end(self):
        assert self.fake.current_stream() is self.stream
        status, self.stream.status = self.stream.status, NONE
        if status != ACTIVE:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.fake.pools.remove(self.pool)
        self.fake.generators_capturing.remove(self.device)
        self.nodes = self.stream.nodes
        if not self.nodes:
            warnings.warn("The CUDA Graph is empty. This usually means", UserWarning, stacklevel=2)

    def raw_cuda_graph(self):
        return self

    def instantiate(self):
        self.instantiated = True

    def reset(self):
        self.nodes = None

    def replay(self):
        assert self.instantiated
        for work in self.nodes:
            work()


class Driver:
    """As `cuda_graphs._Driver`."""

    def __init__(self, fake):
        self.fake = fake

    def num_nodes(self, graph):
        return len(graph.nodes)

    def capture_status(self, stream):
        return self.fake.streams[stream].status

    def exchange_capture(self, stream):
        assert self.fake.streams[stream].status == INVALIDATED
        self.fake.streams[stream].status, self.fake.streams[stream].nodes = ACTIVE, []


class Event:
    """As `torch.cuda.Event`; every two of them are 4 ms apart."""

    milliseconds = 4.0
    fake: FakeCuda

    def __init__(self, enable_timing=False):
        self.stream = None

    def record(self, stream=None):
        self.stream = stream or self.fake.current_stream()
        self.fake.log.append(f"record on {self.stream}")

    def synchronize(self):
        self.fake.log.append(f"wait for {self.stream}")

    def elapsed_time(self, end):
        assert self.stream is end.stream
        return self.milliseconds


def install(monkeypatch):
    """Put a stand-in in the place of torch.cuda and give it."""
    fake = FakeCuda()
    names = ("current_device", "set_device", "device", "current_stream", "set_stream", "stream", "synchronize")
    for name in (*names, "is_current_stream_capturing", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: fake.sync_mode)
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fake.log.append("empty cache"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (Graph,), {"fake": fake}))
    monkeypatch.setattr(torch.cuda, "Event", type("Event", (Event,), {"fake": fake}))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: fake.log.append("busy"), raising=False)
    monkeypatch.setattr(cuda_graphs, "_driver", lambda: Driver(fake))
    monkeypatch.setattr(cuda_graphs, "_capture_stream", functools.cache(cuda_graphs._capture_stream.__wrapped__))
    return fake
